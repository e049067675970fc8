"""A warpgroup's half of o, 64 rows x latent / 2 -> gmem.  Rows that do not exist are not stored."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from .ptx import pack_half
from .softmax import LN2
from .tiles import element, fragment_row, thread_in_warpgroup


def store_lse(config, gLse, request, s_q, token, head, lse_log2):
    """to where and in the base that the options say; ragged: `request` is its first query token"""
    v = lse_log2 if config.options.lse_log2 else lse_log2 * LN2
    if config.ragged:
        gLse[request + token, head] = v
    elif config.options.lse_by_token:
        gLse[request * s_q + token, head] = v
    else:
        gLse[request, head, token] = v


@cute.jit
def store_rows(half: Constexpr[int], rO, inv_sum, gO, rows, clamp: Constexpr[bool]):
    """gO (token, head, column), 16 bit; clamp: f16, values beyond it become its largest.  A 4x4 transpose of element pairs in
    each quad, then 16-byte stores: a quad writes 64 contiguous bytes (pairs stored as they lie would be 4-byte stores, +13 us
    at batch 1)."""
    tid = thread_in_warpgroup()
    odd, high = (tid & 1) == 1, (tid & 2) == 2
    for r in cutlass.range_constexpr(2):
        token, head, exists = rows.locate(fragment_row(tid) + 8 * r)
        for g in cutlass.range_constexpr(cute.size(rO) // 16):
            rOut = cute.make_rmem_tensor(8, gO.element_type)
            v = cute.recast_tensor(rOut, Int32)
            for i in cutlass.range_constexpr(4):
                first, second = (rO[element(r, 8 * g + 2 * i + j)] * inv_sum[r] for j in range(2))
                if const_expr(clamp):
                    v[i] = pack_half(first, second)
                else:
                    rOut[2 * i], rOut[2 * i + 1] = first.to(gO.element_type), second.to(gO.element_type)
            for lo, hi, bit, off in ((0, 1, odd, 1), (2, 3, odd, 1), (0, 2, high, 2), (1, 3, high, 2)):
                got = cute.arch.shuffle_sync_bfly(v[lo] if bit else v[hi], offset=off)
                v[lo], v[hi] = (got if bit else v[lo]), (v[hi] if bit else got)
            if exists:
                cute.autovec_copy(
                    rOut, cute.local_tile(gO[token, head, None], (8,), (half * cute.size(rO) // 4 + g * 4 + tid % 4,))
                )


@cute.jit
def store_wide(half: Constexpr[int], rO, inv_sum, gO, rows):
    """gO (token, head, column), f32: 8-byte stores (32 contiguous bytes a quad)"""
    tid = thread_in_warpgroup()
    for r in cutlass.range_constexpr(2):
        token, head, exists = rows.locate(fragment_row(tid) + 8 * r)
        if exists:
            for i in cutlass.range_constexpr(cute.size(rO) // 4):
                v = cute.make_rmem_tensor(2, gO.element_type)
                v[0], v[1] = rO[element(r, 2 * i)] * inv_sum[r], rO[element(r, 2 * i + 1)] * inv_sum[r]
                cute.autovec_copy(v, cute.local_tile(gO[token, head, None], (2,), (half * cute.size(rO) + i * 4 + tid % 4,)))
