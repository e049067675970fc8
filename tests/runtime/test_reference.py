"""The oracle: against torch's own attention, and the emulated split and merge against it."""

import math
from dataclasses import replace

import pytest
import torch

from flashmla_cute.kernels.config import TILE, ScheduleConfig
from flashmla_cute.reference import emulate_decode, reference_decode
from flashmla_cute.schedule import build_schedule

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

D, LATENT = 24, 16  # the maths does not care; small is fast


def make(lengths, s_q, h_q, h_kv, seed):
    """random inputs, NaN in every page and row past a request's end: (q, pool, block_table)"""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    counts = [-(-length // TILE) for length in lengths]
    pool = randn(sum(counts) + 1, TILE, h_kv, D)
    order = torch.randperm(len(pool), generator=generator)
    pool[order[-1]] = float("nan")
    table = torch.full((len(lengths), max([1, *counts])), -1, dtype=torch.int32)
    at = 0
    for i, (count, length) in enumerate(zip(counts, lengths)):
        table[i, :count] = order[at : at + count]
        if length % TILE:
            pool[table[i, count - 1], length % TILE :] = float("nan")
        at += count
    return randn(len(lengths), s_q, h_q, D), pool, table


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q, h_q, h_kv", [(1, 4, 1), (3, 4, 1), (3, 6, 2), (5, 3, 3)])
def test_reference_is_torch_attention(s_q, h_q, h_kv, causal):
    lengths = [70, 5, 128]
    q, pool, table = make(lengths, s_q, h_q, h_kv, seed=1)
    out, lse = reference_decode(q, pool, table, lengths, 0.3, causal, LATENT)
    for i, length in enumerate(lengths):
        k = pool[table[i, : -(-length // TILE)].long()].reshape(-1, h_kv, D)[:length]
        k = k.transpose(0, 1).repeat_interleave(h_q // h_kv, 0)
        mask = torch.ones(s_q, length, dtype=torch.bool).tril(length - s_q) if causal else None
        one = q[i].transpose(0, 1)
        wanted = torch.nn.functional.scaled_dot_product_attention(one, k, k[..., :LATENT], attn_mask=mask, scale=0.3)
        torch.testing.assert_close(out[i], wanted.transpose(0, 1), rtol=1e-12, atol=1e-12)
        s = one @ k.transpose(1, 2) * 0.3
        s = s if mask is None else s.masked_fill(~mask, float("-inf"))
        torch.testing.assert_close(lse[i], s.exp().sum(-1).log(), rtol=1e-12, atol=1e-12)


def test_reference_of_known_numbers():
    """two keys with scores 0 and log 3: weights 1/4 and 3/4"""
    q, pool = torch.zeros(1, 1, 1, D, dtype=torch.float64), torch.full((1, TILE, 1, D), float("nan"), dtype=torch.float64)
    pool[0, :2] = 0
    q[..., LATENT] = 1
    pool[0, 1, 0, LATENT] = math.log(3) / 0.5
    pool[0, 0, 0, 0], pool[0, 1, 0, 0] = 8, 16
    out, lse = reference_decode(q, pool, torch.zeros(1, 1, dtype=torch.int32), [2], 0.5, True, LATENT)
    assert out[0, 0, 0, 0].item() == pytest.approx(0.25 * 8 + 0.75 * 16) and (out[0, 0, 0, 1:] == 0).all()
    assert lse.item() == pytest.approx(math.log(4))


def test_rows_that_see_no_key():
    q, pool, table = make([0, 2], s_q=4, h_q=2, h_kv=1, seed=2)
    out, lse = reference_decode(q, pool, table, [0, 2], 1.0, True, LATENT)
    assert (out[0] == 0).all() and (lse[0] == float("-inf")).all()
    assert (out[1, :2] == 0).all() and (lse[1, :, :2] == float("-inf")).all()  # 2 tokens: only queries 2 and 3 see any
    assert lse[1, :, 2:].isfinite().all() and (out[1, 2:] != 0).all()


@st.composite
def problems(draw):
    lengths = draw(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 500)), min_size=1, max_size=6))
    h_kv = draw(st.sampled_from([1, 1, 2, 3]))
    return dict(
        lengths=lengths,
        s_q=draw(st.integers(1, 5)),
        h_q=h_kv * draw(st.integers(1, 3)),
        h_kv=h_kv,
        causal=draw(st.booleans()),
        max_parts=draw(st.integers(1, 20)),
        row_tiles=draw(st.integers(1, 3)),
        config=ScheduleConfig(
            item_tiles=draw(st.integers(0, 4)),
            tile_cost=draw(st.sampled_from([0, 1, 20, 1000])),
            max_pieces=draw(st.sampled_from([0, 0, 2, 32])),
            piece_tiles=draw(st.sampled_from([2, 36])),
            runs=draw(st.integers(0, 1)),
        ),
        gain=draw(st.sampled_from([0.0, 1.0, 100.0])),
        seed=draw(st.integers(0, 1000)),
    )


@hypothesis.given(problems())
@hypothesis.settings(max_examples=100)
def test_splitting_and_merging_change_nothing(problem):
    lengths, causal = problem["lengths"], problem["causal"]
    q, pool, table = make(lengths, problem["s_q"], problem["h_q"], problem["h_kv"], problem["seed"])
    q *= problem["gain"]
    schedule = build_schedule(lengths, problem["row_tiles"], problem["max_parts"], problem["config"])
    out, lse = emulate_decode(q, pool, table, schedule, 0.2, causal, LATENT)
    wanted_out, wanted_lse = reference_decode(q, pool, table, lengths, 0.2, causal, LATENT)
    torch.testing.assert_close(out, wanted_out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-10, atol=1e-10)


def test_the_emulator_notices_a_piece_that_nothing_merges():
    q, pool, table = make([500], s_q=1, h_q=1, h_kv=1, seed=3)
    schedule = build_schedule([500], 1, 3, ScheduleConfig(tile_cost=1000))
    assert len(schedule.merges) == 1
    with pytest.raises(AssertionError, match="partial results that nothing merges"):
        emulate_decode(q, pool, table, replace(schedule, merges=()), 0.2, True, LATENT)
