"""Requests of different query counts (cu_seqlens_q) against float64, over poisoned memory, and against the uniform kernel."""

import random
from dataclasses import replace

import pytest
import torch

from flashmla_cute import DecodePlan, PagedKVCache, mla_decode
from flashmla_cute.kernels.config import BATCH_INVARIANT, ScheduleConfig
from flashmla_cute.testing import Case, Problem

from ..problems import Q_STRIDES, clone, num_split, same_bits
from ..ragged import RaggedProblem, with_q
from .test_schedule import assert_equals_twin, poison

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("decode_kernels")]

HEADS = [(128, 1), (16, 1), (5, 1), (64, 1), (16, 2), (24, 3)]
LENGTHS = (5000, 300, 0, 64, 1, 700, 9000, 65, 4096, 129)
COUNTS = (1, 3, 2, 0, 4, 1, 7, 0, 2, 1)


def make(counts, lengths=LENGTHS, layout="contiguous", **case) -> RaggedProblem:
    problem = Problem.make(Case(lengths, s_q=max(1, *counts), **case))
    return with_q(RaggedProblem.make(problem, counts), Q_STRIDES[layout][0])


def drawn_counts(batch: int, most: int, seed: int) -> tuple[int, ...]:
    drawn = random.Random(seed)
    return tuple(drawn.choice((0, 1, 1, drawn.randint(0, most))) for _ in range(batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("h_q, h_kv", HEADS)
def test_mixed_counts(record, dtype, causal, h_q, h_kv):
    for seed, counts in enumerate((COUNTS, COUNTS[::-1], (0,) * 9 + (1,), (9, *(0,) * 9), (1,) * 10)):
        make(counts, h_q=h_q, h_kv=h_kv, causal=causal, dtype=dtype, seed=seed).check(record)


@pytest.mark.parametrize("h_q, most", [(64, 6), (128, 9), (16, 40)])
def test_many_requests_of_few_row_tiles(record, h_q, most):
    """a CTA of a late row tile passes over most of its part's items"""
    drawn = random.Random(most)
    lengths = tuple(drawn.randrange(0, 900) for _ in range(300))
    counts = drawn_counts(300, most, seed=most)
    ragged = make(counts, lengths, h_q=h_q)
    ragged.check(record, requests=drawn.sample(range(300), 60))
    assert ragged.out[: sum(counts)].isfinite().all()


@pytest.mark.parametrize("layout", ["every other token", "padded heads", "padded columns", "head before token"])
def test_strided_q(record, layout):
    for h_q, h_kv in ((16, 1), (128, 1), (16, 2)):
        plain = make(COUNTS, h_q=h_q, h_kv=h_kv)
        plain.run()
        moved = make(COUNTS, layout=layout, h_q=h_q, h_kv=h_kv)
        moved.check(record)
        some = slice(0, sum(COUNTS))
        assert same_bits((plain.out[some], plain.lse[some]), (moved.out[some], moved.lse[some])), layout


def test_float32_partials(record):
    ragged = make(COUNTS, h_q=128)
    plan = ragged.plan(partials=torch.float32)
    ragged.check(record, plan)
    assert num_split(plan) > 0


@pytest.mark.parametrize("h_q, h_kv, s_q", [(128, 1, 2), (16, 1, 1), (16, 2, 3)])
def test_equal_counts_give_the_bits_of_the_uniform_kernel(h_q, h_kv, s_q):
    problem = Problem.make(Case(LENGTHS, h_q, h_kv, s_q))
    ragged = RaggedProblem.make(problem, (s_q,) * len(LENGTHS))
    ragged.run()
    out, lse = problem.run()
    rows = ragged.out[: len(LENGTHS) * s_q].view(out.shape), ragged.lse[: len(LENGTHS) * s_q].view(len(LENGTHS), s_q, h_q)
    assert same_bits((out, lse.transpose(1, 2).contiguous()), rows)


@pytest.mark.parametrize("h_q, h_kv", [(128, 1), (16, 1), (16, 2)])
def test_batch_invariance(record, h_q, h_kv):
    ragged = make(COUNTS, h_q=h_q, h_kv=h_kv)
    most, cache = max(COUNTS), ragged.cache
    ragged.check(record, ragged.plan(batch_invariant=True))
    for i, count in enumerate(COUNTS):
        alone = PagedKVCache.from_tensors(cache.pool, cache.block_table[i : i + 1], cache.cache_seqlens[i : i + 1])
        begins = torch.tensor([0, count], dtype=torch.int32, device="cuda")
        plan = DecodePlan(alone, h_q, cu_seqlens_q=begins, max_seqlen_q=most, batch_invariant=True)
        rows = ragged.rows(i)
        out, lse = mla_decode(ragged.q[rows], alone, plan)
        assert same_bits((out, lse), (ragged.out[rows], ragged.lse[rows])), i


def test_tokens_beyond_max_seqlen_q_are_not_computed():
    """the first max_seqlen_q of a request are, though not as if the others were not there: the mask counts those computed"""
    ragged = make((1, 5, 2), (300, 700, 5000), h_q=16)
    ragged.run(ragged.plan(max_seqlen_q=2))
    assert ragged.out[[0, 1, 2, 6, 7]].isfinite().all() and ragged.lse[[0, 1, 2, 6, 7]].isfinite().all()
    assert ragged.out[3:6].isnan().all() and ragged.out[8:].isnan().all()


def test_no_rows_beyond_q_are_written():
    """cu_seqlens_q that promises more tokens than q has"""
    ragged = make((1, 2, 2), (300, 700, 5000), h_q=16)
    memory = torch.full((16, 16, 512), 7.0, dtype=torch.bfloat16, device="cuda")
    out, lse = memory[:4], torch.full((4, 16), 7.0, device="cuda")
    mla_decode(ragged.q[:4], ragged.cache, ragged.plan(), out=out, lse=lse)
    assert (memory[4:] == 7.0).all() and (out != 7.0).any(-1).all()


def test_no_tokens_at_all():
    ragged = make((0, 0), (300, 70), h_q=16)
    ragged.run()
    assert ragged.out.isnan().all() and ragged.lse.isnan().all()
    out, lse = mla_decode(ragged.q[:0], ragged.cache, ragged.plan())
    assert out.shape == (0, 16, 512) and lse.shape == (0, 16)
    torch.cuda.synchronize()


def test_a_graph_follows_counts_and_lengths(record):
    steps = [(COUNTS, LENGTHS), ((0,) * 10, LENGTHS), ((7, *(0,) * 8, 7), (1,) * 10), (COUNTS[::-1], LENGTHS[::-1])]
    first = make((7,) * 10, h_q=32)
    plan, graph = first.plan(), torch.cuda.CUDAGraph()
    first.run(plan)
    with torch.cuda.graph(graph):
        plan.update()
        first.run(plan)
    for seed, (counts, lengths) in enumerate(steps):
        fresh = Problem.make(replace(first.case, lengths=LENGTHS, seed=seed))
        begins = torch.tensor([0, *counts]).cumsum(0).int()
        cache = first.cache
        cache.cache_seqlens.copy_(torch.tensor([min(a, b) for a, b in zip(lengths, LENGTHS)], dtype=torch.int32))
        first.cu_seqlens_q.copy_(begins)
        first.q[: sum(counts)] = fresh.q.flatten(0, 1)[: sum(counts)]
        for tensor in (first.out, first.lse):
            tensor.fill_(float("nan"))
        graph.replay()
        case = replace(first.case, lengths=tuple(cache.cache_seqlens.tolist()))
        step = replace(first, case=case, counts=counts)
        errors = step.errors(step.out, step.lse)
        record.add(case, errors)
        assert errors.within(case.dtype), f"{errors}\n{counts}\n{lengths}"
        assert step.out[sum(counts) :].isnan().all()


@pytest.mark.parametrize("config", [ScheduleConfig(), BATCH_INVARIANT], ids=["balanced", "batch-invariant"])
def test_the_schedule_equals_its_twin(config):
    drawn = random.Random(1)
    for batch in (1, 2, 33, 132, 1000, 1025):
        lengths = [drawn.choice((0, 1, 64, drawn.randrange(20_000))) for _ in range(batch)]
        pool = torch.empty(1, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
        table = torch.empty(1, 400, dtype=torch.int32, device="cuda").expand(batch, -1)
        cache = PagedKVCache.from_tensors(pool, table, torch.tensor(lengths, dtype=torch.int32, device="cuda"))
        begins = torch.tensor([0, *drawn_counts(batch, 6, seed=batch)]).cumsum(0).to("cuda", torch.int32)
        fixed = config.max_pieces > 0
        plan = DecodePlan(cache, 64, cu_seqlens_q=begins, max_seqlen_q=6, batch_invariant=fixed, config=config)
        poison(plan)
        plan.update()
        assert_equals_twin(plan, lengths)


def test_remembered_calls_follow_the_number_of_tokens():
    ragged = make(COUNTS, h_q=16)
    plan = ragged.plan()
    ragged.run(plan)
    wanted = clone((ragged.out, ragged.lse))
    more = torch.cat([ragged.q, ragged.q])
    out, lse = mla_decode(more, ragged.cache, plan, softmax_scale=ragged.case.softmax_scale)
    rows = slice(0, sum(COUNTS))
    assert out.shape[0] == more.shape[0] and same_bits((out[rows], lse[rows]), (wanted[0][rows], wanted[1][rows]))
