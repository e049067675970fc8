"""e4m3 times a token's scales -> f16, and 16-bit floats -> one or two e4m3 terms."""

from dataclasses import dataclass
from itertools import product

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float8E4M3FN, Float16, Float32, Int32, const_expr

from ..config import SCALE_BYTES, TILE
from .ptx import lane_value, max_magnitude, one_term, opaque, scale_factors, scaled_halves, scaled_pair, two_terms
from .tiles import fragment_row, thread_in_warpgroup

UNIT_TOKENS = 32
ROWS = 8  # of the swizzle's pattern: a thread's rows are 8 apart
IN_FLIGHT = 2  # 16-byte loads of a thread; 4 spill


def _vector(dtype, address, size, align=16):
    pointer = cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=align)
    return cute.make_tensor(pointer, cute.make_layout(size))


@dataclass(frozen=True)
class Converter:
    """A VALUE warpgroup's 256 columns of a ring slot -> f16, 32 tokens at a time.  A warp takes a block of 64 columns, a lane
    16 columns of 8 rows; 8 neighbouring lanes take rows r and r ^ 5, four 16-byte chunks each: no bank conflicts."""

    source: Int32  # shared addresses of my first row in slot 0 and in the f16 tokens at 0
    target: Int32
    scale: Int32  # of my first row's scale for my columns in slot 0
    group_bytes: Constexpr[int]  # from 8 rows of a slot to the next 8

    @classmethod
    def make(cls, warp, ring, blocks, box_tokens, scales):
        """warp: of both warpgroups, 0..7; ring, scales: unswizzled pointers; blocks: shared address of this warp's f16 column
        block; box_tokens: of a TMA box of the ring"""
        lane, by_rows = cute.arch.lane_idx(), box_tokens < TILE
        row = (lane >> 3) ^ (5 * (lane >> 2 & 1))
        block_bytes = ROWS * 128 if by_rows else TILE * 128
        source = ring.toint() + (warp >> 1) * block_bytes + row * 128 + (((warp & 1) * 4 + (lane & 3)) ^ row) * 16
        target = blocks + row * 128 + ((2 * (lane & 3)) ^ row) * 16
        # (a shuffle to one's own lane: ptxas looks through mov, and would compute these again for every tile)
        kept = lambda address: lane_value(address, lane)
        scale = kept(scales.toint() + row * SCALE_BYTES + (warp >> 1) * 4)
        return cls(kept(source), kept(target), scale, ROWS * 512 if by_rows else ROWS * 128)

    @cute.jit
    def run(self, slot: Int32, at: Int32, part: Constexpr[int]):
        """tokens 32 part .. 32 part + 31 of `slot` -> the f16 tokens `at` bytes further"""
        source = self.source + slot * (TILE * 512) + part * (UNIT_TOKENS // ROWS) * self.group_bytes
        target = self.target + at
        for first in cutlass.range_constexpr(0, UNIT_TOKENS // ROWS, IN_FLIGHT):
            raw = tuple(cute.make_rmem_tensor(16, Float8E4M3FN) for _ in range(IN_FLIGHT))
            for i in cutlass.range_constexpr(IN_FLIGHT):
                cute.autovec_copy(_vector(Float8E4M3FN, source + (first + i) * self.group_bytes, 16), raw[i])
            for i in cutlass.range_constexpr(IN_FLIGHT):
                v = cute.make_rmem_tensor(16, Float16)
                v.store(raw[i].load().to(Float16))
                self._apply_scale(v, slot * TILE + part * UNIT_TOKENS + ROWS * (first + i))
                for chunk in cutlass.range_constexpr(2):
                    to = (target ^ (16 * chunk)) + (first + i) * (ROWS * 128)
                    cute.autovec_copy(cute.local_tile(v, (8,), (chunk,)), _vector(Float16, to, 8))

    def _apply_scale(self, v, token):
        factors = scale_factors(_vector(Float32, self.scale + token * SCALE_BYTES, 1, 4)[0])
        words = cute.recast_tensor(v, Int32)
        for i in range(8):
            words[i] = scaled_pair(words[i], *factors)

    @cute.jit
    def zero_rows(self, at: tuple, valid: Int32):
        """token rows >= valid of a converted tile, its halves `at`: a stale NaN there would survive the product with p = 0"""
        zero = cute.make_rmem_tensor(8, Float16)
        zero.fill(0.0)
        target = opaque(self.target)
        for g in cutlass.range_constexpr(TILE // ROWS):
            if ROWS * g + (target >> 7 & (ROWS - 1)) >= valid:
                for chunk in cutlass.range_constexpr(2):
                    to = ((target + at[g // 4]) ^ (16 * chunk)) + g % 4 * (ROWS * 128)
                    cute.autovec_copy(zero, _vector(Float16, to, 8))


# ---------------------------------------------------------------------- 16-bit floats -> e4m3
SLOT_COLUMNS = 256  # of a 16-bit q in a ring slot, and 32 of its rope columns
HIGH_STEPS = 18  # k-steps of 32 columns: 8 in either slot, then one in either slot's rope part
LOW_STEPS = 12  # of the low term that go to smem; SCORE has no registers for more than the other 6 (10 fit into 184, not 168)
BLOCK_BYTES = TILE * 128


@dataclass(frozen=True)
class QuerySlots:
    """A 16-bit q in two ring slots.  A thread owns columns 4 t .. 4 t + 3 and 16 more to the right of each k-step, of rows r
    and r + 8, as operand A of the FP8 product wants them; t = tid % 4.  Raw addresses: one XOR for each vector of a k-step."""

    ring: Int32  # shared addresses of my first columns in slot 0
    rope: Int32
    low: Int32
    stages: tuple
    dtype: Constexpr

    @classmethod
    def make(cls, ring, rope, low, stages, dtype):
        """ring, rope, low (None: one term): unswizzled pointers"""
        tid = thread_in_warpgroup()
        row, pair, odd = fragment_row(tid), tid % 4 // 2, tid % 2 * 8
        to_ring = row * 128 + ((pair ^ (row & 7)) << 4) + odd
        to_rope = row * 64 + ((pair ^ (row >> 1 & 3)) << 4) + odd
        to_low = row * 128 + ((row & 7) << 4) + tid % 4 * 4
        at_low = Int32(0) if low is None else low.toint() + to_low
        return cls(ring.toint() + to_ring, rope.toint() + to_rope, at_low, stages, dtype)

    def vector(self, r, j, g, block=None):
        """vector g of k-step j of row r: two pairs of columns; block: instead of j's"""
        slot_bytes = 2 * SLOT_COLUMNS * TILE
        if j < 16:
            block = j % 8 // 2 if block is None else block
            at = (self.ring + self.stages[j // 8] * slot_bytes) ^ (64 * (j % 2) + 32 * g)
            at += block * BLOCK_BYTES + 1024 * r
        else:
            at = ((self.rope + self.stages[j - 16] * (slot_bytes // 8)) ^ (32 * g)) + 512 * r
        words = cute.make_rmem_tensor(2, Int32)
        cute.autovec_copy(_vector(Int32, at, 2, 8), words)
        return words

    @cute.jit
    def row_scales(self, rInverse):
        """Powers of two that bring the largest of my two rows to 128 .. 255 (e4m3 ends at 448); their inverses go to rInverse,
        NaN for a row that is not finite."""
        most = cute.make_rmem_tensor(2, Int32)
        most.fill(0)
        for block in cutlass.range(4, unroll=1):  # (static, it would keep q in registers until it is quantised: spills)
            self._most(most, (0, 1, 8, 9), block)
        self._most(most, (16, 17), None)
        scales = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            for offset in (1, 2):
                most[r] = max_magnitude(most[r], cute.arch.shuffle_sync_bfly(most[r], offset=offset))
            scales[r], rInverse[r] = power_of_two(most[r], self.dtype)
        return scales

    def _most(self, most, steps, block):
        for r, j, g in product(range(2), steps, range(2)):
            words = self.vector(r, j, g, block)
            most[r] = max_magnitude(max_magnitude(most[r], words[0]), words[1])

    @cute.jit
    def split(self, r: Constexpr[int], first: Constexpr[int], scale: Float32, high, low):
        """k-steps first .. of row r, as many as the 128-column block `high` has -> one or two terms in registers; the low one
        to smem where it belongs there.  low: None with one term."""
        steps = cute.size(high) // 16
        words = [
            self.vector(r, first + k, g) for k in range(steps) for g in range(2)
        ]  # all loads first: nothing else hides them
        high32 = cute.recast_tensor(high, Int32)
        for i in cutlass.range_constexpr(2 * steps):
            k, g = i // 2, i % 2
            halves = tuple(scaled_halves(words[i][w], scale, self.dtype) for w in range(2))
            if const_expr(low is None):
                high32[4 * k + r + 2 * g] = one_term(*halves)
            else:
                high32[4 * k + r + 2 * g], rest = two_terms(*halves)
                if const_expr(first + k < LOW_STEPS):
                    at = (self.low ^ (32 * k + 16 * g)) + first // 4 * BLOCK_BYTES + 1024 * r
                    _vector(Int32, at, 1, 4)[0] = rest
                else:
                    cute.recast_tensor(low, Int32)[4 * k + r + 2 * g] = rest


@cute.jit
def power_of_two(most: Int32, dtype: Constexpr):
    """of a row's largest pair of magnitudes, and its inverse: see QuerySlots.row_scales"""
    pair, larger = cute.make_rmem_tensor(2, dtype), cute.make_rmem_tensor(2, Float32)
    cute.recast_tensor(pair, Int32)[0] = most
    larger.store(pair.load().to(Float32))
    bits = cute.recast_tensor(larger, Int32)
    exponent = cutlass.max(cutlass.max(bits[0], bits[1]) >> 23, 8)  # biased
    finite = exponent < 255
    bits[0] = ((127 + 7 + 127) - exponent) << 23
    bits[1] = (exponent - 7) << 23 if finite else Int32(0x7FFFFFFF)
    return larger[0], larger[1]
