"""TMA operands and whole-warp requests of tiles."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from ..config import TILE
from .tiles import BLOCK, column_blocks, swizzled

EVICT_FIRST = 0x12F0000000000000  # an L2 cache policy


@dataclass(frozen=True)
class TmaOperand:
    """A gmem tensor (rows .., 64, block, index ..) that is moved tile by tile, one instruction each.  The rows of a tile may be
    several modes: for q they are (head, token)."""

    atom: cute.CopyAtom
    tensor: cute.Tensor  # coordinates

    @classmethod
    def make(cls, m, blocks, row_modes=(TILE,)):
        """the box of an instruction is `blocks` column blocks of a tile"""
        box = (*row_modes, BLOCK, blocks)
        layout = cute.composition(swizzled(m.element_type, TILE, BLOCK, blocks), cute.make_layout(box))
        return cls(*cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), m, layout, box))


@dataclass(frozen=True)
class TmaLoad:
    """request of tile `index` of gmem into slot `slot` of smem"""

    atom: cute.CopyAtom
    src: cute.Tensor  # (box, index)
    dst: cute.Tensor  # (box, slot)
    full: cute.Pointer  # mbarrier [slot]
    num_bytes: Constexpr[int]
    hint: Constexpr[int | None]
    every_lane: Constexpr[bool]

    @classmethod
    def make(cls, atom, source, sDst, full, row_modes=(TILE,), hint=None, every_lane=False):
        """source: the operand's tensor moved to this CTA's rows, (rows .., 64, block, index); sDst: (row, column, slot)"""
        blocks, slots = cute.size(sDst, mode=[1]) // BLOCK, cute.size(sDst, mode=[2])
        box = (*row_modes, BLOCK, blocks)
        sBoxes = cute.composition(column_blocks(sDst), cute.make_layout((*box, slots)))
        tDst, tSrc = cpasync.tma_partition(
            atom,
            0,
            cute.make_layout(1),
            cute.group_modes(cute.flat_divide(sBoxes, box), 0, len(box)),
            cute.group_modes(cute.flat_divide(source, box), 0, len(box)),
        )
        only = (0,) * len(box)  # the tile is one box
        num_bytes = TILE * cute.size(sDst, mode=[1]) * sDst.element_type.width // 8
        return cls(atom, tSrc[(None, *only, None)], tDst[(None, *only, None)], full, num_bytes, hint, every_lane)

    @cute.jit
    def start(self, index: Int32, slot: Int32):
        """by a whole warp: cute.copy elects a lane itself"""
        full = self.full + slot
        if const_expr(self.every_lane):
            cute.arch.mbarrier_arrive(full)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full, self.num_bytes)
        hint = None if const_expr(self.hint is None) else Int64(self.hint)
        cute.copy(self.atom, self.src[None, index], self.dst[None, slot], tma_bar_ptr=full, cache_policy=hint)


def load_pages(block_table, batch, tile, end):
    """Lane i gets the page of tile + i (clamped to the item's last tile: entries past a request's end are never read).
    Pages and work records are held one per lane: a uniform load would be waited for on the spot."""
    return block_table[batch, cutlass.min(tile + cute.arch.lane_idx(), end - 1)]
