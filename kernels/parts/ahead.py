"""What a decode CTA does while it waits for the kernels before it.

Before griddepcontrol.wait nothing in memory can be trusted: the kernels before may still be writing it.  But the last step's
record of a part is mostly this step's, and a guess is enough
  to ask the L2 for the part's first tiles: a prefetch hands no bytes out, and whoever writes them later writes the same L2;
  to load their table entries, once that is allowed, beside the true record instead of behind it.
What is read early is read past the L1, which would keep it, and bounded so that no address is wild.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ..config import TILE
from .loads import PageSpan, tiles_per_load
from .ptx import lane_value, uniform
from .work import COUNT, PART


@dataclass(frozen=True)
class Guess:
    """what a part's record may be"""

    record: Int32  # per lane: field lane % PART
    page: Constexpr[int]
    block_table: cute.Tensor

    @classmethod
    def read(cls, mParts, part, page, block_table):
        return cls(_load_past_l1(mParts, (part, cute.arch.lane_idx() % PART)), page, block_table)

    @property
    def has_items(self):
        return uniform(lane_value(self.record, COUNT)) > 0

    def entry(self):
        """(request, page) per lane: where PageSpan.load reads for the first tiles; anywhere if the record is nonsense"""
        batch, first, end, _, seqlen = (lane_value(self.record, i) for i in range(5))
        num_requests, num_pages = self.block_table.shape
        bounded = lambda x, limit: cutlass.max(cutlass.min(x, limit - 1), 0)
        tiles = (num_pages * self.page + TILE - 1) // TILE
        first, last = bounded(first, tiles), (cutlass.min(bounded(end, tiles + 1) * TILE, seqlen) - 1) // self.page
        page = cutlass.min(first * TILE // self.page + cute.arch.lane_idx(), last)
        return bounded(batch, num_requests), bounded(page, num_pages)

    @cute.jit
    def prefetch(self, loads: tuple, most: Constexpr[int], row_tile: Int32, begun: cute.Pointer):
        """Up to `most` tiles, by a whole warp; each by one of the row tiles that share them.  Not once `begun`: the loads
        themselves are under way then, and would queue behind the prefetch (+1 % at b32 h128 s8192)."""
        num_row_tiles, _, _ = cute.arch.grid_dim()
        _, first, end = (uniform(lane_value(self.record, i)) for i in range(3))
        if self.has_items & (first >= 0):
            span = PageSpan(self.page, _load_past_l1(self.block_table, self.entry()), first)
            if uniform(lane_value(span.entries, 0)) >= 0:  # (needs the entries: `begun` is asked when they are there)
                if not cute.arch.mbarrier_test_wait(begun, 0):
                    for i in cutlass.range_constexpr(min(most, tiles_per_load(self.page))):
                        if (first + i < end) & ((row_tile == i) | (num_row_tiles == 1)):
                            for load in loads:
                                if const_expr(load is not None):
                                    load.prefetch_tile(span, first + i)


def _load_past_l1(m, index):
    return cute.arch.load(m.iterator + cute.crd2idx(index, m.layout), Int32, cop="cg")
