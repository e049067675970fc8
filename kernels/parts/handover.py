"""What SCORE hands to the VALUE roles through shared memory: p, one number a row, the word that both are there."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr
from cutlass.cute.nvgpu import warp

from .sync import arrive
from .tiles import fragment_row, thread_in_warpgroup


@cute.jit
def store_fragment(rP, sP, mma):
    """a 64 x 64 accumulator of `mma`, already 16 bit, -> sP (row, token)"""
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), rP.element_type)
    copy = cute.make_tiled_copy_C(atom, mma).get_slice(thread_in_warpgroup())
    cute.copy(atom, copy.retile(rP), copy.partition_D(sP))


@cute.jit
def store_row_values(rRows, sRows):
    """the two rows of a quad"""
    tid = thread_in_warpgroup()
    if tid % 4 == 0:
        for r in cutlass.range_constexpr(2):
            sRows[fragment_row(tid) + 8 * r] = rRows[r]


@cute.jit
def publish(full, every_lane: Constexpr[bool]):
    """to wgmma, which reads through the async proxy, and to whoever waits on the mbarrier"""
    cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_warp()
    arrive(full, every_lane)
