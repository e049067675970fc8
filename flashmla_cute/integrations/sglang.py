"""SGLang: an MLA backend whose decode and target verify are ours.  Prefill is FlashInfer's, as for SGLang's own FlashMLA.

Written against the MLA base class of SGLang 0.5.23.
"""

import torch
from sglang.kernels.ops.attention.dcp_kernels import create_mla_kv_page_table_for_dcp
from sglang.kernels.ops.attention.kv_indices import (
    create_flashmla_kv_indices_triton,
    get_num_kv_index_blocks_flashmla,
    get_num_page_per_block_flashmla,
)
from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend
from sglang.srt.layers.dcp.layout import get_dcp_lens
from sglang.srt.mem_cache.layout.paged_view import paged_view
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
from sglang.srt.runtime_context import get_exec, get_parallel, get_spec
from sglang.srt.utils import get_cuda_graph_max_batch_size

from ..kernels.config import DecodeOptions
from . import support
from .plugins import SGLANG_NAME
from .steps import DecodeStep, DecodeSteps


def create(runner) -> "FlashMLACuteAttnBackend":
    """The backend of a ModelRunner.  Raises ValueError for a model or server setting that the kernels do not decode."""
    if not runner.use_mla_backend:
        raise ValueError(f"--attention-backend {SGLANG_NAME}: the model has no latent attention (MLA); allowed: MLA models")
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        handle_attention_flashmla,
    )

    # Which of the model's attention methods a forward takes is looked up by name: as for FlashMLA, whose prefill is the same.
    AttentionBackendRegistry.register(SGLANG_NAME, handle_attention_flashmla)
    # Backends in this list get queries and new tokens as (latent, rope) pairs, and are asked for lse under context parallelism;
    # for others the model joins the two.  It also has Llama 4's scaling of queries for the others alone.
    scaled = getattr(runner.model_config.hf_text_config, "llama_4_scaling", None) is not None
    if not scaled and SGLANG_NAME not in FORWARD_ABSORB_CORE_ATTENTION_BACKENDS:
        FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.append(SGLANG_NAME)
    return FlashMLACuteAttnBackend(runner)


class FlashMLACuteAttnBackend(FlashInferMLAAttnBackend):
    needs_cpu_seq_lens: bool = False  # plans are made on the device
    supports_ragged_verify_graph: bool = False

    def __init__(self, model_runner, skip_prefill: bool = False, kv_indptr_buf=None, q_indptr_decode_buf=None):
        config, parallel, spec = model_runner.model_config, get_parallel(), get_spec()
        page = model_runner.page_size
        support.need(
            support.why_not_dtypes(model_runner.dtype, model_runner.kv_cache_dtype),
            _why_not_page(page),
            _why_not_speculation(spec, parallel.attn_dcp_size),
        )
        super().__init__(model_runner, skip_prefill, kv_indptr_buf, q_indptr_decode_buf)
        self.data_type = model_runner.kv_cache_dtype
        self.num_draft_tokens = spec.speculative_num_draft_tokens or 0
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        # One table for eager and captured steps, of the size that the parent's buffers have.
        rows = get_cuda_graph_max_batch_size(model_runner.req_to_token_pool.size)
        pages = -(-(self.max_context_len + self.num_draft_tokens) // page)
        self.block_table = torch.zeros(rows, pages, dtype=torch.int32, device=self.device)
        self.steps = DecodeSteps(
            config.num_attention_heads // parallel.attn_tp_size * parallel.attn_dcp_size,
            (config.kv_lora_rank, config.qk_rope_head_dim),
            page,
            model_runner.dtype,
            model_runner.kv_cache_dtype,
            self.device,
            batch_invariant=get_exec().deterministic.enable_deterministic_inference,
            options=DecodeOptions(lse_log2=parallel.attn_dcp_size > 1 and not _merges_natural_logs()),
        )

    # ------------------------------------------------------------------ a step
    def init_forward_metadata(self, forward_batch):
        if not self._plan(forward_batch):
            super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False):
        """Runs before a capture and before every replay, so that what the graph reads is refilled outside of it."""
        if not self._plan(forward_batch):
            super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        for num_queries in {1, self.num_draft_tokens or 1}:
            self.steps.warm_up(num_queries, pair=SGLANG_NAME in FORWARD_ABSORB_CORE_ATTENTION_BACKENDS, heads_outside=True)

    def _plan(self, forward_batch) -> bool:
        """Fills block table and plan of a decode or verify batch; False: the batch is not ours."""
        mode, batch, num_queries = forward_batch.forward_mode, forward_batch.batch_size, 1
        lengths = forward_batch.seq_lens[:batch]
        if mode.is_target_verify():
            num_queries = self.num_draft_tokens
            if getattr(forward_batch.spec_info, "ragged_verify_layout", None) is not None:
                raise ValueError(f"{SGLANG_NAME}: the verify batch is ragged; allowed: {num_queries} query tokens a request")
            lengths = lengths + num_queries
        elif not mode.is_decode_or_idle():
            return False
        if batch > 0:  # (an idle rank has no step)
            table = self.block_table[:batch]
            lengths = self._fill_table(table, forward_batch, lengths)
            self.forward_metadata = self.steps.plan(table, lengths, num_queries)
        return True

    def _fill_table(self, table: torch.Tensor, forward_batch, lengths: torch.Tensor) -> torch.Tensor:
        """The pages of every request into `table`; returns the lengths on this rank."""
        requests = forward_batch.req_pool_indices[: table.shape[0]]
        grid = table.shape[0], get_num_kv_index_blocks_flashmla(table.shape[1], self.page_size)
        strides = self.req_to_token.stride(0), table.stride(0)
        parallel, translator = get_parallel(), self.kv_index_translator
        if parallel.attn_dcp_size > 1:
            local = get_dcp_lens(lengths, parallel.dcp_size, parallel.dcp_rank)
            v2p = translator.full_v2p_table
            create_mla_kv_page_table_for_dcp[grid](
                self.req_to_token,
                requests,
                local,
                table,
                v2p,
                *strides,
                PHYSICAL_PAGE_SIZE=self.page_size,
                DCP_SIZE=parallel.dcp_size,
                DCP_RANK=parallel.dcp_rank,
                PAGES_PER_BLOCK=get_num_page_per_block_flashmla(self.page_size),
                HAS_V2P=v2p is not None,
            )
            return local
        if translator.reads_are_translated:
            translator.copy_page_table(forward_batch.kv_loc_plan, out=table)
        else:
            create_flashmla_kv_indices_triton[grid](
                self.req_to_token, requests, lengths, None, table, *strides, PAGED_SIZE=self.page_size
            )
        return lengths

    # ------------------------------------------------------------------ a layer
    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None):
        """q [tokens, heads, latent + rope], or q its latent and q_rope its rope part; k, k_rope likewise.
        Returns [tokens, heads * latent]; under context parallelism also lse [tokens, heads]."""
        if layer.logit_cap or layer.sliding_window_size > 0:
            given = f"logit_cap is {layer.logit_cap}, sliding_window_size {layer.sliding_window_size}"
            raise ValueError(f"{SGLANG_NAME}: {given}; allowed: neither")
        if k is not None and save_kv_cache:
            loc = KVWriteLoc.for_batch(forward_batch)
            if k_rope is None:
                self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v)
            else:
                self.token_to_kv_pool.set_mla_kv_buffer(layer, loc, k, k_rope)
        heads = layer.tp_q_head_num
        if q_rope is None:
            q = q.view(-1, heads, layer.head_dim)
        else:
            q = q.view(-1, heads, layer.v_head_dim), q_rope.view(-1, heads, layer.head_dim - layer.v_head_dim)
        pool = paged_view(self.token_to_kv_pool.get_key_buffer(layer.layer_id), self.page_size)
        step: DecodeStep = self.forward_metadata
        # (SGLang's pool casts to FP8 and leaves layer.k_scale aside, so what it holds is to scale)
        out, lse = step.decode(q, pool, layer.scaling)
        out = out.flatten(1)
        return out if get_parallel().attn_dcp_size == 1 else (out, lse)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None):
        if forward_batch.forward_mode.is_target_verify():
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, q_rope, k_rope)
        return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, q_rope, k_rope)


def _why_not_page(page: int) -> str | None:
    if page & (page - 1):
        return f"--page-size is {page}; allowed: a power of 2 (SGLang's kernels that fill page tables count in them)"
    return support.why_not_page(page, "--page-size")


def _why_not_speculation(spec, dcp_size: int) -> str | None:
    if (spec.speculative_eagle_topk or 1) > 1:
        return f"--speculative-eagle-topk is {spec.speculative_eagle_topk}; allowed: 1, a chain (the mask is causal)"
    if spec.speculative_algorithm is not None and dcp_size > 1:
        return f"--dcp-size is {dcp_size} with speculative decoding; allowed: 1 (a rank's tokens lack the causal order of all)"
    return None


def _merges_natural_logs() -> bool:
    """whether SGLang's context parallel merge takes lse of a backend of this name as a natural logarithm (0.5.23: to base 2)"""
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla import is_mla_dcp_lse_base_on_e

    return is_mla_dcp_lse_base_on_e(SGLANG_NAME)
