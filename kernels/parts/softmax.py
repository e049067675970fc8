"""Online softmax with a lazy reference maximum; log2 units."""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32

from .tiles import element

M_INIT = -1e30  # finite: exp2(-inf - M_INIT) == 0, never NaN
LN2, LOG2_E = math.log(2.0), math.log2(math.e)


@dataclass(frozen=True)
class OnlineSoftmax:
    """state of the two rows of which a quad of threads owns a quarter each"""

    row_max: cute.Tensor
    row_sum: cute.Tensor  # of this thread's columns, until finalize
    rescale: cute.Tensor  # of the last step
    scale_log2: Float32 | cute.Tensor  # scores, as `step` gets them, to base 2; of all rows, or (row,)
    lazy: Constexpr[float]

    @classmethod
    def make(cls, scale_log2, lazy):
        return cls(*(cute.make_rmem_tensor(2, Float32) for _ in range(3)), scale_log2, lazy)

    def reset(self):
        self.row_max.fill(M_INIT)
        self.row_sum.fill(0.0)

    @cute.jit
    def step(self, rS, rP):
        for r in cutlass.range_constexpr(2):
            scale = self.scale_log2 if isinstance(self.scale_log2, Float32) else self.scale_log2[r]
            m = [rS[element(r, 0)], rS[element(r, 1)]]  # two chains: half the latency
            for i in cutlass.range_constexpr(2, 16):
                m[i % 2] = cute.arch.fmax(m[i % 2], rS[element(r, i)])
            x = cute.arch.fmax(m[0], m[1])
            x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=1))
            x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=2)) * scale
            new = x if x > self.row_max[r] + self.lazy else self.row_max[r]
            self.rescale[r] = cute.math.exp2(self.row_max[r] - new, fastmath=True)
            self.row_max[r] = new
            l = [self.row_sum[r] * self.rescale[r], Float32(0.0)]
            for i in cutlass.range_constexpr(16):
                e = cute.math.exp2(rS[element(r, i)] * scale - new, fastmath=True)
                rS[element(r, i)] = e
                l[i % 2] = l[i % 2] + e
            self.row_sum[r] = l[0] + l[1]
        rP.store(rS.load().to(rP.element_type))

    @cute.jit
    def finalize(self):
        """whole-row sums; returns their inverses, 0 for a row without tokens"""
        inv_sum = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            l = self.row_sum[r]
            l += cute.arch.shuffle_sync_bfly(l, offset=1)
            l += cute.arch.shuffle_sync_bfly(l, offset=2)
            self.row_sum[r] = l
            inv_sum[r] = cute.arch.rcp_approx(l) if l > 0.0 else Float32(0.0)
        return inv_sum

    @cute.jit
    def lse_log2(self, r: Constexpr[int]):
        v = -Float32.inf
        if self.row_sum[r] > 0.0:
            v = self.row_max[r] + cute.math.log2(self.row_sum[r], fastmath=True)
        return v


@cute.jit
def piece_weight(lse: Float32, all_log2: Float32):
    """exp(lse) over 2^all_log2: the share of a piece of a row in all of it"""
    return cute.math.exp2(cute.math.fma(lse, Float32(LOG2_E), -all_log2), fastmath=True)


@cute.jit
def join_pieces(log_sum: Float32, lse: Float32):
    """A sum of pieces, whose weight has the log2 `log_sum` (-inf: none yet), and another piece -> log2 of their joint weight,
    and the share of each.  The same bits in both kernels that ask: only `piece_weight` adds to a product, and fuses it."""
    most = cute.arch.fmax(cute.arch.fmax(log_sum, lse * LOG2_E), M_INIT)
    of_sum, of_piece = cute.math.exp2(log_sum - most, fastmath=True), piece_weight(lse, most)
    total, inverse = of_sum + of_piece, Float32(0.0)
    if total > 0.0:
        inverse = cute.arch.rcp_approx(total)
    return most + cute.math.log2(total, fastmath=True), of_sum * inverse, of_piece * inverse


@cute.jit
def soft_cap(rS, factor):
    """tanh(rS * factor / (2 log2(e))), by exp2: tanh.approx is wrong by 5e-4, 0.02 of a score capped at 50; factor: Float32, or
    (row,)"""
    for i in cutlass.range_constexpr(cute.size(rS)):
        of_row = factor if isinstance(factor, Float32) else factor[i // 2 % 2]
        rS[i] = 1.0 - 2.0 * cute.arch.rcp_approx(cute.math.exp2(rS[i] * of_row, fastmath=True) + 1.0)


@cute.jit
def sink_share(lse_log2: Float32, sink: Float32):
    """the share of a row's softmax that is left to its tokens when a logit `sink` without a value joins it; 0 without tokens"""
    share = Float32(0.0)
    if lse_log2 > -Float32.inf:
        share = cute.arch.rcp_approx(1.0 + cute.math.exp2(sink * LOG2_E - lse_log2, fastmath=True))
    return share


@cute.jit
def rescale_rows(rO, rescale0: Float32, rescale1: Float32):
    """a thread's two rows of o times their factors; rare, row_max is lazy"""
    if cute.arch.vote_any_sync(rescale0 * rescale1 != 1.0):
        for r, factor in enumerate((rescale0, rescale1)):
            for block in cutlass.range_constexpr(cute.size(rO) // 32):
                for i in cutlass.range_constexpr(16 * block, 16 * block + 16):  # (longer static loops: the DSL warns)
                    rO[element(r, i)] = rO[element(r, i)] * factor
