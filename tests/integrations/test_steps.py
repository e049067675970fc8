"""DecodeSteps: what both plugins share."""

from dataclasses import replace

import pytest
import torch

from flashmla_cute import PagedKVCache, compile
from flashmla_cute.integrations import support
from flashmla_cute.integrations.steps import DecodeSteps
from flashmla_cute.testing import Case, Problem

CASES = [
    Case((70, 1, 0, 300), h_q=16),
    Case((130, 64, 7), h_q=5, s_q=3),
    Case((65, 200), h_q=8, dtype=torch.float16, page=16),
    Case((65, 200), h_q=8, latent=512, rope=0, page=128),
    Case((65, 20), h_q=8, latent=256, rope=64),
]


def steps_for(problem: Problem, **options) -> DecodeSteps:
    case = problem.case
    return DecodeSteps(case.h_q, (case.latent, case.rope), case.page, case.dtype, case.dtype, problem.q.device, **options)


def plan(steps: DecodeSteps, problem: Problem):
    return steps.plan(problem.cache.block_table, problem.cache.cache_seqlens, problem.case.s_q)


def check(problem: Problem, out: torch.Tensor, lse: torch.Tensor, cache: torch.dtype | None = None):
    """out [tokens, heads, latent] and lse [tokens, heads], contiguous, against float64; cache: its dtype, if not that of q"""
    case = problem.case
    tokens = len(case.lengths) * case.s_q
    assert out.shape == (tokens, case.h_q, case.latent) and out.is_contiguous() and out.dtype == case.dtype
    assert lse.shape == (tokens, case.h_q) and lse.is_contiguous() and lse.dtype == torch.float32
    by_request = lse.view(-1, case.s_q, case.h_q).transpose(1, 2)
    errors = problem.errors(out.view(-1, case.s_q, case.h_q, case.latent), by_request)
    assert errors.within(cache or case.dtype), f"{errors}\n{case}"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("pair", [False, True], ids=["joined", "pair"])
def test_a_step_decodes(device, case, pair):
    problem = Problem.make(case, device)
    q = problem.q.flatten(0, 1)
    if pair:  # as vLLM has them: rope is a slice of wider rows
        rows = torch.full((*q.shape[:2], 128 + case.rope), float("nan"), dtype=q.dtype, device=device)
        rows[..., 128:] = q[..., case.latent :]
        q = q[..., : case.latent].contiguous(), rows[..., 128:]
    step = plan(steps_for(problem), problem)
    check(problem, *step.decode(q, problem.cache.pool, case.softmax_scale))
    check(problem, *step.decode(q, problem.cache.pool.squeeze(2), case.softmax_scale))  # another view, another check


def test_one_plan_for_all_layers(device):
    problem, other = (Problem.make(Case((70, 1, 0, 300), h_q=16, seed=seed), device) for seed in (0, 1))
    other.cache.block_table.copy_(problem.cache.block_table)
    other.cache.pool.nan_to_num_()
    step = plan(steps_for(problem), problem)
    check(problem, *step.decode(problem.q.flatten(0, 1), problem.cache.pool, problem.case.softmax_scale))
    table = PagedKVCache.from_tensors(other.cache.pool, problem.cache.block_table, problem.cache.cache_seqlens)
    layer = Problem(problem.case, other.q, table, other.out, other.lse)
    check(layer, *step.decode(layer.q.flatten(0, 1), layer.cache.pool, problem.case.softmax_scale))


def test_later_steps_refill_the_same_memory(device):
    """what a captured graph has the addresses of; the engine's own tensor of lengths may move"""
    problem = Problem.make(Case((300, 70, 64, 5), h_q=16), device)
    steps = steps_for(problem)
    first = plan(steps, problem)
    addresses = [t.data_ptr() for t in (first.plan.items, first.plan.parts, first.plan.merges, first.plan.o_split)]
    shorter = torch.tensor([65, 0, 64, 3], dtype=torch.int64, device=device)
    step = steps.plan(problem.cache.block_table, shorter, 1)
    assert [t.data_ptr() for t in (step.plan.items, step.plan.parts, step.plan.merges, step.plan.o_split)] == addresses
    later = Problem(
        Case((65, 0, 64, 3), h_q=16),
        problem.q,
        PagedKVCache.from_tensors(problem.cache.pool, problem.cache.block_table, shorter.int()),
        problem.out,
        problem.lse,
    )
    check(later, *step.decode(problem.q.flatten(0, 1), problem.cache.pool, problem.case.softmax_scale))
    shorter[0], shorter[1] = 64, 1
    step.refresh()
    later.case = Case((64, 1, 64, 3), h_q=16)
    check(later, *step.decode(problem.q.flatten(0, 1), problem.cache.pool, problem.case.softmax_scale))


@pytest.mark.parametrize("pair", [False, True], ids=["joined", "pair"])
def test_a_ragged_step_decodes(device, pair):
    """requests of 2, 0, 1 and 4 query tokens, and rows of q behind them that are nobody's"""
    counts, case = (2, 0, 1, 4), Case((70, 12, 1, 300), h_q=16, s_q=4)
    problem = Problem.make(case, device)
    starts = torch.tensor([0, *counts], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    q = torch.cat([problem.q[i, :n] for i, n in enumerate(counts)] + [torch.full_like(problem.q[0, :2], float("nan"))])
    steps = steps_for(problem)
    step = steps.plan(problem.cache.block_table, problem.cache.cache_seqlens, 4, starts)
    out, lse = step.decode((q[..., :512], q[..., 512:]) if pair else q, problem.cache.pool, case.softmax_scale)
    assert out.shape == (9, 16, 512) and lse.shape == (9, 16)
    for i, n in enumerate(counts):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        one = replace(case, lengths=case.lengths[i : i + 1], s_q=n)
        cache = PagedKVCache.from_tensors(
            problem.cache.pool, problem.cache.block_table[i : i + 1], problem.cache.cache_seqlens[i : i + 1]
        )
        check(Problem(one, q[rows].unsqueeze(0), cache, None, None), out[rows], lse[rows]) if n else None


@pytest.mark.parametrize("pair", [False, True], ids=["joined", "pair"])
def test_a_step_over_fp8_decodes(device, pair):
    problem, scale = Problem.make(Case((70, 1, 0, 300), h_q=16, s_q=2), device), torch.tensor(0.5, device=device)
    pool = (problem.cache.pool.float() / scale).to(torch.float8_e4m3fn)
    problem.cache.pool.copy_(pool.float() * scale)  # (exact in bf16)
    steps = DecodeSteps(16, (512, 64), 64, torch.bfloat16, pool.dtype, device)
    steps.warm_up(2, pair=pair)
    q = problem.q.flatten(0, 1)
    q = (q[..., :512], q[..., 512:]) if pair else q
    check(problem, *plan(steps, problem).decode(q, pool, problem.case.softmax_scale, scale), pool.dtype)


def test_layers_that_share_a_pool_keep_their_scales(device):
    """an FP8 cache is known by its pool and its scale: the second layer must not decode with the first one's"""
    problem = Problem.make(Case((70, 1, 0, 300), h_q=16), device)
    pool, scales = problem.cache.pool.to(torch.float8_e4m3fn), torch.tensor([0.5, 1.0], device=device)
    step = plan(DecodeSteps(16, (512, 64), 64, torch.bfloat16, pool.dtype, device), problem)

    def decodes_with(scale: torch.Tensor):
        problem.cache.pool.copy_(pool.float() * scale)  # (exact in bf16)
        results = step.decode(problem.q.flatten(0, 1), pool, problem.case.softmax_scale, scale)
        check(problem, *results, pool.dtype)
        assert len(step._caches) <= 2

    for i in (0, 1, 0, 1):
        decodes_with(scales[i])
    scales[0] = 0.25  # which the launch reads, as a server that calibrates its scales expects
    decodes_with(scales[0])


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_plans_share_the_largest_workspace(device, batch_invariant):
    problem = Problem.make(Case((70, 20, 300), h_q=16), device)
    steps = steps_for(problem, batch_invariant=batch_invariant)
    table, lengths = problem.cache.block_table, problem.cache.cache_seqlens
    plans = [steps.plan(table[:batch], lengths[:batch], 1).plan for batch in (3, 2, 1)]
    assert len({p.items.data_ptr() for p in plans}) == 3
    assert len({p.o_split.data_ptr() for p in plans}) == len({p.lse_split.data_ptr() for p in plans}) == 1
    check(problem, *plan(steps, problem).decode(problem.q.flatten(0, 1), problem.cache.pool, problem.case.softmax_scale))


def test_layers_are_remembered(device):
    problem = Problem.make(Case((70, 20), h_q=16), device)
    step = plan(steps_for(problem), problem)
    q = problem.q.flatten(0, 1)
    for _ in range(3):
        step.decode(q, problem.cache.pool, 1.0)
    assert len(step._caches) == 1 and len(step.plan.launches) == 1
    step.decode(q, problem.cache.pool.clone(), 1.0)
    assert len(step._caches) == 2


@pytest.mark.parametrize("layout", ["joined", "pair", "heads outside"])
def test_warm_up_compiles_what_a_step_launches(device, monkeypatch, layout):
    asked, get = [], compile.get
    monkeypatch.setattr(compile, "get", lambda op, config: asked.append((op, config)) or get(op, config))
    problem = Problem.make(Case((70, 20), h_q=16, s_q=2), device)
    steps, q = steps_for(problem), problem.q.flatten(0, 1)
    steps.warm_up(2, pair=layout != "joined", heads_outside=layout == "heads outside")
    warm = set(asked)
    if layout != "joined":
        latent, rope = q.split([512, 64], -1)
        q = (latent if layout == "pair" else latent.transpose(0, 1).contiguous().transpose(0, 1)), rope
    check(problem, *plan(steps, problem).decode(q, problem.cache.pool, problem.case.softmax_scale))
    assert set(asked) == warm and len(warm) == 2


# ---------------------------------------------------------------------- what is refused
def test_wrong_rows_are_named(device):
    problem = Problem.make(Case((70, 20), h_q=16, s_q=2), device)
    step = plan(steps_for(problem), problem)
    with pytest.raises(ValueError, match=r"q.shape is \(3, 16, 576\); allowed: \[4, heads, columns\], .* 2 requests of 2"):
        step.decode(problem.q.flatten(0, 1)[:3], problem.cache.pool, 1.0)
    with pytest.raises(ValueError, match=r"q.shape is \(2, 2, 8, 576\).*16"):
        step.decode(problem.q.flatten(0, 1)[:, :8], problem.cache.pool, 1.0)


def test_other_formats_are_refused(device):
    bf16 = torch.bfloat16
    with pytest.raises(ValueError, match=r"page size is 12; allowed: multiples of 8 from 8 to 1024"):
        DecodeSteps(16, (512, 64), 12, bf16, bf16, device)
    with pytest.raises(ValueError, match=r"\(448, 64\); allowed in a cache of torch.bfloat16: \(512, 64\)"):
        DecodeSteps(16, (448, 64), 64, bf16, bf16, device)
    with pytest.raises(ValueError, match=r"dtype is torch.float32; allowed: torch.bfloat16 or torch.float16"):
        DecodeSteps(16, (512, 64), 64, torch.float32, torch.float32, device)


def test_reasons():
    bf16, fp16 = torch.bfloat16, torch.float16
    assert 64 in support.PAGES and (512, 64) in support.CACHES[bf16] and set(support.DTYPES) == {"bfloat16", "float16"}
    assert support.why_not_widths(512, 64, bf16) is support.why_not_page(64) is support.why_not_dtypes(fp16, fp16) is None
    assert support.why_not_page(1, "--page-size").startswith("--page-size is 1; allowed: multiples of 8 from 8")
    assert "cache's dtype is torch.float16; allowed: torch.bfloat16" in support.why_not_dtypes(bf16, fp16)
