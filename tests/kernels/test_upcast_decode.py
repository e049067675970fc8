"""The decode kernel of an e4m3 cache with scales for each token, and what writes such caches, against float64 on what the bytes
stand for, over poisoned pages and outputs."""

import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from flashmla_cute import DecodeOptions, DecodePlan, PagedKVCache, compile, heuristics, mla_decode, ops
from flashmla_cute.kernels.config import FORMATS, SCALED_FORMATS, Fp8AppendConfig, MLAConfig
from flashmla_cute.reference import pack, reference_decode, unpack
from flashmla_cute.testing import Case, Problem

from ..fp8_problems import ScaledProblem
from ..problems import POOL_STRIDES, Q_STRIDES, num_split, plan_of_parts, poisoned, same_bits, some_requests, varied_lengths

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("upcast_kernels")]

BF16, FP16 = torch.bfloat16, torch.float16
# of out and lse, see testing.TOLERANCE; numbers times their scale are rounded to 11 bits, rope columns of an fp16 q to 8
TOLERANCE = {BF16: (4e-3, 2e-3), FP16: (3e-3, 5e-3)}
EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 2047, 2048, 2049)
PAGES = (16, 48, 128, 1024)
OPTIONS = {
    "window": dict(options=DecodeOptions(window=100)),
    "softcap": dict(options=DecodeOptions(softcap=5.0)),
    "float32 out": dict(options=DecodeOptions(out="float32", lse_log2=True)),
    "lse by token": dict(options=DecodeOptions(lse_by_token=True)),
    "sink and pair": dict(sink=True, pair=True),
}
both_dtypes = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)


def needed_kernels() -> list[tuple[type, object]]:
    """(op, config) of all that these tests launch, to be compiled before them"""

    def decode(dtype: str = "bfloat16", causal: bool = True, **base):
        base = MLAConfig(kv=FORMATS[dtype], causal=causal, **base)
        return ops.Fp8DecodeOp, heuristics.fp8_config(base, SCALED_FORMATS[4], dtype, 2)

    return [
        *(decode(dtype, causal) for dtype in FORMATS for causal in (True, False)),
        *(decode(head_tile=8, causal=causal) for causal in (True, False)),
        decode(head_tile=64, causal=False),
        decode(head_tile=16),
        *(decode(page=page) for page in PAGES),
        *(decode(options=option["options"]) for option in OPTIONS.values() if "options" in option),
        decode(sink=True, q_pair=True),
        decode(causal=False, split="float32"),
        decode(ragged=True),
        *((ops.Fp8AppendOp, Fp8AppendConfig(kv=kv, source=source)) for kv in SCALED_FORMATS.values() for source in FORMATS),
    ]


@pytest.fixture(scope="module")
def upcast_kernels():
    """all of them lie in the compile cache"""
    compile.get_many(needed_kernels())


def make(case: Case, scales: int = 4) -> ScaledProblem:
    return ScaledProblem.of(Problem.make(case), scales)


def check(problem: ScaledProblem, requests: list[int] | None = None, plan: DecodePlan | None = None):
    errors, (rel, gap) = problem.errors(*problem.run(plan), requests), TOLERANCE[problem.case.dtype]
    assert not errors.where and errors.rel <= rel and errors.lse <= gap, f"{errors}\n{problem.case}"
    return errors


# ---------------------------------------------------------------------- shapes
@both_dtypes
@pytest.mark.parametrize("scales", SCALED_FORMATS)
@pytest.mark.parametrize("causal, h_q, s_q", [(True, 16, 2), (True, 5, 3), (False, 128, 1), (False, 16, 2)])
def test_page_edges_in_one_batch(dtype, scales, causal, h_q, s_q):
    check(make(Case(EDGES, h_q, 1, s_q, causal, dtype, seed=h_q), scales))


@pytest.mark.parametrize("causal, h_q, h_kv, s_q", [(True, 64, 8, 2), (False, 64, 8, 2), (False, 126, 3, 1)])
def test_several_kv_heads(causal, h_q, h_kv, s_q):
    check(make(Case(EDGES, h_q, h_kv, s_q, causal, seed=h_q)))


@both_dtypes
@pytest.mark.parametrize("b, s_k", [(1, 20), (6, 140), (64, 4096), (2, 30000)])
def test_varied_lengths(dtype, b, s_k):
    for seed, (h_q, s_q) in enumerate(((128, 1), (64, 2), (1, 4))):
        lengths = varied_lengths(b, s_k, 0, seed)
        requests = some_requests(lengths, 4, seed) if b * s_k > 50000 else None
        check(make(Case(lengths, h_q, s_q=s_q, dtype=dtype, seed=seed)), requests)


@both_dtypes
def test_more_queries_than_tokens(dtype):
    lengths, s_q = (0, 1, 2, 3, 4, 5, 70), 5
    problem = make(Case(lengths, 16, s_q=s_q, dtype=dtype))
    check(problem)
    for i, length in enumerate(lengths):
        blind = max(0, s_q - length)
        assert (problem.out[i, :blind] == 0).all() and (problem.lse[i, :, :blind] == float("-inf")).all(), length


@both_dtypes
def test_many_short_requests(dtype):
    """several items a CTA, q after q through the ring"""
    lengths = varied_lengths(512, 100, 0, seed=3, with_zeros=True)
    check(make(Case(lengths, 128, dtype=dtype)), some_requests(lengths, 20, seed=3))
    check(make(Case((1,) * 700, 16, dtype=dtype)), list(range(0, 700, 29)))


@pytest.mark.parametrize("page", PAGES)
def test_page_sizes(page):
    check(make(Case((700, 0, 65, 3000, 1), 16, s_q=2, seed=page, page=page)))


def test_ragged_queries():
    """each request as it is alone"""
    counts, lengths = (3, 0, 1, 2), (700, 65, 3000, 64)
    problem = make(Case(lengths, 16, s_q=3))
    begins = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device="cuda")
    q = torch.cat([problem.q[i, 3 - n :] for i, n in enumerate(counts)])
    plan = DecodePlan(problem.cache, 16, cu_seqlens_q=begins, max_seqlen_q=3)
    out, lse = mla_decode(q, problem.cache, plan)
    table, (rel, gap) = problem.cache.block_table, TOLERANCE[BF16]
    wanted, wanted_lse = reference_decode(problem.q, problem.pool64, table, list(lengths), 576**-0.5, True, 512)
    for i, n in enumerate(counts):
        rows = slice(int(begins[i]), int(begins[i]) + n)
        assert (out[rows].double() - wanted[i, 3 - n :]).norm() <= rel * wanted[i, 3 - n :].norm()
        assert n == 0 or (lse[rows].double() - wanted_lse[i, :, 3 - n :].T).abs().max() <= gap


@pytest.mark.parametrize("which", OPTIONS)
def test_options(which):
    check(make(Case((700, 0, 65, 3000), 16, s_q=2, **OPTIONS[which])))


def test_batch_invariance():
    problem = make(Case((3000, 700, 65), 128))
    out, lse = problem.run(problem.plan(batch_invariant=True))
    cache = problem.cache
    first = PagedKVCache.from_tensors(cache.pool, cache.block_table[:1], cache.cache_seqlens[:1])
    found = mla_decode(problem.q[:1], first, DecodePlan(first, 128, batch_invariant=True))
    assert same_bits((out[:1], lse[:1]), found)


# ---------------------------------------------------------------------- values
def with_scales(problem: ScaledProblem, factors: torch.Tensor) -> ScaledProblem:
    """each scale times one of `factors`, [pages, page, kv heads, 4]"""
    scales = problem.cache.pool[..., 512:528].contiguous().view(torch.float32) * factors
    problem.cache.pool[..., 512:528] = scales.view(torch.uint8)
    return replace(problem, pool64=unpack(problem.cache.pool))


def test_each_scale_counts():
    """of every token and every 128 columns another, from 2^-7 to 2"""
    problem = make(Case((700, 0, 65, 3000), 16, s_q=2))
    shape = (*problem.cache.pool.shape[:3], 4)
    factors = 2 ** (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 8 - 7)
    check(with_scales(problem, factors.cuda()))


@pytest.mark.parametrize("exponent, bound", [(-18, 2e-2), (-14, 4e-3), (8, 4e-3)])
def test_small_and_large_scales(exponent, bound):
    """q makes up for it in the scores.  Below 6e-5 an f16 has an absolute error of 3e-8: half a percent of numbers of 2^-18,
    and all that is left of means of many (hence partial results in float32)."""
    problem = make(Case((700, 65), 16))
    problem.q[..., :512] *= 2.0**-exponent
    problem = with_scales(problem, torch.tensor(2.0**exponent, device="cuda"))
    errors = problem.errors(*problem.run(problem.plan(partials=torch.float32)))
    assert not errors.where and errors.rel <= bound and errors.lse <= 10 * bound, errors


@pytest.mark.parametrize("exponent", [-60, -20, 0, 20, 60])
def test_magnitude_of_q_does_not_matter(exponent):
    """each row is scaled by a power of two before it becomes f16: the same bits, whatever the magnitude"""
    problem = make(Case((700, 65), 16, s_q=2))
    plain = tuple(t.clone() for t in problem.run())
    scale = problem.case.softmax_scale * 2.0**-exponent
    out, lse = mla_decode(problem.q * 2.0**exponent, problem.cache, problem.plan(), softmax_scale=scale)
    assert same_bits(plain, (out, lse))


def test_large_scores():
    problem = make(Case((700, 0, 65, 3000), 128, s_q=2, gain=10.0))
    errors = problem.errors(*problem.run())
    assert not errors.where and errors.rel <= 1e-2 and errors.lse <= 1e-3 * problem.lse.max().item(), errors


@both_dtypes
def test_equal_scores(dtype):
    lengths = (3, 64, 1000, 9000)
    problem = make(Case(lengths, 32, dtype=dtype, gain=0.0))
    check(problem)
    for i, length in enumerate(lengths):
        assert (problem.lse[i] - math.log(length)).abs().max() < 1e-4


@both_dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [100, 500, 550])
def test_a_row_of_q_that_is_not_finite_is_nan_and_no_other(dtype, value, column):
    problem = make(Case((700, 65), 16, dtype=dtype))
    plain = tuple(t.clone() for t in problem.run())
    problem.q[1, 0, 7, column] = value
    out, lse = problem.run()
    assert out[1, 0, 7].isnan().all()
    kept = torch.ones(2, 16, dtype=torch.bool, device="cuda")
    kept[1, 7] = False
    assert torch.equal(out[:, 0][kept], plain[0][:, 0][kept]) and torch.equal(lse[..., 0][kept], plain[1][..., 0][kept])


@pytest.mark.parametrize("first, end", [(5, 6), (512, 516), (524, 528), (600, 602)])
def test_nan_in_a_token(first, end):
    """a number, a scale, the rope: every row of its request sees it, no other request does"""
    problem = make(Case((700, 65), 16))
    plain = problem.run()[0].clone()
    page = problem.cache.block_table[1, 0].long()
    problem.cache.pool[page, 3, 0, first:end] = 0xFF
    out, _ = problem.run()
    assert out[1].isnan().all() and torch.equal(out[0], plain[0])


# ---------------------------------------------------------------------- memory
@pytest.mark.parametrize("strides", Q_STRIDES)
def test_strided_q(strides):
    problem = make(Case((700, 0, 65, 3000), 16, s_q=3))
    plain = tuple(t.clone() for t in problem.run())
    moved = replace(problem, q=Q_STRIDES[strides][0](problem.q), out=poisoned(problem.out), lse=poisoned(problem.lse))
    assert same_bits(plain, moved.run())


@pytest.mark.parametrize(
    "strides", [name for name in POOL_STRIDES if name != "pages padded by a vector"]
)  # (of 16-bit elements)
def test_strided_pool(strides):
    for h_q, h_kv, s_q in ((64, 1, 1), (64, 8, 2)):
        problem = make(Case((700, 0, 65, 3000), h_q, h_kv, s_q, seed=h_q))
        plain = tuple(t.clone() for t in problem.run())
        like = POOL_STRIDES[strides](torch.zeros(problem.cache.pool.shape, dtype=torch.int16, device="cuda").view(FP16))
        storage = torch.full((like.untyped_storage().nbytes() // 2,), 0xFF, dtype=torch.uint8, device="cuda")
        moved = storage.as_strided(like.shape, like.stride(), like.storage_offset())
        moved.copy_(problem.cache.pool)
        assert same_bits(plain, problem.with_pool(moved).run()), problem.case


# ---------------------------------------------------------------------- work
@both_dtypes
def test_splitting_changes_only_rounding(dtype):
    for h_q, s_q in ((128, 1), (16, 2)):
        problem = make(Case((5000, 300, 0, 64, 2), h_q, s_q=s_q, dtype=dtype, seed=h_q))
        whole, few = (plan_of_parts(problem, parts) for parts in (1, 4))
        assert num_split(whole) == 0 and num_split(few) > 0
        check(problem, plan=whole)
        out = problem.out.double().clone()
        check(problem, plan=few)
        assert (problem.out.double() - out).norm() <= 4e-3 * out.norm()


@both_dtypes
def test_runs_repeat_to_the_bit(dtype):
    problem = make(Case(varied_lengths(30, 1500, 0, seed=1), 128, dtype=dtype))
    plan = problem.plan()
    first = tuple(t.clone() for t in problem.run(plan))
    for _ in range(20):
        assert same_bits(first, problem.run(plan))


def test_float32_partials():
    problem = make(Case((5000, 300, 0, 64), 128))
    check(problem, plan=problem.plan(partials=torch.float32))


def test_graph_replay_follows_lengths():
    problem = make(Case((3000, 700), 16))
    plan = problem.plan()
    problem.run(plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update()
        problem.run(plan)
    problem.cache.cache_seqlens.copy_(torch.tensor([130, 699]))
    graph.replay()
    shorter = replace(problem, case=replace(problem.case, lengths=(130, 699)))
    errors = shorter.errors(problem.out, problem.lse)
    assert errors.rel <= 4e-3 and not errors.where


def test_operator():
    """what torch.compile keeps in a graph launches the same"""
    problem = make(Case((700, 65), 16))
    plan, cache = problem.plan(), problem.cache
    plain = tuple(t.clone() for t in problem.run(plan))
    out, lse = poisoned(problem.out), poisoned(problem.lse)
    tensors = (problem.q, cache.pool, cache.block_table, plan.items, plan.parts, plan.merges, out, lse)
    how = (plan.o_split, plan.lse_split, problem.case.softmax_scale, plan.num_sms, None, None, cache.scale, cache.q_scale)
    torch.ops.flashmla_cute.fp8_decode(*tensors, *how, 2, BF16, True, False, 0, 0.0, "", False, False)
    assert same_bits(plain, (out, lse))


# ---------------------------------------------------------------------- cache
@both_dtypes
@pytest.mark.parametrize("scales", SCALED_FORMATS)
@pytest.mark.parametrize("h_kv", [1, 3])
def test_append_quantises(dtype, scales, h_kv):
    """the bytes of `pack`; infinities saturated, NaN kept, zeros, no other slot touched"""
    values = (torch.randn(300, h_kv, 576, device="cuda") * torch.logspace(-4, 3, 300, device="cuda")[:, None, None]).to(dtype)
    values[0, 0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 6e4, 2**-20], device="cuda")
    values[1, 0], values[2, 0, :128], values[3, 0, 128:256] = 0.0, float("inf"), float("nan")
    raw = torch.randint(0, 256, (6, 64, h_kv, 656), dtype=torch.uint8, device="cuda")
    table, lengths = torch.zeros(1, 1, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    cache = PagedKVCache.from_tensors(raw.clone(), table, lengths, scales=scales)
    slots = torch.randperm(6 * 64, device="cuda")[:300]
    slots[5:8] = torch.tensor([-1, 6 * 64, 2**40], device="cuda")
    wanted, written = raw.view(-1, h_kv, 656), [i for i in range(300) if i not in (5, 6, 7)]
    wanted[slots[written]] = pack(values[..., :512], values[..., 512:], scales)[written]
    cache.append(values[..., :512], values[..., 512:], slots)
    found = cache.pool.view(-1, h_kv, 656)
    nan = ((found & 0x7F) == 0x7F) & (torch.arange(656, device="cuda") < 512)  # (either sign is NaN)
    assert torch.equal(nan, ((wanted & 0x7F) == 0x7F) & (torch.arange(656, device="cuda") < 512))
    assert torch.equal(found[~nan], wanted[~nan])


@both_dtypes
@pytest.mark.parametrize("scales", SCALED_FORMATS)
def test_convert(dtype, scales):
    problem = Problem.make(Case((700, 0, 65, 3000), 16, dtype=dtype))
    converted = problem.cache.convert(scales=scales)
    used = problem.cache.block_table[3, :46].long()
    wanted = pack(problem.cache.pool[used, ..., :512], problem.cache.pool[used, ..., 512:], scales)
    assert torch.equal(converted.pool[used], wanted)
    scaled = ScaledProblem(problem.case, problem.q, converted, problem.out, problem.lse, None, unpack(converted.pool))
    check(scaled)
    errors = problem.errors(scaled.out, scaled.lse)  # against the cache before
    assert errors.rel < 5e-2, errors


@pytest.mark.parametrize("scales", SCALED_FORMATS)
def test_extend_and_append_serve_a_batch(scales):
    cache = PagedKVCache.allocate(20, 3, 400, dtype=torch.float8_e4m3fn, scales=scales)
    rows = torch.randn(300, 576, device="cuda").bfloat16()
    cache.append(rows[:, :512], rows[:, 512:], cache.extend([100, 0, 200]))
    q = torch.randn(3, 1, 16, 576, device="cuda").bfloat16()
    out, _ = mla_decode(q, cache, DecodePlan(cache, 16))
    wanted, _ = reference_decode(q, unpack(cache.pool), cache.block_table, [100, 0, 200], 576**-0.5, True, 512)
    assert (out.double() - wanted).norm() <= 4e-3 * wanted.norm()
