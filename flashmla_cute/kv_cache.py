"""The paged KV cache: a pool of pages, each request's list of pages, each request's length."""

from collections.abc import Sequence

import torch

from . import checks, torch_ops
from .checks import need
from .kernels.config import DIMS, MAX_PAGE, PAGE_STEP, SCALED_FORMATS


def _need_scales(scales, dtype: torch.dtype):
    need(scales in (0, *SCALED_FORMATS), "scales", scales, f"0, {' or '.join(map(str, SCALED_FORMATS))}")
    need(not scales or dtype in checks.FP8_DTYPES, "scales", scales, f"0 with dtype {dtype}")


class Identity:
    """what a plan remembers of a cache: equal to itself alone, and without memory of the GPU"""


class PagedKVCache:
    """A pool of latent pages and the block table and lengths that say whose they are.  Holds references, never copies.

    pool           [num_pages, page, num_kv_heads, latent + rope] bf16 or fp16; page a multiple of 8 up to 1024, latent + rope
                   as in kernels/config.py; last axis contiguous, other strides multiples of 16 bytes (blocks may be padded,
                   the pool may be a view into a larger one, beyond 2^31 elements)
    block_table    [batch, max_pages] int32: entry i is the page of the request's tokens page * i .. page * (i + 1) - 1; entries
                   past its end are never read
    cache_seqlens  [batch] int32: tokens of each request, 0 allowed; may change between steps, on the device

    A pool may also be e4m3, of 512 + 64 columns (576 bytes).  Then
    scale          is what its numbers are multiplied by: a number, or a float32 tensor of one element on the device, which
                   every launch reads anew; None: 1.  That suits latents and rope keys as models make them, normalised: e4m3
                   has the same relative error from 2^-6 to 448.
    q_scale        is the same of a q that is e4m3 too

    Or its tokens have scales of their own: a pool of bytes, [num_pages, page, num_kv_heads, 656] uint8, of each token 512 e4m3
    numbers, 4 float32 scales, what each 128 of them are multiplied by, and 64 bf16 rope columns (vLLM's fp8_ds_mla).
    scales         4, or 1: `append` then writes four equal ones, what all 512 are multiplied by.  Either is read alike.
    Numbers times their scale are taken as f16 (11 bits, up to 65504): normalised latents are far from its ends.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        *,
        latent: int | None = None,
        scale: torch.Tensor | float | None = None,
        q_scale: torch.Tensor | float | None = None,
        scales: int | None = None,
    ):
        for name, tensor in (("pool", pool), ("block_table", block_table), ("cache_seqlens", cache_seqlens)):
            checks.is_tensor(name, tensor)
        checks.has_dtype("pool", pool, *checks.POOL_DTYPES)
        if pool.dim() == 3:  # engines keep one kv head without its axis
            pool = pool.unsqueeze(2)
        checks.has_shape("pool", pool, (None, None, None, None), "(pages, page, kv heads, latent + rope)")
        need(scales in (None, 0, *SCALED_FORMATS), "scales", scales, f"0, None, {' or '.join(map(str, SCALED_FORMATS))}")
        kv = checks.format_of("pool", pool, latent, scales)
        need(
            pool.shape[1] % PAGE_STEP == 0 and PAGE_STEP <= pool.shape[1] <= MAX_PAGE,
            "pool.shape[1]",
            pool.shape[1],
            f"pages of a multiple of {PAGE_STEP} tokens up to {MAX_PAGE}",
        )
        need(pool.shape[0] > 0 and pool.shape[2] > 0, "pool.shape", tuple(pool.shape), "at least one page and one kv head")
        checks.has_vector_strides("pool", pool)
        checks.has_dtype("block_table", block_table, torch.int32)
        checks.has_shape("block_table", block_table, (None, None), "(batch, pages of a request)")
        need(block_table.shape[1] > 0, "block_table.shape", tuple(block_table.shape), "at least one page a request")
        need(block_table.stride(1) == 1, "block_table.stride(1)", block_table.stride(1), "1")
        checks.has_dtype("cache_seqlens", cache_seqlens, torch.int32)
        checks.has_shape("cache_seqlens", cache_seqlens, (block_table.shape[0],), "one length for each row of block_table")
        need(cache_seqlens.is_contiguous(), "cache_seqlens.stride()", cache_seqlens.stride(), "contiguous")
        checks.on_device("block_table", block_table, pool.device, "pool")
        checks.on_device("cache_seqlens", cache_seqlens, pool.device, "pool")
        self.pool, self.block_table, self.cache_seqlens, self.format = pool, block_table, cache_seqlens, kv
        self.scale = self.q_scale = None
        if pool.dtype in checks.FP8_DTYPES:
            self.scale = checks.as_scale("scale", scale, pool.device)
            self.q_scale = checks.as_scale("q_scale", q_scale, pool.device)
        for name, given in (("scale", scale), ("q_scale", q_scale)):
            need(self.scale is not None or given is None, name, given, f"None with a pool of {pool.dtype}")
        if kv.scales:
            self.scale = self.q_scale = checks.as_scale("scale", None, pool.device)
        self.identity = Identity()
        self._free: list[int] | None = None  # page ids; only a cache that allocated its pool hands out pages
        self._lengths: list[int] = []
        self._pages: list[list[int]] = []

    # ------------------------------------------------------------------ making one
    @classmethod
    def from_tensors(
        cls,
        pool: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        *,
        latent: int | None = None,
        scale: torch.Tensor | float | None = None,
        q_scale: torch.Tensor | float | None = None,
        scales: int | None = None,
    ) -> "PagedKVCache":
        """A cache over the caller's tensors, without a copy; pool may also be [num_pages, page, latent + rope].

        latent: how many of a token's columns are latent; None: known by their number.  scale, q_scale, scales: see the class.
        Raises TypeError or ValueError that names the tensor, what was given and what is allowed."""
        return cls(pool, block_table, cache_seqlens, latent=latent, scale=scale, q_scale=q_scale, scales=scales)

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        batch: int,
        max_seqlen: int,
        *,
        num_kv_heads: int = 1,
        page: int = 64,
        latent: int = 512,
        rope: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        scale: torch.Tensor | float | None = None,
        scales: int = 0,
        device: torch.device | str = "cuda",
    ) -> "PagedKVCache":
        """An empty cache of `num_pages` pages of `page` tokens for up to `batch` requests of up to `max_seqlen` tokens each.

        scales: 4 or 1 of a token, in e4m3; 0: none, and `scale` is that of the whole e4m3 cache.  The pool is not cleared:
        slots past a request's length may hold anything, also NaN."""
        dtypes = (*checks.DTYPES, *checks.FP8_DTYPES)
        need(dtype in dtypes, "dtype", dtype, " or ".join(map(str, dtypes)))
        _need_scales(scales, dtype)
        sizes = dict(num_pages=num_pages, batch=batch, max_seqlen=max_seqlen, num_kv_heads=num_kv_heads, page=page)
        for name, value in sizes.items():
            need(isinstance(value, int) and value > 0, name, value, "a positive integer")
        need((latent, rope) in DIMS, "(latent, rope)", (latent, rope), f"one of {', '.join(map(str, DIMS))}")
        row = (latent + rope, dtype)
        if scales:
            kv = SCALED_FORMATS[scales]
            need(
                (latent, rope) == (kv.latent, kv.rope), "(latent, rope)", (latent, rope), f"{(kv.latent, kv.rope)} with scales"
            )
            row = (kv.bytes_per_token, torch.uint8)
        cache = cls(
            torch.empty(num_pages, page, num_kv_heads, row[0], dtype=row[1], device=device),
            torch.full((batch, -(-max_seqlen // page)), -1, dtype=torch.int32, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
            latent=latent,
            scale=scale,
            scales=scales,
        )
        cache._free = list(range(num_pages))[::-1]
        cache._lengths, cache._pages = [0] * batch, [[] for _ in range(batch)]
        return cache

    # ------------------------------------------------------------------ shape
    @property
    def batch(self) -> int:
        return self.block_table.shape[0]

    @property
    def page(self) -> int:
        return self.pool.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.pool.shape[2]

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def dtype(self) -> torch.dtype:
        """of the latents"""
        return torch.float8_e4m3fn if self.format.scales else self.pool.dtype

    @property
    def query_dtypes(self) -> tuple[torch.dtype, ...]:
        """of q, and of tokens to append"""
        if self.format.scales:
            return tuple(checks.DTYPES)
        return (self.pool.dtype,) if self.scale is None else (*checks.DTYPES, self.pool.dtype)

    @property
    def capacity(self) -> int:
        """tokens that a row of the block table can name"""
        return self.block_table.shape[1] * self.page

    # ------------------------------------------------------------------ writing
    def append(self, latent: torch.Tensor, rope: torch.Tensor | None, slots: torch.Tensor) -> None:
        """Writes tokens into the pool, on the GPU, on torch's current stream.

        latent  [n, latent] or [n, num_kv_heads, latent], rope [n, rope] or [n, num_kv_heads, rope], of the pool's dtype; None
                for rope where the cache has no such columns.  Into an e4m3 pool also bf16 or fp16: divided by the scale and
                rounded; what is then beyond 448 becomes +-448, NaN stays NaN.  Where tokens have scales, bf16 or fp16: each
                scale is the largest finite magnitude among its columns / 448, at least 2^-126; fp16 rope becomes bf16
        slots   [n] int64: page id * page + row of each token; a negative or too large slot writes nothing.
        Lengths and block table stay as they are: `extend` moves those of an allocated cache and returns the slots."""
        checks.is_hopper("cache.pool", self.pool)
        need(self.format.rope > 0 or rope is None, "rope", "a tensor", "None: the cache has no rope columns")
        given = {"latent": latent, "rope": rope, "slots": slots}
        for name, tensor in given.items():
            if name != "rope" or self.format.rope > 0:
                checks.is_tensor(name, tensor)
                checks.on_device(name, tensor, self.device, "the cache")
        checks.has_dtype("slots", slots, torch.int64)
        checks.has_shape("slots", slots, (None,), "(tokens,)")
        need(slots.is_contiguous(), "slots.stride()", slots.stride(), "contiguous")
        rows = []
        for name, width in (("latent", self.format.latent), ("rope", self.format.rope)):
            tensor = given[name]
            if width == 0:
                rows.append(rows[0])  # (the kernel copies no columns of it)
                continue
            checks.has_dtype(name, tensor, *(self.query_dtypes if name == "latent" else (latent.dtype,)))
            tensor = tensor.unsqueeze(1) if tensor.dim() == 2 else tensor
            checks.has_shape(name, tensor, (slots.shape[0], self.num_kv_heads, width), f"(tokens, kv heads, {name} columns)")
            checks.has_vector_strides(name, tensor)
            rows.append(tensor)
        self._write(*rows, slots)

    def _write(self, latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor):
        """`append` of what was checked"""
        if self.scale is not None:
            if checks.tracing():
                torch.ops.flashmla_cute.fp8_append(latent, rope, slots, self.pool, self.scale, self.format.scales)
            elif slots.shape[0] > 0:
                launch = torch_ops.fp8_append_function(latent, self.pool, self.format.scales)
                launch(latent, rope, slots, self.pool, self.scale)
        elif checks.tracing():
            torch.ops.flashmla_cute.append(latent, rope, slots, self.pool, self.format.latent)
        elif slots.shape[0] > 0:
            torch_ops.append_function(self.pool, self.format.latent)(latent, rope, slots, self.pool)

    def convert(
        self,
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale: torch.Tensor | float | None = None,
        *,
        scales: int = 0,
    ) -> "PagedKVCache":
        """A new cache in e4m3 of what this bf16 or fp16 one holds, over the same block table and lengths; on the GPU.

        scales: 4 or 1 of each token, as `append` chooses them; 0: one for the cache.  scale: that one; None: the largest
        magnitude among the requests' tokens / 448, found on the device.  Slots of the pool that belong to no request are
        converted too, whatever they hold."""
        need(self.scale is None, "cache.pool.dtype", self.pool.dtype, " or ".join(map(str, checks.DTYPES)))
        need(dtype in checks.FP8_DTYPES, "dtype", dtype, " or ".join(map(str, checks.FP8_DTYPES)))
        _need_scales(scales, dtype)
        checks.is_hopper("cache.pool", self.pool)
        kv, how = self.format, dict(latent=self.format.latent, scales=scales)
        if scales:
            row = SCALED_FORMATS[scales]
            allowed = f"a cache of {(row.latent, row.rope)} columns"
            need((kv.latent, kv.rope) == (row.latent, row.rope), "scales", scales, f"0, or {allowed}")
            need(scale is None, "scale", scale, "None with scales")
            pool = self.pool.new_empty(*self.pool.shape[:3], row.bytes_per_token, dtype=torch.uint8)
        else:
            how["scale"] = self.largest().clamp(min=2.0**-100) / 448 if scale is None else scale
            pool = torch.empty(self.pool.shape, dtype=dtype, device=self.device)
        converted = PagedKVCache(pool, self.block_table, self.cache_seqlens, **how)
        step, latent = max(1, 2**18 // self.page), self.format.latent
        for first in range(0, self.pool.shape[0], step):  # (pages of a padded pool have no flat token axis: parts are copied)
            rows = self.pool[first : first + step].flatten(0, 1)
            slots = torch.arange(first * self.page, first * self.page + rows.shape[0], device=self.device)
            converted._write(rows[..., :latent], rows[..., latent:], slots)
        return converted

    def largest(self) -> torch.Tensor:
        """the largest magnitude among the requests' tokens, float32 [1] on the device; 0 without tokens; no host sync"""
        num_pages, page = self.pool.shape[:2]
        token = torch.arange(self.capacity, device=self.device)
        used = token < self.cache_seqlens[:, None]  # [batch, capacity]
        pages = self.block_table.repeat_interleave(page, 1).long()
        slots = torch.where(used, pages * page + token % page, num_pages * page).flatten()  # (unused: one slot too many)
        kept = torch.zeros(num_pages * page + 1, dtype=torch.bool, device=self.device).index_fill_(0, slots, True)
        norm = torch.linalg.vector_norm(self.pool, ord=float("inf"), dim=(2, 3), dtype=torch.float32)
        return torch.where(kept[:-1].view(num_pages, page), norm, 0.0).amax().reshape(1)

    def extend(self, counts: Sequence[int]) -> torch.Tensor:
        """Room for counts[i] more tokens of request i: takes pages from the pool, sets block table and lengths on the device,
        and returns the new tokens' slots, request after request, [sum(counts)] int64.

        Only for a cache made by `allocate`.  Raises ValueError when pages or entries run out: nothing has changed then."""
        self._need_allocator("extend")
        need(len(counts) == self.batch, "len(counts)", len(counts), f"{self.batch}, one for each request")
        need(all(isinstance(n, int) and n >= 0 for n in counts), "counts", list(counts), "integers >= 0")
        after = [length + n for length, n in zip(self._lengths, counts)]
        longest = max(after)
        need(
            longest <= self.capacity,
            "counts",
            f"{list(counts)}, which makes a request {longest} long",
            f"up to {self.capacity}",
        )
        wanted = sum(-(-length // self.page) - len(pages) for length, pages in zip(after, self._pages))
        need(
            wanted <= len(self._free),
            "counts",
            f"{list(counts)}, which takes {wanted} pages",
            f"up to {len(self._free)} free pages",
        )
        slots, rows, columns, new_pages = [], [], [], []
        for request, (before, length, pages) in enumerate(zip(self._lengths, after, self._pages)):
            while len(pages) * self.page < length:
                rows.append(request)
                columns.append(len(pages))
                pages.append(self._free.pop())
                new_pages.append(pages[-1])
            slots += [pages[token // self.page] * self.page + token % self.page for token in range(before, length)]
        self._lengths = after
        if new_pages:
            entries = torch.tensor([rows, columns, new_pages]).to(self.device)
            self.block_table[entries[0], entries[1]] = entries[2].int()
        self.cache_seqlens.copy_(torch.tensor(after, dtype=torch.int32))
        return torch.tensor(slots, dtype=torch.int64).to(self.device)

    def release(self, request: int) -> None:
        """Gives request `request`'s pages back and makes its length 0.  Only for a cache made by `allocate`."""
        self._need_allocator("release")
        need(0 <= request < self.batch, "request", request, f"0 .. {self.batch - 1}")
        self._free += self._pages[request][::-1]
        self._pages[request], self._lengths[request] = [], 0
        self.block_table[request] = -1
        self.cache_seqlens[request] = 0

    @property
    def num_free_pages(self) -> int:
        """pages that `extend` can still take.  Only for a cache made by `allocate`."""
        self._need_allocator("num_free_pages")
        return len(self._free)

    def _need_allocator(self, verb: str):
        if self._free is None:
            raise ValueError(f"{verb} needs a cache made by PagedKVCache.allocate; this one's pages belong to the caller")
