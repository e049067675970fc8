"""The SGLang plugin: over SGLang's own base class and page tables, where SGLang imports, and over their fakes."""

import sys
from types import SimpleNamespace

import pytest
import torch

from flashmla_cute.integrations import plugins
from flashmla_cute.reference import reference_decode
from flashmla_cute.testing import Case, Problem

from . import fakes
from .test_steps import check

H, SCALE, PAGE = 16, 192**-0.5, 64
MAX_CONTEXT = 512
MODES = ("decode", "idle", "verify", "extend")


class Mode(str):
    def is_decode_or_idle(self):
        return self in ("decode", "idle")

    def is_target_verify(self):
        return self == "verify"

    def is_draft_extend_v2(self):
        return False


class ScaledCase(Case):
    softmax_scale = SCALE


class Pool:
    """the KV pool of one layer: [slots, 1, 576]"""

    def __init__(self, problem: Problem):
        self.buffer, self.written = problem.cache.pool.flatten(0, 1), []

    def get_key_buffer(self, layer_id):
        return self.buffer

    def set_kv_buffer(self, layer, loc, k, v):
        self.written.append((loc, k, v))

    def set_mla_kv_buffer(self, layer, loc, k, k_rope):
        self.written.append((loc, k, k_rope))


def settings(dcp=1, rank=0, drafts=None, topk=None, deterministic=False):
    """what of SGLang's runtime context the backend reads"""
    parallel = SimpleNamespace(attn_tp_size=1, attn_dcp_size=dcp, dcp_size=dcp, dcp_rank=rank, dcp_enabled=dcp > 1)
    spec = SimpleNamespace(
        speculative_num_draft_tokens=drafts,
        speculative_eagle_topk=topk,
        speculative_algorithm="EAGLE" if drafts else None,
    )
    return parallel, spec, SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=deterministic))


def make_runner(problem: Problem, heads: int = H, **changes) -> SimpleNamespace:
    """what of a ModelRunner the backend reads: request r has row r + 1 of req_to_token, its tokens in the problem's pages"""
    table, lengths = problem.cache.block_table, problem.cache.cache_seqlens.tolist()
    req_to_token = torch.full((len(lengths) + 1, MAX_CONTEXT), 1 << 20, dtype=torch.int32, device=problem.q.device)
    for request, length in enumerate(lengths):
        at = torch.arange(length, device=table.device)
        req_to_token[request + 1, :length] = table[request, at // PAGE] * PAGE + (at % PAGE).int()
    usual = dict(
        use_mla_backend=True,
        dtype=problem.case.dtype,
        kv_cache_dtype=problem.case.dtype,
        page_size=PAGE,
        device=problem.q.device,
        model_config=SimpleNamespace(
            context_len=MAX_CONTEXT,
            num_attention_heads=heads,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            hf_text_config=SimpleNamespace(),
        ),
        req_to_token_pool=SimpleNamespace(req_to_token=req_to_token, size=len(lengths) + 1),
        token_to_kv_pool=Pool(problem),
        kv_index_translator=SimpleNamespace(reads_are_translated=False, full_v2p_table=None),
    )
    return SimpleNamespace(**{**usual, **changes})


def make_backend(sglang, monkeypatch, runner, **context):
    parallel, spec, execution = settings(**context)
    for name, value in dict(get_parallel=parallel, get_spec=spec, get_exec=execution).items():
        monkeypatch.setattr(sglang, name, lambda value=value: value)
    # the parent's own constructor needs FlashInfer and a GPU
    monkeypatch.setattr(sglang.FlashInferMLAAttnBackend, "__init__", fakes.FlashInferMLAAttnBackend.__init__)
    monkeypatch.setattr(sglang, "get_cuda_graph_max_batch_size", lambda size: size)
    if torch.device(runner.device).type == "cpu":  # (Triton's kernels need a GPU)
        monkeypatch.setattr(sglang, "create_flashmla_kv_indices_triton", fakes.TableKernel())
        monkeypatch.setattr(sglang, "create_mla_kv_page_table_for_dcp", fakes.TableKernel(dcp=True))
    return sglang.create(runner)


def make_batch(problem: Problem, mode: str = "decode", **changes) -> SimpleNamespace:
    batch = len(problem.case.lengths)
    before = problem.case.s_q if mode == "verify" else 0  # (a verify batch's lengths are those before its draft tokens)
    usual = dict(
        forward_mode=Mode(mode),
        batch_size=batch,
        seq_lens=problem.cache.cache_seqlens.long() - before,
        req_pool_indices=torch.arange(1, batch + 1, device=problem.q.device),
        out_cache_loc=torch.zeros(batch * problem.case.s_q, dtype=torch.int64, device=problem.q.device),
        spec_info=SimpleNamespace(ragged_verify_layout=None),
        kv_loc_plan=None,
    )
    return SimpleNamespace(**{**usual, **changes})


def make_layer(heads: int = H, **changes) -> SimpleNamespace:
    usual = dict(layer_id=0, tp_q_head_num=heads, head_dim=576, v_head_dim=512, scaling=SCALE, logit_cap=0.0)
    return SimpleNamespace(**{**usual, "sliding_window_size": -1, **changes})


@pytest.fixture
def writes(monkeypatch, sglang):
    """where a forward writes is the engine's business"""
    monkeypatch.setattr(sglang, "KVWriteLoc", SimpleNamespace(for_batch=lambda batch: batch.out_cache_loc))


def pair(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """as the model has them: the latent part with heads outside"""
    q = problem.q.flatten(0, 1)
    return q[..., :512].transpose(0, 1).contiguous().transpose(0, 1), q[..., 512:]


def run(backend, problem: Problem, mode: str = "decode"):
    forward = backend.forward_extend if mode == "verify" else backend.forward_decode
    latent, rope = pair(problem)
    return forward(latent, None, None, make_layer(), make_batch(problem, mode), q_rope=rope)


def compare(backend, problem: Problem, out: torch.Tensor):
    assert out.shape == (len(problem.case.lengths) * problem.case.s_q, H * 512)
    latent, rope = pair(problem)
    pool = problem.cache.pool
    check(problem, out.view(-1, H, 512), backend.forward_metadata.decode((latent, rope), pool, SCALE)[1])


# ---------------------------------------------------------------------- decode
@pytest.mark.parametrize("entry", ["init_forward_metadata", "init_forward_metadata_out_graph"])
def test_decode(sglang, device, monkeypatch, entry):
    problem = Problem.make(ScaledCase((70, 1, 300), h_q=H), device)
    backend = make_backend(sglang, monkeypatch, make_runner(problem))
    getattr(backend, entry)(make_batch(problem))
    out = run(backend, problem)
    compare(backend, problem, out)
    joined = backend.forward_decode(problem.q.flatten(0, 2), None, None, make_layer(), make_batch(problem))
    assert torch.equal(joined, out)


def test_target_verify(sglang, device, monkeypatch):
    problem = Problem.make(ScaledCase((70, 4, 300), h_q=H, s_q=4), device)
    backend = make_backend(sglang, monkeypatch, make_runner(problem), drafts=4, topk=1)
    backend.init_cuda_graph_state(3, 12)
    backend.init_forward_metadata(make_batch(problem, "verify"))
    compare(backend, problem, run(backend, problem, "verify"))


def test_an_fp8_cache_is_read_as_it_was_cast(sglang, device, monkeypatch):
    problem = Problem.make(ScaledCase((70, 1, 300), h_q=H), device)
    runner = make_runner(problem, kv_cache_dtype=torch.float8_e4m3fn)
    runner.token_to_kv_pool.buffer = runner.token_to_kv_pool.buffer.to(torch.float8_e4m3fn)
    problem.cache.pool.copy_(runner.token_to_kv_pool.buffer.view_as(problem.cache.pool).float())  # (exact in bf16)
    backend = make_backend(sglang, monkeypatch, runner)
    backend.init_forward_metadata(make_batch(problem))
    out, pool = run(backend, problem), runner.token_to_kv_pool.buffer.view_as(problem.cache.pool)
    check(problem, out.view(-1, H, 512), backend.forward_metadata.decode(pair(problem), pool, SCALE)[1], pool.dtype)


def test_new_tokens_are_written(sglang, device, monkeypatch, writes):
    problem = Problem.make(ScaledCase((70, 20), h_q=H), device)
    runner = make_runner(problem)
    backend, batch = make_backend(sglang, monkeypatch, runner), make_batch(problem)
    backend.init_forward_metadata(batch)
    latent, rope = pair(problem)
    k, k_rope = torch.zeros(2, 1, 512, device=device), torch.zeros(2, 1, 64, device=device)
    backend.forward_decode(latent, k, k, make_layer(), batch, q_rope=rope, k_rope=k_rope)
    backend.forward_decode(problem.q.flatten(0, 1), k, k, make_layer(), batch)
    backend.forward_decode(problem.q.flatten(0, 1), k, k, make_layer(), batch, save_kv_cache=False)
    (loc, *first), (_, *second) = runner.token_to_kv_pool.written
    assert loc is batch.out_cache_loc
    assert first[0] is k and first[1] is k_rope and second[0] is k and second[1] is k


def test_translated_pages_come_from_the_engine(sglang, device, monkeypatch):
    problem = Problem.make(ScaledCase((70, 20), h_q=H), device)
    plans = []

    def copy_page_table(plan, out):
        plans.append(plan)
        out[:, : problem.cache.block_table.shape[1]] = problem.cache.block_table

    translator = SimpleNamespace(reads_are_translated=True, full_v2p_table=None, copy_page_table=copy_page_table)
    runner = make_runner(problem, kv_index_translator=translator)
    runner.req_to_token_pool.req_to_token.fill_(1 << 20)
    backend = make_backend(sglang, monkeypatch, runner)
    backend.init_forward_metadata(make_batch(problem, kv_loc_plan="the plan"))
    assert plans == ["the plan"]
    compare(backend, problem, run(backend, problem))


def test_prefill_is_the_parents(sglang, device, monkeypatch):
    problem = Problem.make(ScaledCase((70, 20), h_q=H), device)
    backend = make_backend(sglang, monkeypatch, make_runner(problem))
    parent = sglang.FlashInferMLAAttnBackend
    for name in ("init_forward_metadata", "init_forward_metadata_out_graph", "forward_extend"):
        monkeypatch.setattr(parent, name, getattr(fakes.FlashInferMLAAttnBackend, name))
    batch = make_batch(problem, "extend")
    backend.init_forward_metadata(batch)
    assert backend.forward_metadata == "prefill"
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    assert backend.forward_metadata == ("prefill", True)
    assert backend.forward_extend(1, 2, 3, 4, batch, False, 5, 6) == ("prefill", 1, 2, 3, 4, batch, False, 5, 6)


def test_an_idle_rank_has_no_step(sglang, device, monkeypatch):
    problem = Problem.make(ScaledCase((70, 20), h_q=H), device)
    backend = make_backend(sglang, monkeypatch, make_runner(problem))
    backend.init_forward_metadata(make_batch(problem, "idle", batch_size=0))
    assert backend.forward_metadata is None


def test_context_parallel_ranks_merge(sglang, device, monkeypatch):
    """Tokens dealt out to two ranks; lse [tokens, heads], in the base in which SGLang merges for a backend of our name: 2"""
    whole = Problem.make(ScaledCase((70, 1, 300), h_q=H), device)
    lengths, table = list(whole.case.lengths), whole.cache.block_table
    results = []
    for rank in range(2):
        runner = make_runner(whole, heads=H // 2)
        # a slot of the widened space is token * 2 + owner within a request: slots of two pages make one page on each rank
        pool = torch.full_like(whole.cache.pool, float("nan"))
        req_to_token = runner.req_to_token_pool.req_to_token
        for request, length in enumerate(lengths):
            at = torch.arange(length, device=device)
            req_to_token[request + 1, :length] = table[request, at // (2 * PAGE)] * 2 * PAGE + (at % (2 * PAGE)).int()
            tokens = whole.cache.pool[table[request, : -(-length // PAGE)].long()].flatten(0, 1)[rank:length:2]
            for page in range(-(-len(tokens) // PAGE)):
                part = tokens[page * PAGE : (page + 1) * PAGE]
                pool[table[request, page], : len(part)] = part
        runner.token_to_kv_pool.buffer = pool.flatten(0, 1)
        backend = make_backend(sglang, monkeypatch, runner, dcp=2, rank=rank)
        backend.init_forward_metadata(make_batch(whole))
        out, lse = run(backend, whole)
        results.append((out.view(-1, H, 512), lse))
    outs, lses = (torch.stack(x).double() for x in zip(*results))
    assert lses.shape == (2, 3, H) and (lses[1, 1] == float("-inf")).all()
    weights = torch.exp2(lses) / torch.exp2(lses).sum(0)
    want, _ = reference_decode(whole.q, whole.cache.pool, table, lengths, SCALE, True, 512)
    assert ((outs * weights[..., None]).sum(0) - want.flatten(0, 1)).norm() / want.norm() < 4e-3


@pytest.mark.gpu
def test_a_captured_graph_follows_its_steps(sglang, monkeypatch):
    """SGLang's way: metadata outside, capture the layers, then metadata again before every replay"""
    problem = Problem.make(ScaledCase((300, 200, 130), h_q=H), "cuda")
    backend = make_backend(sglang, monkeypatch, make_runner(problem))
    backend.init_cuda_graph_state(3, 3)
    batch = make_batch(problem)
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    latent, rope = pair(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.forward_decode(latent, None, None, make_layer(), batch, q_rope=rope)
    for lengths in ((300, 200, 130), (257, 1, 64), (3, 192, 129)):
        batch.seq_lens = torch.tensor(lengths, device="cuda")
        backend.init_forward_metadata_out_graph(batch)
        graph.replay()
        want, _ = reference_decode(problem.q, problem.cache.pool, problem.cache.block_table, list(lengths), SCALE, True, 512)
        assert (out.view(3, 1, H, 512) - want).norm() / want.norm() < 4e-3, lengths


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "changes, context, message",
    [
        (dict(page_size=1), {}, "--page-size is 1; allowed: multiples of 8"),
        (dict(page_size=48), {}, "--page-size is 48; allowed: a power of 2"),
        (dict(kv_cache_dtype=torch.float8_e5m2), {}, "cache's dtype is torch.float8_e5m2; allowed: torch.bfloat16"),
        (dict(use_mla_backend=False), {}, "has no latent attention"),
        ({}, dict(drafts=4, topk=4), "--speculative-eagle-topk is 4; allowed: 1"),
        ({}, dict(drafts=4, dcp=2), "--dcp-size is 2 with speculative decoding; allowed: 1"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_other_servers_are_refused(sglang, device, monkeypatch, changes, context, message):
    problem = Problem.make(ScaledCase((70, 20), h_q=H), device)
    with pytest.raises(ValueError, match=message):
        make_backend(sglang, monkeypatch, make_runner(problem, **changes), **context)


def test_determinism_makes_plans_batch_invariant(sglang, device, monkeypatch):
    problem = Problem.make(ScaledCase((70, 20), h_q=H), device)
    for wanted in (False, True):
        backend = make_backend(sglang, monkeypatch, make_runner(problem), deterministic=wanted)
        assert backend.steps.arguments["batch_invariant"] is wanted


@pytest.mark.parametrize("changes", [dict(logit_cap=30.0), dict(sliding_window_size=128)], ids=str)
def test_other_layers_are_refused(sglang, device, monkeypatch, changes):
    problem = Problem.make(ScaledCase((70, 20), h_q=H), device)
    backend = make_backend(sglang, monkeypatch, make_runner(problem))
    backend.init_forward_metadata(make_batch(problem))
    with pytest.raises(ValueError, match=rf"{next(iter(changes))} (is )?{next(iter(changes.values()))}"):
        backend.forward_decode(problem.q.flatten(0, 1), None, None, make_layer(**changes), make_batch(problem))


def test_ragged_verify_is_refused(sglang, device, monkeypatch):
    problem = Problem.make(ScaledCase((70, 20), h_q=H, s_q=2), device)
    backend = make_backend(sglang, monkeypatch, make_runner(problem), drafts=2)
    assert not backend.supports_ragged_verify_graph
    with pytest.raises(ValueError, match="the verify batch is ragged"):
        backend.init_forward_metadata(make_batch(problem, "verify", spec_info=SimpleNamespace(ragged_verify_layout=1)))


# ---------------------------------------------------------------------- registration
def test_registration(sglang, device, monkeypatch):
    plugins.sglang()
    plugins.sglang()
    choices = sys.modules["sglang.srt.arg_groups.choices"]
    assert choices.ATTENTION_BACKEND_CHOICES.count("flashmla_cute") == 1
    assert choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS.count("flashmla_cute") == 1
    factory = sys.modules["sglang.srt.layers.attention.attention_registry"].ATTENTION_BACKENDS["flashmla_cute"]
    problem = Problem.make(ScaledCase((70, 20), h_q=H), device)
    make_backend(sglang, monkeypatch, make_runner(problem))  # (sets the context)
    assert type(factory(make_runner(problem))) is sglang.FlashMLACuteAttnBackend
    common = "sglang.srt.models.deepseek_common"
    handler = sys.modules[f"{common}.attention_backend_handler"]
    assert handler.AttentionBackendRegistry.get_handler("flashmla_cute") is handler.handle_attention_flashmla


def test_pairs_are_asked_for_unless_the_model_scales_queries(sglang, device, monkeypatch):
    problem = Problem.make(ScaledCase((70, 20), h_q=H), device)
    runner = make_runner(problem)
    make_backend(sglang, monkeypatch, runner)
    names = sys.modules["sglang.srt.models.deepseek_common.utils"].FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
    assert names.count("flashmla_cute") == 1
    names.remove("flashmla_cute")
    runner.model_config.hf_text_config.llama_4_scaling = {"beta": 0.1}
    make_backend(sglang, monkeypatch, runner)
    assert "flashmla_cute" not in names
