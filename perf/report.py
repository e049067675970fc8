"""Stored results (JSON), the table at the end of a run, and progress on stderr."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import ours, roofline
from .measure import Measured, Outcome
from .workloads import Row


# ---------------------------------------------------------------------- rows
def records(measured: Measured, workloads: list[str], clocks: dict | None) -> list[dict]:
    """One JSON row per implementation.  Keys whose value is not known are there, as null, with `error` saying why."""
    timed = {name: outcome.timing.us for name, outcome in measured.outcomes.items() if outcome.timing}
    return [
        {
            "impl": name,
            "workloads": workloads,
            **_shape(measured.row),
            **_numbers(outcome.row or measured.row, outcome),
            "note": outcome.note,
            "speedup_over": _speedups(timed) if name == ours.NAME else None,
            "copies": measured.copies,
            "launches": measured.launches,
            "clocks": clocks,
        }
        for name, outcome in measured.outcomes.items()
    ]


def _shape(row: Row) -> dict:
    return {
        "b": row.b,
        "s_q": row.s_q,
        "h_q": row.h_q,
        "h_kv": row.h_kv,
        "s_k": max(row.lengths),
        "tokens": row.tokens,
        "latent": roofline.LATENT,
        "rope": roofline.ROPE,
        "dtype": row.dtype,
        "page": row.page,
        "causal": row.causal,
        "varlen": row.varlen,
    }


def _numbers(row: Row, outcome: Outcome) -> dict:
    time, check = outcome.timing, outcome.check
    return {
        "us": time and time.us,
        "us_spread": time and [time.low, time.high],
        "rounds": time and time.rounds,
        "tflops": time and roofline.tflops(row, time.us),
        "gbps": time and roofline.gbps(row, time.us),
        "rel_err": check and check.rel_err,
        "lse_err": check and check.lse_err,
        "schedule_us": outcome.schedule_us,
        "error": outcome.error,
        "schedule_error": outcome.schedule_error,
    }


def _speedups(timed: dict[str, float]) -> dict[str, float]:
    """peer's time / ours"""
    mine = timed.get(ours.NAME)
    return {name: us / mine for name, us in timed.items() if name != ours.NAME} if mine else {}


# ---------------------------------------------------------------------- file
def new_path(folder: Path, stem: str) -> Path:
    """results are only ever added: a second run of a day gets -2"""
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def write(path: Path, result: dict):
    """whole or not at all; called after every row, so that a run that dies keeps what it had.  NaN and infinity (of a wrong
    result) are not JSON: they become strings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump(_finite(result), file, indent=1, allow_nan=False)
        file.write("\n")
    os.chmod(scratch, 0o644)
    os.replace(scratch, path)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    return value


# ---------------------------------------------------------------------- table
def table(result: dict) -> str:
    """one line per row: our time, each peer's with its time / ours, and how close we are to the ceilings"""
    rows = by_shape(result["rows"])
    peers = list(dict.fromkeys(record["impl"] for record in result["rows"] if record["impl"] != ours.NAME))
    head = f"{'b':>4} {'s_q':>3} {'h':>4} {'s_k':>7} {'us':>9} " + "".join(f"{peer:>17} " for peer in peers)
    lines = [head + f"{'TFLOP/s':>8} {'GB/s':>6} {'% matmul':>8} {'% stream':>8} {'rel err':>8} {'sched us':>8}"]
    for by_name in rows:
        shape, mine = next(iter(by_name.values())), by_name.get(ours.NAME, {})
        spread = "~" if shape["varlen"] else ""
        line = f"{shape['b']:>4} {shape['s_q']:>3} {shape['h_q']:>4} {spread + str(shape['s_k']):>7} {_us(mine):>9} "
        line += "".join(f"{_against(by_name.get(peer, {}), mine):>17} " for peer in peers)
        lines.append(line + _achieved(mine, result["ceilings"]))
    notes = [f"{name} is absent: {reason}" for name, reason in result["absent"].items()]
    for record in result["rows"]:
        for key in ("error", "schedule_error"):
            if record[key]:
                where = f"b{record['b']} s_q{record['s_q']} h{record['h_q']} s_k{record['s_k']}"
                notes.append(f"{record['impl']}, {where}, {key.replace('_', ' ')}: {record[key]}")
    return "\n".join([*lines, *notes])


def by_shape(rows: Iterable[dict]) -> list[dict[str, dict]]:
    """records of one shape together, by implementation"""
    groups: dict[tuple, dict[str, dict]] = {}
    for record in rows:
        key = tuple(record[name] for name in ("b", "s_q", "h_q", "h_kv", "s_k", "tokens", "dtype", "causal"))
        groups.setdefault(key, {})[record["impl"]] = record
    return list(groups.values())


def _us(record: dict) -> str:
    if not record:
        return "-"
    if record["us"] is None:
        return "refused" if record["error"].startswith("refused") else "failed"
    return f"{record['us']:.1f}"


def _against(record: dict, mine: dict) -> str:
    ratio = f" {record['us'] / mine['us']:.2f}x" if record.get("us") and mine.get("us") else ""
    return _us(record) + ratio


def _achieved(mine: dict, ceilings: dict) -> str:
    if not mine.get("us"):
        return ""
    schedule = f"{mine['schedule_us']:.1f}" if mine["schedule_us"] is not None else "-"
    of_matmul, of_stream = mine["tflops"] / ceilings["matmul_tflops"], mine["gbps"] / ceilings["stream_gbps"]
    return (
        f"{mine['tflops']:>8.0f} {mine['gbps']:>6.0f} {of_matmul:>8.0%} {of_stream:>8.0%} {mine['rel_err']:>8.1e} {schedule:>8}"
    )


# ---------------------------------------------------------------------- progress
@contextlib.contextmanager
def progress(total: int) -> Iterator:
    """yields step(text): the row about to be measured.  A bar where rich is installed and stderr is a terminal, else lines."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        rich_console = None
    else:
        rich_console = Console(stderr=True)
    if rich_console is None or not sys.stderr.isatty():
        done = iter(range(1, total + 1))
        yield lambda text: print(f"[{next(done)}/{total}] {text}", file=sys.stderr, flush=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=rich_console) as bar:
        task = bar.add_task("", total=total)

        def step(text: str):
            started = bar.tasks[0].description
            bar.update(task, description=text, advance=1 if started else 0)

        yield step
        bar.update(task, completed=total)
