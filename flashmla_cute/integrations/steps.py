"""A decode step of an engine: one plan for all layers, in memory that captured CUDA graphs may keep reading."""

import torch

from ..decode import MAX_REMEMBERED, mla_decode
from ..kernels.config import PLAIN, DecodeOptions
from ..kv_cache import PagedKVCache
from ..plan import DecodePlan
from . import support


class DecodeSteps:
    """The decode steps of one worker: a plan for each shape of batch, and one workspace for all of them.

    A CUDA graph that was captured in a step reads that step's plan at every replay; a later step of the same shape refills
    the same memory, outside the graph.  Plans are small (20 KB for 128 requests) and stay; what is large, the partial results,
    they share.  So the steps of one DecodeSteps must follow one another on the device: micro-batches that run on two streams
    need one each.

    num_heads        query heads of this rank, after a gather over context parallel ranks if there is one
    widths           (latent, rope) columns of a token
    page             tokens of a cache page
    dtype            element type of the queries, and of out
    cache_dtype      that of the cache
    batch_invariant  a request's bits shall not depend on the rest of the batch
    options          as DecodePlan takes them; lse_by_token is not needed
    Raises ValueError for what the kernels do not decode, RuntimeError for another GPU than Hopper.
    """

    def __init__(
        self,
        num_heads: int,
        widths: tuple[int, int],
        page: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        device: torch.device | str,
        *,
        batch_invariant: bool = False,
        options: DecodeOptions = PLAIN,
    ):
        support.need(support.why_not_dtypes(dtype, cache_dtype), support.why_not_page(page))
        support.need(support.why_not_widths(*widths, cache_dtype))
        self.num_heads, self.latent, self.dtype = num_heads, widths[0], dtype
        self.arguments = dict(batch_invariant=batch_invariant, options=options)  # of a DecodePlan
        # Plans are made before an engine hands a layer's pool out.  They look at its shape only: one page stands for it.
        self.pool = torch.empty(1, page, sum(widths), dtype=cache_dtype, device=device)
        self.one = torch.ones(1, device=device)  # a scale
        self._steps: dict[tuple, DecodeStep] = {}
        self._workspaces: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def plan(
        self,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        num_queries: int,
        cu_seqlens_q: torch.Tensor | None = None,
    ) -> "DecodeStep":
        """The step of a batch, planned on torch's current stream for the lengths as they are on the device: nothing is read on
        the host.  Under full CUDA graphs to be called before a capture or a replay, not inside.

        block_table    [batch, pages of the longest request] int32; a captured graph keeps its address
        cache_seqlens  [batch] int32 or int64, with the tokens of this step; copied: its address may change
        num_queries    query tokens of every request; with cu_seqlens_q: of any request at most
        cu_seqlens_q   [batch + 1] int32: where each request's query tokens begin; copied
        """
        key = (*block_table.shape, num_queries, cu_seqlens_q is not None)
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = DecodeStep(self, block_table, num_queries, ragged=key[-1])
        step.block_table, step.cache_seqlens, step.cu_seqlens_q = block_table, cache_seqlens, cu_seqlens_q
        step.refresh()
        return step

    def warm_up(self, num_queries: int, *, pair: bool = True, heads_outside: bool = False, ragged: bool = False):
        """Compiles and loads what steps of `num_queries` query tokens launch: neither may happen inside a capture.

        pair: q comes as one; heads_outside: its latent part lies in memory as [num_heads, tokens, latent]"""
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.int32, device=self.pool.device)
        starts = zeros(2) if ragged else None
        q = self.pool.new_zeros(num_queries, self.num_heads, self.pool.shape[-1], dtype=self.dtype)
        if pair:
            latent, rope = q[..., : self.latent], q[..., self.latent :]
            q = latent.transpose(0, 1).contiguous().transpose(0, 1) if heads_outside else latent, rope
        self.plan(zeros(1, 1), zeros(1), num_queries, starts).decode(q, self.pool, 1.0)

    def share_workspace(self, plan: DecodePlan):
        """Gives `plan` the largest workspace so far.  A call is done with it before the next begins, and one for each of vLLM's
        50 captured batch sizes would be up to 0.9 GB.  A larger one replaces it for later plans; earlier ones keep theirs."""
        slots, *sizes = plan.o_split.shape
        largest = self._workspaces.get(tuple(sizes))
        if largest is None or largest[0].shape[0] < slots:
            self._workspaces[tuple(sizes)] = plan.o_split, plan.lse_split
        else:
            plan.o_split, plan.lse_split = (workspace[:slots] for workspace in largest)


class DecodeStep:
    """One shape of batch: its plan, the lengths it was made for, and the caches of the layers seen so far."""

    def __init__(self, steps: DecodeSteps, block_table: torch.Tensor, num_queries: int, ragged: bool):
        batch = block_table.shape[0]
        zeros = lambda count: torch.zeros(count, dtype=torch.int32, device=block_table.device)
        self.lengths, self.starts = zeros(batch), zeros(batch + 1) if ragged else None
        self.block_table, self.cache_seqlens, self.cu_seqlens_q = block_table, self.lengths, self.starts
        self.latent, self.one = steps.latent, steps.one
        self._caches: dict[tuple, PagedKVCache] = {}
        shape = self._make_cache(steps.pool, None)
        count = dict(cu_seqlens_q=self.starts, max_seqlen_q=num_queries) if ragged else dict(num_queries=num_queries)
        self.plan = DecodePlan(shape, steps.num_heads, **count, **steps.arguments)
        steps.share_workspace(self.plan)

    def refresh(self) -> None:
        """Plans for the lengths that cache_seqlens (and cu_seqlens_q) hold now, on torch's current stream.  Can be captured."""
        self.lengths.copy_(self.cache_seqlens)
        if self.starts is not None:
            self.starts.copy_(self.cu_seqlens_q)
        self.plan.update()

    def decode(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        pool: torch.Tensor,
        softmax_scale: float,
        scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal decode of one layer.

        q      [tokens, num_heads, latent + rope], request after request, or the pair ([.., latent], [.., rope])
        pool   [pages, page, latent + rope] or [pages, page, 1, latent + rope]
        scale  what the numbers of an FP8 pool are multiplied by, a float32 of one element on the device; None: 1
        Returns out [tokens, num_heads, latent] and lse [tokens, num_heads] float32, both contiguous; a row that sees no token
        gives 0 and -inf, a row of no request (ragged batches may have some) anything.
        Raises ValueError for other shapes, before any launch.
        """
        plan = self.plan
        parts = q if isinstance(q, tuple) else (q,)
        if len(parts) == 2 and parts[1].shape[-1] == 0:  # (models without rope)
            parts = parts[:1]
        tokens, *row = parts[0].shape
        out = torch.empty(tokens, plan.num_heads, self.latent, dtype=parts[0].dtype, device=pool.device)
        lse = torch.empty(tokens, plan.num_heads, dtype=torch.float32, device=pool.device)
        results = dict(out=out, lse=lse)
        if self.starts is None:  # each request has its axis
            if len(row) != 2 or tokens != plan.batch * plan.num_queries:
                raise ValueError(
                    f"q.shape is {(tokens, *row)}; allowed: [{plan.batch * plan.num_queries}, heads, columns], the step's "
                    f"{plan.batch} requests of {plan.num_queries} query tokens each"
                )
            by_request = lambda tensor: tensor.view(plan.batch, plan.num_queries, *tensor.shape[1:])
            parts, results = tuple(map(by_request, parts)), dict(out=by_request(out), lse=by_request(lse).transpose(1, 2))
        q = parts if len(parts) == 2 else parts[0]
        mla_decode(q, self._cache(pool, scale), plan, softmax_scale=softmax_scale, **results)
        return out, lse

    def _cache(self, pool: torch.Tensor, scale: torch.Tensor | None) -> PagedKVCache:
        """The layer's cache.  Kept, so that a layer is checked once and not at every step: mla_decode remembers caches."""
        of_scale = None if scale is None else scale.data_ptr()
        key = pool.data_ptr(), of_scale, self.block_table.data_ptr(), self.block_table.stride(0)
        cache = self._caches.get(key)
        if cache is None:
            if len(self._caches) >= MAX_REMEMBERED:
                self._caches.clear()
            cache = self._caches[key] = self._make_cache(pool, scale)
        return cache

    def _make_cache(self, pool: torch.Tensor, scale: torch.Tensor | None) -> PagedKVCache:
        scales = {}
        if pool.dtype in support.FP8_CACHES:  # (tensors, also for 1: a number would be copied to the device, in a capture)
            scales = dict(scale=self.one if scale is None else scale, q_scale=self.one)
        return PagedKVCache.from_tensors(pool, self.block_table, self.lengths, latent=self.latent, **scales)
