"""A DeepSeek-V3 with random weights generates text on FlashMLA-CuTe: absorbed MLA, a paged latent cache, continuous batching.

python examples/deepseek_v3_decode.py                          on a Hopper GPU
python examples/deepseek_v3_decode.py --attention reference    anywhere, slowly: float64 on the CPU in place of the kernels

The model is Hugging Face's own (pip install transformers), with yarn rope and its mscale; only its attention is done here.
Every logit is compared with the eager model in float32, which sees the whole text at once; eager in the same precision says
how far off rounding alone may be.  Exit status: 0 if tokens and logits agree, else 1.

Attention of a head expands the latent c of every cached token into its key and value, k = (W_uk c, r) and v = W_uv c, where r
is the rotated part that all heads share.  Decoding needs neither:

    q . k = q_nope . (W_uk c) + q_rope . r = (W_uk^T q_nope) . c + q_rope . r         sum_j p_j v_j = W_uv (sum_j p_j c_j)

W_uk goes into the query and W_uv behind the softmax: all heads attend to the one (c, r) that the cache holds for a token.
"""

import argparse
import copy
import sys
import time
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from flashmla_cute import DecodePlan, PagedKVCache, mla_decode
from flashmla_cute.reference import reference_decode

try:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
except ImportError:
    DeepseekV3Config = None

LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128
MLA = dict(kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, qk_nope_head_dim=NOPE, v_head_dim=VALUE)
YARN = dict(type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=4096)
PAGE = 64  # tokens
SLACK = 1.5  # our error over eager's in the same precision


def random_model(options: argparse.Namespace, device: str):
    config = DeepseekV3Config(
        vocab_size=2048,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        first_k_dense_replace=options.layers,  # no experts: this is about attention
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        q_lora_rank=options.hidden // 2,
        **MLA,
        max_position_embeddings=163840,
        rope_theta=10000.0,
        rope_scaling=YARN,
        initializer_range=0.06,  # scores then deviate by 1 to 2: a softmax that selects, which 0.02 would not give
        pad_token_id=0,
        eos_token_id=None,  # requests end by their number of tokens
    )
    config._attn_implementation = "eager"
    torch.manual_seed(options.seed)
    return DeepseekV3ForCausalLM(config).eval().to(device, getattr(torch, options.dtype))


# ---------------------------------------------------------------------- attention over the cache, in two ways
class Kernels:
    """FlashMLA-CuTe"""

    device = "cuda"

    def __init__(self, cache: PagedKVCache, num_heads: int):
        self.plan = DecodePlan(cache, num_heads)

    def begin_step(self):
        self.plan.update()  # once, for all layers

    def write(self, cache: PagedKVCache, latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor):
        cache.append(latent, rope, slots)

    def decode(self, q: tuple[torch.Tensor, torch.Tensor], cache: PagedKVCache, softmax_scale: float) -> torch.Tensor:
        """q [rows, heads, 512] and [rows, heads, 64] -> [rows, heads, 512]"""
        q_latent, q_rope = (part[:, None] for part in q)  # (one query token a row)
        return mla_decode((q_latent, q_rope), cache, self.plan, softmax_scale=softmax_scale)[0][:, 0]


class Reference:
    """the specification, flashmla_cute/reference.py"""

    device = "cpu"

    def __init__(self, cache: PagedKVCache, num_heads: int):
        pass

    def begin_step(self):
        pass

    def write(self, cache: PagedKVCache, latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor):
        real = slots >= 0
        cache.pool.view(-1, LATENT + ROPE)[slots[real]] = torch.cat([latent, rope], -1)[real]

    def decode(self, q: tuple[torch.Tensor, torch.Tensor], cache: PagedKVCache, softmax_scale: float) -> torch.Tensor:
        rows, lengths = torch.cat(q, -1)[:, None], cache.cache_seqlens.tolist()
        out, _ = reference_decode(rows, cache.pool, cache.block_table, lengths, softmax_scale, True, LATENT)
        return out[:, 0].to(rows.dtype)


# ---------------------------------------------------------------------- the model on that cache
class Layer:
    """one decoder layer of the Hugging Face model with its part of the cache"""

    def __init__(self, layer, cache: PagedKVCache, attention):
        self.layer, self.cache, self.attention, a = layer, cache, attention, layer.self_attn
        self.w_uk, self.w_uv = a.kv_b_proj.weight.view(a.num_heads, NOPE + VALUE, LATENT).split([NOPE, VALUE], 1)
        interleaved = getattr(a.config, "rope_interleave", True)
        self.rotate = deepseek.apply_rotary_pos_emb_interleave if interleaved else deepseek.apply_rotary_pos_emb

    def __call__(self, hidden, rope, slots, prefill: bool):
        """hidden [tokens, hidden]; rope: cos and sin; slots [tokens], where in the cache they go, -1: nowhere"""
        x = self.layer.input_layernorm(hidden)
        q_nope, q_rope, latent, k_rope = self._project(x, rope)
        self.attention.write(self.cache, latent, k_rope, slots)
        o = self._prefill(q_nope, q_rope, latent, k_rope) if prefill else self._decode(q_nope, q_rope)
        hidden = hidden + self.layer.self_attn.o_proj(o.flatten(1))
        return hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden)[None])[0]

    def _project(self, x, rope):
        """-> q_nope, q_rope [tokens, heads, ..], latent, k_rope [tokens, ..], the rope parts rotated"""
        a = self.layer.self_attn
        q = a.q_b_proj(a.q_a_layernorm(a.q_a_proj(x))).unflatten(-1, (a.num_heads, NOPE + ROPE))
        q_nope, q_rope = q.split([NOPE, ROPE], -1)
        latent, k_rope = a.kv_a_proj_with_mqa(x).split([LATENT, ROPE], -1)
        q_rope, k_rope = self.rotate(q_rope.transpose(0, 1)[None], k_rope[None, None], *rope)
        return q_nope, q_rope[0].transpose(0, 1), a.kv_a_layernorm(latent), k_rope[0, 0]

    def _prefill(self, q_nope, q_rope, latent, k_rope):
        """a whole prompt on itself, over expanded heads: with as many queries as keys that is the cheaper form"""
        k = torch.cat([torch.einsum("tl,hnl->thn", latent, self.w_uk), k_rope[:, None].expand_as(q_rope)], -1)
        v = torch.einsum("tl,hvl->thv", latent, self.w_uv)
        q, k, v = (x.transpose(0, 1)[None] for x in (torch.cat([q_nope, q_rope], -1), k, v))
        scale = self.layer.self_attn.scaling
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)

    def _decode(self, q_nope, q_rope):
        """one token of each row on what the cache holds of its request"""
        q_latent = torch.einsum("bhn,hnl->bhl", q_nope, self.w_uk)
        o = self.attention.decode((q_latent, q_rope), self.cache, self.layer.self_attn.scaling)  # (mscale^2 is in scaling)
        return torch.einsum("bhl,hvl->bhv", o, self.w_uv)


@dataclass
class Request:
    prompt: torch.Tensor
    new_tokens: int
    tokens: list[int] = field(default_factory=list)  # generated so far
    logits: list[torch.Tensor] = field(default_factory=list)  # by which each was chosen

    @property
    def pages(self) -> int:
        """that it will have taken when it is done (the last token is not written)"""
        return -(-(len(self.prompt) + self.new_tokens - 1) // PAGE)

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.new_tokens


class Server:
    """Rows of a batch that requests enter as others leave.  A row without a request has length 0 and computes nothing that
    counts: a step has the same shapes whoever is there, so on a GPU it is one CUDA graph."""

    def __init__(self, model, attention: type, rows: int, num_pages: int, max_seqlen: int):
        config, device, dtype = model.config, attention.device, model.dtype
        self.model, self.requests = model, [None] * rows
        first = PagedKVCache.allocate(num_pages, rows, max_seqlen, dtype=dtype, device=device)  # it hands out pages
        share = lambda: PagedKVCache.from_tensors(torch.empty_like(first.pool), first.block_table, first.cache_seqlens)
        caches = [first, *(share() for _ in range(config.num_hidden_layers - 1))]
        self.cache, self.attention = first, attention(first, config.num_attention_heads)
        self.layers = [Layer(layer, cache, self.attention) for layer, cache in zip(model.model.layers, caches)]
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)  # the last token of each row
        self.slots = torch.full((rows,), -1, dtype=torch.int64, device=device)  # and where the cache takes it
        self.decode_s, self.decoded, self.taken, self.most_pages = 0.0, 0, 0, 0
        self.compute = self._capture() if device == "cuda" else self._decode

    # ------------------------------------------------------------------ requests
    def run(self, requests: list[Request]):
        waiting = deque(requests)
        while waiting or any(self.requests):
            self._admit(waiting)
            self._step()
            for row, request in enumerate(self.requests):
                if request and request.done:
                    self.cache.release(row)
                    self.requests[row] = None

    def _admit(self, waiting: deque):
        """the longest waiting enters as soon as there is a row, and pages for all it will ever write"""
        while waiting and None in self.requests:
            promised = sum(request.pages for request in self.requests if request)
            if promised + waiting[0].pages > self.cache.pool.shape[0]:
                break
            row = self.requests.index(None)
            self.requests[row] = request = waiting.popleft()
            self.taken += request.pages
            self._prefill(row, request)

    # ------------------------------------------------------------------ tokens
    def _forward(self, tokens, positions, slots, prefill: bool):
        """-> hidden [tokens, hidden]"""
        model = self.model.model
        hidden = model.embed_tokens(tokens)
        rope = model.rotary_emb(hidden[None], positions[None])
        for layer in self.layers:
            hidden = layer(hidden, rope, slots, prefill)
        return model.norm(hidden)

    def _prefill(self, row: int, request: Request):
        count = len(request.prompt)
        slots = self.cache.extend([count if i == row else 0 for i in range(len(self.requests))])
        positions = torch.arange(count, device=slots.device)
        hidden = self._forward(request.prompt.to(slots.device), positions, slots, prefill=True)
        self._choose(row, request, self.model.lm_head(hidden[-1]))

    def _choose(self, row: int, request: Request, logits: torch.Tensor):
        self.tokens[row] = logits.argmax()
        request.tokens.append(int(self.tokens[row]))
        request.logits.append(logits)

    def _step(self):
        """the next token of every request"""
        active = [row for row, request in enumerate(self.requests) if request and not request.done]
        if not active:
            return
        began = time.perf_counter()
        new_slots = self.cache.extend([int(row in active) for row in range(len(self.requests))])
        self.slots.fill_(-1)
        self.slots[torch.tensor(active, device=self.slots.device)] = new_slots
        logits = self.compute().clone()
        tokens = self.tokens.tolist()
        self.decode_s, self.decoded = self.decode_s + time.perf_counter() - began, self.decoded + len(active)
        self.most_pages = max(self.most_pages, self.cache.pool.shape[0] - self.cache.num_free_pages)
        for row in active:
            self.requests[row].tokens.append(tokens[row])
            self.requests[row].logits.append(logits[row])

    def _decode(self) -> torch.Tensor:
        """reads and writes only tensors that stay where they are"""
        positions = (self.cache.cache_seqlens - 1).clamp(min=0)
        self.attention.begin_step()
        logits = self.model.lm_head(self._forward(self.tokens, positions, self.slots, prefill=False))
        self.tokens.copy_(logits.argmax(-1))
        return logits

    def _capture(self):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._decode()  # compiles and loads
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._decode()
        return lambda: (graph.replay(), logits)[1]


# ---------------------------------------------------------------------- the eager model
@dataclass
class Agreement:
    tokens: int = 0
    equal: int = 0  # to eager's in float32
    eager_equal: int = 0  # of eager's in the precision of ours
    ties: int = 0  # others, whose logit in float32 is within that precision of the largest
    ours: float = 0.0  # error of the logits against float32, root mean square over their deviation
    eager: float = 0.0

    @property
    def holds(self) -> bool:
        return self.equal + self.ties == self.tokens and self.ours <= SLACK * self.eager


def compare(model, requests: list[Request]) -> Agreement:
    """with the eager model, in float32 and in our precision, on the texts that came out"""
    result, wide, square = Agreement(), copy.deepcopy(model).float(), {"ours": 0.0, "eager": 0.0, "all": 0.0}
    for request in requests:
        text = torch.cat([request.prompt, torch.tensor(request.tokens[:-1], dtype=torch.int64)])[None].to(model.device)
        true, eager = (m(input_ids=text).logits[0, len(request.prompt) - 1 :].float() for m in (wide, model))
        ours = torch.stack(request.logits).float()
        for name, wrong in (("ours", ours - true), ("eager", eager - true), ("all", true - true.mean(-1, keepdim=True))):
            square[name] += wrong.square().sum().item()
        chosen = true.gather(1, torch.tensor(request.tokens, device=true.device)[:, None])[:, 0]
        gap = true.max(-1).values - chosen
        result.tokens += len(gap)
        result.equal += int((gap == 0).sum())
        result.eager_equal += int((eager.argmax(-1) == true.argmax(-1)).sum())
        result.ties += int(((gap > 0) & (gap <= 2 * (eager - true).abs().max())).sum())
    result.ours, result.eager = ((square[name] / square["all"]) ** 0.5 for name in ("ours", "eager"))
    return result


def serve_eagerly(model, requests: list[Request], rows: int) -> tuple[float, int]:
    """transformers' generate on left-padded batches, each until its longest request is done -> seconds of decoding, without
    prefill, and bytes of the largest cache"""
    seconds, most_bytes = 0.0, 0
    for first in range(0, len(requests), rows):
        batch = requests[first : first + rows]
        for _ in range(2):  # (the first warms up)
            prefill_s, _ = _generate(model, batch, 1)
        total_s, cache = _generate(model, batch, max(request.new_tokens for request in batch))
        seconds += max(total_s - prefill_s, 0.0)
        most_bytes = max(most_bytes, sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)))
    return seconds, most_bytes


def _generate(model, batch: list[Request], new_tokens: int):
    """-> seconds, cache"""
    width = max(len(request.prompt) for request in batch)
    pad = lambda x: F.pad(x, (width - len(x), 0))
    text = torch.stack([pad(request.prompt) for request in batch]).to(model.device)
    mask = torch.stack([pad(torch.ones_like(request.prompt)) for request in batch]).to(model.device)
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    greedy = dict(max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
    out = model.generate(text, attention_mask=mask, **greedy)
    wait()
    return time.perf_counter() - began, out["cache" if "cache" in out else "past_key_values"]


# ---------------------------------------------------------------------- command line
def draw_requests(options: argparse.Namespace) -> list[Request]:
    """prompts of 1 to `longest` tokens, evenly in the logarithm"""
    source = torch.Generator().manual_seed(options.seed)
    lengths = [round(options.longest ** float(torch.rand((), generator=source))) for _ in range(options.requests)]
    prompts = [torch.randint(1, 2048, (length,), generator=source) for length in lengths]
    counts = torch.randint(1, options.new_tokens + 1, (len(prompts),), generator=source).tolist()
    return [Request(prompt, count) for prompt, count in zip(prompts, counts)]


@torch.no_grad()
def serve(options: argparse.Namespace, attention: type) -> dict:
    """the numbers of a run: what `report` prints"""
    model, requests = random_model(options, attention.device), draw_requests(options)
    longest = max(len(request.prompt) + request.new_tokens for request in requests)
    pages, prompts = [request.pages for request in requests], [len(request.prompt) for request in requests]
    num_pages = max(max(pages), sum(pages) * options.rows // len(pages))  # room for as many average requests as there are rows
    server = Server(model, attention, options.rows, num_pages, longest)
    server.run(requests)
    agreement = compare(model, requests)
    eager_s, eager_bytes = serve_eagerly(model, requests, options.rows)
    a, pool = model.model.layers[0].self_attn, server.cache.pool
    return {
        **{name: getattr(options, name) for name in ("dtype", "layers", "hidden", "heads", "rows", "requests", "seed")},
        "mscale": a.scaling * (NOPE + ROPE) ** 0.5,  # (counts twice: for q and for k)
        "prompts": [min(prompts), max(prompts)],
        **{name: getattr(agreement, name) for name in ("tokens", "equal", "eager_equal", "ties")},
        "logits_error": agreement.ours,
        "eager_logits_error": agreement.eager,
        "agrees": agreement.holds,
        "tokens_per_s": server.decoded / server.decode_s,
        "eager_tokens_per_s": server.decoded / eager_s,
        "cache_bytes": server.most_pages * pool[0].nbytes * options.layers,
        "eager_cache_bytes": eager_bytes,
        "expanded": (NOPE + ROPE + VALUE) * options.heads / (LATENT + ROPE),
        "pages": pool.shape[0],
        "pages_taken": server.taken,
    }


def report(run: dict):
    differ = run["tokens"] - run["equal"] - run["ties"]
    print(
        "model     {layers} layers, hidden {hidden}, {heads} heads, {dtype}; yarn, scores * {mscale:.3f}\n"
        "requests  {requests} in {rows} rows; prompts of {prompts[0]} to {prompts[1]} tokens, {tokens} new tokens\n"
        "tokens    {equal} are eager's in float32 (of eager in {dtype} {eager_equal}), "
        "{ties} tie with it within rounding, {differ} differ\n"
        "logits    error against float32: {logits_error:.1e} of their deviation; of eager in {dtype} {eager_logits_error:.1e}\n"
        "decode    {tokens_per_s:.0f} tokens/s, eager {eager_tokens_per_s:.0f} tokens/s\n"
        "cache     {mb:.2f} MB in use at most, eager {eager_mb:.2f} MB (padded); "
        "heads expanded would be {expanded:.1f} times as much\n"
        "pages     {pages} served requests that took {pages_taken} in all".format(
            **run, differ=differ, mb=run["cache_bytes"] / 1e6, eager_mb=run["eager_cache_bytes"] / 1e6
        )
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attention", choices=("kernels", "reference"), default="kernels", help="default: %(default)s")
    sizes = dict(rows=16, requests=48, longest=4000, new_tokens=96, layers=3, hidden=512, heads=16)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    for name in sizes:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: a positive integer")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    attention = {"kernels": Kernels, "reference": Reference}[options.attention]
    if DeepseekV3Config is None:
        print("needs Hugging Face transformers, 4.56 or later: pip install transformers", file=sys.stderr)
        return 1
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if attention is Kernels and not hopper:
        print("no Hopper GPU: the kernels cannot run; --attention reference takes float64 on the CPU instead", file=sys.stderr)
        return 1
    run = serve(options, attention)
    report(run)
    print("agrees with the eager model" if run["agrees"] else "does NOT agree with the eager model")
    return 0 if run["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
