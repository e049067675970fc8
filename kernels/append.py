"""Append: writes new tokens into their slots of a paged cache, one warp per (token, kv head), 16 bytes of the cache a lane.

Into an e4m3 cache they are divided by its scale and rounded: beyond 448 * scale, infinities too, they become +-448, NaN stays.
Where tokens have scales of their own, each is the largest finite magnitude among its columns / 448, or 2^-126 if that is more.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Constexpr, Float8E4M3FN, Float32, Int32, Int64, Uint8, const_expr

from .config import Fp8AppendConfig, MLAConfig
from .parts.tiles import TYPES

WARPS = 8  # of a CTA
VECTOR_BITS = 128
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    latent: cute.Tensor  # (token, kv head, latent)
    rope: cute.Tensor  # (token, kv head, rope); without rope columns anything
    slots: cute.Tensor  # (token,) int64: page * page_size + row; negative: skip the token
    cache: cute.Tensor  # (page, row, kv head, latent + rope), or bytes
    scale: cute.Tensor | None  # (1,) f32: what an e4m3 number of the cache is multiplied by, unless tokens have their own


class Append:
    def __init__(self, config: MLAConfig | Fp8AppendConfig):
        self.config = config

    @cute.jit
    def __call__(self, latent, rope, slots, cache, scale, stream):
        num_tokens, h_kv, _ = latent.shape
        self.kernel(Args(latent, rope, slots, cache, scale)).launch(
            grid=[(num_tokens * h_kv + WARPS - 1) // WARPS, 1, 1], block=[32 * WARPS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, args: Args):
        token, head, exists = self._unit(args)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if exists:
            gCache, inside = self._row(args, token, head)
            if const_expr(self.config.kv.scales > 0):
                if inside:
                    self._write_scaled(args.latent[token, head, None], args.rope[token, head, None], gCache)
            elif inside:
                scale = args.scale[0] if const_expr(args.scale is not None) else None
                latent = self.config.kv.latent
                self._write(args.latent[token, head, None], gCache, 0, latent, scale)
                self._write(args.rope[token, head, None], gCache, latent, self.config.kv.rope, scale)

    @cute.jit
    def _unit(self, args: Args):
        """this warp's token and kv head, and whether there is one"""
        cta, _, _ = cute.arch.block_idx()
        num_tokens, h_kv, _ = args.latent.shape
        unit = cta * WARPS + cute.arch.warp_idx()
        return unit // h_kv, unit % h_kv, unit // h_kv < num_tokens

    @cute.jit
    def _row(self, args: Args, token: Int32, head: Int32):
        """the token's row of the cache, and whether its slot is in the pool: any other must not corrupt what lies there"""
        num_pages, page, _, _ = args.cache.shape
        slot = args.slots[token]
        inside = (slot >= 0) & (slot < Int64(num_pages) * page)
        return args.cache[Int32(slot // page), Int32(slot % page), head, None], inside

    @cute.jit
    def _write(self, gSource, gCache, column: Constexpr[int], width: Constexpr[int], scale):
        lane, source, kept = cute.arch.lane_idx(), gSource.element_type, gCache.element_type
        vector = VECTOR_BITS // kept.width
        for first in cutlass.range_constexpr(0, width // vector, 32):
            i = first + lane
            if i < width // vector:
                r = cute.make_rmem_tensor(vector, source)
                cute.autovec_copy(cute.local_tile(gSource, (vector,), (i,)), r)
                if const_expr(source is not kept):
                    r8 = cute.make_rmem_tensor(vector, kept)
                    r8.store((r.load().to(Float32) / scale).to(kept))
                    r = r8
                cute.autovec_copy(r, cute.local_tile(gCache, (vector,), (column // vector + i,)))

    @cute.jit
    def _write_scaled(self, gLatent, gRope, gCache):
        """16 latent columns a lane, so that 8 lanes share one of 4 scales; then 8 rope columns for some"""
        lane, kv = cute.arch.lane_idx(), self.config.kv
        r, r8 = cute.make_rmem_tensor(16, gLatent.element_type), cute.make_rmem_tensor(16, Float8E4M3FN)
        cute.autovec_copy(cute.local_tile(gLatent, (16,), (lane,)), r)
        x, most = cute.make_rmem_tensor(16, Float32), Float32(0.0)
        x.store(r.load().to(Float32))
        for i in cutlass.range_constexpr(16):
            magnitude = cute.arch.fmax(x[i], -x[i])
            most = magnitude if (magnitude > most) & (magnitude < Float32.inf) else most
        for offset in (1, 2, 4, 8, 16)[: 3 if kv.scales == 4 else 5]:
            most = cute.arch.fmax(most, cute.arch.shuffle_sync_bfly(most, offset=offset))
        scale = cute.arch.fmax(most / E4M3_MAX, Float32(SMALLEST_SCALE))
        r8.store((x.load() / scale).to(Float8E4M3FN))
        cute.autovec_copy(r8, cute.local_tile(cute.recast_tensor(gCache, Float8E4M3FN), (16,), (lane,)))
        if lane % 8 == 0:
            cute.recast_tensor(gCache, Float32)[kv.latent // 4 + lane // 8] = scale
        if lane < kv.rope // 8:
            rRope, r16 = cute.make_rmem_tensor(8, gRope.element_type), cute.make_rmem_tensor(8, BFloat16)
            cute.autovec_copy(cute.local_tile(gRope, (8,), (lane,)), rRope)
            r16.store(rRope.load().to(Float32).to(BFloat16))
            cute.autovec_copy(r16, cute.local_tile(cute.recast_tensor(gCache, BFloat16), (8,), (kv.rope_byte // 16 + lane,)))


def fake_args(config: MLAConfig | Fp8AppendConfig):
    """symbolic arguments of `Append.__call__` before the stream"""
    from cutlass.cute.runtime import make_fake_tensor

    fp8, kv, n, h_kv = isinstance(config, Fp8AppendConfig), config.kv, cute.sym_int(), cute.sym_int()
    source, kept = TYPES[config.source if fp8 else kv.dtype], Uint8 if kv.scales else TYPES[kv.dtype]
    wide = lambda dtype: cute.sym_int64(divisibility=VECTOR_BITS // dtype.width)
    rows = lambda dtype, *shape: make_fake_tensor(dtype, shape, stride=(*(wide(dtype) for _ in shape[1:]), 1), assumed_align=16)
    return (
        rows(source, n, h_kv, kv.latent),
        rows(source, n, h_kv, kv.rope or kv.latent),
        make_fake_tensor(Int64, (n,), stride=(1,), assumed_align=8),
        rows(kept, cute.sym_int(), config.page, h_kv, kv.bytes_per_token if kv.scales else kv.head_dim),
        make_fake_tensor(Float32, (1,), stride=(1,), assumed_align=4) if fp8 else None,
    )
