"""What a row costs at least: floating-point operations, bytes.

The model counts what the algorithm needs: every cached token once, whatever number of CTAs reads it; and every product,
also those the causal mask drops (at most s_q / s_k of them), as all published MLA numbers do.
"""

from flashmla_cute.kernels.config import FORMATS, FP8_FORMATS, SCALED_FORMATS

from .workloads import Row

LATENT, ROPE, ITEMSIZE = 512, 64, 2  # of a cached token in 16 bits, and of q and out
# of an H100, only to size a measurement before there is one
TYPICAL_BYTES_PER_US, TYPICAL_FLOPS_PER_US, TYPICAL_FIXED_US = 3.0e6, 650e6, 10.0


# ---------------------------------------------------------------------- model
def flops(row: Row) -> int:
    return 2 * row.s_q * row.h_q * row.tokens * (2 * LATENT + ROPE)


def kv_bytes(row: Row) -> int:
    kv = SCALED_FORMATS[4] if row.is_scaled else {**FORMATS, **FP8_FORMATS}[row.dtype]
    return row.tokens * row.h_kv * kv.bytes_per_token


def bytes_moved(row: Row) -> int:
    """cache read once, q read, out written"""
    return kv_bytes(row) + row.b * row.s_q * row.h_q * (LATENT + ROPE + LATENT) * ITEMSIZE


def expected_us(row: Row) -> float:
    """rough time of a good kernel, to choose the number of launches in a graph: the same for all implementations"""
    return TYPICAL_FIXED_US + max(bytes_moved(row) / TYPICAL_BYTES_PER_US, flops(row) / TYPICAL_FLOPS_PER_US)


def tflops(row: Row, us: float) -> float:
    return flops(row) / us / 1e6


def gbps(row: Row, us: float) -> float:
    return bytes_moved(row) / us / 1e3
