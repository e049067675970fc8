"""The benchmark: workloads x implementations -> checked, interleaved times, stored as JSON, and a table.

python -m perf.bench --workload core --workload latency --peers flashmla,fa3 --name dense
python -m perf.bench --workload quick --impl-only
python -m perf.bench --workload e4m3 --variants --peers flashmla_fp8 --name fp8-peers

Peers are found by environment variables (perf/peers/README.md); one that is not there is reported as absent.  Outside a
checkout FLASHMLA_CUTE_COMMIT says which commit is measured.  Exit code 2: no Hopper GPU, nothing was measured.  1: our own
kernel failed in a row, or the GPU was lost.
"""

import argparse
import secrets
import sys
import time
from pathlib import Path

import torch

from flashmla_cute import ceilings

from . import card, measure, ours, peers, report
from .workloads import WORKLOADS, rows

RESULTS = Path(__file__).parent / "results"
MIN_ROUNDS = 20


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    reason = card.why_unusable()
    if reason:
        print(f"perf.bench: {reason}", file=sys.stderr)
        return 2
    found, absent = peers.load(options.peers)
    variants = ours.VARIANTS if options.variants else {}
    implementations = {ours.NAME: ours.prepare, **variants, **{name: module.prepare for name, module in found.items()}}
    result, path = _header(options, absent)
    lost = None
    with card.Sampler() as sampler:
        began = time.monotonic()
        result["clocks"]["idle"] = _settled(sampler, began)
        result["ceilings"] = vars(ceilings.measure())
        result["clocks"]["ceilings"] = sampler.summary(began, time.monotonic())
        try:
            _measure_all(options, implementations, sampler, result, path)
        except measure.GpuLost as error:
            lost = f"stopped, the GPU is lost: {error}"
        result["clocks"]["during"] = during = sampler.summary(began, time.monotonic())
        result["clocks"]["after"] = _settled(sampler, time.monotonic())
        result["clocks"]["absent"] = sampler.absent
        result["throttle"] = during and during["reasons"]
        result["stopped"] = lost
        report.write(path, result)
    print(report.table(result))
    print(lost or f"stored in {path}")
    mine = [record for record in result["rows"] if record["impl"] == ours.NAME]
    return 1 if lost or any(record["error"] for record in mine) else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="repeatable; default: core")
    parser.add_argument("--peers", default=",".join(peers.NAMES), help="comma-separated; default: %(default)s")
    parser.add_argument("--impl-only", action="store_true", help="time only FlashMLA-CuTe")
    parser.add_argument("--variants", action="store_true", help="also e4m3 rows with one term of q, e4m3 q, and a bf16 cache")
    parser.add_argument("--rounds", type=int, default=30, help=f"replays of each graph, at least {MIN_ROUNDS}; default: 30")
    parser.add_argument("--seed", type=int, help="of the inputs; default: a new one, which is stored")
    parser.add_argument("--name", help="of the result; default: the workloads")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default: perf/results")
    options = parser.parse_args(argv)
    options.workload = options.workload or ["core"]
    options.peers = [] if options.impl_only else [name for name in options.peers.split(",") if name]
    unknown = [name for name in options.peers if name not in peers.NAMES]
    if unknown:
        parser.error(f"--peers: no such peer: {', '.join(unknown)}; there are {', '.join(peers.NAMES)}")
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds is {options.rounds}; fewer than {MIN_ROUNDS} give no spread")
    options.seed = secrets.randbits(31) if options.seed is None else options.seed
    options.name = options.name or "-".join(options.workload)
    return options


def _header(options: argparse.Namespace, absent: dict[str, str]) -> tuple[dict, Path]:
    """the result before anything is measured, and where it will be"""
    identity = card.identity()
    path = report.new_path(options.out, f"{identity['date']}-{card.slug(identity['device'])}-{options.name}")
    result = {
        **identity,
        "seed": options.seed,
        "clocks": {},
        "throttle": None,
        "ceilings": {},
        "absent": absent,
        "rows": [],
    }
    return result, path


def _settled(sampler: card.Sampler, since: float) -> dict | None:
    """clocks of the idle card: waits for a first sample, or until it is clear that there is none"""
    deadline = since + 3.0
    while sampler.absent is None and time.monotonic() < deadline and sampler.summary(since, time.monotonic()) is None:
        time.sleep(card.SAMPLE_S)
    return sampler.summary(since, time.monotonic())


def _measure_all(options: argparse.Namespace, implementations: dict, sampler: card.Sampler, result: dict, path: Path):
    """appends to result["rows"] and stores after every row"""
    todo = rows(options.workload)
    with report.progress(len(todo)) as step:
        for row, workloads in todo.items():
            step(str(row))
            try:
                measured = measure.measure_row(row, implementations, options.rounds, options.seed)
            except measure.GpuLost as error:
                raise measure.GpuLost(f"{row}: {error}") from error
            clocks = sampler.summary(measured.begin, measured.end)
            result["rows"] += report.records(measured, workloads, clocks)
            report.write(path, result)
            torch.cuda.empty_cache()  # (peers leave workspaces of gigabytes behind)


if __name__ == "__main__":
    sys.exit(main())
