"""o^T = v^T p^T with v^T, e4m3 in a ring slot, as operand A in registers: no f16 copy of v in shared memory.

A warp has 64 columns of the latent, 16 of each of four products m64n64k16.  ldmatrix.trans moves pairs of bytes, so a thread
gets two neighbouring columns, 2 (lane // 4) and the next, of two tokens; the first becomes the upper of its two rows of o^T.
Its accumulator: those two columns, query rows 8 i + 2 (lane % 4) + e, at 4 i + e and 4 i + 2 + e.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr

from ..config import TILE
from .ptx import lane_value, pack_half, transposed_halves, transposed_matrices

BLOCKS = 4  # products, of a warpgroup's 256 columns
SLOT_BYTES = TILE * 512
ROWS = 8  # of the swizzle's pattern


def _vector(dtype, address, size, align, space=cute.AddressSpace.smem):
    return cute.make_tensor(cute.make_ptr(dtype, address, space, assumed_align=align), cute.make_layout(size))


@dataclass(frozen=True)
class Columns:
    """a VALUE warp's 64 columns of the ring's slots"""

    source: Int32  # shared address of the first 16 of token `lane` in slot 0
    group_bytes: Constexpr[int]  # from 8 tokens to the next 8

    @classmethod
    def make(cls, warp, ring, box_tokens):
        """warp: of both warpgroups, 0..7; ring: unswizzled pointer; box_tokens: of a TMA box of the ring"""
        lane, by_rows = cute.arch.lane_idx(), box_tokens < TILE
        group_bytes, block_bytes = (ROWS * 512, ROWS * 128) if by_rows else (ROWS * 128, TILE * 128)
        row, chunk = lane % ROWS, (warp & 1) * 4
        source = ring.toint() + lane // ROWS * group_bytes + (warp >> 1) * block_bytes + row * 128 + (chunk ^ row) * 16
        # (a shuffle to one's own lane: ptxas looks through mov, and would compute this again for every tile)
        return cls(lane_value(source, lane), group_bytes)

    def load(self, slot, block, step):
        """16 columns of the 16 tokens of a k-step, as bytes"""
        return transposed_matrices(self._at(slot, block, 16 * step))

    def _at(self, slot, block, tokens):
        """`tokens` tokens further, a multiple of 8"""
        return ((self.source + slot * SLOT_BYTES) ^ (16 * block)) + tokens // ROWS * self.group_bytes

    @cute.jit
    def zero_tail(self, slot: Int32, valid: Int32):
        """of the tokens from `valid` on: a stale NaN there would survive the product with p = 0"""
        zero = cute.make_rmem_tensor(4, Int32)
        zero.fill(0)
        for first in cutlass.range_constexpr(0, TILE, 32):
            if first + cute.arch.lane_idx() >= valid:
                for block in cutlass.range_constexpr(BLOCKS):
                    cute.autovec_copy(zero, _vector(Int32, self._at(slot, block, first), 4, 16))
        cute.arch.fence_proxy("async.shared", space="cta")  # TMA will write there
        cute.arch.sync_warp()


def to_operand(raw, rV):
    """raw: of Columns.load -> f16, operand A of a k-step"""
    words = cute.recast_tensor(rV, Int32)
    for j in range(2):  # 8 tokens each
        words[2 * j], words[2 * j + 1] = transposed_halves(raw[j])


@cute.jit
def rescale_columns(rO: tuple, sRescale):
    """o^T times the factors of its query rows; rare, row_max is lazy"""
    lane = cute.arch.lane_idx()
    if cute.arch.vote_any_sync(sRescale[lane] * sRescale[lane + 32] != 1.0):
        for i in cutlass.range_constexpr(TILE // 8):
            for e in cutlass.range_constexpr(2):
                factor = sRescale[8 * i + 2 * (lane % 4) + e]
                for block in cutlass.range_constexpr(BLOCKS):
                    for j in cutlass.range_constexpr(4 * i + e, 4 * i + 4, 2):
                        rO[block][j] = rO[block][j] * factor


@cute.jit
def store_columns(first: Int32, rO: tuple, sInv, gO, rows, clamp: Constexpr[bool]):
    """o^T of a warp, columns `first` .. -> gO (token, head, column), times sInv (row,).  Eight lanes' pairs fill a sector.
    clamp: f16, values beyond it become its largest."""
    lane, dtype = cute.arch.lane_idx(), gO.element_type
    starts = tuple(_start(gO, rows, lane + 32 * i) for i in range(2))
    for i in cutlass.range_constexpr(TILE // 8):
        for e in cutlass.range_constexpr(2):
            row = 8 * i + 2 * (lane % 4) + e
            start, factor = lane_value(starts[i // 4], row % 32), sInv[row]
            if start >= 0:
                address = gO.iterator.toint() + Int64(start) * 16 + (first + 2 * (lane // 4)) * (dtype.width // 8)
                for block in cutlass.range_constexpr(BLOCKS):
                    v = cute.make_rmem_tensor(2, dtype)
                    pair = tuple(rO[block][4 * i + 2 * j + e] * factor for j in range(2))
                    if const_expr(clamp):
                        cute.recast_tensor(v, Int32)[0] = pack_half(*pair)
                    else:
                        v[0], v[1] = (x.to(dtype) for x in pair)
                    to = address + 16 * block * (dtype.width // 8)
                    cute.autovec_copy(v, _vector(dtype, to, 2, dtype.width // 4, cute.AddressSpace.gmem))


@cute.jit
def _start(gO, rows, row: Int32) -> Int32:
    """where a row of the tile begins, in 16 bytes; -1: it does not exist"""
    token, head, exists = rows.locate(row)
    start = Int32(-1)
    if exists:
        start = Int32(cute.crd2idx((token, head, 0), gO.layout) // (128 // gO.element_type.width))
    return start
