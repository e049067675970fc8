"""Sequence tail, causal limit and sliding window."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ..config import TILE
from .rows import RowTile
from .tiles import element, fragment_row, thread_in_warpgroup


@dataclass(frozen=True)
class Mask:
    rows: RowTile
    seqlen: Int32
    causal: Constexpr[bool]  # bottom-right
    window: Constexpr[int]  # tokens that a row sees at most; 0: all

    def limit(self, row):
        """row `row` of the tile sees the tokens < limit"""
        if not self.causal:
            return self.seqlen
        return cutlass.min(self.seqlen, self.seqlen - self.rows.s_q + 1 + self.rows.token_of(row))

    def clear(self):
        """(first, end) of the tokens that every row of the tile sees: one division per item, not per tile"""
        return self.limit(TILE - 1) - self.window if self.window else Int32(0), self.limit(0)

    @cute.jit
    def apply(self, rS, tile: Int32, clear):
        first, end = clear
        if tile * TILE + TILE > end:
            tid = thread_in_warpgroup()
            for r in cutlass.range_constexpr(2):
                seen = self.limit(fragment_row(tid) + 8 * r) - tile * TILE - (tid % 4) * 2
                for i in cutlass.range_constexpr(16):
                    rS[element(r, i)] = rS[element(r, i)] if 8 * (i // 2) + i % 2 < seen else -Float32.inf
        if const_expr(self.window > 0):
            if tile * TILE < first:
                tid = thread_in_warpgroup()
                for r in cutlass.range_constexpr(2):
                    unseen = self.limit(fragment_row(tid) + 8 * r) - self.window - tile * TILE - (tid % 4) * 2
                    for i in cutlass.range_constexpr(16):
                        rS[element(r, i)] = rS[element(r, i)] if 8 * (i // 2) + i % 2 >= unseen else -Float32.inf
