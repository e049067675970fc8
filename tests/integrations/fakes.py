"""Just enough of the engines' base classes for the contract tests to run where the engines are not installed.

What they do is what the released ones do with our classes (vLLM 0.33.0, SGLang 0.5.23), cut down to decode; the same tests run
against the released classes where those import.
"""

import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import torch

M = TypeVar("M")
MODULES = {
    "vllm": (
        "vllm.model_executor.layers.attention.mla_attention",
        "vllm.v1.attention.backend",
        "vllm.v1.attention.backends.registry",
        "vllm.envs",
    ),
    "sglang": (
        "sglang.srt.layers.attention.flashinfer_mla_backend",
        "sglang.srt.layers.attention.attention_registry",
        "sglang.srt.arg_groups.choices",
        "sglang.kernels.ops.attention.dcp_kernels",
        "sglang.kernels.ops.attention.kv_indices",
        "sglang.srt.layers.dcp.layout",
        "sglang.srt.mem_cache.layout.paged_view",
        "sglang.srt.mem_cache.memory_pool",
        "sglang.srt.models.deepseek_common.attention_backend_handler",
        "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla",
        "sglang.srt.models.deepseek_common.utils",
        "sglang.srt.runtime_context",
        "sglang.srt.utils",
    ),
}


def install(engine: str, monkeypatch):
    """the engine's modules as empty ones with our stand-ins in them, until the test is over"""
    for name in [name for name in sys.modules if name == engine or name.startswith(engine + ".")]:
        monkeypatch.delitem(sys.modules, name)
    for path in MODULES[engine]:
        names = path.split(".")
        for depth in range(1, len(names) + 1):
            name = ".".join(names[:depth])
            if name not in sys.modules:
                module = ModuleType(name)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, name, module)
                if depth > 1:
                    setattr(sys.modules[".".join(names[: depth - 1])], names[depth - 1], module)
    for path, contents in (_vllm() if engine == "vllm" else _sglang()).items():
        for key, value in contents.items():
            setattr(sys.modules[path], key, value)


# ---------------------------------------------------------------------- vLLM
class QueryLenSupport(Enum):
    UNIFORM = "uniform"
    VARLEN = "varlen"


class AttentionCGSupport(Enum):
    UNIFORM_BATCH = 2


class AttentionType(str, Enum):
    DECODER = "decoder"
    ENCODER = "encoder"


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    dcp_local_seq_lens: torch.Tensor | None = None


class MLACommonBackend:
    @classmethod
    def get_supported_head_sizes(cls):
        return [320, 512, 576]


@dataclass
class MLACommonDecodeMetadata:
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    dcp_tot_seq_lens: torch.Tensor | None


@dataclass
class MLACommonMetadata(Generic[M]):
    num_decodes: int
    num_decode_tokens: int
    decode: Any


class MLACommonMetadataBuilder(Generic[M]):
    reorder_batch_threshold: int = 1

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, metadata_cls):
        self.metadata_cls = metadata_cls
        self.page_size, self.device = kv_cache_spec.block_size, device
        self.num_heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        self.mla_dims = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.dcp_world_size = vllm_config.parallel_config.decode_context_parallel_size
        if vllm_config.speculative_config is not None and self.dcp_world_size == 1:
            self.reorder_batch_threshold = 1 + vllm_config.speculative_config.num_speculative_tokens

    def build(self, common_prefix_len, common, fast_build=False):
        total, local = None, common.seq_lens
        if self.dcp_world_size > 1:
            total, local = common.seq_lens, common.dcp_local_seq_lens
        decode = self._build_decode(
            block_table_tensor=common.block_table_tensor,
            seq_lens_device=local,
            max_seq_len=common.max_seq_len,
            query_start_loc_cpu=common.query_start_loc_cpu,
            query_start_loc_device=common.query_start_loc,
            num_decode_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            dcp_tot_seq_lens_device=total,
        )
        return self.metadata_cls(common.num_reqs, common.num_actual_tokens, decode)


class MLACommonImpl(Generic[M]):
    supports_pcp = True
    need_to_return_lse_for_decode = False

    def __init__(self, num_heads, head_size, scale, *others, kv_lora_rank, qk_rope_head_dim, **_):
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.supports_quant_query_input = True


def _vllm() -> dict[str, dict[str, Any]]:
    overrides = {}

    class AttentionBackendEnum(Enum):
        CUSTOM = None

        def is_overridden(self):
            return self.name in overrides

        def get_path(self):
            return overrides[self.name]

    # (the released enum is extended in place)
    registry = SimpleNamespace(CUSTOM=AttentionBackendEnum.CUSTOM, __members__=dict(AttentionBackendEnum.__members__))

    def register_backend(backend, path):
        if isinstance(backend, str):
            assert backend not in registry.__members__, "registered twice"
            registry.__members__[backend] = path
        else:
            overrides[backend.name] = path

    metadata = MLACommonDecodeMetadata, MLACommonMetadata, MLACommonMetadataBuilder
    mla = QueryLenSupport, MLACommonBackend, MLACommonImpl, *metadata
    attention = AttentionCGSupport, AttentionType, CommonAttentionMetadata
    contents = [
        {cls.__name__: cls for cls in mla},
        {cls.__name__: cls for cls in attention},
        {"AttentionBackendEnum": registry, "register_backend": register_backend},
        {"VLLM_BATCH_INVARIANT": False},
    ]
    return dict(zip(MODULES["vllm"], contents))


# ---------------------------------------------------------------------- SGLang
class FlashInferMLAAttnBackend:
    """Names what it was asked to do; ours hands it prefill."""

    def __init__(self, model_runner, skip_prefill=False, kv_indptr_buf=None, q_indptr_decode_buf=None):
        self.max_context_len, self.device = model_runner.model_config.context_len, model_runner.device
        self.skip_prefill, self.page_size = skip_prefill, model_runner.page_size
        self.req_to_token_pool, self.token_to_kv_pool = model_runner.req_to_token_pool, model_runner.token_to_kv_pool
        self.kv_index_translator = model_runner.kv_index_translator
        self.forward_metadata = None

    def init_forward_metadata(self, forward_batch):
        self.forward_metadata = "prefill"

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        self.forward_metadata = "prefill", in_capture

    def forward_extend(self, *arguments):
        return "prefill", *arguments


class TableKernel:
    """create_flashmla_kv_indices_triton (dcp: create_mla_kv_page_table_for_dcp) in Python"""

    def __init__(self, dcp: bool = False):
        self.dcp = dcp

    def __getitem__(self, grid):
        return self.fill_dcp if self.dcp else self.fill

    @staticmethod
    def fill(req_to_token, requests, lengths, start, table, stride, table_stride, PAGED_SIZE):
        assert start is None and (stride, table_stride) == (req_to_token.stride(0), table.stride(0))
        for row, (request, length) in enumerate(zip(requests.tolist(), lengths.tolist())):
            pages = req_to_token[request, :length:PAGED_SIZE] // PAGED_SIZE
            table[row, : len(pages)] = pages

    @staticmethod
    def fill_dcp(req_to_token, requests, lengths, table, v2p, *strides, **sizes):
        page, ranks, rank = sizes["PHYSICAL_PAGE_SIZE"], sizes["DCP_SIZE"], sizes["DCP_RANK"]
        assert v2p is None and not sizes["HAS_V2P"] and strides == (req_to_token.stride(0), table.stride(0))
        for row, (request, length) in enumerate(zip(requests.tolist(), lengths.tolist())):
            pages = req_to_token[request, rank :: page * ranks][: -(-length // page)] // ranks // page
            table[row, : len(pages)] = pages


def paged_view(flat: torch.Tensor, page_size: int) -> torch.Tensor:
    return flat.unflatten(0, (-1, page_size))


def get_dcp_lens(lens: torch.Tensor, dcp_size: int, dcp_rank: int) -> torch.Tensor:
    return lens // dcp_size + (dcp_rank < lens % dcp_size)


def _sglang() -> dict[str, dict[str, Any]]:
    backends, handlers, attention, prefix = {}, {}, ["flashmla"], ["flashmla"]
    contents = [
        {"FlashInferMLAAttnBackend": FlashInferMLAAttnBackend},
        {
            "ATTENTION_BACKENDS": backends,
            "register_attention_backend": lambda name: lambda function: backends.setdefault(name, function),
        },
        {
            "ATTENTION_BACKEND_CHOICES": attention,
            "add_attention_backend_choices": attention.extend,
            "CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS": prefix,
            "add_chunked_prefix_cache_attention_backend": prefix.append,
        },
        {"create_mla_kv_page_table_for_dcp": TableKernel(dcp=True)},
        {
            "create_flashmla_kv_indices_triton": TableKernel(),
            "get_num_kv_index_blocks_flashmla": lambda width, page: -(-width * page // 4096),
            "get_num_page_per_block_flashmla": lambda page: 4096 // page,
        },
        {"get_dcp_lens": get_dcp_lens},
        {"paged_view": paged_view},
        {"KVWriteLoc": SimpleNamespace(for_batch=lambda batch: batch.out_cache_loc)},
        {
            "AttentionBackendRegistry": SimpleNamespace(register=handlers.__setitem__, get_handler=handlers.get),
            "handle_attention_flashmla": lambda attn, batch: None,
        },
        {"is_mla_dcp_lse_base_on_e": lambda name: name in {"flashmla", "cutedsl_mla", "aiter"}},
        {"FORWARD_ABSORB_CORE_ATTENTION_BACKENDS": ["fa3", "flashinfer"]},
        {"get_exec": None, "get_parallel": None, "get_spec": None},
        {"get_cuda_graph_max_batch_size": lambda size: size},
    ]
    return dict(zip(MODULES["sglang"], contents))
