"""What of perf/ runs without a GPU: refusals, the rules of a peer, tables and pictures of stored runs."""

import json
import re
import weakref
from pathlib import Path

import pytest
import torch

from perf import invariance, model, ours, parallel, peers, plots
from perf.peers import triton_mla
from perf.workloads import Row

from .runtime.test_parallel import run

RESULTS = Path(__file__).parents[1] / "perf" / "results"


@pytest.fixture
def stored() -> dict:
    return json.loads((RESULTS / "2026-11-24-h100-dense.json").read_text())


def test_parallel_says_what_is_missing(capsys):
    if torch.cuda.device_count() > 1:
        pytest.skip("there are GPUs")
    assert parallel.main([]) == 2
    assert re.match(r"perf.parallel: (no CUDA device|.* GPUs$)", capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("script", [invariance, model], ids=lambda script: script.__name__)
def test_scripts_say_what_is_missing(script, capsys):
    assert script.main([]) == 2
    assert capsys.readouterr().err.startswith(f"{script.__name__}: no CUDA device")


@pytest.mark.parametrize(
    "shape, splits",
    [
        ((1, 128, 4096), 8),
        ((1, 16, 65536), 128),
        ((8, 128, 4096), 8),
        ((64, 128, 8192), 1),
        ((1, 16, 100), 1),
        ((1, 16, 1 << 20), 264),
    ],
)
def test_splits_of_triton(shape, splits):
    assert triton_mla.num_splits(*shape, sms=132) == splits


def measured(rank: int, size: int, device: str):
    """perf.parallel.measure_row with the kernels' twins, without timing; the capture of `tensor` fails on one rank.  What is
    captured must be there when graphs are replayed: the tensors they read are its."""
    patch = pytest.MonkeyPatch()
    patch.setattr(parallel.timing, "num_copies", lambda size: 2)
    patch.setattr(parallel, "_eager", lambda launch, copies: float(launch(copies - 1)[0].shape[-1]))
    tried = []

    def capture(launch, copies, launches):
        tried.append(weakref.ref(launch))
        if len(tried) == 2 and rank == size - 1:
            raise RuntimeError("no graph")
        return tried[-1]

    def replay(graphs, launches):
        assert all(launch() is not None for launch in graphs.values())
        return {name: [1.0 + rank, 2.0 + rank] for name in graphs}

    patch.setattr(parallel, "_capture", capture)
    patch.setattr(parallel, "_replay", replay)
    records = parallel.measure_row(Row(1, 6, 300, "one request"), 0, device)
    patch.undo()
    if rank > 0:
        assert records == []
        return
    by_name = {record["method"]: record for record in records}
    assert list(by_name) == list(parallel.METHODS)
    errors = {name: record["error"] for name, record in by_name.items() if record["error"]}
    assert errors == {"tensor": "RuntimeError: no graph", "data": "refused: 1 requests, fewer than ranks"}
    timed = [record for record in records if record["us"]]
    assert [record["method"] for record in timed] == ["one", "context", "context_scatter"]
    assert all(record["us"] == 0.5 + size and 0 < record["rel_err"] < 4e-3 for record in timed)
    assert by_name["one"]["cache_bytes_per_gpu"] == 300 * 1152 == size * by_name["context"]["cache_bytes_per_gpu"]
    assert "refused: 1 requests" in parallel.table({"rows": records})


def test_parallel_measures_what_all_ranks_can():
    run([measured], 2, "cpu")


def test_an_absent_peer_is_named(monkeypatch):
    monkeypatch.delenv(triton_mla.VARIABLE, raising=False)
    found, absent = peers.load(["triton_mla"])
    assert found == {} and triton_mla.VARIABLE in absent["triton_mla"]


def test_table_has_every_timed_row(stored):
    head, _, *lines = plots.table(stored).splitlines()
    timed = [record for record in stored["rows"] if record["impl"] == ours.NAME and record["us"]]
    assert len(lines) == len(timed) > 0 and "fa3 / ours" in head
    assert {line.count("|") for line in (head, *lines)} == {head.count("|")}
    for record, line in zip(timed, lines):
        assert f"| {record['us']:.1f} |" in line and f"| {record['speedup_over']['fa3']:.2f} |" in line


def test_pictures(stored, tmp_path):
    pytest.importorskip("matplotlib")
    stored["rows"][1] |= {"us": None, "error": "refused: a peer that does not do this row"}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(stored))
    assert plots.main([str(path), "--out", str(tmp_path)]) == 0
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("roofline", "speedup", "relative"))
