"""The decode kernel of an e4m3 cache against float64 on what the cache stands for, over poisoned pages and outputs."""

import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from flashmla_cute import DecodeOptions, DecodePlan, PagedKVCache, compile, heuristics, mla_decode, ops
from flashmla_cute.kernels.config import FORMATS, FP8_FORMATS, Fp8AppendConfig, MLAConfig
from flashmla_cute.reference import dequantise, quantise, reference_decode
from flashmla_cute.testing import TOLERANCE, Case, Problem

from ..fp8_problems import E4M3, Fp8Problem, check, make
from ..problems import POOL_STRIDES, Q_STRIDES, num_split, plan_of_parts, poisoned, same_bits, some_requests, varied_lengths

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fp8_kernels")]

BF16, FP16 = torch.bfloat16, torch.float16
EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 2047, 2048, 2049)
QUERIES = {"bf16": (BF16, None, 2), "fp16": (FP16, None, 2), "bf16 one term": (BF16, None, 1), "e4m3": (BF16, E4M3, 1)}
PAGES = (16, 48, 128, 1024)
OPTIONS = {
    "window": dict(options=DecodeOptions(window=100)),
    "softcap": dict(options=DecodeOptions(softcap=5.0)),
    "float32 out": dict(options=DecodeOptions(out="float32", lse_log2=True)),
    "lse by token": dict(options=DecodeOptions(lse_by_token=True)),
    "sink and pair": dict(sink=True, pair=True),
}
every_query = pytest.mark.parametrize("dtype, q_dtype, terms", QUERIES.values(), ids=QUERIES)


def needed_kernels() -> list[tuple[type, object]]:
    """(op, config) of all that these tests launch, to be compiled before them"""
    flat = FP8_FORMATS["float8_e4m3fn"]

    def decode(query: str = "bf16", causal: bool = True, **base):
        dtype, q_dtype, terms = QUERIES[query]
        kv = FORMATS[str(dtype).removeprefix("torch.")]
        name = str(q_dtype or dtype).removeprefix("torch.")
        return ops.Fp8DecodeOp, heuristics.fp8_config(MLAConfig(kv=kv, causal=causal, **base), flat, name, terms)

    return [
        *(decode(query, causal) for query in QUERIES for causal in (True, False)),
        *(decode(head_tile=8, causal=causal) for causal in (True, False)),
        decode(head_tile=64, causal=False),
        decode(head_tile=16),
        *(decode(page=page) for page in PAGES),
        decode("e4m3", page=32),
        *(decode(options=option["options"]) for option in OPTIONS.values() if "options" in option),
        decode(sink=True, q_pair=True),
        *(decode(causal=causal, split="float32") for causal in (True, False)),
        decode(ragged=True),
        *((ops.Fp8AppendOp, Fp8AppendConfig(source=source)) for source in (*FORMATS, flat.dtype)),
    ]


@pytest.fixture(scope="module")
def fp8_kernels():
    """all of them lie in the compile cache"""
    compile.get_many(needed_kernels())


# ---------------------------------------------------------------------- shapes
@every_query
@pytest.mark.parametrize("causal, h_q, s_q", [(True, 16, 2), (True, 5, 3), (False, 128, 1), (False, 16, 2)])
def test_page_edges_in_one_batch(dtype, q_dtype, terms, causal, h_q, s_q):
    check(make(Case(EDGES, h_q, 1, s_q, causal, dtype, seed=h_q), q_dtype, terms))


@pytest.mark.parametrize("causal, h_q, h_kv, s_q", [(True, 64, 8, 2), (False, 64, 8, 2), (False, 126, 3, 1)])
def test_several_kv_heads(causal, h_q, h_kv, s_q):
    check(make(Case(EDGES, h_q, h_kv, s_q, causal, seed=h_q)))


@every_query
@pytest.mark.parametrize("b, s_k", [(1, 20), (6, 140), (64, 4096), (2, 30000)])
def test_varied_lengths(dtype, q_dtype, terms, b, s_k):
    for seed, (h_q, s_q) in enumerate(((128, 1), (64, 2), (1, 4))):
        lengths = varied_lengths(b, s_k, 0, seed)
        requests = some_requests(lengths, 4, seed) if b * s_k > 50000 else None
        check(make(Case(lengths, h_q, s_q=s_q, dtype=dtype, seed=seed), q_dtype, terms), requests)


@every_query
def test_more_queries_than_tokens(dtype, q_dtype, terms):
    lengths, s_q = (0, 1, 2, 3, 4, 5, 70), 5
    problem = make(Case(lengths, 16, s_q=s_q, dtype=dtype), q_dtype, terms)
    check(problem)
    for i, length in enumerate(lengths):
        blind = max(0, s_q - length)
        assert (problem.out[i, :blind] == 0).all() and (problem.lse[i, :, :blind] == float("-inf")).all(), length


@every_query
def test_many_short_requests(dtype, q_dtype, terms):
    """several items a CTA, q after q through the ring"""
    lengths = varied_lengths(512, 100, 0, seed=3, with_zeros=True)
    check(make(Case(lengths, 128, dtype=dtype), q_dtype, terms), some_requests(lengths, 20, seed=3))
    check(make(Case((1,) * 700, 16, dtype=dtype), q_dtype, terms), list(range(0, 700, 29)))


@pytest.mark.parametrize("page", PAGES)
def test_page_sizes(page):
    check(make(Case((700, 0, 65, 3000, 1), 16, s_q=2, seed=page, page=page)))


def test_small_pages_of_an_e4m3_query():
    check(make(Case((700, 0, 65, 3000, 1), 16, s_q=2, page=32), E4M3, 1))


def test_ragged_queries():
    """each request as it is alone"""
    counts, lengths = (3, 0, 1, 2), (700, 65, 3000, 64)
    problem = make(Case(lengths, 16, s_q=3))
    begins = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device="cuda")
    q = torch.cat([problem.q[i, 3 - n :] for i, n in enumerate(counts)])
    plan = DecodePlan(problem.cache, 16, cu_seqlens_q=begins, max_seqlen_q=3)
    out, lse = mla_decode(q, problem.cache, plan)
    wanted, wanted_lse = reference_decode(
        problem.q, problem.pool64, problem.cache.block_table, list(lengths), 576**-0.5, True, 512
    )
    rel, gap = TOLERANCE[E4M3]
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
    first = PagedKVCache.from_tensors(cache.pool, cache.block_table[:1], cache.cache_seqlens[:1], scale=cache.scale)
    found = mla_decode(problem.q[:1], first, DecodePlan(first, 128, batch_invariant=True))
    assert same_bits((out[:1], lse[:1]), found)


# ---------------------------------------------------------------------- values
def test_two_terms_hold_bf16():
    """a q that bf16 and f16 both hold exactly gives the same scores in either"""
    case = Case((1000, 64, 3), 64, dtype=BF16)
    problem = make(case)
    problem.q.copy_((problem.q * 8).round() / 8)  # (few bits: exact in fp16 too, at every magnitude that occurs)
    some = problem.run()
    other = replace(problem, q=problem.q.half(), out=poisoned(problem.out).half(), lse=poisoned(problem.lse))
    other.run()
    assert torch.equal(some[1], other.lse)
    assert (some[0].double() - other.out.double()).norm() <= 3e-3 * other.out.double().norm()


@pytest.mark.parametrize("exponent", [-60, -20, 0, 20, 60])
def test_magnitude_of_q_does_not_matter(exponent):
    """each row is scaled by a power of two before it is quantised: the same bits, whatever the magnitude"""
    problem = make(Case((700, 65), 16, s_q=2))
    plain = tuple(t.clone() for t in problem.run())
    scale = problem.case.softmax_scale * 2.0**-exponent
    out, lse = mla_decode(problem.q * 2.0**exponent, problem.cache, problem.plan(), softmax_scale=scale)
    assert same_bits(plain, (out, lse))


def test_rows_of_very_different_magnitude():
    problem = make(Case((700, 65), 16, s_q=2))
    problem.q *= torch.logspace(-30, 4, 16, base=2, device="cuda").to(BF16)[:, None]
    out, _ = problem.run()
    scale = problem.case.softmax_scale
    wanted, _ = reference_decode(problem.q, problem.pool64, problem.cache.block_table, [700, 65], scale, True, 512)
    error = (out.double() - wanted).flatten(3).norm(dim=3) / wanted.norm(dim=3)
    assert error[:, :, :12].max() <= 6e-3  # the rows with moderate scores, each by itself


def test_large_scores():
    """the FP8 tensor core cuts a running sum after about 14 bits: the error of a score grows with it"""
    problem = make(Case((700, 0, 65, 3000), 128, s_q=2, gain=10.0))
    errors = problem.errors(*problem.run())
    assert not errors.where and errors.rel <= 1e-2 and errors.lse <= 1e-3 * problem.lse.max().item()


@every_query
def test_equal_scores(dtype, q_dtype, terms):
    lengths = (3, 64, 1000, 9000)
    problem = make(Case(lengths, 32, dtype=dtype, gain=0.0), q_dtype, terms)
    check(problem)
    for i, length in enumerate(lengths):
        assert (problem.lse[i] - math.log(length)).abs().max() < 1e-4


def test_scale_tensors_and_numbers_agree():
    problem = make(Case((700, 65), 16), E4M3)
    cache, plain = problem.cache, tuple(t.clone() for t in problem.run())
    scales = dict(scale=cache.scale.item(), q_scale=cache.q_scale.item())
    for given in (scales, {name: torch.tensor(number, device="cuda") for name, number in scales.items()}):
        moved = PagedKVCache.from_tensors(cache.pool, cache.block_table, cache.cache_seqlens, **given)
        assert same_bits(plain, replace(problem, cache=moved).run())


def test_a_scale_tensor_is_read_by_every_launch():
    problem = make(Case((700,), 16))
    scale = problem.cache.scale
    first, _ = problem.run(plan := problem.plan())
    first = first.double().clone()
    problem.q /= 2  # (scores stay, out doubles)
    scale *= 2
    problem.run(plan)
    assert (problem.out.double() - 2 * first).norm() <= 1e-3 * first.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_q_that_is_not_finite_is_nan_and_no_other(value):
    problem = make(Case((700, 65), 16))
    plain = tuple(t.clone() for t in problem.run())
    problem.q[1, 0, 7, 100] = value
    out, lse = problem.run()
    assert out[1, 0, 7].isnan().all()
    kept = torch.ones(2, 16, dtype=torch.bool, device="cuda")
    kept[1, 7] = False
    assert torch.equal(out[:, 0][kept], plain[0][:, 0][kept]) and torch.equal(lse[..., 0][kept], plain[1][..., 0][kept])


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
        moved = problem.with_pool(_embedded(problem.cache.pool, strides))
        assert same_bits(plain, moved.run()), moved.case


def _embedded(pool: torch.Tensor, strides: str) -> torch.Tensor:
    """POOL_STRIDES' view of a larger pool, for a type that cannot be filled with NaN by torch.full"""
    like = POOL_STRIDES[strides](torch.zeros(pool.shape, dtype=torch.int16, device=pool.device).view(FP16))
    storage = torch.full((like.untyped_storage().nbytes() // 2,), 0x7F, dtype=torch.uint8, device=pool.device).view(E4M3)
    moved = storage.as_strided(like.shape, like.stride(), like.storage_offset())
    moved.view(torch.uint8).copy_(pool.view(torch.uint8))
    return moved


# ---------------------------------------------------------------------- work
@every_query
def test_splitting_changes_only_rounding(dtype, q_dtype, terms):
    for h_q, s_q in ((128, 1), (16, 2)):
        problem = make(Case((5000, 300, 0, 64, 2), h_q, s_q=s_q, dtype=dtype, seed=h_q), q_dtype, terms)
        whole, few = (plan_of_parts(problem, parts) for parts in (1, 4))
        assert num_split(whole) == 0 and num_split(few) > 0
        check(problem, plan=whole)
        out = problem.out.double().clone()
        check(problem, plan=few)
        assert (problem.out.double() - out).norm() <= 4e-3 * out.norm()


@every_query
def test_runs_repeat_to_the_bit(dtype, q_dtype, terms):
    problem = make(Case(varied_lengths(30, 1500, 0, seed=1), 128, dtype=dtype), q_dtype, terms)
    plan = problem.plan()
    first = tuple(t.clone() for t in problem.run(plan))
    for _ in range(5):
        assert same_bits(first, problem.run(plan))


@pytest.mark.parametrize("h_q, s_q", [(128, 1), (16, 2)])
def test_float32_partials(h_q, s_q):
    problem = make(Case((5000, 300, 0, 64), h_q, s_q=s_q, seed=h_q))
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
    assert errors.rel <= 3e-3 and not errors.where


# ---------------------------------------------------------------------- cache
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("h_kv", [1, 3])
def test_append_quantises(dtype, h_kv):
    """the bytes that torch's own conversion gives; saturated beyond 448, NaN kept, no other slot touched"""
    values = torch.randn(300, h_kv, 576, device="cuda").to(dtype) * 100
    values[0, 0, :6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 2**-20], device="cuda")
    raw = torch.randint(0, 256, (6, 64, h_kv, 576), dtype=torch.uint8, device="cuda")
    table, lengths = torch.zeros(1, 1, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    cache = PagedKVCache.from_tensors(raw.view(E4M3), table, lengths, scale=0.37)
    slots = torch.randperm(6 * 64, device="cuda")[:300]
    slots[5:8] = torch.tensor([-1, 6 * 64, 2**40], device="cuda")
    wanted, written = raw.clone().view(-1, h_kv, 576), [i for i in range(300) if i not in (5, 6, 7)]
    expected = quantise(values, cache.scale).view(torch.uint8)
    wanted[slots[written]] = expected[written]
    cache.append(values[..., :512], values[..., 512:], slots)
    found = cache.pool.view(torch.uint8).view(-1, h_kv, 576)
    nan = (found & 0x7F) == 0x7F  # (either sign is NaN)
    assert torch.equal(nan, (wanted & 0x7F) == 0x7F) and torch.equal(found[~nan], wanted[~nan])
    copied = PagedKVCache.from_tensors(torch.zeros_like(cache.pool), table, lengths, scale=0.37)
    rows = cache.pool.view(-1, h_kv, 576)[:64]
    copied.append(rows[..., :512], rows[..., 512:], torch.arange(64, device="cuda"))
    assert torch.equal(copied.pool.view(torch.uint8)[0], rows.view(torch.uint8))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_convert(dtype):
    """scale from the requests' tokens alone: NaN and huge values elsewhere do not count"""
    problem = Problem.make(Case((700, 0, 65, 3000), 16, dtype=dtype))
    spare = problem.cache.pool[problem.cache.block_table[2, 1].long(), 1:]
    spare[:] = 1000.0  # past the end of request 2
    converted = problem.cache.convert()
    largest = max(
        problem.cache.pool[problem.cache.block_table[i, : -(-n // 64)].long()].flatten(0, 1)[:n].abs().max().item()
        for i, n in enumerate(problem.case.lengths)
        if n
    )
    assert math.isclose(converted.scale.item(), largest / 448, rel_tol=1e-6)
    pool64 = dequantise(converted.pool, converted.scale)
    quantised = Fp8Problem(problem.case, problem.q, converted, problem.out, problem.lse, None, pool64)
    check(quantised)
    errors = problem.errors(quantised.out, quantised.lse)  # against the cache before
    assert errors.rel < 5e-2, errors


def test_extend_and_append_serve_a_batch():
    cache = PagedKVCache.allocate(20, 3, 400, dtype=E4M3)
    rows = torch.randn(300, 576, device="cuda").bfloat16()
    cache.append(rows[:, :512], rows[:, 512:], cache.extend([100, 0, 200]))
    q = torch.randn(3, 1, 16, 576, device="cuda").bfloat16()
    out, _ = mla_decode(q, cache, DecodePlan(cache, 16))
    wanted, _ = reference_decode(q, dequantise(cache.pool, cache.scale), cache.block_table, [100, 0, 200], 576**-0.5, True, 512)
    assert (out.double() - wanted).norm() <= 6e-3 * wanted.norm()


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
