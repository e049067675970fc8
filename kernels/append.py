"""Append, Fp8Append: write new tokens into their slots of a paged cache, one warp per (token, kv head), 16 bytes a lane."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, const_expr

from .config import Fp8AppendConfig, MLAConfig
from .parts.tiles import TYPES, element_type

WARPS = 8  # of a CTA
VECTOR = 8  # elements of 16 bytes


@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    latent: cute.Tensor  # (token, kv head, latent)
    rope: cute.Tensor  # (token, kv head, rope); without rope columns anything
    slots: cute.Tensor  # (token,) int64: page * page_size + row; negative: skip the token
    cache: cute.Tensor  # (page, row, kv head, latent + rope)
    scale: cute.Tensor | None = None  # (1,) f32: what an e4m3 number of the cache is multiplied by


class Append:
    def __init__(self, config: MLAConfig):
        self.config = config

    @cute.jit
    def __call__(self, latent: cute.Tensor, rope: cute.Tensor, slots: cute.Tensor, cache: cute.Tensor, stream):
        self.kernel(Args(latent, rope, slots, cache)).launch(**_launch(latent), stream=stream, use_pdl=True)

    @cute.kernel
    def kernel(self, args: Args):
        token, head, exists = _unit(args)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if exists:
            gCache, inside = _row(args, token, head)
            if inside:
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


class Fp8Append:
    """The same into an e4m3 cache: what is beyond 448 * scale, infinities too, becomes +-448, NaN stays NaN."""

    def __init__(self, config: Fp8AppendConfig):
        self.config = config

    @cute.jit
    def __call__(self, latent, rope, slots, cache, scale, stream):
        self.kernel(Args(latent, rope, slots, cache, scale)).launch(**_launch(latent), stream=stream, use_pdl=True)

    @cute.kernel
    def kernel(self, args: Args):
        token, head, exists = _unit(args)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if exists:
            gCache, inside = _row(args, token, head)
            if inside:
                scale, latent = args.scale[0], self.config.kv.latent
                self._quantise(args.latent[token, head, None], gCache, 0, latent, scale)
                self._quantise(args.rope[token, head, None], gCache, latent, self.config.kv.rope, scale)

    @cute.jit
    def _quantise(self, gSource, gCache, column: Constexpr[int], width: Constexpr[int], scale: Float32):
        lane, vector = cute.arch.lane_idx(), 16
        for first in cutlass.range_constexpr(0, width // vector, 32):
            i = first + lane
            if i < width // vector:
                r, r8 = (cute.make_rmem_tensor(vector, dt) for dt in (TYPES[self.config.source], TYPES[self.config.kv.dtype]))
                cute.autovec_copy(cute.local_tile(gSource, (vector,), (i,)), r)
                if const_expr(r.element_type is r8.element_type):
                    r8.store(r.load())
                else:
                    r8.store((r.load().to(Float32) / scale).to(r8.element_type))
                cute.autovec_copy(r8, cute.local_tile(gCache, (vector,), (column // vector + i,)))


def _launch(latent):
    num_tokens, h_kv, _ = latent.shape
    return dict(grid=[(num_tokens * h_kv + WARPS - 1) // WARPS, 1, 1], block=[32 * WARPS, 1, 1])


@cute.jit
def _unit(args: Args):
    """this warp's token and kv head, and whether there is one"""
    cta, _, _ = cute.arch.block_idx()
    num_tokens, h_kv, _ = args.latent.shape
    unit = cta * WARPS + cute.arch.warp_idx()
    return unit // h_kv, unit % h_kv, unit // h_kv < num_tokens


@cute.jit
def _row(args: Args, token: Int32, head: Int32):
    """the token's row of the cache, and whether its slot is in the pool: any other must not corrupt what lies there"""
    num_pages, page, _, _ = args.cache.shape
    slot = args.slots[token]
    inside = (slot >= 0) & (slot < Int64(num_pages) * page)
    return args.cache[Int32(slot // page), Int32(slot % page), head, None], inside


def fake_fp8_args(config: Fp8AppendConfig):
    """symbolic arguments of `Fp8Append.__call__` before the stream"""
    from cutlass.cute.runtime import make_fake_tensor

    source, dtype, kv, n, h_kv = TYPES[config.source], TYPES[config.kv.dtype], config.kv, cute.sym_int(), cute.sym_int()
    rows = lambda dt, *shape: make_fake_tensor(
        dt, shape, stride=(*(cute.sym_int64(divisibility=128 // dt.width) for _ in shape[1:]), 1), assumed_align=16
    )
    return (
        rows(source, n, h_kv, kv.latent),
        rows(source, n, h_kv, kv.rope),
        make_fake_tensor(Int64, (n,), stride=(1,), assumed_align=8),
        rows(dtype, cute.sym_int(), config.page, h_kv, kv.head_dim),
        make_fake_tensor(Float32, (1,), stride=(1,), assumed_align=4),
    )


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
