"""Random problems from all axes (tests/axes.py) on a GPU, each against float64; the count and the worst error are stored.

python -m tests.fuzz --cases 10000                      a new seed; result in perf/results
python -m tests.fuzz --cases 10000 --seed 7 --workers 8

Several processes share the GPU: most problems are small, and the host is what takes time.  A problem that fails is named in the
result as the line that runs it again, after `from tests.axes import *`.  One that ends a process, or takes too long, is a
failure too, and another process goes on behind it.  Exit code 1: something failed; 2: no Hopper GPU.
"""

import argparse
import multiprocessing
import queue
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from flashmla_cute.testing import TOLERANCE, Errors
from perf import card, report

from .axes import AXES, Drawn

RESULTS = Path(__file__).parent.parent / "perf" / "results"
HANG_S = 120  # of a problem, its compile included
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


# ---------------------------------------------------------------------- one process
def _work(seed: int, indices: range, results):
    """sends (index, errors or None, reason) for each problem; ends at the first that leaves the GPU unusable"""
    import torch

    for index in indices:
        try:
            results.put((index, Drawn.of_seed(seed, index).run(), ""))
        except Exception as error:
            results.put((index, None, f"{type(error).__name__}: {error}".split("\n")[0]))
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                break
    results.close()
    results.join_thread()


class Worker:
    """a process that works through `indices`, and is replaced by another when it dies"""

    def __init__(self, seed: int, indices: range):
        self.seed, self.todo = seed, indices
        self._start()

    def _start(self):
        self.results = CONTEXT.Queue()
        self.process = CONTEXT.Process(target=_work, args=(self.seed, self.todo, self.results), daemon=True)
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
            tally.add(Drawn.of_seed(self.seed, index), errors, reason)

    def _replace(self, tally: Tally, reason: str):
        self.process.kill()
        self.process.join()
        tally.add(Drawn.of_seed(self.seed, self.todo[0]), None, reason)
        self.todo = self.todo[1:]
        if self.todo:
            self._start()


# ---------------------------------------------------------------------- the run
def run(cases: int, seed: int, workers: int) -> Tally:
    tally = Tally()
    crew = [Worker(seed, range(first, cases, workers)) for first in range(min(workers, cases))]
    told = time.monotonic()
    while any(worker.todo for worker in crew):
        for worker in crew:
            worker.collect(tally)
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            print(f"{tally.cases}/{cases}, {tally.failures} failed", file=sys.stderr, flush=True)
        time.sleep(0.01)
    for worker in crew:
        worker.process.join()
    return tally


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="of all problems; default: a new one, which is stored")
    parser.add_argument("--workers", type=int, default=6, help="processes that share the GPU; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default: perf/results")
    options = parser.parse_args(argv)
    reason = card.why_unusable()
    if reason:
        print(f"tests.fuzz: {reason}", file=sys.stderr)
        return 2
    identity, began = card.identity(), time.monotonic()
    seed = secrets.randbits(31) if options.seed is None else options.seed
    tally = run(options.cases, seed, options.workers)
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
