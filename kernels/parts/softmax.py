"""Online softmax with a lazy reference maximum; log2 units."""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32

from .tiles import element

M_INIT = -1e30  # finite: exp2(-inf - M_INIT) == 0, never NaN
LN2 = math.log(2.0)


@dataclass(frozen=True)
class OnlineSoftmax:
    """state of the two rows of which a quad of threads owns a quarter each"""

    row_max: cute.Tensor
    row_sum: cute.Tensor  # of this thread's columns, until finalize
    rescale: cute.Tensor  # of the last step
    scale_log2: Float32
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
            m = [rS[element(r, 0)], rS[element(r, 1)]]  # two chains: half the latency
            for i in cutlass.range_constexpr(2, 16):
                m[i % 2] = cute.arch.fmax(m[i % 2], rS[element(r, i)])
            x = cute.arch.fmax(m[0], m[1])
            x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=1))
            x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=2)) * self.scale_log2
            new = x if x > self.row_max[r] + self.lazy else self.row_max[r]
            self.rescale[r] = cute.math.exp2(self.row_max[r] - new, fastmath=True)
            self.row_max[r] = new
            l = [self.row_sum[r] * self.rescale[r], Float32(0.0)]
            for i in cutlass.range_constexpr(16):
                e = cute.math.exp2(rS[element(r, i)] * self.scale_log2 - new, fastmath=True)
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
    def lse(self, r: Constexpr[int]):
        """natural log"""
        v = -Float32.inf
        if self.row_sum[r] > 0.0:
            v = (self.row_max[r] + cute.math.log2(self.row_sum[r], fastmath=True)) * LN2
        return v
