"""The entry points: each names a backend to its engine.  An engine loads them in all of its processes, early, so nothing of an
engine is imported before its function is called, and its base classes not before the backend is chosen."""

import logging

VLLM_NAME = "FLASHMLA_CUTE"
VLLM_CLASS = "flashmla_cute.integrations.vllm.FlashMLACuteBackend"
SGLANG_NAME = "flashmla_cute"


def vllm():
    """`vllm.general_plugins`: the backend FLASHMLA_CUTE, also as CUSTOM if that name is free.

    vLLM sends its configuration to spawned processes by pickle.  A name that a plugin added is not known there before the
    plugins are loaded, and unpickling fails; CUSTOM is always known."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if VLLM_NAME not in AttentionBackendEnum.__members__:  # (vLLM may load plugins more than once)
        register_backend(VLLM_NAME, VLLM_CLASS)
    custom = AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():
        register_backend(custom, VLLM_CLASS)
    elif custom.get_path() != VLLM_CLASS:
        message = "%s: another plugin has taken the attention backend CUSTOM (%s); use %s"
        logging.getLogger(__name__).warning(message, VLLM_NAME, custom.get_path(), VLLM_NAME)


def sglang():
    """`sglang.srt.plugins`: `--attention-backend flashmla_cute`, or `--decode-attention-backend flashmla_cute` beside another
    backend for prefill."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

    if SGLANG_NAME in ATTENTION_BACKENDS:
        return
    choices.add_attention_backend_choices([SGLANG_NAME])
    choices.add_chunked_prefix_cache_attention_backend(SGLANG_NAME)  # (prefill is FlashInfer's, which reads that layout)
    register_attention_backend(SGLANG_NAME)(_sglang_backend)


def _sglang_backend(runner):
    from .sglang import create

    return create(runner)
