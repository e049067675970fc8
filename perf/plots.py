"""Pictures of a stored run.

python -m perf.plots perf/results/FILE.json --out DIR

table.md      the rows as a Markdown table
relative.png  time of every implementation over ours, row by row
roofline.png  TFLOP/s and GB/s against query rows per cached token, with the ceilings that the same run measured
speedup.png   each peer's time over ours, by number of requests
"""

import argparse
import json
import sys
from pathlib import Path

from . import ours, report
from .roofline import ITEMSIZE, LATENT, ROPE

COLOURS = {ours.NAME: "#0b6e4f", "flashmla": "#c8553d", "fa3": "#3d5a98", "triton_mla": "#b58900", "sdpa": "#8d8d8d"}
MARKERS = {16: "o", 32: "v", 64: "s", 96: "^", 128: "D"}  # by query heads
FLOPS_PER_BYTE = 2 * (2 * LATENT + ROPE) / ((LATENT + ROPE) * ITEMSIZE)  # of one query row: the slope of the roof


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.plots", description="pictures of a stored run")
    parser.add_argument("file", type=Path, help="a result of perf.bench")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    options = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        print("perf.plots: needs matplotlib: pip install 'flashmla-cute[plots]'", file=sys.stderr)
        return 2
    matplotlib.use("Agg")  # (files only: no display is asked for)
    result = json.loads(options.file.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(table(result))
    print(options.out / "table.md")
    for name, draw in (("roofline", roofline), ("speedup", speedup), ("relative", relative)):
        figure = draw(result)
        path = options.out / f"{name}.png"
        figure.savefig(path, dpi=160, bbox_inches="tight")
        print(path)
    return 0


def roofline(result: dict):
    """two panels over query rows per cached token, every timed row a point"""
    import matplotlib.pyplot as plt

    figure, (compute, memory) = plt.subplots(1, 2, figsize=(12, 4.6))
    ceilings = result["ceilings"]
    for record in _timed(result):
        style = dict(color=COLOURS.get(record["impl"], "black"), marker=_marker(record), linestyle="none", markersize=6)
        style |= dict(fillstyle="full" if record["b"] >= 64 else "none", label=record["impl"])
        compute.plot(_rows_per_token(record), record["tflops"], **style)
        memory.plot(_rows_per_token(record), record["gbps"], **style)
    rows = [2 ** (i / 8) for i in range(8 * 2, 8 * 10 + 1)]
    roof = [min(ceilings["matmul_tflops"], ceilings["stream_gbps"] * FLOPS_PER_BYTE * n / 1e3) for n in rows]
    compute.plot(rows, roof, color="black", linewidth=1, label="read stream, then matmul")
    memory.plot(rows, [1e3 * t / FLOPS_PER_BYTE / n for n, t in zip(rows, roof)], color="black", linewidth=1)
    compute.set(ylabel="TFLOP/s", yscale="log")
    memory.set(ylabel="GB/s", ylim=(0, 1.1 * ceilings["stream_gbps"]))
    for axes in (compute, memory):
        _powers_of_two(axes)
        axes.set_xlabel("query rows per cached token  (s_q * h_q / h_kv)")
        axes.grid(alpha=0.3)
    _legend(compute)
    figure.suptitle(f"{_title(result)}   (filled: 64 requests and more)")
    return figure


def speedup(result: dict):
    """peer's time / ours, a panel per peer; marker by heads, filled where there is one query token"""
    import matplotlib.pyplot as plt

    mine = [record for record in _timed(result) if record["impl"] == ours.NAME]
    peers = list(dict.fromkeys(peer for record in mine for peer in record["speedup_over"]))
    figure, panels = plt.subplots(1, max(1, len(peers)), figsize=(5.2 * max(1, len(peers)), 4.4), squeeze=False)
    for axes, peer in zip(panels[0], peers):
        for record in mine:
            if peer in record["speedup_over"]:
                axes.plot(
                    record["b"],
                    record["speedup_over"][peer],
                    color=COLOURS.get(peer, "black"),
                    marker=_marker(record),
                    fillstyle="full" if record["s_q"] == 1 else "none",
                    linestyle="none",
                    label=f"h{record['h_q']}",
                )
        axes.axhline(1.0, color="black", linewidth=1)
        _powers_of_two(axes)
        axes.set(xlabel="requests", ylabel=f"time of {peer} / time of {ours.NAME}", title=peer)
        axes.grid(alpha=0.3)
        _legend(axes)
    if not peers:
        panels[0][0].text(0.5, 0.5, "no peer was timed in this run", ha="center")
    figure.suptitle(f"{_title(result)}   (filled: one query token)", y=1.02)
    return figure


def relative(result: dict):
    """a group of bars for each row that we have timed: every implementation's time / ours"""
    import matplotlib.pyplot as plt

    groups = [group for group in report.by_shape(result["rows"]) if group.get(ours.NAME, {}).get("us")]
    names = _implementations(result)
    figure, axes = plt.subplots(figsize=(max(6, 1.7 * len(groups) + 2), 4.4))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        us = [(at + i * width, group.get(name, {}).get("us"), group[ours.NAME]["us"]) for at, group in enumerate(groups)]
        timed = [(x, theirs / mine) for x, theirs, mine in us if theirs]
        bars = axes.bar(*zip(*timed), width, color=COLOURS.get(name), label=name) if timed else ()
        if i > 0 and timed:
            axes.bar_label(bars, fmt=lambda ratio: f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", fontsize=7)
    labels = [f"b{r['b']} s_q{r['s_q']}\nh{r['h_q']} s_k{r['s_k']}" for r in (group[ours.NAME] for group in groups)]
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(groups))], labels, fontsize=8)
    axes.set(yscale="log", ylabel=f"time / time of {ours.NAME}")
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.legend(fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.suptitle(_title(result), y=1.02)
    return figure


def table(result: dict) -> str:
    """Markdown"""
    peers = _implementations(result)[1:]
    lines = [
        "| requests | query tokens | heads | cached tokens | us | "
        + " | ".join(f"{p} / ours" for p in peers)
        + " | TFLOP/s | GB/s |"
    ]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for group in report.by_shape(result["rows"]):
        mine = group.get(ours.NAME)
        if mine and mine["us"]:
            ratios = [f"{group[peer]['us'] / mine['us']:.2f}" if group.get(peer, {}).get("us") else "-" for peer in peers]
            cells = (mine["b"], mine["s_q"], mine["h_q"], mine["s_k"], f"{mine['us']:.1f}", *ratios)
            lines.append("| " + " | ".join(map(str, (*cells, f"{mine['tflops']:.0f}", f"{mine['gbps']:.0f}"))) + " |")
    return "\n".join(lines) + "\n"


def _implementations(result: dict) -> list[str]:
    """ours first"""
    names = dict.fromkeys(record["impl"] for record in result["rows"])
    return sorted(names, key=lambda name: name != ours.NAME)


def _timed(result: dict) -> list[dict]:
    return [record for record in result["rows"] if record["us"] is not None]


def _rows_per_token(record: dict) -> float:
    return record["s_q"] * record["h_q"] / record["h_kv"]


def _marker(record: dict) -> str:
    return MARKERS.get(record["h_q"], "x")


def _powers_of_two(axes):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")


def _legend(axes):
    """every label once"""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    axes.legend(once.values(), once.keys(), fontsize=8)


def _title(result: dict) -> str:
    return f"{result['device']}, {result['date']}, {result['commit'][:10]}{' (dirty)' if result['dirty'] else ''}"


if __name__ == "__main__":
    sys.exit(main())
