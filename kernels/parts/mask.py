"""Sequence tail and causal limit."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32

from ..config import TILE
from .rows import RowTile
from .tiles import element, fragment_row, thread_in_warpgroup


@dataclass(frozen=True)
class Mask:
    rows: RowTile
    seqlen: Int32
    causal: Constexpr[bool]  # bottom-right

    def limit(self, row):
        """row `row` of the tile sees the tokens < limit"""
        if not self.causal:
            return self.seqlen
        return cutlass.min(self.seqlen, self.seqlen - self.rows.s_q + 1 + self.rows.token_of(row))

    @cute.jit
    def apply(self, rS, tile: Int32, lowest: Int32):
        """lowest = limit(0), the smallest of the tile: one division per item, not per tile"""
        if tile * TILE + TILE > lowest:
            tid = thread_in_warpgroup()
            for r in cutlass.range_constexpr(2):
                end = self.limit(fragment_row(tid) + 8 * r) - tile * TILE - (tid % 4) * 2
                for i in cutlass.range_constexpr(16):
                    rS[element(r, i)] = rS[element(r, i)] if 8 * (i // 2) + i % 2 < end else -Float32.inf
