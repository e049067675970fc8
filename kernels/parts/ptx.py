"""What the DSL has no word for, and the work-arounds for ptxas and LLVM.  All inline assembly of the project is here."""

import cutlass.cute as cute
from cutlass import BFloat16, Int32


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


def max_magnitude(a, b):
    """larger of pairs of 16-bit floats' bits, those of b without signs: integer order is the order of magnitudes, NaN on top"""
    return cute.arch.inline_ptx(
        "{ .reg .b32 a, b; mov.b32 a, {$r0}; and.b32 b, {$r1}, 0x7fff7fff; max.u16x2 {$w0}, a, b; }",  # (max takes no literal)
        write_only_types=[Int32],
        read_only_args=[a, b],
    )


def scaled_halves(pair, scale, dtype):
    """a pair of bf16 or f16 times a power of two -> a pair of f16"""
    if dtype is BFloat16:
        code = "{ .reg .b32 s, p, l, h; prmt.b32 s, {$r1}, 0, 0x3232; mul.rn.bf16x2 p, {$r0}, s; shl.b32 l, p, 16; "
        code += "and.b32 h, p, 0xffff0000; cvt.rn.f16x2.f32 {$w0}, h, l; }"
    else:
        code = "{ .reg .f16 a, b; .reg .f32 l, h; mov.b32 {a, b}, {$r0}; cvt.f32.f16 l, a; cvt.f32.f16 h, b; "
        code += "mul.f32 l, l, {$r1}; mul.f32 h, h, {$r1}; cvt.rn.f16x2.f32 {$w0}, h, l; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[pair, scale])


def scaled_f16(pair, scale):
    """a pair of f16 times a power of two that is an f16"""
    code = "{ .reg .b32 s; cvt.rn.f16x2.f32 s, {$r1}, {$r1}; mul.rn.f16x2 {$w0}, {$r0}, s; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[pair, scale])


_HIGH = "cvt.rn.satfinite.e4m3x2.f16x2 a, {$r0}; cvt.rn.satfinite.e4m3x2.f16x2 b, {$r1}; mov.b32 {$w0}, {a, b}; "
_LOW = "cvt.rn.f16x2.e4m3x2 x, a; cvt.rn.f16x2.e4m3x2 y, b; sub.f16x2 x, {$r0}, x; sub.f16x2 y, {$r1}, y; "
_LOW += "cvt.rn.satfinite.e4m3x2.f16x2 a, x; cvt.rn.satfinite.e4m3x2.f16x2 b, y; mov.b32 {$w1}, {a, b}; "


def one_term(first, second):
    """two pairs of f16 -> four e4m3 in an Int32"""
    code = "{ .reg .b16 a, b; " + _HIGH + "}"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[first, second])


def two_terms(first, second):
    """two pairs of f16 -> four e4m3, and the e4m3 of what they lack.  Either has 4 bits and there is a sign between them:
    together they hold the 8 bits of a bf16 exactly, but for elements of less than 2^-10 of the largest after scaling."""
    code = "{ .reg .b16 a, b; .reg .b32 x, y; " + _HIGH + _LOW + "}"
    return cute.arch.inline_ptx(code, write_only_types=[Int32, Int32], read_only_args=[first, second])


def scale_factors(scale):
    """An f32 -> two pairs of equal f16, of its mantissa / 2^8 and of its power of two * 2^8: an e4m3 number times both is right
    to 11 bits wherever the product is a normal f16, which no f16 of the scale alone achieves.  NaN stays."""
    code = "{ .reg .b32 m, e; .reg .pred n; and.b32 m, {$r0}, 0x007fffff; or.b32 m, m, 0x3b800000; "
    code += "and.b32 e, {$r0}, 0xff800000; setp.nan.f32 n, {$r0}, {$r0}; selp.b32 e, {$r0}, e, n; mul.f32 e, e, 0f43800000; "
    code += "cvt.rn.f16x2.f32 {$w0}, m, m; cvt.rn.f16x2.f32 {$w1}, e, e; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32, Int32], read_only_args=[scale])


def scaled_pair(pair, mantissas, powers):
    """two f16 times what scale_factors gives"""
    code = "{ .reg .b32 p; mul.rn.f16x2 p, {$r0}, {$r1}; mul.rn.f16x2 {$w0}, p, {$r2}; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[pair, mantissas, powers])


def transposed_halves(word):
    """e4m3 (a0 b0 a1 b1), lowest byte first -> two pairs of f16, (a0 a1) and (b0 b1)"""
    code = "{ .reg .b32 w; .reg .b16 a, b; prmt.b32 w, {$r0}, 0, 0x3120; mov.b32 {a, b}, w; "
    code += "cvt.rn.f16x2.e4m3x2 {$w0}, a; cvt.rn.f16x2.e4m3x2 {$w1}, b; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32, Int32], read_only_args=[word])


def transposed_matrices(address):
    """ldmatrix.trans of two matrices of 8 x 16 bytes; address: per lane, of row `lane` % 16"""
    code = "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{$w0}, {$w1}}, [{$r0}];"
    return cute.arch.inline_ptx(code, write_only_types=[Int32, Int32], read_only_args=[address])


def opaque(x):
    """The same value, but LLVM cannot hoist what is computed from it: addresses do not occupy registers across the loop."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])
