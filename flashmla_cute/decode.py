"""MLA decode: check, look the compiled kernel up, launch."""

from math import inf

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from . import checks, torch_ops
from .checks import need
from .kv_cache import PagedKVCache
from .plan import DecodePlan

MAX_REMEMBERED = 1024  # launches of a plan; an engine may make new caches at every step


def mla_decode(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    cache: PagedKVCache,
    plan: DecodePlan,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sink: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last `num_queries` tokens of every request over its cached tokens, in the latent space (absorbed MLA).

    q              [batch, num_queries, num_heads, latent + rope], the pool's dtype, over an e4m3 pool bf16, fp16 or e4m3; last
                   axis contiguous, the other strides multiples of 16 bytes; or its two parts, ([.., latent], [.., rope]),
                   which need not be concatenated; [tokens, num_heads, latent + rope] if the plan has cu_seqlens_q
    cache          the layer's PagedKVCache
    plan           a DecodePlan made for this batch and up to date with its lengths
    softmax_scale  scores are (q . k) * softmax_scale, positive; None: (latent + rope) ** -0.5
    causal         bottom-right: query token i of num_queries sees the tokens < length - num_queries + 1 + i
    sink           [num_heads] float32 or None: a logit, to base e, that takes its share of each row's softmax without a value
    out, lse       where to write, as returned; None: new tensors

    Returns out [batch, num_queries, num_heads, latent] of q's dtype (float32: plan.options; if q is e4m3, bf16 or, if `out` is
    that, fp16), softmax(scores) @ latent, and
    lse [batch, num_heads, num_queries] float32, the natural log of the sum of exp(scores), without the sink (plan.options has
    another layout and base).  A row that sees no token gives out = 0, lse = -inf.
    With cu_seqlens_q, out is [tokens, num_heads, latent] and lse [tokens, num_heads]; rows of no request are not written.

    Runs on torch's current stream, can be captured in a CUDA graph and traced by torch.compile, reads nothing on the host.
    Raises TypeError, ValueError (both name the argument) or RuntimeError (not a Hopper GPU) before any launch.
    """
    q_rope = None
    if type(q) is tuple:
        q, q_rope = _pair(q)
    if getattr(cache, "scale", None) is not None:
        return _over_fp8(q, q_rope, cache, plan, softmax_scale, causal, sink=sink, out=out, lse=lse)
    if is_dynamo_compiling():
        return _traced(q, q_rope, cache, plan, softmax_scale, causal, sink=sink, out=out, lse=lse)
    # A call like an earlier one costs a look-up instead of 30 checks.  The key holds what chooses the configuration, and of
    # what is checked whatever the compiled function does not check by itself (tests/runtime/test_launch_checks.py).
    key = None
    try:
        q_strides = q.is_contiguous() or q.stride()
        out_strides = out is None or out.is_contiguous() or out.stride()
        lse_strides = lse is None or lse.is_contiguous() or lse.stride()
        others = None if q_rope is None and sink is None else (_kind(q_rope), _kind(sink))
        key = cache.identity, causal, type(q), q_strides, type(out), out_strides, type(lse), lse_strides, others
        launch = plan.launches[key]
        scale = plan.softmax_scale if softmax_scale is None else float(softmax_scale)
        known = 0.0 < scale < inf and not (is_grad_enabled() and _requires_grad(q, q_rope, cache.pool, sink, out, lse))
    except (AttributeError, KeyError, TypeError, ValueError):
        known = False
    if not known:
        if checks.tracing():
            return _traced(q, q_rope, cache, plan, softmax_scale, causal, sink=sink, out=out, lse=lse)
        scale = _check(q, q_rope, cache, plan, softmax_scale, causal, sink=sink, out=out, lse=lse)
        launch = _remember(plan, key, q, q_rope, cache.pool, sink)
    if out is None:
        out = torch.empty(plan.out_shape or (*q.shape[:2], plan.format.latent), dtype=plan.out_dtype, device=q.device)
    if lse is None:
        lse = torch.empty(plan.lse_shape or q.shape[:2], dtype=torch.float32, device=q.device)
    try:
        launch(
            q,
            cache.pool,
            cache.block_table,
            plan.items,
            plan.parts,
            plan.merges,
            out,
            lse,
            plan.o_split,
            plan.lse_split,
            scale,
            plan.num_sms,
            q_rope,
            sink,
        )
    except Exception:
        # if an argument is to blame, this names it
        _check(q, q_rope, cache, plan, softmax_scale, causal, sink=sink, out=out, lse=lse)
        raise
    return out, lse


def _pair(q: tuple) -> tuple:
    if len(q) != 2:
        raise TypeError(f"q is a tuple of {len(q)}; allowed: a torch.Tensor, or two: the latent and the rope columns")
    checks.is_tensor("q[1]", q[1])
    return q


def _kind(tensor: torch.Tensor | None):
    return None if tensor is None else (type(tensor), tensor.stride())


def _requires_grad(*tensors) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _remember(plan, key, q, q_rope, pool, sink):
    """the launch of arguments that were checked, for `key` from now on"""
    if plan.batch == 0:
        return _nothing
    return _keep(
        plan, key, torch_ops.decode_function(q, pool, plan.o_split, q_rope, sink, key[1], plan.fixed_pieces, plan.options)
    )


def _keep(plan, key, launch):
    if plan.cu_seqlens_q is not None:
        launch = _unless_empty(launch)
    if len(plan.launches) >= MAX_REMEMBERED:
        plan.launches.clear()
    plan.launches[key] = launch
    return launch


def _unless_empty(launch):
    """TMA describes no tensor without elements"""
    return lambda q, *others: launch(q, *others) if q.shape[0] > 0 else None


def _nothing(*_):
    """the launch of an empty batch"""


def _traced(q, q_rope, cache, plan, softmax_scale, causal, *, sink, out, lse):
    """mla_decode as torch.compile sees it: what can be checked without memory, new outputs, one operator."""
    scale = _check(q, q_rope, cache, plan, softmax_scale, causal, sink=sink, out=out, lse=lse)
    out, lse = _outputs(q, plan, plan.out_dtype, out, lse)
    arguments = _arguments(q, q_rope, cache, plan, scale, sink=sink, out=out, lse=lse)
    torch.ops.flashmla_cute.decode(*arguments, causal, plan.fixed_pieces, *_as_operands(plan.options))
    return out, lse


def _outputs(q, plan, out_dtype, out, lse):
    """those given, new ones for the others"""
    if out is None:
        out = torch.empty(plan.out_shape or (*q.shape[:2], plan.format.latent), dtype=out_dtype, device=q.device)
    if lse is None:
        lse = torch.empty(plan.lse_shape or q.shape[:2], dtype=torch.float32, device=q.device)
    return out, lse


def _arguments(q, q_rope, cache, plan, scale, *, sink, out, lse) -> tuple:
    """of a compiled decode.  (mla_decode spells this and _outputs out: as calls they cost it 0.25 us of 0.85.)"""
    tensors = (q, cache.pool, cache.block_table, plan.items, plan.parts, plan.merges, out, lse, plan.o_split, plan.lse_split)
    return (*tensors, scale, plan.num_sms, q_rope, sink)


def _as_operands(options):
    """as the operators take them"""
    return options.window, options.softcap, options.out, options.lse_by_token, options.lse_log2


def _over_fp8(q, q_rope, cache, plan, softmax_scale, causal, *, sink, out, lse):
    """mla_decode over an e4m3 cache"""
    key = None
    try:
        layouts = tuple(None if t is None else (type(t), t.dtype, t.stride()) for t in (q, q_rope, sink, out, lse))
        key = cache.identity, causal, layouts
        launch = plan.launches[key]
        scale = plan.softmax_scale if softmax_scale is None else float(softmax_scale)
        known = 0.0 < scale < inf and not (is_grad_enabled() and _requires_grad(q, q_rope, cache.pool, sink, out, lse))
    except (AttributeError, KeyError, TypeError):
        known = False
    if not known:
        scale = _check(q, q_rope, cache, plan, softmax_scale, causal, sink=sink, out=out, lse=lse)
    base_dtype = q.dtype
    if base_dtype not in checks.DTYPES:
        base_dtype = out.dtype if out is not None and out.dtype in checks.DTYPES else torch.bfloat16
    out, lse = _outputs(q, plan, torch.float32 if plan.options.out else base_dtype, out, lse)
    arguments = (*_arguments(q, q_rope, cache, plan, scale, sink=sink, out=out, lse=lse), cache.scale, cache.q_scale)
    if checks.tracing():
        how = plan.query_terms, base_dtype, causal, plan.fixed_pieces
        torch.ops.flashmla_cute.fp8_decode(*arguments, *how, *_as_operands(plan.options))
        return out, lse
    if not known:
        shared = (plan.o_split, q_rope, sink, causal, plan.fixed_pieces, plan.options)
        how = (base_dtype, plan.query_terms, q, cache.pool)
        launch = _keep(plan, key, torch_ops.fp8_decode_function(*how, *shared)) if plan.batch else _nothing
    try:
        launch(*arguments)
    except Exception:
        # if an argument is to blame, this names it
        _check(q, q_rope, cache, plan, softmax_scale, causal, sink=sink, out=out, lse=lse)
        raise
    return out, lse


def _check(q, q_rope, cache, plan, softmax_scale, causal, *, sink, out, lse) -> float:
    """all of mla_decode's arguments; returns the scale"""
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache is a {type(cache).__name__}; allowed: a PagedKVCache")
    if not isinstance(plan, DecodePlan):
        raise TypeError(f"plan is a {type(plan).__name__}; allowed: a DecodePlan")
    if not isinstance(causal, bool):
        raise TypeError(f"causal is a {type(causal).__name__}; allowed: a bool")
    checks.is_tensor("q", q)
    checks.is_tensor("cache.pool", cache.pool)
    checks.is_hopper("q", q)
    checks.on_device("cache.pool", cache.pool, q.device, "q")
    _check_queries(q, q_rope, cache, plan)
    _check_plan(cache, plan)
    if sink is not None:
        checks.is_tensor("sink", sink)
        checks.on_device("sink", sink, q.device, "q")
        checks.has_dtype("sink", sink, torch.float32)
        checks.has_shape("sink", sink, (plan.num_heads,), "(num_heads,)")
        need(sink.is_contiguous(), "sink.stride()", sink.stride(), "contiguous")
    ragged = plan.cu_seqlens_q is not None
    if out is not None:
        checks.is_tensor("out", out)
        checks.on_device("out", out, q.device, "q")
        checks.has_dtype("out", out, *_out_dtypes(q, plan))
        axes = "(tokens of q, num_heads, latent)" if ragged else "(batch, num_queries, num_heads, latent)"
        checks.has_shape("out", out, (*q.shape[:-1], plan.format.latent), axes)
        checks.has_vector_strides("out", out)
    if lse is not None:
        checks.is_tensor("lse", lse)
        checks.on_device("lse", lse, q.device, "q")
        checks.has_dtype("lse", lse, torch.float32)
        axes = "(batch * num_queries, num_heads)" if plan.options.lse_by_token else "(batch, num_heads, num_queries)"
        checks.has_shape("lse", lse, plan.lse_shape or q.shape[:2], "(tokens of q, num_heads)" if ragged else axes)
        checks.has_no_overlap("lse", lse)
    if softmax_scale is None:
        return plan.softmax_scale
    try:
        scale = float(softmax_scale)
    except (TypeError, ValueError):
        raise TypeError(f"softmax_scale is a {type(softmax_scale).__name__}; allowed: a number or None") from None
    need(0.0 < scale < inf, "softmax_scale", scale, "a positive finite number")
    return scale


def _out_dtypes(q, plan) -> tuple[torch.dtype, ...]:
    if plan.out_dtype not in checks.FP8_DTYPES:
        return (plan.out_dtype,)
    return tuple(checks.DTYPES) if q.dtype in checks.FP8_DTYPES else (q.dtype,)


def _check_queries(q, q_rope, cache, plan):
    rows, axes, kv = (plan.batch, plan.num_queries, plan.num_heads), "(batch, num_queries, num_heads)", plan.format
    if plan.cu_seqlens_q is not None:
        rows, axes = (q.shape[0] if q.dim() == 3 else None, plan.num_heads), "(tokens, num_heads)"
    if q_rope is None:
        columns = [("q", q, kv.head_dim, "latent + rope")]
    else:
        need(kv.rope > 0, "q", "a pair", "one tensor: the cache has no rope columns")
        columns = [("q[0]", q, kv.latent, "latent"), ("q[1]", q_rope, kv.rope, "rope")]
    for name, tensor, width, meaning in columns:
        checks.on_device(name, tensor, cache.device, "the cache")
        checks.has_dtype(name, tensor, *(cache.query_dtypes if tensor is q else (q.dtype,)))
        checks.has_shape(name, tensor, (*rows, width), f"{axes} of the plan, {meaning}")
        checks.has_vector_strides(name, tensor)


def _check_plan(cache: PagedKVCache, plan: DecodePlan):
    """that the plan is for this cache"""
    if checks.tracing():  # (no addresses)
        same = plan.cache_seqlens is cache.cache_seqlens
    else:
        same = plan.cache_seqlens.data_ptr() == cache.cache_seqlens.data_ptr()
    need(same, "plan", "made for another cache_seqlens tensor", "a plan whose cache shares this cache's cache_seqlens")
    if not checks.tracing() and plan.format != cache.format:
        raise ValueError(f"plan.format is {plan.format}; allowed: {cache.format}, the cache's")
    if plan.num_kv_heads != cache.num_kv_heads:
        raise ValueError(f"plan.num_kv_heads is {plan.num_kv_heads}; allowed: {cache.num_kv_heads}, the cache's")
    if plan.capacity > cache.capacity:
        shape = tuple(cache.block_table.shape)
        raise ValueError(f"cache.block_table.shape is {shape}; allowed: {plan.capacity} tokens, as planned")
