"""Append: writes new tokens into their slots of a paged cache, one warp per (token, kv head), 16 bytes a lane."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64

from .config import MLAConfig
from .parts.tiles import element_type

WARPS = 8  # of a CTA
VECTOR = 8  # elements of 16 bytes


@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    latent: cute.Tensor  # (token, kv head, latent)
    rope: cute.Tensor  # (token, kv head, rope); without rope columns anything
    slots: cute.Tensor  # (token,) int64: page * page_size + row; negative: skip the token
    cache: cute.Tensor  # (page, row, kv head, latent + rope)


class Append:
    def __init__(self, config: MLAConfig):
        self.config = config

    @cute.jit
    def __call__(self, latent: cute.Tensor, rope: cute.Tensor, slots: cute.Tensor, cache: cute.Tensor, stream):
        num_tokens, h_kv, _ = latent.shape
        self.kernel(Args(latent, rope, slots, cache)).launch(
            grid=[(num_tokens * h_kv + WARPS - 1) // WARPS, 1, 1], block=[32 * WARPS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, args: Args):
        cta, _, _ = cute.arch.block_idx()
        num_tokens, h_kv, _ = args.latent.shape
        num_pages, page, _, _ = args.cache.shape
        unit = cta * WARPS + cute.arch.warp_idx()
        token, head = unit // h_kv, unit % h_kv
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if token < num_tokens:
            slot = args.slots[token]
            if (slot >= 0) & (slot < Int64(num_pages) * page):  # a slot outside the pool must not corrupt what lies there
                gCache = args.cache[Int32(slot // page), Int32(slot % page), head, None]
                latent = self.config.kv.latent
                self._copy(args.latent[token, head, None], gCache, 0, latent)
                self._copy(args.rope[token, head, None], gCache, latent, self.config.kv.rope)

    @cute.jit
    def _copy(self, gSource, gCache, column: Constexpr[int], width: Constexpr[int]):
        lane = cute.arch.lane_idx()
        for first in cutlass.range_constexpr(0, width // VECTOR, 32):
            i = first + lane
            if i < width // VECTOR:
                r = cute.make_rmem_tensor(VECTOR, element_type(self.config))
                cute.autovec_copy(cute.local_tile(gSource, (VECTOR,), (i,)), r)
                cute.autovec_copy(r, cute.local_tile(gCache, (VECTOR,), (column // VECTOR + i,)))


def fake_args(config: MLAConfig):
    """symbolic arguments of `Append.__call__` before the stream"""
    from cutlass.cute.runtime import make_fake_tensor

    dtype, kv, n, h_kv = element_type(config), config.kv, cute.sym_int(), cute.sym_int()
    wide = lambda: cute.sym_int64(divisibility=VECTOR)
    tensor = lambda shape, stride: make_fake_tensor(dtype, shape, stride=stride, assumed_align=16)
    return (
        tensor((n, h_kv, kv.latent), (wide(), wide(), 1)),
        tensor((n, h_kv, kv.rope or kv.latent), (wide(), wide(), 1)),
        make_fake_tensor(Int64, (n,), stride=(1,), assumed_align=8),
        tensor((cute.sym_int(), config.page, h_kv, kv.head_dim), (wide(), wide(), wide(), 1)),
    )
