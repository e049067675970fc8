"""The decode kernel in every other shape: latent and rope, pages, q in two parts, options; all against float64."""

import math
from dataclasses import replace

import pytest
import torch

from flashmla_cute import DecodeOptions, PagedKVCache
from flashmla_cute.kernels.config import DIMS, TILE
from flashmla_cute.testing import Case, Problem

from ..problems import check, clone, same_bits

pytestmark = pytest.mark.gpu
LENGTHS = (0, 1, 63, 64, 65, 200, 1000, 3000)
PAGES = (8, 16, 24, 32, 40, 48, 64, 96, 128, 256, 1000, 1024)
DTYPES = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_dims = pytest.mark.parametrize("dims", DIMS, ids=str)
rows = pytest.mark.parametrize("h_q, h_kv, s_q", [(16, 1, 1), (128, 1, 2), (12, 2, 3)])


def case(lengths=LENGTHS, h_q=16, dims=(512, 64), **others) -> Case:
    return Case(lengths, h_q, latent=dims[0], rope=dims[1], **others)


@every_dims
@every_dtype
@rows
def test_dims(record, dims, dtype, h_q, h_kv, s_q):
    check(Problem.make(case(h_q=h_q, h_kv=h_kv, s_q=s_q, dims=dims, dtype=dtype)), record)


@pytest.mark.parametrize("page", PAGES)
@rows
def test_pages(record, page, h_q, h_kv, s_q):
    for seed in range(4):  # (each with another absurd id past the end of a request)
        check(Problem.make(case(h_q=h_q, h_kv=h_kv, s_q=s_q, page=page, seed=seed)), record)


@every_dims
@pytest.mark.parametrize("page", [8, 32, 96, 256])
def test_dims_and_pages(record, dims, page):
    check(Problem.make(case(dims=dims, page=page, h_q=32, s_q=2)), record)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_size_changes_nothing(page):
    """the same tokens, in pages of 64 and of `page`: the same bits"""
    problem = Problem.make(case(lengths=(700, 3000, 0, 64), h_q=128))
    expected, cache = clone(problem.run()), problem.cache
    tokens = [
        cache.pool[cache.block_table[i, : -(-n // 64)].long()].flatten(0, 1)[:n] for i, n in enumerate(problem.case.lengths)
    ]
    moved = PagedKVCache.allocate(2 + sum(-(-n // page) for n in problem.case.lengths), 4, 3000, page=page)
    moved.pool.fill_(float("nan"))
    slots = moved.extend(list(problem.case.lengths))
    rows = torch.cat(tokens)[:, 0]
    moved.append(rows[:, :512].contiguous(), rows[:, 512:].contiguous(), slots)
    again = replace(problem, cache=moved, out=torch.empty_like(problem.out), lse=torch.empty_like(problem.lse))
    assert same_bits(again.run(), expected)


@every_dims
@every_dtype
def test_a_table_that_ends_within_a_tile(record, dims, dtype):
    """pages of 8: a request whose last page is the last entry of a table that does not hold whole tiles"""
    check(Problem.make(case(lengths=(8, 40, 72), dims=dims, dtype=dtype, page=8)), record)


@pytest.mark.parametrize("dims", [pair for pair in DIMS if pair[1]], ids=str)
@rows
def test_q_in_two_parts(dims, h_q, h_kv, s_q):
    problem = Problem.make(case(h_q=h_q, h_kv=h_kv, s_q=s_q, dims=dims))
    expected = clone(problem.run())
    again = replace(problem, case=replace(problem.case, pair=True))
    assert same_bits(again.run(), expected)


@pytest.mark.parametrize("heads", [1, 3, 5, 8, 10, 12, 20, 24, 40, 48, 63, 65, 96, 100, 128, 200, 256])
def test_heads(record, heads):
    check(Problem.make(case(h_q=heads)), record)
    check(Problem.make(case(lengths=(300, 5, 1500), h_q=heads, s_q=2)), record)


@pytest.mark.parametrize("h_kv", [1, 2, 3, 4, 5, 6, 7, 8])
def test_kv_heads(record, h_kv):
    for group in (1, 5, 16):
        check(Problem.make(case(lengths=(300, 5, 1500), h_q=h_kv * group, h_kv=h_kv, s_q=2)), record)


@pytest.mark.parametrize("s_q", [5, 7, 64, 200, 512])
def test_many_query_tokens(record, s_q):
    for h_q in (1, 16):
        check(Problem.make(case(lengths=(600, 3, 0, 1500), h_q=h_q, s_q=s_q)), record)


# ---------------------------------------------------------------------- options
OPTIONS = {
    "window of 1": DecodeOptions(window=1),
    "window of 64": DecodeOptions(window=64),
    "window of 100": DecodeOptions(window=100),
    "window of 2000": DecodeOptions(window=2000),
    "softcap": DecodeOptions(softcap=2.0),
    "float32 out": DecodeOptions(out="float32"),
    "lse by token": DecodeOptions(lse_by_token=True),
    "lse to base 2": DecodeOptions(lse_log2=True),
    "all": DecodeOptions(window=333, softcap=5.0, out="float32", lse_by_token=True, lse_log2=True),
}


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(record, options, causal, sink):
    for h_q, s_q in ((16, 1), (128, 2), (5, 3)):
        check(Problem.make(case(h_q=h_q, s_q=s_q, causal=causal, options=options, sink=sink)), record)


@pytest.mark.parametrize("page", [16, 64])
def test_tiles_before_a_window_are_not_read(page):
    window, s_q = 100, 2
    problem = Problem.make(case((5000, 300, 64, 1000), s_q=s_q, page=page, options=DecodeOptions(window=window)))
    plain, cache, poisoned = clone(problem.run()), problem.cache, 0
    for i, length in enumerate(problem.case.lengths):
        unseen = torch.arange(max(length - (window + s_q - 1), 0) // TILE * TILE, device="cuda")
        cache.pool[cache.block_table[i, unseen // page].long(), unseen % page] = math.nan
        poisoned += len(unseen)
    assert poisoned > 5000
    assert same_bits(plain, problem.run())


def test_float32_out_is_closer():
    """bf16 rounds out to 1.7e-3; without that rounding what is left is p's"""
    errors = {out: Problem.make(case(options=DecodeOptions(out=out))).check().rel for out in ("", "float32")}
    assert errors["float32"] < 0.9 * errors[""]


@pytest.mark.parametrize("lengths", [(1000,), (40, 3000)])
def test_sinks_at_the_ends(lengths):
    """-inf takes nothing, +inf takes all"""
    problem = Problem.make(case(lengths=lengths, sink=True))
    plain = clone(replace(problem, sink=None).run())
    problem.sink[::2], problem.sink[1::2] = -math.inf, math.inf
    out, lse = problem.run()
    assert torch.equal(out[:, :, ::2], plain[0][:, :, ::2]) and (out[:, :, 1::2] == 0).all() and torch.equal(lse, plain[1])
