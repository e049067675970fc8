"""What the DSL has no word for, and the work-arounds for ptxas and LLVM.  All inline assembly of the project is here."""

import cutlass.cute as cute
from cutlass import Int32


def uniform(x):
    """Warp-uniform integer in a uniform register.  REDUX writes one, so that loops bounded by the value are uniform to
    ptxas; make_warp_uniform (shfl) of an already uniform load is dropped, and loop-carried values sit in vector registers."""
    return cute.arch.warp_redux_sync(x, "max")


def lane_value(x, lane):
    return cute.arch.shuffle_sync(x, lane)


def pack_half(low, high):
    """two f32 -> two f16 in an Int32, values beyond f16 clamped to its largest: no inf where the true value is finite"""
    return cute.arch.inline_ptx(
        "cvt.rn.satfinite.f16x2.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[high, low]
    )


def opaque(x):
    """The same value, but LLVM cannot hoist what is computed from it: addresses do not occupy registers across the loop."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])
