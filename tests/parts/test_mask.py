"""kernels/parts/mask.py, run natively on the CPU: how many tokens each row sees."""

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass import Constexpr, Int32
from cutlass.cute.runtime import from_dlpack

from flashmla_cute.kernels.config import TILE
from flashmla_cute.kernels.parts.mask import Mask
from flashmla_cute.kernels.parts.rows import RowTile, num_row_tiles

TOKENS, HEADS = 7, 20


@cute.jit
def limits(out: cute.Tensor, seqlen: Int32, head_tile: Constexpr[int], causal: Constexpr[bool], window: Constexpr[int]):
    """out[token, head] = the row's limit; out[TOKENS, 0] = rows that do not see all of what their tile says is clear"""
    s_q, h_q, h_kv = Int32(TOKENS), Int32(HEADS), Int32(1)
    for tile in cutlass.range(num_row_tiles(head_tile, s_q, h_q, h_kv)):
        rows = RowTile.of(head_tile, tile, s_q, h_q, h_kv)
        mask = Mask(rows, seqlen, causal, window)
        first, end = mask.clear()
        for row in cutlass.range(TILE):
            token, head, exists = rows.locate(row)
            if exists:
                out[token, head] = mask.limit(row)
                if (mask.limit(row) < end) | ((window > 0) & (mask.limit(row) - window > first)):
                    out[TOKENS, 0] = out[TOKENS, 0] + 1


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_tile", [0, 8, 32, 64])
def test_limit(head_tile, causal, window):
    out = torch.zeros(TOKENS + 1, HEADS, dtype=torch.int32)
    compiled = cute.compile(limits, from_dlpack(out), Int32(1), head_tile, causal, window)
    for seqlen in (1, 3, 6, 7, 8, 64, 1000):
        out.fill_(-999)
        out[TOKENS, 0] = 0
        compiled(from_dlpack(out), seqlen)
        for token in range(TOKENS):
            sees = seqlen - TOKENS + 1 + token if causal else seqlen  # (not positive: no token)
            assert out[token].tolist() == [sees] * HEADS, f"seqlen {seqlen}, query token {token}"
        assert out[TOKENS, 0] == 0, "mask.apply leaves tiles alone that are clear"
