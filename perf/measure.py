"""One row: inputs, then for each implementation a captured graph, its check against float64, and only then its time."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import roofline, timing
from .peers import Refused
from .problem import Check, Expected, Problem
from .timing import Timing
from .workloads import Row

Prepare = Callable[[Problem], object]  # -> what perf/peers/__init__.py describes
WITH_SCHEDULE = " + schedule"  # of the name of a graph that also makes the schedule
SCHEDULE_LAUNCHES = 20


class GpuLost(Exception):
    """an illegal access or the like has ended the CUDA context: no later number of this process would mean anything"""


@dataclass
class Outcome:
    """what one implementation did with one row; `error` says why something is missing"""

    check: Check | None = None
    timing: Timing | None = None
    schedule_us: float | None = None
    error: str | None = None
    schedule_error: str | None = None
    row: Row | None = None  # what it decoded, where that is not the row itself: another type of cache
    note: str | None = None


@dataclass
class Measured:
    row: Row
    copies: int
    launches: int  # in a graph
    outcomes: dict[str, Outcome]
    begin: float  # of the timing, time.monotonic(), to look clocks up by
    end: float


def measure_row(row: Row, implementations: dict[str, Prepare], rounds: int, seed: int) -> Measured:
    """Raises GpuLost; everything else that goes wrong is noted in the outcomes of those it happened to."""
    copies = timing.num_copies(roofline.kv_bytes(row))
    launches = timing.num_launches(copies, roofline.expected_us(row))
    outcomes = {name: Outcome() for name in implementations}
    begin = time.monotonic()
    try:
        problem = Problem.make(row, copies, seed)
        expected = problem.expected(copies - 1)  # launches are whole rotations: the last one uses the last pool
        ready, graphs = _make_ready(problem, expected, implementations, launches, outcomes)
        begin = time.monotonic()
        if graphs:
            _time(ready, graphs, launches, rounds, outcomes)
    except Exception as error:  # mostly out of memory: this row cannot be measured, the others can
        reason = _describe(error)
        for outcome in outcomes.values():
            outcome.error = outcome.error or reason
            outcome.timing = None
    return Measured(row, copies, launches, outcomes, begin, time.monotonic())


def _make_ready(problem: Problem, expected: Expected, implementations: dict[str, Prepare], launches: int, outcomes: dict):
    """-> name -> implementation, and name -> graph of those whose results are right"""
    ready, graphs = {}, {}
    for name, prepare in implementations.items():
        outcome = outcomes[name]
        try:
            ready[name] = prepare(problem)
            own = ready[name].problem
            outcome.row, outcome.note = own.row, getattr(ready[name], "note", None)
            graph = _capture(ready[name].launch, own, launches)
            right = expected if own is problem else own.expected(len(own.pools) - 1)
            outcome.check = _check(graph, ready[name], right, own.row.dtype)
            outcome.error = outcome.check.failure
        except Refused as reason:
            outcome.error = f"refused: {reason}"
        except Exception as error:  # of a peer, or ours: the others are still measured
            outcome.error = _describe(error)
        if outcome.error is None:
            graphs[name] = graph
    return ready, graphs


def _capture(launch: Callable, problem: Problem, launches: int) -> torch.cuda.CUDAGraph:
    for pool in (problem.pools[0], problem.pools[-1]):  # compiles, loads modules, fills caches: none of it may be captured
        launch(pool)
    torch.cuda.synchronize()
    return timing.capture(lambda copy: launch(problem.pools[copy]), len(problem.pools), launches)


def _check(graph: torch.cuda.CUDAGraph, implementation, expected: Expected, dtype: str) -> Check:
    """of what the graph writes, since that is what is timed; its outputs are poisoned first"""
    out, lse = implementation.result()
    for tensor in (out, lse):
        if tensor is not None:
            tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return expected.check(out, lse, dtype, getattr(implementation, "tolerance", None))


def _describe(error: Exception) -> str:
    """`error` in a line, if the GPU still works"""
    text = f"{type(error).__name__}: {error}".strip().split("\n")[0]  # (torch appends hints and stack traces)
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise GpuLost(text) from lost
    return text


def _time(ready: dict, graphs: dict, launches: int, rounds: int, outcomes: dict[str, Outcome]):
    """fills in timing and schedule_us of the implementations that have a graph"""
    together = dict(graphs)
    for name in graphs:
        if ready[name].launch_with_schedule is not None:
            with _noting(outcomes[name]):
                together[name + WITH_SCHEDULE] = _capture(ready[name].launch_with_schedule, ready[name].problem, launches)
    timings = timing.interleave(together, launches, rounds)
    for name in graphs:
        outcomes[name].timing = timings[name]
        if name + WITH_SCHEDULE in timings:
            outcomes[name].schedule_us = _difference(timings[name + WITH_SCHEDULE], timings[name])
    alone = {}
    for name in graphs:
        if ready[name].schedule is not None:
            with _noting(outcomes[name]):
                ready[name].schedule()
                torch.cuda.synchronize()
                alone[name] = timing.capture(lambda _, name=name: ready[name].schedule(), 1, SCHEDULE_LAUNCHES)
    if alone:
        for name, result in timing.interleave(alone, SCHEDULE_LAUNCHES, rounds).items():
            outcomes[name].schedule_us = result.us


def _difference(more: Timing, less: Timing) -> float | None:
    """None where the spread of the two hides it"""
    return more.us - less.us if more.low > less.high else None


@contextlib.contextmanager
def _noting(outcome: Outcome) -> Iterator[None]:
    """an exception of a schedule is the outcome's schedule_error: the decode call itself is still timed"""
    try:
        yield
    except Exception as error:
        outcome.schedule_error = _describe(error)
