"""The vLLM plugin: through vLLM's own builder and metadata, where vLLM imports, and through their fakes."""

import sys
from types import SimpleNamespace

import pytest
import torch

from flashmla_cute.integrations import plugins, support
from flashmla_cute.reference import reference_decode
from flashmla_cute.testing import Case, Problem

from .test_steps import check

H, SCALE = 16, 192**-0.5
LAYER = "model.layers.0.self_attn.attn"


def module(name: str):
    return sys.modules[f"vllm.{name}"]


def configuration(dcp: int = 1, speculative: int = 0, heads: int = H, latent: int = 512, cache: str = "auto"):
    """what of VllmConfig the builder reads"""
    layer = SimpleNamespace(
        q_lora_rank=1536,
        kv_lora_rank=latent,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        prefill_backend=SimpleNamespace(clone=lambda: None),
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            max_model_len=1024,
            get_num_attention_heads=lambda parallel: heads,
            get_head_size=lambda: 576,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=dcp, prefill_context_parallel_size=1, cp_kv_cache_interleave_size=1
        ),
        compilation_config=SimpleNamespace(static_forward_context={LAYER: layer}),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        cache_config=SimpleNamespace(block_size=64, cache_dtype=cache),
        attention_config=SimpleNamespace(use_prefill_query_quantization=False),
        speculative_config=SimpleNamespace(num_speculative_tokens=speculative, parallel_drafting=False, method="mtp")
        if speculative
        else None,
    )


def make_builder(vllm, device: str, monkeypatch, **options):
    config = configuration(**options)
    dcp = options.get("dcp", 1)
    if dcp > 1:
        base = module("model_executor.layers.attention.mla_attention")
        monkeypatch.setattr(base, "get_dcp_group", lambda: SimpleNamespace(world_size=dcp), raising=False)
        manager = type("Manager", (), {"init_kv_gather": lambda *_: None})
        monkeypatch.setattr(base, "MLADCPManager", manager, raising=False)
        config.compilation_config.static_forward_context[LAYER].dcp_manager = manager()
    spec = SimpleNamespace(block_size=64, dtype=torch.bfloat16)
    return vllm.FlashMLACuteMetadataBuilder(spec, [LAYER], config, torch.device(device))


def make_impl(vllm, monkeypatch, **changes):
    arguments = dict(
        num_heads=H,
        head_size=576,
        scale=SCALE,
        num_kv_heads=1,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype="auto",
        logits_soft_cap=None,
        attn_type="decoder",
        kv_sharing_target_layer_name=None,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        qk_head_dim=192,
        v_head_dim=128,
        kv_b_proj=None,
    )
    base = module("model_executor.layers.attention.mla_attention")
    current = SimpleNamespace(parallel_config=SimpleNamespace(decode_context_parallel_size=1))
    monkeypatch.setattr(base, "get_current_vllm_config", lambda: current, raising=False)
    return vllm.FlashMLACuteImpl(**{**arguments, **changes})


def common(problem: Problem, num_queries: list[int] | None = None, **more):
    """vLLM's metadata of a batch of decodes; num_queries: 0 for requests that pad a graph's batch"""
    case, device = problem.case, problem.q.device
    starts = torch.tensor([0, *(num_queries or [case.s_q] * len(case.lengths))], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return module("v1.attention.backend").CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=problem.cache.cache_seqlens,
        num_reqs=len(case.lengths),
        num_actual_tokens=len(case.lengths) * case.s_q,
        max_query_len=case.s_q,
        max_seq_len=max(case.lengths),
        block_table_tensor=problem.cache.block_table,
        slot_mapping=torch.zeros(len(case.lengths) * case.s_q, dtype=torch.int64, device=device),
        **more,
    )


def make_problem(device: str, lengths=(70, 1, 300), s_q: int = 1, seed: int = 0) -> Problem:
    problem = Problem.make(ScaledCase(lengths, h_q=H, s_q=s_q, seed=seed), device)
    return problem


class ScaledCase(Case):
    softmax_scale = SCALE


def layer_cache(problem: Problem) -> torch.Tensor:
    return problem.cache.pool.squeeze(2)  # (vLLM's has no axis of kv heads)


def pair(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    q = problem.q.flatten(0, 1)
    return q[..., :512].contiguous(), q[..., 512:]


# ---------------------------------------------------------------------- decode
@pytest.mark.parametrize("s_q", [1, 3])
def test_build_then_decode(vllm, device, monkeypatch, s_q):
    builder = make_builder(vllm, device, monkeypatch, speculative=s_q - 1)
    impl = make_impl(vllm, monkeypatch)
    for lengths in ((70, 3, 300), (65, 64, 5)):
        problem = make_problem(device, lengths, s_q)
        metadata = builder.build(0, common(problem))
        assert metadata.num_decodes == 3 and metadata.num_decode_tokens == 3 * s_q
        for _ in range(2):  # layers
            out, lse = impl.forward_mqa(pair(problem), layer_cache(problem), metadata, None)
            assert lse is None
            check(problem, out, metadata.decode.step.decode(pair(problem), layer_cache(problem), SCALE)[1])
        joined, _ = impl.forward_mqa(problem.q.flatten(0, 1), layer_cache(problem), metadata, None)
        assert torch.equal(joined, out)


def test_an_fp8_cache(vllm, device, monkeypatch):
    builder = make_builder(vllm, device, monkeypatch, cache="fp8")
    impl = make_impl(vllm, monkeypatch, kv_cache_dtype="fp8")
    assert not impl.supports_quant_query_input  # queries come as a 16-bit pair
    problem, layer = make_problem(device), SimpleNamespace(_k_scale=torch.tensor(0.5, device=device))
    pool = (problem.cache.pool.float() / 0.5).to(torch.float8_e4m3fn)
    problem.cache.pool.copy_(pool.float() * 0.5)  # (exact in bf16)
    metadata = builder.build(0, common(problem))
    out, _ = impl.forward_mqa(pair(problem), pool.squeeze(2), metadata, layer)
    _, lse = metadata.decode.step.decode(pair(problem), pool.squeeze(2), SCALE, layer._k_scale)
    check(problem, out, lse, pool.dtype)


def test_requests_that_pad_a_batch(vllm, device, monkeypatch):
    """a full graph's batch: the last requests have no tokens, their rows of q are somebody's old ones"""
    builder = make_builder(vllm, device, monkeypatch, speculative=1)
    problem = make_problem(device, (70, 130, 0, 0), s_q=2)
    metadata = builder.build(0, common(problem, [2, 2, 0, 0]))
    out, _ = make_impl(vllm, monkeypatch).forward_mqa(pair(problem), layer_cache(problem), metadata, None)
    assert (out[4:] == 0).all()
    check(problem, out, metadata.decode.step.decode(pair(problem), layer_cache(problem), SCALE)[1])


def test_steps_keep_their_memory(vllm, device, monkeypatch):
    builder = make_builder(vllm, device, monkeypatch)
    first = builder.build(0, common(make_problem(device, (70, 1, 300)))).decode.step.plan.items.data_ptr()
    problem = make_problem(device, (64, 129, 300), seed=1)
    later = builder.build(0, common(problem))
    assert later.decode.step.plan.items.data_ptr() == first
    out, _ = make_impl(vllm, monkeypatch).forward_mqa(pair(problem), layer_cache(problem), later, None)
    assert out.isfinite().all()


def test_draft_steps_follow_lengths_that_move_on_the_device(vllm, device, monkeypatch):
    builder = make_builder(vllm, device, monkeypatch)
    assert builder.supports_draft_decode_metadata_update
    problem = make_problem(device, (70, 64, 300))
    metadata = builder.build(0, common(problem))
    problem.cache.cache_seqlens.copy_(torch.tensor([64, 63, 129]))
    builder.update_draft_decode_metadata(metadata)
    moved = Problem(ScaledCase((64, 63, 129), h_q=H), problem.q, problem.cache, problem.out, problem.lse)
    check(moved, *metadata.decode.step.decode(pair(moved), layer_cache(moved), SCALE))


def test_context_parallel_ranks_merge(vllm, device, monkeypatch):
    """Tokens dealt out to two ranks, all heads on each; out and lse [tokens, heads] of both, merged as natural logarithms, are
    those of the whole.  A rank without tokens counts for nothing."""
    whole = make_problem(device, (70, 1, 300))
    lengths = list(whole.case.lengths)
    results = []
    for rank in range(2):
        builder = make_builder(vllm, device, monkeypatch, dcp=2, heads=H // 2)
        assert not builder.supports_draft_decode_metadata_update and builder.reorder_batch_threshold == 1
        local = torch.tensor([length // 2 + (rank < length % 2) for length in lengths], dtype=torch.int32, device=device)
        pool = torch.full_like(whole.cache.pool, float("nan"))
        table = whole.cache.block_table
        for request, length in enumerate(lengths):
            tokens = whole.cache.pool[table[request, : -(-length // 64)].long()].flatten(0, 1)[rank:length:2]
            for page in range(-(-len(tokens) // 64)):
                part = tokens[page * 64 : page * 64 + 64]
                pool[table[request, page], : len(part)] = part
        metadata = builder.build(0, common(whole, dcp_local_seq_lens=local))
        impl = make_impl(vllm, monkeypatch)
        impl.need_to_return_lse_for_decode = True
        assert impl.can_return_lse_for_decode and impl.lse_base_on_e and impl.supports_dcp
        results.append(impl.forward_mqa(whole.q.flatten(0, 1), pool.squeeze(2), metadata, None))
    outs, lses = (torch.stack(x).double() for x in zip(*results))
    assert lses.shape == (2, 3, H) and (lses[1, 1] == float("-inf")).all()
    weights = torch.softmax(lses, 0)
    merged = (outs * weights[..., None]).sum(0)
    want, want_lse = reference_decode(whole.q, whole.cache.pool, whole.cache.block_table, lengths, SCALE, True, 512)
    assert (merged - want.flatten(0, 1)).norm() / want.norm() < 4e-3
    assert (torch.logsumexp(lses, 0) - want_lse.squeeze(-1)).abs().max() < 1e-4


@pytest.mark.gpu
def test_a_captured_graph_follows_its_steps(vllm, monkeypatch):
    """vLLM's way: build outside, capture the layers, then build again before every replay"""
    builder = make_builder(vllm, "cuda", monkeypatch, speculative=1)
    impl = make_impl(vllm, monkeypatch)
    longest = make_problem("cuda", (300, 200, 130), s_q=2)
    metadata, tables = common(longest), longest.cache.block_table
    built = builder.build_for_cudagraph_capture(metadata) if hasattr(builder, "build_for_cudagraph_capture") else None
    built = built or builder.build(0, metadata)
    q, pool = pair(longest), layer_cache(longest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [impl.forward_mqa(q, pool, built, None)[0] for _ in range(2)]
    for lengths in ((300, 200, 130), (257, 2, 64), (3, 0, 129)):
        longest.cache.cache_seqlens.copy_(torch.tensor(lengths))
        builder.build(0, common(longest))
        graph.replay()
        want, _ = reference_decode(longest.q, longest.cache.pool, tables, list(lengths), SCALE, True, 512)
        for out in outs:
            assert (out - want.flatten(0, 1)).norm() / want.norm() < 4e-3, lengths


# ---------------------------------------------------------------------- what is advertised and refused
def test_the_backend_says_what_the_kernels_do(vllm):
    backend = vllm.FlashMLACuteBackend
    assert backend.get_name() == "FLASHMLA_CUTE"
    assert backend.get_builder_cls() is vllm.FlashMLACuteMetadataBuilder and backend.get_impl_cls() is vllm.FlashMLACuteImpl
    assert backend.supported_kv_cache_dtypes == ["auto", *support.DTYPES] + ["fp8", "fp8_e4m3"] * bool(support.FP8_CACHES)
    blocks = backend.get_supported_kernel_block_sizes()
    assert {16, 64, 1024} <= {*blocks} and all(block in support.PAGES and block % 16 == 0 for block in blocks)
    assert [backend.get_preferred_block_size(size) for size in (16, 64, 256)] == [64, 64, 256]
    assert backend.get_supported_head_sizes() == [320, 512, 576]
    assert backend.supports_batch_invariance()
    capability = lambda *version: SimpleNamespace(major=version[0], minor=version[1])
    assert backend.supports_compute_capability(capability(9, 0))
    assert not backend.supports_compute_capability(capability(10, 0))
    assert not vllm.FlashMLACuteImpl.supports_pcp


def test_combinations(vllm):
    reason = lambda dtype, cache: vllm.FlashMLACuteBackend.supports_combination(
        576, dtype, cache, 64, True, False, False, False, None
    )
    assert reason(torch.bfloat16, "auto") is reason(torch.bfloat16, None) is reason(torch.float16, "float16") is None
    assert "cache's dtype is torch.bfloat16; allowed: torch.float16" in reason(torch.float16, "bfloat16")
    assert "cache's dtype is fp8_ds_mla" in reason(torch.bfloat16, "fp8_ds_mla")
    fp8 = vllm.FlashMLACuteBackend.supports_combination(320, torch.bfloat16, "fp8", 64, True, False, False, False, None)
    assert ("head_size is 320; allowed in a cache of torch.float8_e4m3fn: [576]" if support.FP8_CACHES else "is fp8") in fp8


def test_ragged_queries(vllm, device, monkeypatch):
    """requests of 1 and 3 query tokens in one batch"""
    builder = make_builder(vllm, device, monkeypatch, speculative=2)
    problem = make_problem(device, (70, 20), s_q=2)
    batch = common(problem, [1, 3])
    batch.max_query_len = 3
    metadata = builder.build(0, batch)
    assert metadata.num_decodes == 2
    out, _ = make_impl(vllm, monkeypatch).forward_mqa(pair(problem), layer_cache(problem), metadata, None)
    q = problem.q.flatten(0, 1)
    for request, rows in enumerate((slice(0, 1), slice(1, 4))):
        table, length = problem.cache.block_table[request : request + 1], problem.case.lengths[request]
        want, _ = reference_decode(q[rows].unsqueeze(0), problem.cache.pool, table, [length], SCALE, True, 512)
        assert (out[rows] - want[0]).norm() / want.norm() < 4e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(alibi_slopes=[0.5]), "alibi_slopes is"),
        (dict(sliding_window=128), "sliding_window is 128"),
        (dict(logits_soft_cap=30.0), "logits_soft_cap is 30.0"),
        (dict(attn_type="encoder"), "attn_type is encoder"),
    ],
)
def test_other_layers_are_refused(vllm, monkeypatch, changes, message):
    with pytest.raises(NotImplementedError, match=message):
        make_impl(vllm, monkeypatch, **changes)


def test_batch_invariance_comes_from_vllms_switch(vllm, device, monkeypatch):
    assert make_builder(vllm, device, monkeypatch).steps.arguments["batch_invariant"] is False
    monkeypatch.setattr(vllm.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    assert make_builder(vllm, device, monkeypatch).steps.arguments["batch_invariant"] is True


# ---------------------------------------------------------------------- registration
def test_registration(vllm):
    registry = module("v1.attention.backends.registry").AttentionBackendEnum
    plugins.vllm()
    plugins.vllm()
    assert "FLASHMLA_CUTE" in registry.__members__
    assert registry.CUSTOM.get_path() == plugins.VLLM_CLASS
    name, _, attribute = plugins.VLLM_CLASS.rpartition(".")
    assert getattr(sys.modules[name], attribute) is vllm.FlashMLACuteBackend


def test_other_widths_are_refused(vllm, device, monkeypatch):
    with pytest.raises(ValueError, match=r"\(448, 64\); allowed in a cache of torch.bfloat16: \(512, 64\)"):
        make_builder(vllm, device, monkeypatch, latent=448)


@pytest.mark.parametrize("vllm", ["released"], indirect=True)
def test_vllms_own_validation(vllm):
    backend = vllm.FlashMLACuteBackend
    capability = SimpleNamespace(major=9, minor=0)

    def reasons(**changes):
        usual = dict(
            head_size=576,
            dtype=torch.bfloat16,
            kv_cache_dtype="auto",
            block_size=64,
            use_mla=True,
            has_sink=False,
            use_sparse=False,
            use_mm_prefix=False,
            use_per_head_quant_scales=False,
            device_capability=capability,
            attn_type="decoder",
        )
        return backend.validate_configuration(**{**usual, **changes})

    assert reasons() == reasons(block_size=128) == reasons(use_dcp=True) == reasons(kv_cache_dtype="bfloat16") == []
    assert reasons(head_size=320) == reasons(block_size=16) == []
    assert reasons(head_size=256) == ["head_size not supported"]
    assert reasons(block_size=8) == ["block_size not supported"]
    assert "sparse not supported" in reasons(use_sparse=True)
    assert "attention sinks not supported" in reasons(has_sink=True)
    assert "PCP not supported" in reasons(use_pcp=True)
    assert "compute capability not supported" in reasons(device_capability=SimpleNamespace(major=10, minor=0))
    assert reasons(use_batch_invariant=True) == []
    assert any("adaptive verification" in reason for reason in reasons(use_adaptive_verification=True))
    assert any("cache's dtype" in reason for reason in reasons(dtype=torch.float16, kv_cache_dtype="bfloat16"))
