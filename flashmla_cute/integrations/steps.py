"""A decode step of an engine: one plan for all layers, in memory that captured CUDA graphs may keep reading."""

import torch

from ..decode import MAX_REMEMBERED, mla_decode
from ..kv_cache import PagedKVCache
from ..plan import DecodePlan
from . import support


class DecodeSteps:
    """The decode steps of one worker: a plan for each shape of batch, and one workspace for all of them.

    A CUDA graph that was captured in a step reads that step's plan at every replay; a later step of the same shape refills
    the same memory, outside the graph.  Plans are small (40 KB for 128 requests) and stay; what is large, the partial results,
    they share.  So the steps of one DecodeSteps must follow one another on the device: micro-batches that run on two streams
    need one each.

    num_heads        query heads of this rank, after a gather over context parallel ranks if there is one
    page             tokens of a cache page
    dtype            element type of queries and cache
    batch_invariant  a request's bits shall not depend on the rest of the batch
    Raises ValueError for what the kernels do not decode, RuntimeError for another GPU than Hopper.
    """

    def __init__(
        self, num_heads: int, page: int, dtype: torch.dtype, device: torch.device | str, *, batch_invariant: bool = False
    ):
        support.need(support.why_not_page(page), support.why_not_batch_invariant() if batch_invariant else None)
        self.num_heads = num_heads
        self.options = {"batch_invariant": True} if batch_invariant else {}
        # Plans are made before an engine hands a layer's pool out.  They look at its shape only: one page stands for it.
        self.pool = torch.empty(1, page, support.FORMATS[dtype].head_dim, dtype=dtype, device=device)
        self._steps: dict[tuple[int, ...], DecodeStep] = {}
        self._workspaces: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._joined = self.pool.new_empty(0, num_heads, self.pool.shape[-1])

    def plan(self, block_table: torch.Tensor, cache_seqlens: torch.Tensor, num_queries: int) -> "DecodeStep":
        """The step of a batch, planned on torch's current stream for the lengths as they are on the device: nothing is read on
        the host.  Under full CUDA graphs to be called before a capture or a replay, not inside.

        block_table    [batch, pages of the longest request] int32; a captured graph keeps its address
        cache_seqlens  [batch] int32 or int64, with the tokens of this step; copied: its address may change
        num_queries    query tokens of every request
        """
        key = (*block_table.shape, num_queries)
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = DecodeStep(self, block_table, num_queries)
        step.block_table, step.cache_seqlens = block_table, cache_seqlens
        step.refresh()
        return step

    def warm_up(self, num_queries: int):
        """Compiles and loads what steps of `num_queries` query tokens launch: neither may happen inside a capture."""
        table = torch.zeros(1, 1, dtype=torch.int32, device=self.pool.device)
        q = self.pool.new_zeros(num_queries, self.num_heads, self.pool.shape[-1])
        self.plan(table, torch.zeros_like(table[0]), num_queries).decode(q, self.pool, 1.0)

    def share_workspace(self, plan: DecodePlan):
        """One workspace for all plans of one size: a call is done with it before the next begins, and one for each of vLLM's 50
        captured batch sizes would be up to 0.9 GB."""
        mine = plan.o_split, plan.lse_split
        plan.o_split, plan.lse_split = self._workspaces.setdefault(plan.o_split.shape, mine)

    def joined(self, tokens: int) -> torch.Tensor:
        """room for `tokens` joined queries; an earlier, smaller one lives on in the steps that were given it"""
        if self._joined.shape[0] < tokens:
            self._joined = self._joined.new_empty(tokens, *self._joined.shape[1:])
        return self._joined[:tokens]


class DecodeStep:
    """One shape of batch: its plan, the lengths it was made for, and the caches of the layers seen so far."""

    def __init__(self, steps: DecodeSteps, block_table: torch.Tensor, num_queries: int):
        self.block_table = block_table
        self.lengths = torch.zeros(block_table.shape[0], dtype=torch.int32, device=block_table.device)
        self.cache_seqlens = self.lengths
        cache = PagedKVCache.from_tensors(steps.pool, block_table, self.lengths)
        self.plan = DecodePlan(cache, steps.num_heads, num_queries, **steps.options)
        steps.share_workspace(self.plan)
        # Without query pairs in the kernel the two parts are joined in memory that is allocated here, before any capture.
        self._joined = None if support.QUERY_PAIRS else steps.joined(self.tokens)
        self._caches: dict[tuple[int, ...], PagedKVCache] = {}

    @property
    def tokens(self) -> int:
        return self.plan.batch * self.plan.num_queries

    def refresh(self) -> None:
        """Plans for the lengths that cache_seqlens holds now, on torch's current stream.  Can be captured."""
        self.lengths.copy_(self.cache_seqlens)
        self.plan.update()

    def decode(
        self, q: torch.Tensor | tuple[torch.Tensor, torch.Tensor], pool: torch.Tensor, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal decode of one layer.

        q     [tokens, num_heads, latent + rope], request after request, or the pair ([.., latent], [.., rope])
        pool  [pages, page, latent + rope] or [pages, page, 1, latent + rope]
        Returns out [tokens, num_heads, latent] and lse [tokens, num_heads] float32, natural log, both contiguous; a row that
        sees no token gives 0 and -inf.  Raises ValueError for other shapes, before any launch.
        """
        plan = self.plan
        part = q[0] if isinstance(q, tuple) else q
        if part.dim() != 3 or part.shape[0] != self.tokens:
            raise ValueError(
                f"q.shape is {tuple(part.shape)}; allowed: [{self.tokens}, heads, columns], the step's {plan.batch} requests "
                f"of {plan.num_queries} query tokens each"
            )
        if isinstance(q, tuple) and not support.QUERY_PAIRS:
            q = torch.cat(q, dim=-1, out=self._joined)
        by_request = lambda tensor: tensor.view(plan.batch, plan.num_queries, *tensor.shape[1:])
        q = tuple(map(by_request, q)) if isinstance(q, tuple) else by_request(q)
        out = torch.empty(plan.out_shape, dtype=pool.dtype, device=pool.device)
        lse = torch.empty(plan.batch, plan.num_queries, plan.num_heads, dtype=torch.float32, device=pool.device)
        mla_decode(q, self._cache(pool), plan, softmax_scale=softmax_scale, out=out, lse=lse.transpose(1, 2))
        return out.flatten(0, 1), lse.flatten(0, 1)

    def _cache(self, pool: torch.Tensor) -> PagedKVCache:
        """The layer's cache.  Kept, so that a layer is checked once and not at every step (mla_decode remembers caches)."""
        key = pool.data_ptr(), self.block_table.data_ptr(), self.block_table.stride(0)
        cache = self._caches.get(key)
        if cache is None:
            if len(self._caches) >= MAX_REMEMBERED:
                self._caches.clear()
            cache = self._caches[key] = PagedKVCache.from_tensors(pool, self.block_table, self.lengths)
        return cache
