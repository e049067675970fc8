"""What of perf/ runs without a GPU: refusals, the rules of a peer, tables and pictures of stored runs."""

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashmla_cute.reference import dequantise, reference_decode
from perf import invariance, measure, model, ours, parallel, peers, plots, report
from perf.peers import flashmla_fp8, triton_mla
from perf.problem import Problem
from perf.workloads import WORKLOADS, Row

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


@pytest.mark.parametrize("peer", [triton_mla, flashmla_fp8], ids=lambda peer: peer.VARIABLE)
def test_an_absent_peer_is_named(monkeypatch, peer):
    monkeypatch.delenv(peer.VARIABLE, raising=False)
    name = peer.__name__.rpartition(".")[2]
    found, absent = peers.load([name])
    assert found == {} and peer.VARIABLE in absent[name]


E4M3_ROW = Row(2, 4, 100, "e4m3", dtype="float8_e4m3fn")


@pytest.mark.parametrize(
    "other, reason",
    [
        (dict(dtype="bfloat16"), "a cache of bfloat16"),
        (dict(dtype="fp8_ds_mla"), "a cache of fp8_ds_mla"),
        (dict(page=32), "pages of 32 tokens"),
    ],
)
def test_the_fork_refuses_what_it_has_not(other, reason):
    row = replace(E4M3_ROW, **other)
    with pytest.raises(peers.Refused, match=reason):
        flashmla_fp8.prepare(Problem.make(row, 1, 0, "cpu"))


@pytest.mark.parametrize("prepare", ours.VARIANTS.values(), ids=ours.VARIANTS)
def test_variants_are_of_e4m3_rows(prepare):
    with pytest.raises(peers.Refused):
        prepare(Problem.make(replace(E4M3_ROW, dtype="bfloat16"), 1, 0, "cpu"))


def test_the_e4m3_workload():
    shapes = {(row.b, row.s_q, row.h_q, row.s_k) for row in WORKLOADS["e4m3"]}
    assert {row.dtype for row in WORKLOADS["e4m3"]} == {"float8_e4m3fn"} and all(not row.varlen for row in WORKLOADS["e4m3"])
    assert shapes == {(128, 1, h, 8192) for h in (16, 64, 128)} | {
        (128, 2, 128, 8192),
        (64, 1, 16, 4096),
        (16, 1, 16, 4096),
    } | {(1, 1, h, s_k) for h in (16, 128) for s_k in (4096, 65536)}


def test_a_quantised_query_has_its_own_expectation():
    problem = Problem.make(E4M3_ROW, 2, 0, "cpu")
    quantised, wide = problem.with_e4m3_q(), problem.with_bf16_cache()
    assert quantised.q.dtype == torch.float8_e4m3fn and quantised.pools is problem.pools and problem.q.dtype == torch.bfloat16
    assert len(wide.pools) == 2 and wide.pools[0].dtype == torch.bfloat16 and wide.pools[0].shape == problem.pools[0].shape
    q, pool = (dequantise(x, torch.tensor(1 / 64)) for x in (quantised.q, problem.pools[1]))
    out, lse = reference_decode(q, pool, problem.block_table, [100, 100], problem.softmax_scale, False, 512)
    right, other = quantised.expected(1), problem.expected(1)
    assert right.check(out, lse, "float8_e4m3fn").rel_err < 1e-12
    check = other.check(out, lse, "float8_e4m3fn")
    assert check.rel_err > 1e-2 and "allowed 3e-03" in check.failure
    assert other.check(out, lse, "float8_e4m3fn", (check.rel_err * 1.1, check.lse_err * 1.1)).failure is None


class Exact:
    """an implementation that decodes `problem` in float64 and is wrong by `error`"""

    schedule = launch_with_schedule = None
    note = "exact"

    def __init__(self, problem: Problem, error: float = 0.0, tolerance: tuple[float, float] | None = None):
        self.problem, self.error, self.tolerance = problem, error, tolerance
        self.out = self.lse = None

    def launch(self, pool):
        expected = self.problem.expected(next(i for i, mine in enumerate(self.problem.pools) if mine is pool))
        self.out, self.lse = expected.out * (1 + self.error), expected.lse

    def result(self):
        return self.out, self.lse


def test_each_is_checked_against_its_own_problem(monkeypatch):
    """the harness without a GPU: a graph is its last launch; what decodes another problem is held to that one's result"""
    monkeypatch.setattr(measure.timing, "num_copies", lambda size: 2)
    monkeypatch.setattr(measure.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "Problem", type("OnCpu", (), {"make": lambda *given: Problem.make(*given, "cpu")}))
    monkeypatch.setattr(measure, "_capture", lambda launch, problem, launches: lambda: launch(problem.pools[-1]))

    def check(graph, implementation, expected, dtype):
        graph()
        return expected.check(*implementation.result(), dtype, implementation.tolerance)

    timed = []
    monkeypatch.setattr(measure, "_check", check)
    monkeypatch.setattr(measure, "_time", lambda ready, graphs, *_: timed.extend(graphs))
    implementations = {
        "plain": Exact,
        "quantised": lambda problem: Exact(problem.with_e4m3_q()),
        "bf16": lambda problem: Exact(problem.with_bf16_cache()),
        "wrong": lambda problem: Exact(problem, error=0.02),
        "loose": lambda problem: Exact(problem, error=0.02, tolerance=(0.03, 1e-2)),
    }
    result = measure.measure_row(E4M3_ROW, implementations, 20, 0)
    assert timed == ["plain", "quantised", "bf16", "loose"] and "off by 2.00e-02" in result.outcomes["wrong"].error
    records = {record["impl"]: record for record in report.records(result, ["e4m3"], None)}
    assert {record["dtype"] for record in records.values()} == {"float8_e4m3fn"}  # one line of the table
    assert all(record["note"] == "exact" for record in records.values())
    assert result.outcomes["bf16"].row.dtype == "bfloat16"


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
