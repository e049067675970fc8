"""batch_invariant=True: a request's bits are the same whatever shares its batch, and wherever in it the request is."""

import random

import pytest
import torch

from flashmla_cute import DecodePlan, PagedKVCache, mla_decode
from flashmla_cute.testing import Case, Problem

from ..problems import check, num_split, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("decode_kernels")]

LENGTHS = (5000, 300, 0, 64, 1, 700, 20_000, 65, 4096, 129, 12_345, 640)
SHAPES = [(128, 1, 1), (16, 1, 1), (128, 1, 2), (5, 1, 3), (16, 2, 3)]  # (h_q, h_kv, s_q)


class Pool:
    """requests to draw batches from"""

    def __init__(self, case: Case):
        self.problem = Problem.make(case)

    def decode(self, requests: list[int], **options) -> tuple[torch.Tensor, torch.Tensor, DecodePlan]:
        """a batch of these requests"""
        p, index = self.problem, torch.tensor(requests, device="cuda")
        cache = PagedKVCache.from_tensors(p.cache.pool, p.cache.block_table[index], p.cache.cache_seqlens[index])
        plan = DecodePlan(cache, p.case.h_q, p.case.s_q, **options)
        plan.o_split.fill_(float("nan"))
        plan.lse_split.fill_(float("nan"))
        return *mla_decode(p.q[index], cache, plan, causal=p.case.causal), plan


def batches(count: int, seed: int) -> list[list[int]]:
    """of 1 to 40 requests, some of them several times"""
    drawn = random.Random(seed)
    return [[drawn.randrange(len(LENGTHS)) for _ in range(drawn.randrange(1, 41))] for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("partials", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("h_q, h_kv, s_q", SHAPES)
def test_bits_do_not_depend_on_the_batch(record, dtype, partials, h_q, h_kv, s_q):
    case = Case(LENGTHS, h_q, h_kv, s_q, dtype=dtype, seed=h_q)
    pool = Pool(case)
    options = dict(batch_invariant=True, partials=partials)
    plan = DecodePlan(pool.problem.cache, h_q, s_q, **options)
    check(pool.problem, record, plan=plan)
    assert num_split(plan) >= 3, "nothing is merged: nothing is shown"
    wanted = pool.problem.out, pool.problem.lse
    for requests in [*([i] for i in range(len(LENGTHS))), *batches(20, seed=h_q), [6] * 200]:
        out, lse, _ = pool.decode(requests, **options)
        for at, i in enumerate(requests):
            assert same_bits((out[at], lse[at]), (wanted[0][i], wanted[1][i])), f"request {i} at {at} of {requests}\n{case}"


def test_the_default_does_depend_on_it():
    """or the test above could not fail"""
    pool = Pool(Case(LENGTHS, 128))
    alone, crowded = pool.decode([6]), pool.decode([6] * 40)
    assert not same_bits(alone[:1], (crowded[0][:1],))


def test_a_long_request_alone_is_still_split():
    *_, plan = Pool(Case(LENGTHS, 16)).decode([6], batch_invariant=True)
    assert int(plan.merges[1, 2]) == 9  # sqrt(9 / 32 * 313)


def test_graph_replays_are_batch_invariant():
    """one captured plan, lengths that change around request 0"""
    pool = Pool(Case(LENGTHS, 128, seed=3))
    p, index = pool.problem, torch.tensor([6, 1, 2, 3], device="cuda")
    cache = PagedKVCache.from_tensors(p.cache.pool, p.cache.block_table[index], p.cache.cache_seqlens[index])
    plan, q = DecodePlan(cache, 128, batch_invariant=True), p.q[index]
    out, lse = mla_decode(q, cache, plan)
    wanted, graph = (out[0].clone(), lse[0].clone()), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update()
        mla_decode(q, cache, plan, out=out, lse=lse)
    for others in ((1, 0, 0), (300, 0, 64), (0, 0, 0)):
        cache.cache_seqlens[1:] = torch.tensor(others, dtype=torch.int32)
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits((out[0], lse[0]), wanted), others
