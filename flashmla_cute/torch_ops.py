"""torch.ops.flashmla_cute: the launches as operators, which torch.compile keeps whole.

An operator writes only into tensors that it is given, and its schema names them.  They lie on a raw torch.library.Library:
torch.library.custom_op would add 15 to 30 us to a call.  Eager calls of mla_decode, DecodePlan and PagedKVCache launch the
compiled functions themselves; only traced ones come here.
"""

from collections.abc import Callable

import torch

from . import checks, compile, heuristics, ops
from .kernels.config import DecodeOptions, Fp8AppendConfig, KVFormat, MLAConfig, ScheduleConfig

SCHEMAS = {
    "decode": "(Tensor q, Tensor pool, Tensor block_table, Tensor items, Tensor parts, Tensor merges, Tensor(a!) out, "
    "Tensor(b!) lse, Tensor(c!) o_split, Tensor(d!) lse_split, float softmax_scale, int num_sms, Tensor? q_rope, Tensor? sink, "
    "bool causal, bool fixed_pieces, int window, float softcap, str out_dtype, bool lse_by_token, bool lse_log2) -> ()",
    "fp8_decode": "(Tensor q, Tensor pool, Tensor block_table, Tensor items, Tensor parts, Tensor merges, Tensor(a!) out, "
    "Tensor(b!) lse, Tensor(c!) o_split, Tensor(d!) lse_split, float softmax_scale, int num_sms, Tensor? q_rope, Tensor? sink, "
    "Tensor kv_scale, Tensor q_scale, int q_terms, ScalarType base_dtype, "
    "bool causal, bool fixed_pieces, int window, float softcap, str out_dtype, bool lse_by_token, bool lse_log2) -> ()",
    "schedule": "(Tensor cache_seqlens, Tensor(a!) items, Tensor(b!) parts, Tensor(c!) merges, int row_tiles, int max_tokens, "
    "int reach, int[] config) -> ()",
    "ragged_schedule": "(Tensor cache_seqlens, Tensor cu_seqlens_q, Tensor(a!) items, Tensor(b!) parts, Tensor(c!) merges, "
    "int row_tiles, int max_tokens, int reach, int[] config) -> ()",
    "append": "(Tensor latent, Tensor rope, Tensor slots, Tensor(a!) pool, int num_latent) -> ()",
    "fp8_append": "(Tensor latent, Tensor rope, Tensor slots, Tensor(a!) pool, Tensor scale, int scales) -> ()",
}


def decode_function(
    q: torch.Tensor,
    pool: torch.Tensor,
    o_split: torch.Tensor,
    q_rope: torch.Tensor | None,
    sink: torch.Tensor | None,
    *how: bool | DecodeOptions,
) -> Callable:
    """The compiled decode for these tensors; what it takes: ops.DecodeOp.  how: causal, fixed_pieces (the schedule is
    batch-invariant), options"""
    kv = checks.format_of("pool", pool, o_split.shape[-1])
    return compile.get(ops.DecodeOp, _decode_config(kv, q, pool, o_split, q_rope, sink, *how))


def fp8_decode_function(base_dtype: torch.dtype, q_terms: int, q: torch.Tensor, pool: torch.Tensor, *others) -> Callable:
    """The compiled decode over an e4m3 pool; what it takes: ops.Fp8DecodeOp.  base_dtype: of out, unless the options say
    float32; others: as decode_function has them."""
    fmt = checks.format_of("pool", pool)
    base = _decode_config(KVFormat(_name(base_dtype), fmt.latent, fmt.rope), q, pool, *others)
    return compile.get(ops.Fp8DecodeOp, heuristics.fp8_config(base, fmt, _name(q.dtype), q_terms))


def _decode_config(kv: KVFormat, q, pool, o_split, q_rope, sink, *how) -> MLAConfig:
    causal, fixed_pieces, options = how
    num_queries, num_heads = o_split.shape[1:3]
    return heuristics.decode_config(
        kv,
        num_queries,
        num_heads,
        num_kv_heads=pool.shape[2],
        mergeable=all(t.stride(-3) == num_heads * t.stride(-2) for t in (q, q_rope) if t is not None),
        causal=causal,
        split=_name(o_split.dtype),
        page=pool.shape[1],
        options=options,
        q_pair=q_rope is not None,
        sink=sink is not None,
        ragged=q.dim() == 3,
        fixed_pieces=fixed_pieces,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decode(q: torch.Tensor, pool: torch.Tensor, *others):
    arguments, (q_rope, sink, causal, fixed_pieces, *options) = others[:-9], others[-9:]
    checks.is_hopper("q", q)
    if q.shape[0] > 0:
        o_split = arguments[6]
        launch = decode_function(q, pool, o_split, q_rope, sink, causal, fixed_pieces, DecodeOptions(*options))
        launch(q, pool, *arguments, q_rope, sink)


def fp8_decode(q: torch.Tensor, pool: torch.Tensor, *others):
    arguments, scales, how, options = others[:-13], others[-11:-9], others[-9:-7], others[-5:]
    (q_rope, sink), (causal, fixed_pieces) = others[-13:-11], others[-7:-5]
    checks.is_hopper("q", q)
    if q.shape[0] > 0:
        q_terms, base_dtype = how
        shared = (arguments[6], q_rope, sink, causal, fixed_pieces, DecodeOptions(*options))
        launch = fp8_decode_function(base_dtype, q_terms, q, pool, *shared)
        launch(q, pool, *arguments, q_rope, sink, *scales)


def schedule(cache_seqlens: torch.Tensor, *others):
    *arguments, config = others
    checks.is_hopper("cache_seqlens", cache_seqlens)
    if cache_seqlens.shape[0] > 0:
        compile.get(ops.ScheduleOp, ScheduleConfig(*config))(cache_seqlens, *arguments)


def ragged_schedule(cache_seqlens: torch.Tensor, *others):
    *arguments, config = others
    checks.is_hopper("cache_seqlens", cache_seqlens)
    if cache_seqlens.shape[0] > 0:
        compile.get(ops.RaggedScheduleOp, ScheduleConfig(*config))(cache_seqlens, *arguments)


def append(latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor, pool: torch.Tensor, num_latent: int):
    checks.is_hopper("pool", pool)
    if slots.shape[0] > 0:
        append_function(pool, num_latent)(latent, rope, slots, pool)


def fp8_append(latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor, pool: torch.Tensor, *how):
    scale, scales = how
    checks.is_hopper("pool", pool)
    if slots.shape[0] > 0:
        fp8_append_function(latent, pool, scales)(latent, rope, slots, pool, scale)


def append_function(pool: torch.Tensor, num_latent: int) -> Callable:
    """the compiled append into `pool`; what it takes: ops.AppendOp"""
    config = MLAConfig(kv=checks.format_of("pool", pool, num_latent), page=pool.shape[1], causal=False)
    return compile.get(ops.AppendOp, config)


def fp8_append_function(latent: torch.Tensor, pool: torch.Tensor, scales: int) -> Callable:
    """the compiled append for these tensors; what it takes: ops.Fp8AppendOp"""
    config = Fp8AppendConfig(kv=checks.format_of("pool", pool, scales=scales), source=_name(latent.dtype), page=pool.shape[1])
    return compile.get(ops.Fp8AppendOp, config)


def _register() -> torch.library.Library:
    library = torch.library.Library("flashmla_cute", "DEF")
    for launch in (decode, fp8_decode, schedule, ragged_schedule, append, fp8_append):
        # (the strides that were checked and that choose the configuration must arrive)
        tag = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)  # torch 2.6 has the second only
        library.define(launch.__name__ + SCHEMAS[launch.__name__], tags=(tag,))
        library.impl(launch.__name__, launch, "CUDA")
        torch.library.register_fake(f"flashmla_cute::{launch.__name__}", _nothing, lib=library)
    return library


def _nothing(*_):
    """all that an operator does to shapes"""


_library = _register()  # (its operators live as long as it does)
