"""FlashMLA's two functions for dense decode, with its arguments and its conventions, on our kernels.

from flashmla_cute.compat import flash_mla_with_kvcache, get_mla_metadata      # instead of: from flash_mla import ..

As in FlashMLA 1.0 the metadata is an object, whatever get_mla_metadata was given, never a pair of tensors.  An argument that
asks for what no kernel of ours does raises ValueError.
"""

from dataclasses import dataclass, field

import torch

from .checks import has_shape, is_tensor, need
from .decode import mla_decode
from .kv_cache import PagedKVCache
from .plan import DecodePlan

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]
_ROWS = "num_q_tokens_per_head_k"


@dataclass
class FlashMLASchedMeta:
    """The schedule of a step, for all of its layers: made by the first call that it is passed to, for the lengths of that call.
    Later calls must have the same shapes, and lengths of the same values."""

    expected: dict[str, int] = field(default_factory=dict)  # what get_mla_metadata was told, and what the first call had
    plan: DecodePlan | None = None

    def check(self, found: dict[str, int]):
        """raises ValueError where a call differs from what this was made for"""
        for name, value in found.items():
            wanted = self.expected.get(name, value)
            need(value == wanted, name, value, f"{wanted}, what tile_scheduler_metadata was made for")


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[FlashMLASchedMeta, None]:
    """(tile_scheduler_metadata, num_splits) for flash_mla_with_kvcache, in FlashMLA's new form, without arguments, or in its
    old one, to whose arguments the calls are then held.  Nothing is launched yet: the lengths count as they are in the first
    call.  num_splits is None.

    cache_seqlens            [batch] int32
    num_q_tokens_per_head_k  s_q * h_q / h_k
    """
    _refuse(is_fp8_kvcache=is_fp8_kvcache, topk=topk)
    told = {_ROWS: num_q_tokens_per_head_k, "k_cache.shape[2]": num_heads_k, "q.shape[2]": num_heads_q}
    if cache_seqlens is not None:
        is_tensor("cache_seqlens", cache_seqlens)
        has_shape("cache_seqlens", cache_seqlens, (None,), "(batch,)")
        told["q.shape[0]"] = cache_seqlens.shape[0]
    return FlashMLASchedMeta({name: value for name, value in told.items() if value is not None}), None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense MLA decode.

    q              [batch, s_q, h_q, 576], bf16 or fp16
    k_cache        [num_blocks, 64, h_k, 576], of q's dtype
    block_table    [batch, max_blocks] int32
    cache_seqlens  [batch] int32

    Returns out [batch, s_q, h_q, 512] and lse [batch, h_q, s_q] float32, which is +inf where a query sees no token (that of
    mla_decode is -inf).  Like mla_decode it reads nothing on the host.
    """
    _refuse(
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    meta = tile_scheduler_metadata
    if not isinstance(meta, FlashMLASchedMeta):
        raise TypeError(f"tile_scheduler_metadata is a {type(meta).__name__}; allowed: what get_mla_metadata returns first")
    need(num_splits is None, "num_splits", type(num_splits).__name__, "None, as get_mla_metadata returns it")
    is_tensor("q", q)
    has_shape("q", q, (None, None, None, None), "(batch, s_q, h_q, head dim)")
    for name, tensor in (("k_cache", k_cache), ("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        is_tensor(name, tensor)
    plan, cache = _plan(meta, q, k_cache, block_table, cache_seqlens)
    need(head_dim_v == plan.format.latent, "head_dim_v", head_dim_v, str(plan.format.latent))
    out, lse = mla_decode(q, cache, plan, softmax_scale=softmax_scale, causal=causal)
    inf = float("inf")
    return out, lse.nan_to_num_(nan=float("nan"), posinf=inf, neginf=inf)


def _plan(meta: FlashMLASchedMeta, q, k_cache, block_table, cache_seqlens) -> tuple[DecodePlan, PagedKVCache]:
    """the plan of `meta`, made if this is its first call, and this layer's cache"""
    cache = PagedKVCache.from_tensors(k_cache, block_table, cache_seqlens)
    (b, s_q, h_q, _), h_k = q.shape, cache.num_kv_heads
    need(h_q % h_k == 0, "q.shape[2]", h_q, f"a multiple of the {h_k} kv heads")
    found = {"q.shape[0]": b, "q.shape[1]": s_q, "q.shape[2]": h_q, "k_cache.shape[2]": h_k, _ROWS: s_q * h_q // h_k}
    meta.check(found)
    if meta.plan is None:
        plan = DecodePlan(cache, h_q, s_q)
        meta.expected, meta.plan = found, plan
    elif cache_seqlens is not meta.plan.cache_seqlens:  # the same values: those that were planned for
        cache = PagedKVCache.from_tensors(k_cache, block_table, meta.plan.cache_seqlens)
    return meta.plan, cache


def _refuse(**arguments):
    """raises ValueError for an argument of FlashMLA's that no kernel of ours has"""
    for name, value in arguments.items():
        if value is not None and value is not False:
            shown = value if isinstance(value, bool | int) else f"a {type(value).__name__}"
            allowed = "False" if name.startswith("is_") else "None"
            raise ValueError(f"{name} is {shown}; allowed: {allowed}, this is dense decode of a bf16 or fp16 cache")
