"""kernels/parts/rows.py, run natively on the CPU: every query row is located exactly once."""

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass import Constexpr, Int32
from cutlass.cute.runtime import from_dlpack

from flashmla_cute.heuristics import choose_head_tile
from flashmla_cute.kernels.config import TILE
from flashmla_cute.kernels.parts.rows import RowTile, num_row_tiles

MAX_HEADS, MAX_TOKENS = 128, 8
SHAPES = [
    (s_q, group * h_kv, h_kv)
    for s_q in (1, 2, 3, 4, 7)
    for group in (1, 2, 3, 5, 8, 12, 16, 21, 40, 63, 64, 65, 96, 126, 128)
    for h_kv in (1, 2, 3, 8)
    if group * h_kv <= MAX_HEADS
]


@cute.jit
def locate_all(
    count: cute.Tensor,  # (token, head): how often it was located
    info: cute.Tensor,  # rows that do not exist, rows whose kv head is wrong, rows off the tile's box
    s_q: Int32,
    h_q: Int32,
    h_kv: Int32,
    head_tile: Constexpr[int],
):
    for tile in cutlass.range(num_row_tiles(head_tile, s_q, h_q, h_kv)):
        rows = RowTile.of(head_tile, tile, s_q, h_q, h_kv)
        for row in cutlass.range(TILE):
            token, head, exists = rows.locate(row)
            if exists:
                count[token, head] = count[token, head] + 1
                if head // (h_q // h_kv) != rows.kv_head:
                    info[1] = info[1] + 1
                # where TMA puts it: its place in the tile's box of (heads, tokens)
                box = token * h_q + head - rows.first_head
                if cutlass.const_expr(head_tile != 0):
                    box = head - rows.first_head + head_tile * (token - rows.token)
                if box != row:
                    info[2] = info[2] + 1
            else:
                info[0] = info[0] + 1


class Native:
    """`locate_all` compiled for the CPU, once for each tiling"""

    def __init__(self):
        self.count = torch.zeros(MAX_TOKENS, MAX_HEADS, dtype=torch.int32)
        self.info = torch.zeros(3, dtype=torch.int32)
        self.tensors = from_dlpack(self.count), from_dlpack(self.info)
        self.compiled = {}

    def run(self, head_tile, s_q, h_q, h_kv):
        if head_tile not in self.compiled:
            one = Int32(1)
            self.compiled[head_tile] = cute.compile(locate_all, *self.tensors, one, one, one, head_tile)
        self.count.zero_(), self.info.zero_()
        self.compiled[head_tile](*self.tensors, s_q, h_q, h_kv)
        return self.info.tolist()


@pytest.fixture(scope="module")
def native():
    return Native()


@pytest.mark.parametrize("head_tile", [0, 1, 2, 4, 8, 16, 32, 64])
def test_every_row_is_located_once(native, head_tile):
    shapes = [shape for shape in SHAPES if head_tile or shape[2] == 1]  # the flat tiling is for one kv head
    for s_q, h_q, h_kv in shapes:
        missing, wrong_kv_head, off_box = native.run(head_tile, s_q, h_q, h_kv)
        shape = f"s_q {s_q}, h_q {h_q}, h_kv {h_kv}"
        assert (native.count[:s_q, :h_q] == 1).all(), shape
        assert native.count.sum() == s_q * h_q, f"{shape}: located rows that do not exist"
        assert (wrong_kv_head, off_box) == (0, 0), shape
        assert missing == TILE * num_row_tiles(head_tile, s_q, h_q, h_kv) - s_q * h_q, shape
        assert num_row_tiles(head_tile, s_q, h_q, h_kv) > 0, shape


def test_the_chosen_tiling_wastes_no_whole_tile():
    """`choose_head_tile` needs no more tiles than the rows of its kv heads, each group padded to a power of two"""
    for s_q, h_q, h_kv in SHAPES:
        head_tile = choose_head_tile(s_q, h_q, h_kv, mergeable=True)
        group = h_q // h_kv
        padded = group if h_kv == 1 else min(1 << (group - 1).bit_length(), -(-group // TILE) * TILE)
        fewest = h_kv * -(-s_q * padded // TILE)
        assert num_row_tiles(head_tile, s_q, h_q, h_kv) == fewest, (s_q, h_q, h_kv, head_tile)
