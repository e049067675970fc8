"""FlashMLA's interface: its conventions, its errors, and its own test file, unchanged, on our functions."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashmla_cute import compat
from flashmla_cute.compat import flash_mla_with_kvcache, get_mla_metadata
from flashmla_cute.testing import Case, Problem

from . import twins

ROOT = Path(__file__).parents[2]
TESTS_VARIABLE = "FLASHMLA_TESTS"  # the folder `tests` of a FlashMLA checkout
TEST_FILE = "test_flash_mla_dense_decoding.py"
SHIM = "from flashmla_cute.compat import *\n"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """ "cpu": the twins of the kernels"""
    if request.param == "cpu":
        twins.install(monkeypatch)
    return request.param


def make(device: str, *lengths: int, **options) -> Problem:
    return Problem.make(Case(lengths or (70, 0, 700), **{"h_q": 16, "causal": False, **options}), device)


def call(problem: Problem, metadata, num_splits=None, **change):
    cache = problem.cache
    arguments = dict(
        q=problem.q,
        k_cache=cache.pool,
        block_table=cache.block_table,
        cache_seqlens=cache.cache_seqlens,
        head_dim_v=512,
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
        causal=problem.case.causal,
    )
    return flash_mla_with_kvcache(**{**arguments, **change})


def check(problem: Problem, out: torch.Tensor, lse: torch.Tensor):
    assert not (lse == float("-inf")).any(), "an empty row's lse is +inf"
    errors = problem.errors(out, torch.where(lse == float("inf"), float("-inf"), lse))
    assert errors.within(problem.case.dtype), f"{errors}\n{problem.case}"


FORMS = {
    "new": lambda p: get_mla_metadata(),
    "old": lambda p: get_mla_metadata(p.cache.cache_seqlens, p.q.shape[1] * p.q.shape[2] // p.case.h_kv, p.case.h_kv),
    "old, by name": lambda p: get_mla_metadata(
        cache_seqlens=p.cache.cache_seqlens,
        num_q_tokens_per_head_k=p.q.shape[1] * p.q.shape[2] // p.case.h_kv,
        num_heads_k=p.case.h_kv,
        num_heads_q=p.case.h_q,
        is_fp8_kvcache=False,
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [dict(), dict(h_q=8, h_kv=2, s_q=2, causal=True), dict(dtype=torch.float16, s_q=3)], ids=str
)
def test_decodes(device, form, options):
    problem = make(device, **options)
    metadata, num_splits = FORMS[form](problem)
    out, lse = call(problem, metadata, num_splits)
    assert out.shape == (3, problem.case.s_q, problem.case.h_q, 512) and out.dtype == problem.q.dtype
    assert lse.shape == (3, problem.case.h_q, problem.case.s_q) and lse.dtype == torch.float32
    check(problem, out, lse)
    assert (lse[1] == float("inf")).all() and (out[1] == 0).all()


def test_positional_arguments_and_scale(device):
    problem = make(device)
    cache, metadata = problem.cache, get_mla_metadata()[0]
    first = flash_mla_with_kvcache(
        problem.q, cache.pool, cache.block_table, cache.cache_seqlens, 512, metadata, None, 0.25, True
    )
    named = call(problem, metadata, softmax_scale=0.25, causal=True)
    other = call(problem, metadata, softmax_scale=0.5, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(first, named)) and not torch.equal(first[0], other[0])


def test_one_metadata_serves_all_layers_of_a_step(device):
    """also where each layer brings its own tensor of the same lengths"""
    problem = make(device)
    metadata, _ = get_mla_metadata()
    check(problem, *call(problem, metadata))
    plan = metadata.plan
    for _ in range(2):
        problem.cache.pool.mul_(-2)
        check(problem, *call(problem, metadata, cache_seqlens=problem.cache.cache_seqlens.clone()))
    assert metadata.plan is plan


def test_a_new_step_needs_new_metadata(device):
    """the lengths are those of the first call"""
    problem = make(device, 70, 0, 700)
    check(problem, *call(problem, get_mla_metadata()[0]))
    shorter = make(device, 5, 64, 1)
    check(shorter, *call(shorter, get_mla_metadata()[0]))


# ---------------------------------------------------------------------- errors
def zeros(*shape, dtype=torch.int32):
    return lambda p: torch.zeros(shape, dtype=dtype, device=p.q.device)


REFUSED = {
    "fp8": (dict(is_fp8_kvcache=True), "is_fp8_kvcache is True; allowed: False"),
    "sparse": (dict(indices=zeros(3, 1, 8)), "indices is a Tensor; allowed: None"),
    "sink": (dict(attn_sink=zeros(16)), "attn_sink is a Tensor; allowed: None"),
    "extra cache": (dict(extra_k_cache=zeros(4, 64, 1, 576)), "extra_k_cache is a Tensor; allowed: None"),
    "extra indices": (dict(extra_indices_in_kvcache=zeros(1)), "extra_indices_in_kvcache is a Tensor; allowed: None"),
    "topk_length": (dict(topk_length=zeros(3)), "topk_length is a Tensor; allowed: None"),
    "extra_topk_length": (dict(extra_topk_length=zeros(3)), "extra_topk_length is a Tensor; allowed: None"),
    "head_dim_v": (dict(head_dim_v=256), "head_dim_v is 256; allowed: 512"),
    "num_splits": (dict(num_splits=zeros(4)), "num_splits is Tensor; allowed: None"),
    "metadata": (
        dict(tile_scheduler_metadata=zeros(4, 8)),
        "tile_scheduler_metadata is a Tensor; allowed: what get_mla_metadata",
    ),
    "no table": (dict(block_table=None), "block_table is a NoneType; allowed: a torch.Tensor"),
    "no lengths": (dict(cache_seqlens=None), "cache_seqlens is a NoneType; allowed: a torch.Tensor"),
    "q axes": (dict(q=zeros(3, 16, 576, dtype=torch.bfloat16)), "q.shape is (3, 16, 576)"),
    "q dtype": (dict(q=zeros(3, 1, 16, 576, dtype=torch.float16)), "q.dtype is torch.float16"),
    "page": (dict(k_cache=zeros(4, 20, 1, 576, dtype=torch.bfloat16)), "pool.shape[1] is 20"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("later", [False, True], ids=["first call", "later call"])
def test_refuses(device, case, later):
    change, message = REFUSED[case]
    problem = make(device)
    metadata, _ = get_mla_metadata()
    if later:
        call(problem, metadata)
    change = {name: value(problem) if callable(value) else value for name, value in change.items()}
    with pytest.raises((ValueError, TypeError)) as caught:
        call(problem, metadata, **change)
    assert message in str(caught.value), str(caught.value)
    check(problem, *call(problem, metadata))  # what was refused has left nothing behind


@pytest.mark.parametrize(
    "lengths, other, message",
    [
        ((70, 0), dict(), "q.shape[0] is 2; allowed: 3"),
        ((70, 0, 700), dict(s_q=2), "q.shape[1] is 2; allowed: 1"),
        ((70, 0, 700), dict(h_q=32), "q.shape[2] is 32; allowed: 16"),
        ((70, 0, 700), dict(h_kv=2), "k_cache.shape[2] is 2; allowed: 1"),
    ],
    ids=str,
)
def test_refuses_what_the_metadata_is_not_for(device, lengths, other, message):
    problem = make(device)
    metadata, _ = get_mla_metadata()
    call(problem, metadata)
    with pytest.raises(ValueError) as caught:
        call(make(device, *lengths, **other), metadata)
    assert message in str(caught.value) and "tile_scheduler_metadata was made for" in str(caught.value)


def test_holds_calls_to_the_old_form(device):
    problem = make(device, s_q=2)
    seqlens = problem.cache.cache_seqlens
    for told, message in (
        ((seqlens, 16, 1), "num_q_tokens_per_head_k is 32; allowed: 16"),
        ((seqlens[:2], 32, 1), "q.shape[0] is 3; allowed: 2"),
        ((seqlens, 32, 2), "k_cache.shape[2] is 1; allowed: 2"),
        ((seqlens, 32, 1, 8), "q.shape[2] is 16; allowed: 8"),
    ):
        with pytest.raises(ValueError) as caught:
            call(problem, get_mla_metadata(*told)[0])
        assert message in str(caught.value)
    for told, message in ((dict(is_fp8_kvcache=True), "is_fp8_kvcache is True"), (dict(topk=64), "topk is 64")):
        with pytest.raises(ValueError, match=message):
            get_mla_metadata(seqlens, 32, 1, **told)


# ---------------------------------------------------------------------- CUDA graphs
@pytest.mark.gpu
def test_a_captured_step_plans_at_every_replay():
    """metadata made inside the capture, as FlashMLA's users do"""
    problem = make("cuda", 5000, 0, 700, s_q=2, causal=True)
    check(problem, *call(problem, get_mla_metadata()[0]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metadata, num_splits = get_mla_metadata()
        out, lse = call(problem, metadata, num_splits)
    for lengths in ((5000, 0, 700), (0, 0, 0), (130, 0, 1), (5000, 0, 0)):
        problem.cache.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        check(replace(problem, case=replace(problem.case, lengths=lengths)), out, lse)


# ---------------------------------------------------------------------- FlashMLA's own tests
def environment(folder: Path) -> dict[str, str]:
    """in which `import flash_mla` finds our functions, written to `folder`"""
    (folder / "flash_mla.py").write_text(SHIM)
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_the_shim_is_what_python_imports(tmp_path):
    code = "import flash_mla; print(flash_mla.flash_mla_with_kvcache.__module__, *sorted(vars(flash_mla)))"
    run = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    module, *names = run.stdout.split()
    assert module == compat.__name__ and set(compat.__all__) <= set(names), run.stderr


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_flashmla_passes_its_own_tests(tmp_path, decode_kernels, capsys, dtype):
    """Its file has no option to leave its timing out, and looks for a kernel of FlashMLA's name in the profile; told that a
    profiler of NVIDIA's is attached, it runs the timed cases too but takes no times: those it prints mean nothing."""
    folder = Path(os.environ.get(TESTS_VARIABLE, ""))
    if not (folder / TEST_FILE).is_file():
        pytest.skip(f"{TESTS_VARIABLE} names no folder with {TEST_FILE}: the folder `tests` of a FlashMLA checkout")
    pytest.importorskip("triton")
    told = {**environment(tmp_path), "NSYS_PROFILING_SESSION_ID": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(folder / TEST_FILE), "--dtype", dtype]
    run = subprocess.run(command, env=told, capture_output=True, text=True)
    ran = len(re.findall(r"^Running on TestParam\(", run.stdout, re.MULTILINE))
    with capsys.disabled():
        print(f"\nFlashMLA's {TEST_FILE}, {dtype}: {ran} cases ran, exit status {run.returncode}")
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    assert ran > 0 and "mismatch" not in run.stdout
