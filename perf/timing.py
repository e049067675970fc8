"""The one timing protocol.

1. Cold cache: the launches rotate over copies of the KV pool, two or more, that exceed 400 MB together, eight times the L2.
2. One CUDA graph per implementation with the same number of launches, whole rotations, so that no host time is measured and
   consecutive launches overlap the way they do in a captured model.
3. Warm-up, then the graphs take turns, one replay each, in an order that rotates; nothing waits for the host in between.
   Near the power cap a card's clock follows the last milliseconds: only implementations that share them can be compared.
4. CUDA events around each replay; median over the rounds, and the 10th to 90th percentile as the spread.
"""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

COLD_BYTES = 400e6
MIN_COPIES = 2  # a launch never follows one on the same pool
GRAPH_US = 1000.0  # a graph holds this much work, or MIN_LAUNCHES
MIN_LAUNCHES = 20
WARM_UP_S = 0.2  # for all implementations together
BUDGET_S = 1.5  # of one implementation in one row
FEWEST = 3  # replays of an implementation too slow for the budget


@dataclass(frozen=True)
class Timing:
    us: float  # per launch, median
    low: float  # 10th percentile
    high: float  # 90th percentile
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def num_copies(kv_bytes: int) -> int:
    """pools to rotate over"""
    return max(MIN_COPIES, math.ceil(COLD_BYTES / kv_bytes))


def num_launches(copies: int, expected_us: float) -> int:
    """launches in a graph: whole rotations, at least GRAPH_US of work or MIN_LAUNCHES, whichever is less"""
    wanted = min(GRAPH_US / expected_us, MIN_LAUNCHES)
    return copies * max(1, math.ceil(wanted / copies))


def capture(launch: Callable[[int], object], copies: int, launches: int) -> torch.cuda.CUDAGraph:
    """`launches` calls of launch(copy), copy = 0, 1, .. in rotation.  Whatever the launch raises while captured is raised."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i % copies)
    return graph


def interleave(graphs: dict[str, torch.cuda.CUDAGraph], launches: int, rounds: int) -> dict[str, Timing]:
    """`rounds` replays of each graph in turns.  One that would exceed BUDGET_S takes fewer turns, spread over the first
    rounds; its Timing says how many."""
    cost_s = {name: _replay_ms(graph, 2) / 1e3 for name, graph in graphs.items()}
    turns = {name: min(rounds, max(FEWEST, int(BUDGET_S / cost))) for name, cost in cost_s.items()}
    for _ in range(max(1, int(WARM_UP_S / sum(cost_s.values())))):
        for graph in graphs.values():
            graph.replay()
    events = {name: [] for name in graphs}
    names = list(graphs)
    for i in range(max(turns.values())):
        for name in itertools.islice(itertools.cycle(names), i % len(names), i % len(names) + len(names)):
            if i < turns[name]:
                events[name].append(_timed_replay(graphs[name]))
    torch.cuda.synchronize()
    us = {name: [1e3 * start.elapsed_time(end) / launches for start, end in pairs] for name, pairs in events.items()}
    return {name: Timing.of(samples) for name, samples in us.items()}


def _timed_replay(graph: torch.cuda.CUDAGraph) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    return start, end


def _replay_ms(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """the last of `count` replays: the first one uploads the graph"""
    pairs = [_timed_replay(graph) for _ in range(count)]
    torch.cuda.synchronize()
    start, end = pairs[-1]
    return start.elapsed_time(end)
