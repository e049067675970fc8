"""A long run: random shapes and plans, launch after launch, with results checked on the GPU and memory watched.

python -m perf.soak                                    a million launches, about a minute
python -m perf.soak --seconds 3600 --seed 7            an hour

A launch is one call of mla_decode, eager or captured: two kernel launches.  A pool of small random problems is made, each with
two sets of lengths; the first result for each set is held to float64, and every later one has to repeat it bit for bit.

1. CUDA graphs, each over a few problems: the plans of all are updated, the problems decode in random order, then out and lse
   of each are poisoned, each decodes once more and is compared.  Mismatches are counted on the GPU: nothing waits for them.
2. Between replays: lengths change in place, in front of the graph that will plan for them; problems decode eagerly, some with a
   new plan, and are compared as well.
3. In the end every problem is held to float64 again.

Memory is measured after a warm-up that does all of this, and at the end.  No progress for 60 s ends the run: a hang.
Exit code 2: no Hopper GPU, nothing ran.  1: a wrong result, memory that grew, a hang or a lost GPU; stored all the same.
"""

import argparse
import faulthandler
import gc
import os
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from flashmla_cute import DecodePlan, heuristics
from flashmla_cute.kernels.config import TILE
from flashmla_cute.testing import Case, Errors, Problem

from . import card, report

RESULTS = Path(__file__).parent / "results"
LAUNCHES = 1_000_000
NUM_PROBLEMS = 200
TILES = 400  # KV tiles x row tiles of the largest problem: about 10 us on 132 SMs
LONGEST = 8192
GROUP = 8  # problems of a graph
GRAPH_ROUNDS = 16  # launches of each of them in a replay
BURST = 16  # the most launches of a problem in an eager turn
SWITCH, NEW_PLAN = 0.5, 0.2  # of the turns
WARM_TURNS = 200
SYNC_TURNS = 64  # turns that the host may be ahead of the GPU, each about 2 ms
HANG_S = 60.0
RSS_LIMIT_MB, GPU_LIMIT_MB = 32.0, 64.0  # a leak of 64 bytes a launch shows; allocators alone stay below
REPORT_S = 5.0
FIELDS = ("launches", "eager_launches", "graph_launches", "checked", "failures", "wrong", "worst_rel_err", "worst_lse_err")
FIELDS += ("rss_growth_mb", "gpu_growth_mb", "grew", "seconds", "shapes", "stopped")  # null where a run was stopped before
MAX_WRONG = 5  # named in the result, so that they can be made again


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    reason = card.why_unusable()
    if reason:
        print(f"perf.soak: {reason}", file=sys.stderr)
        return 2
    result = {**card.identity(), "clocks": {"before": card.clocks_now()}, "seed": options.seed, **dict.fromkeys(FIELDS)}
    path = report.new_path(options.out, f"{result['date']}-{card.slug(result['device'])}-soak")

    def stop(message: str):
        result["stopped"] = message
        report.write(path, result)
        print(f"perf.soak: {message}; stored in {path}", file=sys.stderr, flush=True)

    with Watchdog(stop) as watchdog:
        try:
            soak(options, result, watchdog)
        except RuntimeError as error:  # an illegal access or the like: nothing more can be asked of this GPU
            stop(f"{type(error).__name__}: {error}".split("\n")[0])
            return 1
    result["clocks"]["after"] = card.clocks_now()
    report.write(path, result)
    print(_summary(result))
    print(f"stored in {path}")
    return 1 if result["failures"] or result["grew"] else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--launches", type=int, help=f"to stop after; default: {LAUNCHES}, or no limit with --seconds")
    parser.add_argument("--seconds", type=float, help="to stop after, beside the seconds of the set-up")
    parser.add_argument("--problems", type=int, default=NUM_PROBLEMS, help="in the pool; default: %(default)s")
    parser.add_argument("--seed", type=int, help="of everything random; default: a new one, which is stored")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default: perf/results")
    options = parser.parse_args(argv)
    for name in ("launches", "seconds", "problems"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} is {value}; allowed: more than 0")
    options.seed = secrets.randbits(31) if options.seed is None else options.seed
    if options.seconds is None:
        options.seconds, options.launches = float("inf"), options.launches or LAUNCHES
    options.launches = options.launches or float("inf")
    return options


def _summary(result: dict) -> str:
    lines = [
        f"{result['launches']} launches in {result['seconds']:.1f} s, {result['eager_launches']} of them eager; "
        f"{result['checked']} results checked, {result['failures']} wrong, rel err at most {result['worst_rel_err']:.1e}",
        f"grew: RSS {result['rss_growth_mb']:.1f} MB, GPU {result['gpu_growth_mb']:.1f} MB; seed {result['seed']}",
        *result["wrong"],
    ]
    if result["grew"]:
        lines.append(f"memory grew by more than {RSS_LIMIT_MB:.0f} MB RSS or {GPU_LIMIT_MB:.0f} MB GPU: a leak")
    return "\n".join(lines)


# ---------------------------------------------------------------------- problems
def random_case(rng: random.Random) -> Case:
    """A small problem of one of eight kernel configurations: both dtypes, causal or not, flat or 16 heads of a row tile."""
    if rng.random() < 0.3:
        h_kv, h_q, s_q = 2, rng.choice((18, 24, 32)), rng.randint(2, 4)
    else:
        h_kv, h_q, s_q = 1, rng.choice((1, 8, 16, 20, 64, 128)), rng.randint(1, 4)
    batch = round(2 ** rng.uniform(0, 6))
    row_tiles = heuristics.row_tiles(heuristics.choose_head_tile(s_q, h_q, h_kv, True), s_q, h_q, h_kv)
    mean = TILE * TILES / row_tiles / batch * rng.random()
    length = lambda: 0 if rng.random() < 0.1 else min(LONGEST, 1 + int(mean * rng.expovariate(1)))
    return Case(
        lengths=tuple(length() for _ in range(batch)),
        h_q=h_q,
        h_kv=h_kv,
        s_q=s_q,
        causal=rng.random() < 0.5,
        dtype=rng.choice((torch.bfloat16, torch.float16)),
        seed=rng.randrange(2**31),
    )


def shorter(lengths: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(0, length) for length in lengths)


@dataclass(frozen=True)
class Known:
    """the first result for a set of lengths"""

    case: Case
    lengths: torch.Tensor  # [batch] int32
    out: torch.Tensor
    lse: torch.Tensor
    errors: Errors  # against float64


class Subject:
    """A problem that knows its results.  `mismatches`: a counter on the GPU, a view of one element."""

    def __init__(self, case: Case, rng: random.Random, mismatches: torch.Tensor, device: str = "cuda"):
        self.problem, self.mismatches = Problem.make(case, device), mismatches
        self.plan = self.problem.plan()
        self.known = [self._first_run(lengths) for lengths in (case.lengths, shorter(case.lengths, rng))]
        self.current = self.known[-1]
        self.out, self.lse = self.current.out.clone(), self.current.lse.clone()  # what is expected now

    def _first_run(self, lengths: tuple[int, ...]) -> Known:
        p = self.problem
        case, on_device = replace(p.case, lengths=lengths), torch.tensor(lengths, dtype=torch.int32, device=p.q.device)
        p.cache.cache_seqlens.copy_(on_device)
        self.plan.update()
        self.poison()
        out, lse = p.run(self.plan)
        return Known(case, on_device, out.clone(), lse.clone(), replace(p, case=case).errors(out, lse))

    def switch(self):
        """the other set of lengths, in place"""
        self.current = self.known[self.current is self.known[0]]
        self.problem.cache.cache_seqlens.copy_(self.current.lengths)
        self.out.copy_(self.current.out)
        self.lse.copy_(self.current.lse)

    def poison(self):
        self.problem.out.fill_(float("nan"))
        self.problem.lse.fill_(float("nan"))

    def compare(self):
        """bit for bit, without waiting: can be captured"""
        p = self.problem
        wrong = (p.out.view(torch.int16) != self.out.view(torch.int16)).any()
        self.mismatches.add_(wrong | (p.lse.view(torch.int32) != self.lse.view(torch.int32)).any())

    def decode(self, count: int, plan: DecodePlan | None = None):
        for _ in range(count):
            self.problem.run(plan or self.plan)

    def recheck(self) -> Errors:
        """a last run, against float64"""
        self.plan.update()
        self.poison()
        self.decode(1)
        return replace(self.problem, case=self.current.case).errors(self.problem.out, self.problem.lse)


def capture(group: list[Subject], rng: random.Random, pool) -> torch.cuda.CUDAGraph:
    """GRAPH_ROUNDS launches of each subject, of which the last is compared"""
    order = group * (GRAPH_ROUNDS - 1)
    rng.shuffle(order)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for subject in group:
            subject.plan.update()
        for subject in order:
            subject.decode(1)
        for subject in group:
            subject.poison()
        for subject in group:
            subject.decode(1)
        for subject in group:
            subject.compare()
    return graph


# ---------------------------------------------------------------------- the run
@dataclass
class Tally:
    eager_launches: int = 0
    graph_launches: int = 0
    checked: int = 0
    new_plans: int = 0
    switches: int = 0

    @property
    def launches(self) -> int:
        return self.eager_launches + self.graph_launches


@dataclass(frozen=True)
class Memory:
    rss_mb: float
    gpu_mb: float  # of the whole card, as the driver counts
    tensors_mb: float  # as torch counts

    @classmethod
    def now(cls) -> "Memory":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # (what the allocator keeps for later is not a leak)
        free, total = torch.cuda.mem_get_info()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        rss = pages * os.sysconf("SC_PAGE_SIZE")
        return cls(rss / 2**20, (total - free) / 2**20, torch.cuda.memory_allocated() / 2**20)


class Watchdog:
    """Ends the process when `beat` is not called for HANG_S: after `stop(message)` and a trace of where the host waits."""

    def __init__(self, stop: Callable[[str], None]):
        self._stop, self._done, self._last = stop, threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self):
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(
            1.5 * HANG_S, exit=True
        )  # where whoever hangs holds the GIL, no thread of Python runs

    def _watch(self):
        while not self._done.wait(min(1.0, HANG_S)):
            if time.monotonic() - self._last > HANG_S:
                self._stop(f"no progress for {HANG_S:.0f} s: a hang")
                faulthandler.dump_traceback()
                os._exit(1)


class Progress:
    """a line on stderr every REPORT_S"""

    def __init__(self, tally: Tally, mismatches: torch.Tensor):
        self.tally, self.mismatches, self._next = tally, mismatches, REPORT_S

    def report(self, seconds: float):
        if seconds >= self._next:
            wrong = int(self.mismatches.sum())
            print(f"{seconds:.0f} s: {self.tally.launches} launches, {wrong} wrong results", file=sys.stderr, flush=True)
            self._next = seconds + REPORT_S


def soak(options: argparse.Namespace, result: dict, watchdog: "Watchdog"):
    """fills in `result`"""
    rng, began = random.Random(options.seed), time.monotonic()
    mismatches = torch.zeros(options.problems, dtype=torch.int64, device="cuda")
    subjects = []
    for i in range(options.problems):
        subjects.append(Subject(random_case(rng), rng, mismatches[i]))
        watchdog.beat()
    groups = [subjects[i : i + GROUP] for i in range(0, len(subjects), GROUP)]
    pool = torch.cuda.graph_pool_handle()  # one for all: replays follow each other on one stream
    graphs = [capture(group, rng, pool) for group in groups]
    watchdog.beat()
    turns(groups, graphs, rng, Tally(), watchdog, lambda tally, done: done >= WARM_TURNS)
    before, tally, begin = Memory.now(), Tally(), time.monotonic()
    progress = Progress(tally, mismatches)
    result["setup_seconds"] = begin - began

    def enough(tally: Tally, done: int) -> bool:
        seconds = time.monotonic() - begin
        result.update(launches=tally.launches, seconds=seconds)  # (what a run that hangs leaves behind)
        if done % SYNC_TURNS == 0:
            progress.report(seconds)
        return tally.launches >= options.launches or seconds >= options.seconds

    turns(groups, graphs, rng, tally, watchdog, enough)
    result["seconds"] = time.monotonic() - begin
    after = Memory.now()
    last = [subject.recheck() for subject in subjects]
    tally.eager_launches += len(subjects)
    tally.checked += len(subjects)
    result.update(_outcome(subjects, last, mismatches.tolist()), **asdict(tally), launches=tally.launches)
    result.update(_growth(before, after))
    result["shapes"] = _shapes(subjects)


def turns(groups: list[list[Subject]], graphs: list, rng: random.Random, tally: Tally, watchdog: Watchdog, enough: Callable):
    """turn after turn until enough(tally, turns done); the host waits for the GPU every SYNC_TURNS"""
    done = 0
    while not enough(tally, done):
        at = rng.randrange(len(groups))
        _replay(groups[at], graphs[at], rng, tally)
        _burst(rng.choice(rng.choice(groups)), rng, tally)
        done += 1
        if done % SYNC_TURNS == 0:
            torch.cuda.synchronize()
            watchdog.beat()
    torch.cuda.synchronize()
    watchdog.beat()


def _replay(group: list[Subject], graph: torch.cuda.CUDAGraph, rng: random.Random, tally: Tally):
    _maybe_switch(rng.choice(group), rng, tally)
    graph.replay()
    tally.graph_launches += GRAPH_ROUNDS * len(group)
    tally.checked += len(group)


def _burst(subject: Subject, rng: random.Random, tally: Tally):
    """eager launches, of which the last is compared"""
    _maybe_switch(subject, rng, tally)
    plan, count = subject.plan, rng.randint(1, BURST)
    if rng.random() < NEW_PLAN:
        plan = subject.problem.plan()
        tally.new_plans += 1
    plan.update()
    subject.decode(count - 1, plan)
    subject.poison()
    subject.decode(1, plan)
    subject.compare()
    tally.eager_launches += count
    tally.checked += 1


def _maybe_switch(subject: Subject, rng: random.Random, tally: Tally):
    if rng.random() < SWITCH:
        subject.switch()
        tally.switches += 1


# ---------------------------------------------------------------------- what is stored
def _outcome(subjects: list[Subject], last: list[Errors], mismatches: list[int]) -> dict:
    wrong, failures, errors = [], sum(mismatches), []
    for subject, final, differ in zip(subjects, last, mismatches):
        if differ:
            wrong.append(f"{differ} results differ from the first one: {subject.problem.case}")
        against_float64 = [(known.case, known.errors) for known in subject.known] + [(subject.current.case, final)]
        for case, error in against_float64:
            errors.append(error)
            if not error.within(case.dtype):
                failures += 1
                wrong.append(f"{error}: {case}")
    worst = {"worst_rel_err": max(error.rel for error in errors), "worst_lse_err": max(error.lse for error in errors)}
    return {"failures": failures, "wrong": wrong[:MAX_WRONG], **worst}


def _growth(before: Memory, after: Memory) -> dict:
    rss, gpu = after.rss_mb - before.rss_mb, after.gpu_mb - before.gpu_mb
    return {
        "rss_growth_mb": rss,
        "gpu_growth_mb": gpu,
        "tensors_growth_mb": after.tensors_mb - before.tensors_mb,
        "rss_mb": after.rss_mb,
        "gpu_mb": after.gpu_mb,
        "grew": rss > RSS_LIMIT_MB or gpu > GPU_LIMIT_MB,
    }


def _shapes(subjects: list[Subject]) -> dict:
    """what the pool covers; its cases follow from the seed"""
    cases = [subject.problem.case for subject in subjects]
    lengths = [length for subject in subjects for known in subject.known for length in known.case.lengths]
    values = lambda name: sorted({getattr(case, name) for case in cases})
    return {
        "problems": len(cases),
        "length_sets": sum(len(subject.known) for subject in subjects),
        "batch": [min(len(case.lengths) for case in cases), max(len(case.lengths) for case in cases)],
        "s_q": values("s_q"),
        "h_q": values("h_q"),
        "h_kv": values("h_kv"),
        "causal": values("causal"),
        "dtypes": sorted({str(case.dtype).removeprefix("torch.") for case in cases}),
        "longest": max(lengths),
        "requests": len(lengths),
        "empty_requests": lengths.count(0),
    }


if __name__ == "__main__":
    sys.exit(main())
