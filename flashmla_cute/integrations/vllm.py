"""vLLM: an MLA backend whose decode is ours.  Prefill, projections and cache writes stay vLLM's.

Written against the MLA base classes of vLLM 0.33.0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import vllm.envs as envs
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType

from ..kernels.config import TILE
from . import support
from .plugins import VLLM_NAME
from .steps import DecodeStep, DecodeSteps

# vLLM's names of cache types
KV_CACHE_DTYPES = {
    name: dtype
    for name, dtype in {**support.DTYPES, "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}.items()
    if dtype in support.CACHES
}


def cache_dtype(name: str | None, model: torch.dtype):
    return model if name in (None, "auto") else KV_CACHE_DTYPES.get(name, name)


class FlashMLACuteBackend(MLACommonBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = list(support.DTYPES.values())
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *KV_CACHE_DTYPES]

    @staticmethod
    def get_name() -> str:
        return VLLM_NAME

    @staticmethod
    def get_builder_cls() -> type["FlashMLACuteMetadataBuilder"]:
        return FlashMLACuteMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type["FlashMLACuteImpl"]:
        return FlashMLACuteImpl

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        return [page for page in support.PAGES if page % 16 == 0]  # (vLLM's blocks are multiples of 16)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Whole tiles: in smaller pages a tile of 64 tokens is eight loads, not one."""
        return default_block_size if default_block_size % TILE == 0 else TILE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        mine = {sum(widths) for cache in support.CACHES.values() for widths in cache}
        return [size for size in super().get_supported_head_sizes() if size in mine]  # (vLLM's metadata accept no others)

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return (capability.major, capability.minor) == (9, 0)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # whether a batch is ragged is decided by the host's lengths

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability,
    ) -> str | None:
        cache = cache_dtype(kv_cache_dtype, dtype)
        reason = support.why_not_dtypes(dtype, cache)
        if reason is None and head_size in cls.get_supported_head_sizes():  # (else vLLM says so)
            sizes = [sum(widths) for widths in support.CACHES[cache]]
            reason = None if head_size in sizes else f"head_size is {head_size}; allowed in a cache of {cache}: {sizes}"
        return reason


@dataclass
class FlashMLACuteDecodeMetadata(MLACommonDecodeMetadata):
    step: DecodeStep


@dataclass
class FlashMLACuteMetadata(MLACommonMetadata[FlashMLACuteDecodeMetadata]):
    pass


class FlashMLACuteMetadataBuilder(MLACommonMetadataBuilder[FlashMLACuteMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN
    # Requests of more query tokens are prefill; vLLM raises it to 1 + speculative tokens.  Longer ones would decode too, but
    # every number of query tokens is a plan of its own.
    reorder_batch_threshold: int = 1

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, FlashMLACuteMetadata)
        # Under context parallelism all ranks' heads meet the tokens of this rank.
        self.steps = DecodeSteps(
            self.num_heads * self.dcp_world_size,
            (self.mla_dims.kv_lora_rank, self.mla_dims.qk_rope_head_dim),
            self.page_size,
            vllm_config.model_config.dtype,
            cache_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype),
            device,
            batch_invariant=envs.VLLM_BATCH_INVARIANT,
        )
        # A draft step's lengths advance on the device, under a graph, when no context parallel lengths hang on them.
        self.supports_draft_decode_metadata_update = self.dcp_world_size == 1
        for num_queries in range(1, self.reorder_batch_threshold + 1):
            self.steps.warm_up(num_queries, pair=self.dcp_world_size == 1)  # (vLLM joins the parts for its gather)
            if num_queries > 1:
                self.steps.warm_up(num_queries, ragged=True)

    def _build_decode(
        self,
        block_table_tensor: torch.Tensor,
        seq_lens_device: torch.Tensor,
        max_seq_len: int,
        query_start_loc_cpu: torch.Tensor,
        query_start_loc_device: torch.Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: torch.Tensor | None,
    ) -> FlashMLACuteDecodeMetadata:
        num_decodes = block_table_tensor.shape[0]
        lengths = query_start_loc_cpu.diff().tolist()
        num_queries, starts = max(*lengths, 1), None
        # One number of query tokens for all, or 0 for requests that pad a captured batch: the form that graphs are captured in.
        if num_decode_tokens != num_decodes * num_queries or not {*lengths} <= {0, num_queries}:
            starts = query_start_loc_device
        return FlashMLACuteDecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            step=self.steps.plan(block_table_tensor, seq_lens_device, num_queries, starts),
        )

    def update_draft_decode_metadata(self, metadata: FlashMLACuteMetadata) -> None:
        if metadata.decode is not None:
            metadata.decode.step.refresh()


class FlashMLACuteImpl(MLACommonImpl[FlashMLACuteMetadata]):
    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_dcp: bool = True
    supports_pcp: bool = False  # (not tried)

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args,
    ):
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_args,
        )
        given = dict(alibi_slopes=alibi_slopes, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap)
        for name, value in given.items():
            if value:
                raise NotImplementedError(f"{VLLM_NAME}: {name} is {value}; allowed: None")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"{VLLM_NAME}: attn_type is {attn_type}; allowed: {AttentionType.DECODER}")
        # Over an FP8 cache the kernel splits 16-bit queries itself, exactly, and takes their two parts as they are; vLLM's own
        # quantisation would be a launch and lose bits.
        self.supports_quant_query_input = False
        self.is_fp8 = KV_CACHE_DTYPES.get(kv_cache_dtype) in support.FP8_CACHES

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: FlashMLACuteMetadata,
        layer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q: the pair ([tokens, heads, latent], [tokens, heads, rope]), or joined, as vLLM does under context parallelism.
        Returns out [tokens, heads, latent] and, for context parallelism, lse [tokens, heads], natural log."""
        scale = layer._k_scale if self.is_fp8 else None
        out, lse = attn_metadata.decode.step.decode(q, kv_c_and_k_pe_cache, self.scale, scale)
        return out, lse if self.need_to_return_lse_for_decode else None
