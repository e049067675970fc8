"""Shapes and card -> how the kernel is specialised and how many CTAs it gets.  Pure integers: no torch, no GPU."""

from .kernels.config import PLAIN, DecodeOptions, Fp8Config, KVFormat, MLAConfig, UpcastConfig
from .kernels.parts.rows import num_row_tiles


def decode_config(
    kv: KVFormat,
    num_queries: int,
    num_heads: int,
    num_kv_heads: int,
    *,
    mergeable: bool,
    causal: bool,
    split: str,
    page: int = 64,
    options: DecodeOptions = PLAIN,
    q_pair: bool = False,
    sink: bool = False,
    ragged: bool = False,
    fixed_pieces: bool = False,
) -> MLAConfig:
    """How the decode kernel is specialised.  num_queries: of a request; ragged: of any at most; split: element type of partial
    results; mergeable: see choose_head_tile; fixed_pieces: the schedule is batch-invariant."""
    return MLAConfig(
        kv=kv,
        page=page,
        causal=causal and num_queries > 1,
        options=options,
        q_pair=q_pair,
        sink=sink,
        ragged=ragged,
        fixed_pieces=fixed_pieces,
        head_tile=choose_head_tile(num_queries, num_heads, num_kv_heads, mergeable, ragged),
        split=split,
    )


def fp8_config(base: MLAConfig, kv: KVFormat, q_dtype: str, q_terms: int) -> Fp8Config | UpcastConfig:
    """The decode `base`, which is over a cache in the type of out, over an e4m3 cache `kv`."""
    if kv.scales:
        return UpcastConfig(base=base)  # (one kernel for any number of scales)
    q_terms = 1 if q_dtype == kv.dtype else q_terms
    return Fp8Config(base=base, kv=kv, q_dtype=q_dtype, q_terms=q_terms, open_steps=24 if q_terms == 2 else 2)


def choose_head_tile(num_queries: int, num_heads: int, num_kv_heads: int, mergeable: bool, ragged: bool = False) -> int:
    """`MLAConfig.head_tile` for a query tensor [b, num_queries, num_heads, head_dim] (kernels/parts/rows.py), or a ragged one
    [tokens, num_heads, head_dim].

    mergeable: query token and head are one strided axis (stride(-3) == num_heads * stride(-2)).
    One configuration, the flat one, serves every head count with one kv head; the others waste rows only where a group of
    heads is not a power of two.
    """
    if num_kv_heads == 1 and (mergeable or (num_queries == 1 and not ragged)):
        return 0
    if num_queries == 1:
        return 64
    group = num_heads // num_kv_heads
    return min(64, 1 << (group - 1).bit_length())


def row_tiles(head_tile: int, num_queries: int, num_heads: int, num_kv_heads: int) -> int:
    """64-row tiles of a request over all its kv heads"""
    return num_row_tiles(head_tile, num_queries, num_heads, num_kv_heads)


def max_parts(row_tiles: int, num_sms: int) -> int:
    """Spans the batch may be cut into: one CTA on each SM, `row_tiles` of them sharing a span."""
    return max(1, num_sms // row_tiles)
