"""Ring positions, warp arrivals, and barriers whose counts come from the role table."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr


@dataclass(frozen=True)
class RingPos:
    """a value: whoever owns the loop writes pos = pos.next(stages)"""

    stage: Int32
    phase: Int32

    @cute.jit
    def next(self, stages: Constexpr[int]):
        last = self.stage == stages - 1
        return RingPos(Int32(0) if last else self.stage + 1, self.phase ^ 1 if last else self.phase)


def warp_arrivals(num_warps: int, every_lane: bool) -> int:
    """arrivals of one phase when each of `num_warps` warps calls `arrive` once"""
    return num_warps * (32 if every_lane else 1)


@cute.jit
def arrive(bar, every_lane: Constexpr[bool], count: Constexpr[int] = 1):
    """by a whole warp: one elected lane, or all 32 in the debug configuration"""
    if const_expr(every_lane):
        cute.arch.mbarrier_arrive(bar, arrive_count=count)
    else:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(bar, arrive_count=count)


class BarrierTable:
    """base of a kernel's dataclass of pointers to mbarriers, in smem order; its `table` says name -> (how many, arrivals)"""

    @classmethod
    def total(cls, config):
        return sum(num for num, _ in cls.table(config).values())

    @classmethod
    def carve(cls, config, base):
        at = {}
        for name, (num, _) in cls.table(config).items():
            at[name], base = base, base + num
        return cls(**at)

    def init(self, config):
        for name, (num, arrivals) in self.table(config).items():
            for i in range(num):
                cute.arch.mbarrier_init(getattr(self, name) + i, arrivals)
