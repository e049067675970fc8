"""The decode kernel against float64, over poisoned pages, table entries, outputs and workspace."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from flashmla_cute import DecodePlan, mla_decode
from flashmla_cute.kernels.config import ScheduleConfig
from flashmla_cute.reference import reference_decode
from flashmla_cute.testing import TOLERANCE, Case, Problem

from ..problems import (
    POISON,
    POOL_STRIDES,
    Q_STRIDES,
    check,
    clone,
    embed,
    moved_pages,
    num_split,
    plan_of_parts,
    poisoned,
    same_bits,
    shared_prefix,
    small_cases,
    some_requests,
    storage_of,
    varied_lengths,
    with_pool,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("decode_kernels")]

DTYPES = [torch.bfloat16, torch.float16]
HEADS = [(h_q, h_kv) for h_q in (1, 3, 9, 63, 64, 126, 128) for h_kv in (1, 2, 3, 8) if h_q % h_kv == 0]
SOME_HEADS = [(128, 1), (16, 1), (5, 1), (64, 8), (126, 3), (128, 2)]
EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 2047, 2048, 2049)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_mask = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


# ---------------------------------------------------------------------- FlashMLA's own cases
@every_dtype
@pytest.mark.parametrize("h_q, h_kv", HEADS)
def test_flashmla_grid(record, dtype, h_q, h_kv):
    grid = product((1, 2, 6, 64), (1, 2, 4), (20, 140, 4096), (False, True), (False, True))
    for seed, (b, s_q, s_k, varied, causal) in enumerate(grid):
        lengths = varied_lengths(b, s_k, s_q, seed) if varied else (s_k,) * b
        requests = some_requests(lengths, 8, seed) if b * s_k > 30000 else None
        check(Problem.make(Case(lengths, h_q, h_kv, s_q, causal, dtype, seed=seed)), record, requests)


@every_dtype
@every_mask
@pytest.mark.parametrize("h_q, h_kv", HEADS)
def test_flashmla_zero_lengths(record, dtype, causal, h_q, h_kv):
    lengths = varied_lengths(128, 4096, 2, seed=h_q, with_zeros=True)
    problem = Problem.make(Case(lengths, h_q, h_kv, 2, causal, dtype, seed=h_q))
    check(problem, record, some_requests(lengths, 12, seed=h_q))
    empty = [i for i, length in enumerate(lengths) if length == 0]
    assert 30 < len(empty) < 98
    assert (problem.out[empty] == 0).all() and (problem.lse[empty] == float("-inf")).all()


def within_flashmla_rule(answer, wanted, abs_tol, rel_tol, cos_tol):
    """kernelkit's check: every element within abs_tol or rel_tol, and the cosine difference of the whole within cos_tol"""
    answer, wanted = answer.double(), wanted.double()
    difference = (answer - wanted).abs()
    elements = (difference < abs_tol) | (difference / (wanted.abs() + 1e-6) < rel_tol)
    cosine = 1 - 2 * (answer * wanted).sum() / (answer.square() + wanted.square()).sum()
    return bool(elements.all()) and abs(cosine.item()) < cos_tol


@pytest.mark.parametrize("h_q, h_kv", [(128, 1), (64, 1), (16, 1), (126, 3), (64, 8)])
def test_flashmla_elementwise_rule(record, h_q, h_kv):
    """on data distributed like FlashMLA's: randn / 10, clamped"""
    for seed, (b, s_q, s_k, causal) in enumerate(product((1, 6), (1, 2, 4), (20, 140, 4096), (False, True))):
        problem = Problem.make(Case(varied_lengths(b, s_k, s_q, seed), h_q, h_kv, s_q, causal, seed=seed))
        for tensor in (problem.q, problem.cache.pool):
            tensor.div_(10).clamp_(-1, 1)  # (NaN stays NaN)
        check(problem, record)
        case, cache = problem.case, problem.cache
        out, lse = reference_decode(
            problem.q, cache.pool, cache.block_table, list(case.lengths), case.softmax_scale, causal, 512
        )
        assert within_flashmla_rule(problem.out, out.bfloat16(), 8e-4, 2.01 / 128, 5e-6), f"out\n{case}"
        assert within_flashmla_rule(problem.lse, lse, 1e-6, 8.01 / 65536, 1e-7), f"lse\n{case}"


# ---------------------------------------------------------------------- lengths
@every_dtype
@every_mask
@pytest.mark.parametrize("s_q", [1, 2, 3, 4, 7])
def test_page_edges_in_one_batch(record, dtype, causal, s_q):
    for seed, (h_q, h_kv) in enumerate(SOME_HEADS):
        check(Problem.make(Case(EDGES, h_q, h_kv, s_q, causal, dtype, seed=seed)), record)


@every_dtype
@pytest.mark.parametrize("length", EDGES)
def test_each_length_alone(record, dtype, length):
    for seed, (s_q, h_q) in enumerate(product((1, 2), (128, 7))):
        check(Problem.make(Case((length,), h_q, s_q=s_q, dtype=dtype, seed=seed)), record)


@every_dtype
@pytest.mark.parametrize("h_q, h_kv", SOME_HEADS)
def test_more_queries_than_tokens(record, dtype, h_q, h_kv):
    """query i of s_q sees the tokens < length - s_q + 1 + i: the first ones see none"""
    lengths, s_q = (0, 1, 2, 3, 4, 5, 70), 5
    problem = Problem.make(Case(lengths, h_q, h_kv, s_q, True, dtype, seed=h_q))
    check(problem, record)
    for i, length in enumerate(lengths):
        blind = max(0, s_q - length)
        assert (problem.out[i, :blind] == 0).all() and (problem.lse[i, :, :blind] == float("-inf")).all(), length
        assert problem.lse[i, :, blind:].isfinite().all(), length


@every_dtype
@pytest.mark.parametrize("s_q", [1, 2])
def test_batch_of_512(record, dtype, s_q):
    lengths = varied_lengths(512, 600, 0, seed=s_q, with_zeros=True)
    problem = Problem.make(Case(lengths, 16, s_q=s_q, dtype=dtype, seed=s_q))
    check(problem, record, some_requests(lengths, 60, seed=s_q))


@every_dtype
def test_one_very_long_request(record, dtype):
    check(Problem.make(Case((100_001,), 16, dtype=dtype)), record)
    check(Problem.make(Case((65_536, 1, 0, 40), 128, s_q=2, dtype=dtype)), record)


# ---------------------------------------------------------------------- values
@pytest.mark.parametrize("dtype, gain", [(torch.bfloat16, 1e4), (torch.float16, 5e3)], ids=str)
@pytest.mark.parametrize("h_q, s_q", [(128, 1), (16, 2)])
def test_large_scores(record, dtype, gain, h_q, s_q):
    problem = Problem.make(Case((1, 64, 1000, 4500), h_q, s_q=s_q, dtype=dtype, gain=gain))
    check(problem, record)
    assert problem.lse.max() > 1e4


@every_dtype
@every_mask
@pytest.mark.parametrize("s_q", [1, 3])
def test_equal_scores(record, dtype, causal, s_q):
    lengths = (3, 64, 1000, 9000)
    problem = Problem.make(Case(lengths, 32, s_q=s_q, causal=causal, dtype=dtype, gain=0.0))
    check(problem, record)
    for i, length in enumerate(lengths):
        for token in range(s_q):
            sees = length - s_q + 1 + token if causal else length
            assert (problem.lse[i, :, token] - math.log(sees)).abs().max() < 1e-4, (length, token)


@every_dtype
def test_one_huge_key(record, dtype):
    """about half of the rows attend to it alone, the others not at all; it comes after, and before, many ordinary ones"""
    for position in (0, 100, 2999):
        problem = Problem.make(Case((3000, 3000), 128, dtype=dtype, seed=position))
        page = problem.cache.block_table[0, position // 64]
        problem.cache.pool[page, position % 64] *= 64
        check(problem, record)
        assert (problem.lse[0] > 50).any() and (problem.lse[0] < 20).any() and (problem.lse[1] < 20).all()


@every_dtype
@pytest.mark.parametrize("scale", [0.01, 0.2, 3.0])
def test_softmax_scale(dtype, scale):
    problem = Problem.make(Case((500, 3, 1000), 16, s_q=2, dtype=dtype))
    cache, lengths = problem.cache, list(problem.case.lengths)
    out, lse = mla_decode(problem.q, cache, problem.plan(), softmax_scale=scale)
    wanted, wanted_lse = reference_decode(problem.q, cache.pool, cache.block_table, lengths, scale, True, 512)
    rel, absolute = TOLERANCE[dtype]
    assert (out - wanted).norm() <= rel * wanted.norm()
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=absolute)


# ---------------------------------------------------------------------- memory
@every_dtype
@pytest.mark.parametrize("strides", Q_STRIDES)
def test_strided_q(record, dtype, strides):
    """strides change which kernel runs, not a bit of its result"""
    move, mergeable = Q_STRIDES[strides]
    for h_q, s_q in ((16, 3), (128, 2), (5, 2), (70, 2)):
        problem = Problem.make(Case((700, 0, 65, 3000), h_q, s_q=s_q, dtype=dtype, seed=h_q))
        plain = clone(problem.run())
        moved = replace(problem, q=move(problem.q), out=poisoned(problem.out), lse=poisoned(problem.lse))
        assert (moved.q.stride(1) == h_q * moved.q.stride(2)) == mergeable
        check(moved, record)
        assert same_bits(plain, (moved.out, moved.lse)), moved.case


@every_dtype
@pytest.mark.parametrize("strides", ["every other request", "padded heads", "padded columns", "head before token"])
def test_strided_q_of_several_kv_heads(record, dtype, strides):
    for h_q, h_kv, s_q in ((64, 8, 2), (126, 3, 1), (12, 2, 4)):
        problem = Problem.make(Case((700, 0, 65, 3000), h_q, h_kv, s_q, dtype=dtype, seed=h_q))
        plain = clone(problem.run())
        moved = replace(problem, q=Q_STRIDES[strides][0](problem.q), out=poisoned(problem.out), lse=poisoned(problem.lse))
        check(moved, record)
        assert same_bits(plain, (moved.out, moved.lse)), moved.case


@every_dtype
@pytest.mark.parametrize("strides", POOL_STRIDES)
def test_strided_pool(record, dtype, strides):
    for h_q, h_kv, s_q in ((64, 1, 1), (8, 2, 2)):
        problem = Problem.make(Case((700, 0, 65, 3000), h_q, h_kv, s_q, dtype=dtype, seed=h_q))
        plain = clone(problem.run())
        moved = with_pool(problem, POOL_STRIDES[strides](problem.cache.pool))
        check(moved, record)
        assert same_bits(plain, (moved.out, moved.lse)), moved.case


@every_dtype
@pytest.mark.parametrize("elements, num_pages", [(2**31, 58_400), (2**32, 116_700)])
def test_pool_beyond(record, dtype, elements, num_pages):
    problem = Problem.make(Case((700, 0, 65, 3000), 128, dtype=dtype))
    plain, count = clone(problem.run()), problem.cache.pool.shape[0]
    moved = moved_pages(problem, num_pages, num_pages - count)
    assert (num_pages - count) * 64 * 576 > elements
    check(moved, record)
    assert same_bits(plain, (moved.out, moved.lse))


OUT_STRIDES = {
    "padded columns": lambda out: ((*out.shape[:3], 576), lambda x: x[..., :512]),
    "padded heads": lambda out: ((*out.shape[:2], out.shape[2] + 3, 512), lambda x: x[:, :, 1:-2]),
    "head before token": lambda out: ((out.shape[0], out.shape[2], out.shape[1], 512), lambda x: x.transpose(1, 2)),
    "every other token": lambda out: ((out.shape[0], 2 * out.shape[1], *out.shape[2:]), lambda x: x[:, 1::2]),
}
LSE_STRIDES = {
    "padded columns": lambda lse: ((*lse.shape[:2], lse.shape[2] + 1), lambda x: x[..., :-1]),
    "padded heads": lambda lse: ((lse.shape[0], lse.shape[1] + 3, lse.shape[2]), lambda x: x[:, 1:-2]),
    "head before token": lambda lse: ((lse.shape[0], lse.shape[2], lse.shape[1]), lambda x: x.transpose(1, 2)),
    "every other token": lambda lse: ((*lse.shape[:2], 2 * lse.shape[2]), lambda x: x[..., 1::2]),
}


@every_dtype
@pytest.mark.parametrize("strides", OUT_STRIDES)
def test_strided_out_and_lse(record, dtype, strides):
    """results where they belong, and what lies between them untouched"""
    for case in (replace(case, lengths=(700, 0, 65, 9000)) for case in small_cases(dtype)):
        problem = Problem.make(case)
        plain = clone(problem.run())
        out, lse = (
            embed(poisoned(tensor), *table[strides](tensor), fill=POISON)
            for tensor, table in ((problem.out, OUT_STRIDES), (problem.lse, LSE_STRIDES))
        )
        moved = replace(problem, out=out, lse=lse)
        check(moved, record)
        assert same_bits(plain, (out, lse)), case
        for tensor in (out, lse):
            tensor.fill_(POISON)
            assert (storage_of(tensor) == POISON).all(), f"written outside\n{case}"


@every_dtype
def test_shared_pages(record, dtype):
    """prefix sharing: requests read the same pages"""
    for case in (Case((1000, 1000, 700, 641), 64, dtype=dtype), Case((1000, 1000, 640), 16, s_q=2, dtype=dtype, seed=1)):
        check(shared_prefix(Problem.make(case), 10), record)


@every_dtype
def test_equal_requests_get_equal_results(record, dtype):
    """the same pages and queries: bit for bit the same, where both are cut alike"""
    problem = shared_prefix(Problem.make(Case((640, 640), 64, dtype=dtype)), 10)
    problem.q[1] = problem.q[0]
    check(problem, record, plan=plan_of_parts(problem, 1))
    assert torch.equal(problem.out[0], problem.out[1]) and torch.equal(problem.lse[0], problem.lse[1])


# ---------------------------------------------------------------------- the same numbers again
@every_dtype
def test_repeat_runs_are_bit_identical(dtype):
    for case in (*small_cases(dtype), Case(varied_lengths(64, 2000, 0, seed=5), 128, dtype=dtype)):
        problem = Problem.make(case)
        plan, first = problem.plan(), None
        for _ in range(10):
            problem.out.fill_(float("nan"))
            problem.lse.fill_(float("nan"))
            plan.o_split.fill_(float("nan"))
            plan.lse_split.fill_(float("nan"))
            again = clone(problem.run(plan))
            first = first or again
            assert same_bits(first, again), case


@every_dtype
@pytest.mark.parametrize("h_q, h_kv, s_q", [(128, 1, 1), (16, 1, 2), (5, 1, 1), (16, 2, 3)])
def test_splitting_changes_only_rounding(record, dtype, h_q, h_kv, s_q):
    problem = Problem.make(Case((5000, 300, 0, 64, 2), h_q, h_kv, s_q, dtype=dtype, seed=h_q))
    whole_plan, few_plan = plan_of_parts(problem, 1), plan_of_parts(problem, 4)
    many_plan = DecodePlan(problem.cache, h_q, s_q, config=ScheduleConfig(tile_cost=1000))
    many_plan.o_split.fill_(float("nan"))
    many_plan.lse_split.fill_(float("nan"))
    assert num_split(whole_plan) == 0 and num_split(few_plan) > 0
    assert int(many_plan.merges[1 : 1 + many_plan.merges[0, 0], 2].max()) > 8, "pieces of the longest request"
    check(problem, record, plan=whole_plan)
    out, lse = clone((problem.out, problem.lse))
    rel, absolute = TOLERANCE[dtype]
    for plan in (few_plan, many_plan):
        check(problem, record, plan=plan)
        assert (problem.out.double() - out.double()).norm() <= rel * out.double().norm()
        torch.testing.assert_close(problem.lse, lse, rtol=0, atol=absolute)


# ---------------------------------------------------------------------- partial results in float16 and float32
@every_dtype
@pytest.mark.parametrize("h_q, s_q", [(128, 1), (16, 2)])
def test_float32_partials(record, dtype, h_q, s_q):
    problem = Problem.make(Case((5000, 300, 0, 64), h_q, s_q=s_q, dtype=dtype, seed=h_q))
    out, lse = clone(problem.run(plan := problem.plan()))
    wide = DecodePlan(problem.cache, h_q, s_q, partials=torch.float32)
    wide.o_split.fill_(float("nan"))
    assert wide.o_split.dtype == torch.float32 and plan.o_split.dtype == torch.float16 and num_split(plan) > 0
    check(problem, record, plan=wide)
    rel, absolute = TOLERANCE[dtype]
    assert (problem.out.double() - out.double()).norm() <= rel * out.double().norm()
    torch.testing.assert_close(problem.lse, lse, rtol=0, atol=absolute)


@pytest.mark.parametrize("partials", [torch.float16, torch.float32], ids=str)
def test_latents_beyond_float16(record, partials):
    """float32 partials hold what bf16 latents can be; float16 ones are clamped, to a number"""
    problem = Problem.make(Case((5000,), 16))
    problem.q[..., :512] = 0  # (scores from rope alone: they stay moderate)
    problem.cache.pool[..., :512] = (problem.cache.pool[..., :512].abs() + 1) * 2.0**20
    plan = DecodePlan(problem.cache, 16, partials=partials)
    assert num_split(plan) == 1
    if partials == torch.float32:
        check(problem, record, plan=plan)
    else:
        out, _ = problem.run(plan)
        assert ((out.float() - 65504).abs() <= 256).all()
