"""kernels/parts/sync.py, and the law that its RingPos follows: who owns the loop advances the state."""

from dataclasses import fields

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass import Constexpr, Int32
from cutlass.cute.runtime import from_dlpack

from flashmla_cute.kernels.config import MLAConfig
from flashmla_cute.kernels.dense_decode import SCORE_WARPS, VALUE_WARPS, Barriers
from flashmla_cute.kernels.parts.sync import RingPos, warp_arrivals


@cute.jit
def walk(out: cute.Tensor, skip: Int32, stages: Constexpr[int]):
    """a ring position carried through a dynamic loop with a dynamic branch, as the roles carry theirs"""
    pos = RingPos(Int32(0), Int32(0))
    for i in cutlass.range(out.shape[0], unroll=1):
        out[i, 0], out[i, 1] = pos.stage, pos.phase
        if i != skip:
            pos = pos.next(stages)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_ring_position_is_carried(stages):
    out = torch.full((20, 2), -1, dtype=torch.int32)
    cute.compile(walk, from_dlpack(out), Int32(0), stages)(from_dlpack(out), 7)
    steps = [i - (i > 7) for i in range(20)]
    assert out.tolist() == [[n % stages, n // stages % 2] for n in steps]


def test_warp_arrivals():
    assert (warp_arrivals(4, False), warp_arrivals(4, True)) == (4, 128)


def test_barrier_table():
    """A phase of a barrier completes by whole roles, or by an arrival for each load that expects TMA's bytes; in the debug
    configuration by all lanes of their warps, and by those of the requesting warp beside the one that expects the bytes."""
    elected, lanes = (Barriers.table(MLAConfig(lane_arrivals=each)) for each in (False, True))
    assert list(elected) == list(lanes) == [field.name for field in fields(Barriers)]
    assert elected.pop("begun") == lanes["begun"] == (1, 1), "nobody waits on it"
    for name, (number, arrivals) in elected.items():
        assert arrivals in (1, 2, SCORE_WARPS, VALUE_WARPS), name
        assert lanes[name] == (number, (32 + 1) * arrivals if arrivals <= 2 else 32 * arrivals), name
        assert number == (MLAConfig().ring_slots if name.startswith("slot_") else 1), name
    assert Barriers.total(MLAConfig()) == 1 + sum(number for number, _ in elected.values())
