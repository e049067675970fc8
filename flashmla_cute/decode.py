"""MLA decode: check, look the compiled kernel up, launch."""

import torch

from . import checks, compile, heuristics, ops
from .checks import need
from .kernels.config import MLAConfig
from .kv_cache import PagedKVCache
from .plan import DecodePlan


def mla_decode(
    q: torch.Tensor,
    cache: PagedKVCache,
    plan: DecodePlan,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last `num_queries` tokens of every request over its cached tokens, in the latent space (absorbed MLA).

    q              [batch, num_queries, num_heads, latent + rope], the pool's dtype; last axis contiguous, the other strides
                   multiples of 16 bytes
    cache          the layer's PagedKVCache
    plan           a DecodePlan made for this batch and up to date with its lengths
    softmax_scale  scores are (q . k) * softmax_scale; None: (latent + rope) ** -0.5
    causal         bottom-right: query token i of num_queries sees the tokens < length - num_queries + 1 + i
    out, lse       where to write, as returned; None: new tensors

    Returns out [batch, num_queries, num_heads, latent] of q's dtype, softmax(scores) @ latent, and
    lse [batch, num_heads, num_queries] float32, the natural log of the sum of exp(scores).
    A row that sees no token gives out = 0, lse = -inf.

    Runs on torch's current stream, can be captured in a CUDA graph, reads nothing on the host.
    Raises TypeError, ValueError (both name the argument) or RuntimeError (not a Hopper GPU) before any launch.
    """
    out, lse = _check(q, cache, plan, out, lse)
    b, num_queries, num_heads, head_dim = q.shape
    if b == 0:
        return out, lse
    mergeable = q.stride(1) == num_heads * q.stride(2)
    config = MLAConfig(
        kv=cache.format,
        causal=bool(causal) and num_queries > 1,
        head_tile=heuristics.choose_head_tile(num_queries, num_heads, cache.num_kv_heads, mergeable),
        split=str(plan.o_split.dtype).removeprefix("torch."),
    )
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    compile.get(ops.DecodeOp, config)(
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
    )
    return out, lse


def _check(q, cache, plan, out, lse):
    """all of mla_decode's arguments; returns out and lse, made if they were None"""
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache is a {type(cache).__name__}; allowed: a PagedKVCache")
    if not isinstance(plan, DecodePlan):
        raise TypeError(f"plan is a {type(plan).__name__}; allowed: a DecodePlan")
    checks.is_tensor("q", q)
    checks.is_tensor("cache.pool", cache.pool)
    checks.is_hopper("q", q)
    checks.on_device("cache.pool", cache.pool, q.device, "q")
    checks.has_dtype("q", q, cache.pool.dtype)
    heads = (plan.batch, plan.num_queries, plan.num_heads)
    checks.has_shape("q", q, (*heads, cache.format.head_dim), "(batch, num_queries, num_heads) of the plan, latent + rope")
    checks.has_vector_strides("q", q)
    same = plan.cache_seqlens.data_ptr() == cache.cache_seqlens.data_ptr()
    need(same, "plan", "made for another cache_seqlens tensor", "a plan whose cache shares this cache's cache_seqlens")
    need(plan.num_kv_heads == cache.num_kv_heads, "plan.num_kv_heads", plan.num_kv_heads, f"{cache.num_kv_heads}, the cache's")
    need(
        plan.capacity <= cache.capacity,
        "cache.block_table.shape",
        tuple(cache.block_table.shape),
        f"{plan.capacity} tokens, as planned",
    )
    if out is None:
        out = torch.empty(*heads, cache.format.latent, dtype=q.dtype, device=q.device)
    else:
        checks.is_tensor("out", out)
        checks.on_device("out", out, q.device, "q")
        checks.has_dtype("out", out, q.dtype)
        checks.has_shape("out", out, (*heads, cache.format.latent), "(batch, num_queries, num_heads, latent)")
        checks.has_vector_strides("out", out)
    if lse is None:
        lse = torch.empty(plan.batch, plan.num_heads, plan.num_queries, dtype=torch.float32, device=q.device)
    else:
        checks.is_tensor("lse", lse)
        checks.on_device("lse", lse, q.device, "q")
        checks.has_dtype("lse", lse, torch.float32)
        checks.has_shape("lse", lse, (plan.batch, plan.num_heads, plan.num_queries), "(batch, num_heads, num_queries)")
    return out, lse
