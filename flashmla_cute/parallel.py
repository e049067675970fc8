"""Decode on several GPUs, over torch.distributed and NCCL: heads, cached tokens or requests divided among the ranks of a group.

TensorParallel    every rank holds the whole cache and some of the heads; nothing is exchanged within attention
ContextParallel   every rank holds some tokens of every request; partial results are exchanged and merged by their lse
DataParallel      every rank holds some of the requests; outputs are exchanged where the next layer needs them

Which tokens may a row see?  Query token i of num_queries sees the first n = length - num_queries + 1 + i tokens of its request,
and on rank r those of them that lie there: sharding.count(n, r), since a rank keeps its tokens in order.  That number does not
grow by one with i as under the kernel's causal mask: with tokens 0, 2, 4 on one rank and 1, 3, 5 on another, every second query
token sees nothing new.  So each query token decodes as a request of its own, with its own length and its request's pages; the
price is that a page is read once for each query token.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from . import checks, compile, ops
from .checks import need
from .decode import mla_decode
from .kernels.config import MLAConfig
from .kernels.parts.work import MERGE_GROUPS
from .kv_cache import PagedKVCache
from .plan import DecodePlan


# ---------------------------------------------------------------------- which tokens, heads, requests a rank has
@dataclass(frozen=True)
class Interleaved:
    """tokens are dealt to `size` ranks in stripes of `stripe`: token t lies on rank t // stripe % size"""

    size: int
    stripe: int = 64

    def __post_init__(self):
        need(self.size > 0, "size", self.size, "a positive integer")
        need(self.stripe > 0, "stripe", self.stripe, "a positive integer")

    def count(self, tokens: torch.Tensor, rank: int) -> torch.Tensor:
        """how many of the first `tokens` tokens of a request lie on `rank`; tokens [batch, ..]"""
        rest = tokens % (self.size * self.stripe) - rank * self.stripe
        return tokens // (self.size * self.stripe) * self.stripe + rest.clamp(0, self.stripe)


@dataclass(frozen=True, eq=False)
class Contiguous:
    """rank r holds the tokens begins[:, r] .. begins[:, r + 1] - 1 of each request, the last rank all from its begin on.

    begins  [batch, size] integers, not descending along a row, column 0 zero; equal neighbours: the rank has no token.  It is
            read on the device whenever it is used."""

    begins: torch.Tensor

    @property
    def size(self) -> int:
        return self.begins.shape[1]

    def count(self, tokens: torch.Tensor, rank: int) -> torch.Tensor:
        """as Interleaved.count"""
        column = lambda r: self.begins[:, r].view(-1, *[1] * (tokens.dim() - 1))
        last = tokens if rank == self.size - 1 else torch.minimum(tokens, column(rank + 1))
        return (last - column(rank)).clamp(min=0)


def share_of(count: int, size: int, rank: int) -> range:
    """of `count` heads in a row those of `rank`; the first ranks have one more where they do not divide"""
    first = lambda r: r * (count // size) + min(r, count % size)
    return range(first(rank), first(rank + 1))


def assign(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Requests of each rank, the same on every rank: the longest first, each to the rank that has the fewest tokens so far,
    among equals the fewest requests."""
    loads, requests = [(0, 0, rank) for rank in range(size)], [[] for _ in range(size)]
    for request in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, count, rank = min(loads)
        loads[rank] = tokens + lengths[request], count + 1, rank
        requests[rank].append(request)
    return [sorted(mine) for mine in requests]


# ---------------------------------------------------------------------- the group
class Ranks:
    """The ranks of a process group (default: all), each with a GPU of its own.

    Making one is collective: every rank of the group must.  Raises RuntimeError where torch.distributed, the process group or
    NCCL is missing, or the ranks cannot reach each other; ValueError if this process is not in the group."""

    def __init__(self, group: "dist.ProcessGroup | None", device: torch.device):
        if not dist.is_available():
            raise RuntimeError("this build of torch has no torch.distributed, which decode on several GPUs needs")
        if not dist.is_initialized():
            raise RuntimeError("no process group: call torch.distributed.init_process_group('nccl') in every process first")
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        need(self.rank >= 0, "group", "one without this process", "a group that this process is in")
        if device.type == "cuda":
            self._check_nccl(device)

    def _check_nccl(self, device: torch.device):
        if not dist.is_nccl_available():
            raise RuntimeError("this build of torch has no NCCL, which decode on several GPUs needs")
        backend, gpus = dist.get_backend(self.group), torch.cuda.device_count()
        if "nccl" not in backend:
            raise RuntimeError(f"the process group's backend is {backend}; allowed: nccl, for tensors on {device}")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # (torchrun sets it)
        if local > gpus:
            raise RuntimeError(f"{local} ranks on this host need a GPU each, it has {gpus}")
        here = torch.ones((), device=device)
        try:
            dist.all_reduce(here, group=self.group)
            connected = int(here)
        except RuntimeError as error:  # two ranks on one GPU among others
            raise RuntimeError(
                f"NCCL does not connect {self.size} ranks, each on a GPU of its own ({gpus} here): {error}"
            ) from error
        if connected != self.size:
            raise RuntimeError(f"{connected} of {self.size} ranks answered")

    def exchange(self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor]) -> None:
        """send[i] goes to rank i % size, receive[i] comes from there; contiguous, on torch's current stream.  What has no
        elements, which both ends know, is not sent."""
        operations = []
        for i, (outgoing, incoming) in enumerate(zip(send, receive)):
            peer = i % self.size
            if peer == self.rank:
                if incoming.data_ptr() != outgoing.data_ptr():
                    incoming.copy_(outgoing)
                continue
            address = peer if self.group is None else dist.get_global_rank(self.group, peer)
            for operation, tensor in ((dist.isend, outgoing), (dist.irecv, incoming)):
                if tensor.numel() > 0:
                    operations.append(dist.P2POp(operation, tensor, address, self.group))
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()

    def all_gather(self, tensor: torch.Tensor, extents: Sequence[int], axis: int) -> list[torch.Tensor]:
        """`tensor` of every rank; that of rank r has extents[r] along `axis`, 0 allowed"""
        tensor = tensor.contiguous()
        shape = lambda extent: (*tensor.shape[:axis], extent, *tensor.shape[axis + 1 :])
        received = [tensor if r == self.rank else tensor.new_empty(shape(extent)) for r, extent in enumerate(extents)]
        self.exchange([tensor] * self.size, received)
        return received


# ---------------------------------------------------------------------- heads
class TensorParallel:
    """Query heads divided among the ranks; `heads` are this rank's, which decodes them with a plan for that many:
    mla_decode(q[:, :, heads], cache, plan).

    W_uv and the output projection of the same heads follow, and the sum over ranks is theirs; `gather` is for who wants all
    heads before that."""

    def __init__(self, num_heads: int, device: torch.device, group: "dist.ProcessGroup | None" = None):
        self.ranks, self.num_heads = Ranks(group, device), num_heads
        need(num_heads >= self.ranks.size, "num_heads", num_heads, f"at least {self.ranks.size}, one for each rank")
        mine = share_of(num_heads, self.ranks.size, self.ranks.rank)
        self.heads = slice(mine.start, mine.stop)

    def gather(self, out: torch.Tensor) -> torch.Tensor:
        """out [batch, num_queries, heads of this rank, columns] -> [batch, num_queries, num_heads, columns], on every rank"""
        extents = [len(share_of(self.num_heads, self.ranks.size, r)) for r in range(self.ranks.size)]
        need(out.shape[2] == extents[self.ranks.rank], "out.shape[2]", out.shape[2], f"{extents[self.ranks.rank]} heads")
        return torch.cat(self.ranks.all_gather(out, extents, 2), 2)


# ---------------------------------------------------------------------- requests
class DataParallel:
    """Requests divided among the ranks by their lengths, which every rank must give alike; `requests` are this rank's."""

    def __init__(self, lengths: Sequence[int], device: torch.device, group: "dist.ProcessGroup | None" = None):
        self.ranks = Ranks(group, device)
        self.assigned = assign(lengths, self.ranks.size)
        self.requests = self.assigned[self.ranks.rank]
        order = [request for mine in self.assigned for request in mine]
        self._place = torch.tensor(order, dtype=torch.int64).argsort().to(device)

    def gather(self, out: torch.Tensor) -> torch.Tensor:
        """out [this rank's requests, ..] -> [all requests, ..] in their order, on every rank"""
        extents = [len(mine) for mine in self.assigned]
        need(out.shape[0] == len(self.requests), "out.shape[0]", out.shape[0], f"{len(self.requests)} requests")
        return torch.cat(self.ranks.all_gather(out, extents, 0))[self._place]


# ---------------------------------------------------------------------- tokens
class ContextParallel:
    """Decode of requests whose cached tokens lie on several GPUs, divided by `sharding`.

    cache          a PagedKVCache whose pool and block table hold this rank's tokens of each request, in order, from its first
                   page on, and whose cache_seqlens holds the length of each request over all ranks
    sharding       Interleaved or Contiguous, the same on every rank
    num_heads      query heads, all of them on every rank (behind tensor-parallel projections: TensorParallel.gather)
    num_queries    query tokens of a request, the last ones of its length
    causal         query token i sees the tokens < length - num_queries + 1 + i; False: all see all
    scatter_heads  a rank gets the result of its share of the heads only (share_of), for a tensor-parallel output projection

    Call `update` whenever lengths or block table have changed.  Partial results travel in the cache's element type (of an e4m3
    cache, whose q is bf16 or e4m3: bf16), their lse in float32; the merge is that of the decode kernel (kernels/combine.py), in
    float32.  Nothing is read on the host."""

    def __init__(
        self,
        cache: PagedKVCache,
        sharding: Interleaved | Contiguous,
        num_heads: int,
        num_queries: int = 1,
        *,
        causal: bool = True,
        scatter_heads: bool = False,
        group: "dist.ProcessGroup | None" = None,
    ):
        need(isinstance(num_queries, int) and num_queries > 0, "num_queries", num_queries, "a positive integer")
        self.ranks, self.sharding, self.causal = Ranks(group, cache.device), sharding, causal
        size, rank = self.ranks.size, self.ranks.rank
        need(sharding.size == size, "sharding.size", sharding.size, f"{size}, the ranks of the group")
        need(not scatter_heads or num_heads >= size, "num_heads", num_heads, f"at least {size}, one for each rank")
        self.num_heads, self.num_queries = num_heads, num_queries
        self.block_table, self.seqlens = cache.block_table, cache.cache_seqlens
        self.format, self.page = cache.format, cache.page
        rows = cache.batch * num_queries
        self._table = self.block_table.repeat_interleave(num_queries, 0)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=cache.device)
        scales = () if cache.format.scales else (cache.scale, cache.q_scale)
        self.plan = DecodePlan(self.cache(cache.pool, *scales), num_heads)
        self.shares = [share_of(num_heads, size, r) if scatter_heads else range(num_heads) for r in range(size)]
        mine, dtype = len(self.shares[rank]), torch.bfloat16 if cache.dtype in checks.FP8_DTYPES else cache.dtype
        empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device=cache.device)
        # Heads come first everywhere, so that a rank's share is contiguous and is sent from where the decode kernel wrote it.
        self._pieces = empty(size, mine, rows, self.format.latent)
        self._piece_lses = empty(size, mine, rows, dtype=torch.float32)
        self._partial = empty(num_heads, rows, self.format.latent) if scatter_heads else self._pieces[rank]
        self._partial_lse = empty(num_heads, rows, dtype=torch.float32) if scatter_heads else self._piece_lses[rank]
        merges = [[1, MERGE_GROUPS, 0, 0], [0, 0, size, 0]]  # one request, of `size` pieces from slot 0 on
        self._merges = torch.tensor(merges, dtype=torch.int32, device=cache.device)
        kv = replace(checks.DTYPES[dtype], latent=self.format.latent, rope=self.format.rope)
        self._merge = compile.get(ops.MergeOp, MLAConfig(kv=kv, causal=False, split=kv.dtype))
        self.update()

    def cache(self, pool: torch.Tensor, scale=None, q_scale=None) -> PagedKVCache:
        """what `decode` takes for the layer whose tokens are in `pool`; make it once.  scale, q_scale: of an e4m3 pool."""
        latent = self.format.latent
        return PagedKVCache.from_tensors(pool, self._table, self._lengths, latent=latent, scale=scale, q_scale=q_scale)

    def update(self) -> None:
        """plans for the lengths and the block table as they are now, on torch's current stream"""
        tokens = self.seqlens[:, None] + torch.arange(1 - self.num_queries, 1, device=self.seqlens.device)
        if not self.causal:
            tokens = self.seqlens[:, None].expand_as(tokens)
        self._lengths.copy_(self.sharding.count(tokens.clamp(min=0), self.ranks.rank).flatten())
        self._table.copy_(self.block_table.repeat_interleave(self.num_queries, 0))
        self.plan.update()

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Where PagedKVCache.append puts new tokens: positions [batch, n] int64, of each request's tokens, negative for none ->
        [batch * n] int64, -1 for tokens of other ranks."""
        before = self.sharding.count(positions, self.ranks.rank)
        mine = (self.sharding.count(positions + 1, self.ranks.rank) > before) & (positions >= 0)
        place = torch.where(mine, before, 0)
        pages = self.block_table.gather(1, place // self.page).long()
        return torch.where(mine, pages * self.page + place % self.page, -1).flatten()

    def decode(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        cache: PagedKVCache,
        *,
        softmax_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [batch, num_queries, num_heads, latent + rope], or its two parts, the same on every rank; cache: made by `cache`.

        Returns, over the tokens of all ranks, out [batch, num_queries, heads, latent] of q's dtype and lse [batch, heads,
        num_queries] float32, where heads are num_heads or this rank's share; in memory the heads are outermost.  Raises as
        mla_decode does.  Every rank of the group must call it."""
        shape = (self.block_table.shape[0], self.num_queries, self.num_heads, None)
        for part in q if isinstance(q, tuple) else (q,):
            checks.is_tensor("q", part)
            checks.has_shape("q", part, shape, "(batch, num_queries, num_heads, columns)")
        fold = lambda part: part.flatten(0, 1).unsqueeze(1)
        rows = tuple(map(fold, q)) if isinstance(q, tuple) else fold(q)
        out, lse = self._partial.transpose(0, 1).unsqueeze(1), self._partial_lse.T.unsqueeze(-1)
        mla_decode(rows, cache, self.plan, softmax_scale=softmax_scale, causal=False, out=out, lse=lse)
        heads = [slice(share.start, share.stop) for share in self.shares]
        sent = [x[share] for x in (self._partial, self._partial_lse) for share in heads]
        self.ranks.exchange(sent, [*self._pieces, *self._piece_lses])
        return self._merged()

    def _merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """the pieces of all ranks -> out, lse.  The merge sees one request, and in each (head, row) a query token of it."""
        size, mine, rows, latent = self._pieces.shape
        shape = (mine, rows // self.num_queries, self.num_queries)
        out, lse = self._pieces.new_empty(*shape, latent), self._piece_lses.new_empty(shape)
        self._merge(
            self._pieces.view(size, mine * rows, 1, latent),
            self._piece_lses.view(size, mine * rows, 1),
            self._merges,
            out.view(1, mine * rows, 1, latent),
            lse.view(1, 1, mine * rows),
            self.plan.num_sms,
        )
        return out.permute(1, 2, 0, 3), lse.transpose(0, 1)
