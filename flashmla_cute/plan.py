"""The plan of a step: which CTA works on which KV tiles, made on the device once a step and used by all layers."""

import functools
from collections.abc import Callable
from dataclasses import astuple, replace

import torch

from . import checks, compile, heuristics, ops
from .checks import need
from .kernels.config import BATCH_INVARIANT, FORMATS, PLAIN, TILE, DecodeOptions, ScheduleConfig
from .kernels.parts.work import MERGE, PART, RECORD
from .kv_cache import PagedKVCache
from .schedule import num_items, num_slots


@functools.cache
def num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@functools.cache
def _constants(config: ScheduleConfig) -> list[int]:
    """as the operator takes it"""
    return list(astuple(config))


class DecodePlan:
    """Schedule and workspace for decoding a batch with `num_heads` query heads and `num_queries` query tokens a request, or
    with as many for each request as `cu_seqlens_q` says.

    Built from the lengths that cache.cache_seqlens holds on the device when `update` runs (the constructor runs it once):
    nothing is read on the host.  Call `update` when lengths have changed; under CUDA graphs, inside the capture, so that every
    replay plans for the lengths of that step.  One plan serves all layers whose caches share that cache_seqlens tensor, on one
    stream; its workspace (up to 128 KB for each SM) is overwritten by every call.

    partials: element type of the partial results of a request that several CTAs share.  float16 does not show in the error of
    out (1.8e-3 with either, bf16), but clamps them at +-65504, far beyond any normalised latent; float32 does not, and takes up
    to a quarter longer at small batch.

    cu_seqlens_q: [batch + 1] int32, on the device; request i's query tokens are rows cu_seqlens_q[i] .. cu_seqlens_q[i + 1] - 1
    of q, and may be none.  max_seqlen_q: query tokens of any request at most; it fixes grid and workspace, and tokens beyond it
    are not computed.  Call `update` when cu_seqlens_q has changed, too.

    batch_invariant: how a request is cut depends on its own length alone, and its pieces are merged in one order: out and lse
    have the same bits whatever else is in the batch, and wherever in it.  A request of n tokens is cut into at most
    32, and about max(sqrt(9 / 32 * n / 64 / row tiles), n / 2304), pieces.  A CTA that has all of a request's pieces joins
    them over a slot of its own; those of requests that several CTAs share, fewer than CTAs, have a partial result each (with
    partials=float32 and over e4m3 caches all pieces do: the workspace then grows with batch and capacity).  Deployments that
    always decode large batches of similar lengths want fewer: config=ScheduleConfig(max_pieces=2).

    options: sliding window, softcap, float32 out, and how lse is written (kernels/config.py); each combination compiles once.

    query_terms: over an e4m3 cache, e4m3 numbers into which each element of a 16-bit q is split inside the kernel.  2 hold bf16
    exactly (fp16 to 2^-9), 1 keeps 3 bits of mantissa and halves the work of the scores.  Not where tokens have scales of
    their own: scores are computed in f16 there, which holds q.

    config: another cost model of the schedule.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        num_heads: int,
        num_queries: int = 1,
        *,
        cu_seqlens_q: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        partials: torch.dtype = torch.float16,
        batch_invariant: bool = False,
        options: DecodeOptions = PLAIN,
        query_terms: int = 2,
        config: ScheduleConfig | None = None,
    ):
        if not isinstance(cache, PagedKVCache):
            raise TypeError(f"cache is a {type(cache).__name__}; allowed: a PagedKVCache")
        counts = {"num_queries": num_queries}
        if cu_seqlens_q is not None:
            need(num_queries == 1, "num_queries", num_queries, "nothing beside cu_seqlens_q, which goes with max_seqlen_q")
            _check_ragged(cache, cu_seqlens_q)
            counts, num_queries = {"max_seqlen_q": max_seqlen_q}, max_seqlen_q
        elif max_seqlen_q is not None:
            raise ValueError(f"max_seqlen_q is {max_seqlen_q}; allowed: None without cu_seqlens_q, num_queries says it then")
        for name, value in {"num_heads": num_heads, **counts}.items():
            need(isinstance(value, int) and value > 0, name, value, "a positive integer")
        need(
            num_heads % cache.num_kv_heads == 0,
            "num_heads",
            num_heads,
            f"a multiple of the cache's {cache.num_kv_heads} kv heads",
        )
        config = config or (BATCH_INVARIANT if batch_invariant else ScheduleConfig())
        fixed = config.max_pieces > 0
        need(batch_invariant == fixed, "batch_invariant", batch_invariant, f"{fixed} with this config, {config}")
        joins = fixed and partials == torch.float16 and cache.format.dtype in FORMATS  # what the kernel can
        config = replace(config, runs=int(joins))
        self.fixed_pieces = config.runs > 0
        need(cache.batch <= config.max_batch, "cache.batch", cache.batch, f"up to {config.max_batch}")
        if not isinstance(options, DecodeOptions):
            raise TypeError(f"options is a {type(options).__name__}; allowed: DecodeOptions")
        need(partials in (torch.float16, torch.float32), "partials", partials, "torch.float16 or torch.float32")
        need(query_terms in (1, 2), "query_terms", query_terms, "1 or 2")
        one_term = query_terms == 1 and cache.format.scales > 0
        need(not one_term, "query_terms", 1, "2 over a cache whose tokens have scales of their own: q is exact there")
        checks.is_hopper("cache.pool", cache.pool)
        self.query_terms = query_terms
        self.cache_seqlens, self.capacity, self.config = cache.cache_seqlens, cache.capacity, config
        self.batch, self.num_heads, self.num_queries, self.cu_seqlens_q = cache.batch, num_heads, num_queries, cu_seqlens_q
        self.num_kv_heads, self.device, self.format = cache.num_kv_heads, cache.device, cache.format
        self.options = options
        self.out_dtype = torch.float32 if options.out == "float32" else cache.dtype  # (e4m3: q's, see decode.py)
        self.out_shape = self.lse_shape = None  # of as many tokens as q has
        if cu_seqlens_q is None:
            self.out_shape = (self.batch, num_queries, num_heads, cache.format.latent)
            self.lse_shape = (self.batch, num_heads, num_queries)
            if options.lse_by_token:
                self.lse_shape = (self.batch * num_queries, num_heads)
        self.reach = options.window + num_queries - 1 if options.window else self.capacity
        self.softmax_scale = cache.format.head_dim**-0.5  # unless the caller of mla_decode has another
        self.launches: dict[tuple, Callable] = {}  # by what mla_decode was called with: checked once, then remembered
        self.num_sms = num_sms(self.device.index)
        head_tile = heuristics.choose_head_tile(num_queries, num_heads, cache.num_kv_heads, mergeable=True)
        self.row_tiles = heuristics.row_tiles(head_tile, num_queries, num_heads, cache.num_kv_heads)
        self.max_parts = heuristics.max_parts(self.row_tiles, self.num_sms)
        int32 = lambda *shape: torch.empty(shape, dtype=torch.int32, device=self.device)
        sizes = (self.batch, self.row_tiles, self.max_parts, -(-self.capacity // TILE), config)
        self.items = int32(max(1, num_items(*sizes)), RECORD)
        self.parts = int32(self.max_parts, PART)
        self.merges = int32(1 + self.batch, MERGE)
        slots = num_slots(*sizes)
        self.o_split = torch.empty(slots, num_queries, num_heads, cache.format.latent, dtype=partials, device=self.device)
        self.lse_split = torch.empty(slots, num_queries, num_heads, dtype=torch.float32, device=self.device)
        self.constants = _constants(config)
        self._build = compile.get(ops.ScheduleOp if cu_seqlens_q is None else ops.RaggedScheduleOp, config)
        self.update()

    def update(self) -> None:
        """Plans for the lengths as they are now, on torch's current stream.  A length beyond the block table is cut to it."""
        lengths = (self.cache_seqlens,) if self.cu_seqlens_q is None else (self.cache_seqlens, self.cu_seqlens_q)
        arguments = (*lengths, self.items, self.parts, self.merges, self.row_tiles, self.capacity, self.reach)
        if checks.tracing():
            traced = torch.ops.flashmla_cute.schedule if self.cu_seqlens_q is None else torch.ops.flashmla_cute.ragged_schedule
            traced(*arguments, self.constants)
        elif self.batch > 0:
            self._build(*arguments)


def _check_ragged(cache: PagedKVCache, cu_seqlens_q):
    checks.is_tensor("cu_seqlens_q", cu_seqlens_q)
    checks.has_dtype("cu_seqlens_q", cu_seqlens_q, torch.int32)
    checks.has_shape("cu_seqlens_q", cu_seqlens_q, (cache.batch + 1,), "one more than requests")
    need(cu_seqlens_q.is_contiguous(), "cu_seqlens_q.stride()", cu_seqlens_q.stride(), "contiguous")
    checks.on_device("cu_seqlens_q", cu_seqlens_q, cache.device, "the cache")
