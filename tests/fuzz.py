"""Random problems from all axes (tests/axes.py) on a GPU, each against float64; the count and the worst error are stored.

python -m tests.fuzz --cases 10000                      a new seed; result in perf/results
python -m tests.fuzz --cases 10000 --seed 7 --workers 8
python -m tests.fuzz --seed 7 --compile                 only compiles what that run needs, without a GPU

Several processes share the GPU: most problems are small, and the host is what takes time.  A problem that fails is named in the
result as the line that runs it again, after `from tests.axes import *`.  One that ends a process, or takes too long, is a
failure too, and another process goes on behind it.  Exit code 1: something failed; 2: no Hopper GPU.
"""

import argparse
import contextlib
import multiprocessing
import queue
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from flashmla_cute import checks, compile, plan, workers
from flashmla_cute.testing import TOLERANCE, Errors
from perf import card, report

from .axes import AXES, Drawn

RESULTS = Path(__file__).parent.parent / "perf" / "results"
HANG_S = 120  # of a problem, its compile included
SMS = 132  # of the card, where there is none to ask
UNUSABLE = 3  # exit code of a process that a problem has left without a GPU
TELL_S = 10  # between two lines of progress
MAX_NAMED = 20  # failures that the result names
CONTEXT = multiprocessing.get_context("spawn")  # (CUDA does not survive a fork)


@dataclass
class Tally:
    """what all workers have found"""

    cases: int = 0
    failures: int = 0
    rel: dict[str, float] = field(default_factory=dict)  # by dtype
    lse: float = 0.0
    failed: list[dict] = field(default_factory=list)

    def add(self, drawn: Drawn, errors: Errors | None, reason: str):
        """errors: None where there is no result"""
        self.cases += 1
        if errors is not None and not errors.within(drawn.case.dtype):
            reason = errors.where or f"rel {errors.rel:.2e}, lse {errors.lse:.2e}"
        if reason:
            self.failures += 1
            if len(self.failed) < MAX_NAMED:
                self.failed.append({"case": str(drawn), "reason": reason})
        if errors is not None and not errors.where:
            name = str(drawn.case.dtype).removeprefix("torch.")
            self.rel[name] = max(self.rel.get(name, 0.0), errors.rel)
            self.lse = max(self.lse, errors.lse)


# ---------------------------------------------------------------------- kernels
def needed_kernels(seed: int, kernels: int) -> list[tuple[type, object]]:
    """(op, config) of all that a run launches: what its first problems ask for, on the CPU and without being launched"""
    found = {}

    def collect(op_class, config):
        found[op_class, config] = None
        return lambda *_: None

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(checks, "is_hopper", lambda name, tensor: None))
        patches.enter_context(mock.patch.object(plan, "num_sms", lambda index: SMS))
        patches.enter_context(mock.patch.object(compile, "get", collect))
        for index in range(kernels):
            Drawn.of_seed(seed, index, kernels, tokens=64).launch("cpu")
    return list(found)


def compile_kernels(seed: int, kernels: int):
    """into the disk cache, in parallel"""
    missing = [pair for pair in needed_kernels(seed, kernels) if not compile.is_cached(*pair)]
    if missing:
        workers.run(compile._fill_cache, missing, f"compiling {len(missing)} kernels for {compile.ARCH}")


# ---------------------------------------------------------------------- one process
def _work(seed: int, kernels: int, indices: range, results):
    """sends (index, errors or None, reason) for each problem; ends at the first that leaves the GPU unusable"""
    import torch

    status = 0
    for index in indices:
        try:
            results.put((index, Drawn.of_seed(seed, index, kernels).run(), ""))
        except Exception as error:
            results.put((index, None, f"{type(error).__name__}: {error}".split("\n")[0]))
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                status = UNUSABLE
                break
    results.close()
    results.join_thread()
    sys.exit(status)


class Worker:
    """a process that works through `indices`, and is replaced by another when it dies"""

    def __init__(self, seed: int, kernels: int, indices: range):
        self.seed, self.kernels, self.todo = seed, kernels, indices
        self._start()

    def _start(self):
        self.results = CONTEXT.Queue()
        self.process = CONTEXT.Process(target=_work, args=(self.seed, self.kernels, self.todo, self.results), daemon=True)
        self.process.start()
        self.heard = time.monotonic()

    def collect(self, tally: Tally):
        """what has come since the last call"""
        while self.todo:
            dead = not self.process.is_alive()  # (asked first: what a process sent before its end is read below)
            try:
                index, errors, reason = self.results.get(timeout=0.2 if dead else 0.0)
            except queue.Empty:
                slow = time.monotonic() - self.heard > HANG_S
                if dead or slow:
                    self._replace(tally, f"no result after {HANG_S} s" if slow else f"exit code {self.process.exitcode}")
                return
            self.heard, self.todo = time.monotonic(), range(index + self.todo.step, self.todo.stop, self.todo.step)
            tally.add(self._drawn(index), errors, reason)

    def _drawn(self, index: int) -> Drawn:
        return Drawn.of_seed(self.seed, index, self.kernels)

    def _replace(self, tally: Tally, reason: str):
        self.process.kill()
        self.process.join()
        if self.process.exitcode != UNUSABLE:  # (else what did it has been counted)
            tally.add(self._drawn(self.todo[0]), None, reason)
            self.todo = self.todo[1:]
        if self.todo:
            self._start()


# ---------------------------------------------------------------------- the run
def run(cases: int, seed: int, kernels: int, num_workers: int, seconds: float = float("inf")) -> Tally:
    """`cases` problems, or as many as fit into `seconds`"""
    tally, end = Tally(), time.monotonic() + seconds
    crew = [Worker(seed, kernels, range(first, cases, num_workers)) for first in range(min(num_workers, cases))]
    told = time.monotonic()
    while any(worker.todo for worker in crew):
        for worker in crew:
            worker.collect(tally)
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            print(f"{tally.cases}/{cases}, {tally.failures} failed", file=sys.stderr, flush=True)
        if time.monotonic() > end:
            for worker in crew:
                worker.process.kill()
            break
        time.sleep(0.01)
    for worker in crew:
        worker.process.join()
    return tally


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="of all problems; default: a new one, which is stored")
    parser.add_argument("--kernels", type=int, default=100, help="values of what is compiled; default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="only compile them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop earlier after so long; default: never")
    parser.add_argument("--workers", type=int, default=6, help="processes that share the GPU; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default: perf/results")
    options = parser.parse_args(argv)
    seed = secrets.randbits(31) if options.seed is None else options.seed
    if options.compile:
        compile_kernels(seed, options.kernels)
        return 0
    reason = card.why_unusable()
    if reason:
        print(f"tests.fuzz: {reason}", file=sys.stderr)
        return 2
    compile_kernels(seed, options.kernels)
    identity, began = card.identity(), time.monotonic()
    tally = run(options.cases, seed, options.kernels, options.workers, options.seconds)
    result = {
        **identity,
        "cases": tally.cases,
        "failures": tally.failures,
        "worst_rel_err": max(tally.rel.values(), default=None),
        "seed": seed,
        "worst_rel_err_of": tally.rel,
        "tolerance_of": {str(dtype).removeprefix("torch."): rel for dtype, (rel, _) in TOLERANCE.items()},
        "worst_lse_err": tally.lse,
        "axes": list(AXES),
        "kernels": options.kernels,
        "seconds": round(time.monotonic() - began, 1),
        "failed": tally.failed,
    }
    path = report.new_path(options.out, f"{identity['date']}-{card.slug(identity['device'])}-fuzz")
    report.write(path, result)
    for failure in tally.failed:
        print(f"{failure['reason']}\n  {failure['case']}")
    print(f"{tally.cases} cases, {tally.failures} failures, worst {tally.rel}, {result['seconds']} s; stored in {path}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
