"""cu_seqlens_q without a GPU: through the compiled functions' twins, and what is refused."""

import pytest
import torch

from flashmla_cute import DecodePlan, PagedKVCache, mla_decode
from flashmla_cute.heuristics import choose_head_tile
from flashmla_cute.schedule import build_schedule
from flashmla_cute.testing import Case, Problem

from ..ragged import RaggedProblem
from . import twins

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

COUNTS, LENGTHS = (1, 3, 0, 2), (70, 300, 5, 0)


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        twins.install(patch)
        yield


def make(counts=COUNTS, lengths=LENGTHS, **case) -> RaggedProblem:
    return RaggedProblem.make(Problem.make(Case(lengths, s_q=max(1, *counts), **case), "cpu"), counts)


@pytest.mark.parametrize("h_q, h_kv", [(8, 1), (16, 2)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("invariant", [True, False])
def test_through_the_twins(record, h_q, h_kv, causal, invariant):
    ragged = make(h_q=h_q, h_kv=h_kv, causal=causal)
    ragged.check(record, ragged.plan(batch_invariant=invariant))


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([0, 1, 1, 2, 7])), min_size=1, max_size=40), st.integers(1, 140)
)
def test_requests_without_queries_have_no_work(requests, parts):
    lengths, counts = zip(*requests)
    begins = [sum(counts[:i]) for i in range(len(counts) + 1)]
    made = build_schedule(lengths, 2, parts, cu_seqlens_q=begins)
    assert {item.batch for item in made.items} == {i for i, (n, k) in enumerate(requests) if n and k}
    assert all((item.token, item.num_queries) == (begins[item.batch], counts[item.batch]) for item in made.items)
    same = build_schedule([n * bool(k) for n, k in requests], 2, parts)
    assert [(i.first, i.end, i.slot) for i in made.items] == [(i.first, i.end, i.slot) for i in same.items]


def test_new_outputs_have_the_shapes_of_q():
    ragged = make(h_q=8)
    out, lse = mla_decode(ragged.q, ragged.cache, ragged.plan())
    assert out.shape == (*ragged.q.shape[:2], 512) and lse.shape == ragged.q.shape[:2]


def test_rows_are_one_axis_only_where_tokens_and_heads_are():
    assert choose_head_tile(1, 16, 1, mergeable=True, ragged=True) == 0
    assert choose_head_tile(1, 16, 1, mergeable=False, ragged=False) == 0  # a token a request: its heads are the axis
    assert choose_head_tile(1, 16, 1, mergeable=False, ragged=True) == 64
    assert choose_head_tile(3, 16, 1, mergeable=False, ragged=True) == 16


PLAN = {
    "a list": (dict(cu_seqlens_q=[0, 1]), TypeError, "cu_seqlens_q is a list"),
    "int64": (dict(cu_seqlens_q=torch.zeros(5, dtype=torch.int64)), ValueError, "cu_seqlens_q.dtype is torch.int64"),
    "too short": (dict(cu_seqlens_q=torch.zeros(4, dtype=torch.int32)), ValueError, r"cu_seqlens_q.shape is \(4,\)"),
    "strided": (dict(cu_seqlens_q=torch.zeros(10, dtype=torch.int32)[::2]), ValueError, r"cu_seqlens_q.stride\(\) is \(2,\)"),
    "no maximum": (dict(max_seqlen_q=None), ValueError, "max_seqlen_q is None; allowed: a positive integer"),
    "a maximum of 0": (dict(max_seqlen_q=0), ValueError, "max_seqlen_q is 0; allowed: a positive integer"),
    "both": (dict(num_queries=2), ValueError, "num_queries is 2; allowed: nothing beside cu_seqlens_q"),
    "only a maximum": (dict(cu_seqlens_q=None), ValueError, "max_seqlen_q is 3; allowed: None without cu_seqlens_q"),
}


@pytest.mark.parametrize("what", PLAN)
def test_a_plan_refuses(what):
    change, error, message = PLAN[what]
    ragged = make(h_q=8)
    with pytest.raises(error, match=message):
        DecodePlan(ragged.cache, 8, **{**dict(cu_seqlens_q=ragged.cu_seqlens_q, max_seqlen_q=3), **change})


CALL = {
    "a uniform q": (lambda r: dict(q=r.q[None]), r"q.shape is \(1, 9, 8, 576\)"),
    "other heads": (lambda r: dict(q=r.q[:, :4]), r"q.shape is \(9, 4, 576\); allowed: \(9, 8, 576\)"),
    "out of other tokens": (lambda r: dict(out=r.out[:-1]), r"out.shape is \(8, 8, 512\); allowed: \(9, 8, 512\)"),
    "lse by head": (lambda r: dict(lse=r.lse.T), r"lse.shape is \(8, 9\); allowed: \(9, 8\)"),
}


@pytest.mark.parametrize("what", CALL)
def test_a_call_refuses(what):
    change, message = CALL[what]
    ragged = make(h_q=8)
    arguments = dict(q=ragged.q, cache=ragged.cache, plan=ragged.plan(), out=ragged.out, lse=ragged.lse)
    with pytest.raises(ValueError, match=message):
        mla_decode(**{**arguments, **change(ragged)})
    assert ragged.out.isnan().all()


def test_a_ragged_q_needs_a_ragged_plan():
    ragged = make(h_q=8)
    cache = PagedKVCache.from_tensors(*(getattr(ragged.cache, n) for n in ("pool", "block_table", "cache_seqlens")))
    with pytest.raises(ValueError, match=r"q.shape is \(9, 8, 576\); allowed: \(4, 1, 8, 576\)"):
        mla_decode(ragged.q, cache, DecodePlan(cache, 8))
