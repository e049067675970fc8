"""What batch_invariant=True costs: the same decode calls with the default plan and with batch-invariant ones, in turns.

python -m perf.invariance                               15 s; result in perf/results

Each plan's result is checked against float64 before it is timed, by the protocol of perf/timing.py.  Beside the default of
batch_invariant=True there are plans of at most two and at most four pieces a request, for deployments that know their batches.
Exit code 2: no Hopper GPU, nothing was measured.  1: a row failed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from flashmla_cute.kernels.config import BATCH_INVARIANT, MAX_PIECE_GAIN, ScheduleConfig

from . import card, measure, ours, report
from .workloads import LogNormal, Row

RESULTS = Path(__file__).parent / "results"
ROUNDS = 20
DEFAULT, INVARIANT = "default", "batch_invariant"
PLANS = {DEFAULT: {}, INVARIANT: dict(batch_invariant=True, config=BATCH_INVARIANT)}
PLANS |= {
    f"{INVARIANT}, {pieces} pieces": dict(
        batch_invariant=True, config=ScheduleConfig(max_pieces=pieces, piece_gain=MAX_PIECE_GAIN)
    )
    for pieces in (2, 4)
}
ROWS = (
    Row(1, 128, 4096, "one request: what the pieces do for latency"),
    Row(16, 128, 4096, "few requests, two row tiles: pieces have to fill the card"),
    Row(16, 128, 8192, "the same, longer"),
    Row(16, 16, 4096, "one row tile"),
    Row(32, 128, 8192, "between latency and throughput"),
    Row(32, 16, 2048, "short requests with two query tokens", s_q=2),
    Row(64, 128, 8192, "one request for each pair of SMs"),
    Row(64, 16, 4096, "half the SMs"),
    Row(128, 128, 4096, "two requests for each pair of SMs: pieces are pure cost"),
    Row(128, 128, 8192, "FlashMLA's headline shape"),
    Row(128, 128, 32768, "steady state"),
    Row(128, 128, 8192, "compute-bound", s_q=2),
    Row(128, 64, 8192, "one full row tile"),
    Row(128, 16, 8192, "memory-bound"),
    Row(128, 16, LogNormal(2048, 65536), "a server's mixture of lengths"),
    Row(128, 128, LogNormal(2048, 65536), "the same with two row tiles a request"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.invariance", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the inputs; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default: perf/results")
    options = parser.parse_args(argv)
    reason = card.why_unusable()
    if reason:
        print(f"perf.invariance: {reason}", file=sys.stderr)
        return 2
    result = {**card.identity(), "seed": options.seed, "rounds": ROUNDS, "plans": {}, "clocks": {}, "rows": []}
    result["plans"] = {name: str(plan.get("config")) for name, plan in PLANS.items()}
    path = report.new_path(options.out, f"{result['date']}-{card.slug(result['device'])}-invariance")
    with card.Sampler() as sampler:
        began = time.monotonic()
        for row in ROWS:
            result["rows"].append(_measure(row, options.seed))
            print(_line(result["rows"][-1]), flush=True)
            report.write(path, result)
            torch.cuda.empty_cache()
        result["clocks"] = sampler.summary(began, time.monotonic())
        report.write(path, result)
    print(f"stored in {path}")
    return 1 if any(row["errors"] for row in result["rows"]) else 0


def _measure(row: Row, seed: int) -> dict:
    """one row of the result: us and cost, the time over the default's, of each plan"""
    prepared = {name: lambda problem, plan=plan: ours.Ours(problem, **plan) for name, plan in PLANS.items()}
    outcomes = measure.measure_row(row, prepared, ROUNDS, seed).outcomes
    us = {name: outcome.timing and outcome.timing.us for name, outcome in outcomes.items()}
    spread = {name: outcome.timing and [outcome.timing.low, outcome.timing.high] for name, outcome in outcomes.items()}
    return {
        "row": str(row),
        "why": row.why,
        **{name: getattr(row, name) for name in ("b", "s_q", "h_q", "tokens", "varlen")},
        "us": us,
        "us_spread": spread,
        "cost": {name: time / us[DEFAULT] if time and us[DEFAULT] else None for name, time in us.items()},
        "rel_err": {name: outcome.check and outcome.check.rel_err for name, outcome in outcomes.items()},
        "errors": {name: outcome.error for name, outcome in outcomes.items() if outcome.error},
    }


def _line(row: dict) -> str:
    times = [f"{name} {row['us'][name]:.1f} us ({row['cost'][name]:.3f})" for name in PLANS if row["cost"][name]]
    return f"{row['row']:42} {', '.join(times)} {'; '.join(row['errors'].values())}"


if __name__ == "__main__":
    sys.exit(main())
