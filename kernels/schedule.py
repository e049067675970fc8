"""Schedule: request lengths -> one contiguous span of work per CTA, on the device.  One CTA, once a step, for all layers.

No host sync, a fixed grid, every buffer of a fixed size: a CUDA graph replays it with other lengths.  The steps, each over
threads, a barrier between them (parts/spans.py has the maths of a cut):
  1  prefix sums over the requests: cost C, and items as far as they are known before the cuts
  2  warp i tries one number of parts: cost = longest part * tile_cost + split pieces * row tiles; the cheapest wins, and
     thread p finds its cut p
  3  prefix sums over the cuts inside a request number pieces and slots
  4  thread r writes request r's first item, thread p the item that begins at cut p, then part p's record
  5  requests to merge (split, or without tokens: their out and lse are written there) are listed for kernels/combine.py

A split piece has a slot for its partial result, those of a request one after the other: one slot for each cut inside a
request, and one for each request that has such cuts.

Batch-invariant schedules are made by a subclass, kernels/fixed_schedule.py.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.memory import SmemAllocator

from .config import TILE, ScheduleConfig
from .parts.spans import NUM_CANDIDATES, candidate, cut, load_of, upper_bound
from .parts.work import BEGIN, COUNT, MERGE, MERGE_GROUPS, PART, RECORD


@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    cache_seqlens: cute.Tensor  # (request,)
    items: cute.Tensor  # out, (request + part, RECORD)
    parts: cute.Tensor  # out, (part, PART): the part's first item, where its items begin, and how many they are
    merges: cute.Tensor  # out, (1 + request, MERGE); merges[0] is their number, and how many may share a row
    row_tiles: Int32
    max_tokens: Int32  # longer lengths are cut to what the block table can name
    reach: Int32  # tokens at a request's end that any of its query tokens sees: few with a sliding window
    cu_seqlens_q: cute.Tensor | None  # (request + 1,) ragged: where each request's query tokens begin


@dataclass(frozen=True)
class Smem:
    prefix: cute.Tensor  # (request + 1,) cost before the request
    items: cute.Tensor  # (request + 1,) items before it, not counting those that begin at a cut
    cut_request: cute.Tensor  # (part + 1,)
    cut_tile: cute.Tensor  # (part + 1,)
    inside: cute.Tensor  # (part + 1,) cuts inside a request before it
    slot: cute.Tensor  # (part + 1,) of the piece that begins at the cut
    begin: cute.Tensor  # (part + 1,) first item behind the cut
    cost: cute.Tensor  # (candidate,)
    warp_sum: cute.Tensor  # (warp,)


class BuildSchedule:
    merge_groups = MERGE_GROUPS

    def __init__(self, config: ScheduleConfig):
        self.config = config

    @cute.jit
    def __call__(
        self,
        cache_seqlens: cute.Tensor,
        items: cute.Tensor,
        parts: cute.Tensor,
        merges: cute.Tensor,
        row_tiles: Int32,
        max_tokens: Int32,
        reach: Int32,
        stream,
        cu_seqlens_q: cute.Tensor | None = None,
    ):
        args = Args(cache_seqlens, items, parts, merges, row_tiles, max_tokens, reach, cu_seqlens_q)
        self.kernel(args).launch(
            grid=[1, 1, 1],
            block=[self.config.num_threads, 1, 1],
            stream=stream,
            use_pdl=True,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, args: Args):
        smem = self._allocate()
        cute.arch.griddepcontrol_wait()
        self._prefix_sums(args, smem)
        parts = self._choose_parts(args, smem)
        self._cuts(args, smem)
        # the decode kernel waits for this grid's end, not for this trigger: it only lets its prologue start
        cute.arch.griddepcontrol_launch_dependents()
        self._items(args, smem, parts)
        self._parts(args, smem)
        self._merges(args, smem, parts)

    def _allocate(self):
        config, num_cuts = self.config, self.config.num_threads

        @cute.struct
        class Storage:
            prefix: cute.struct.MemRange[Int32, config.max_batch + 1]
            items: cute.struct.MemRange[Int32, config.max_batch + 1]
            cut_request: cute.struct.MemRange[Int32, num_cuts]
            cut_tile: cute.struct.MemRange[Int32, num_cuts]
            inside: cute.struct.MemRange[Int32, num_cuts]
            slot: cute.struct.MemRange[Int32, num_cuts]
            begin: cute.struct.MemRange[Int32, num_cuts]
            cost: cute.struct.MemRange[Int32, NUM_CANDIDATES]
            warp_sum: cute.struct.MemRange[Int32, 32]

        storage = SmemAllocator().allocate(Storage)
        view = lambda field, n: field.get_tensor(cute.make_layout(n))
        return Smem(
            view(storage.prefix, config.max_batch + 1),
            view(storage.items, config.max_batch + 1),
            view(storage.cut_request, num_cuts),
            view(storage.cut_tile, num_cuts),
            view(storage.inside, num_cuts),
            view(storage.slot, num_cuts),
            view(storage.begin, num_cuts),
            view(storage.cost, NUM_CANDIDATES),
            view(storage.warp_sum, 32),
        )

    # ------------------------------------------------------------------ steps
    @cute.jit
    def _scan(self, smem: Smem, value: Int32):
        """inclusive prefix sum over the CTA's threads, and the total"""
        tid, _, _ = cute.arch.thread_idx()
        lane, warp = tid % 32, tid // 32
        cute.arch.sync_threads()  # warp_sum of the scan before has been read
        for step in cutlass.range_constexpr(5):
            other = cute.arch.shuffle_sync_up(value, 1 << step)
            value += other if lane >= 1 << step else 0
        if lane == 31:
            smem.warp_sum[warp] = value
        cute.arch.sync_threads()
        sums = smem.warp_sum[lane]
        before = cute.arch.warp_redux_sync(sums if lane < warp else Int32(0), "add")
        return value + before, cute.arch.warp_redux_sync(sums, "add")

    @cute.jit
    def _num_tiles(self, args: Args, request: Int32):
        length = Int32(0)
        if request < args.cache_seqlens.shape[0]:
            length = self._length(args, request)
            if const_expr(args.cu_seqlens_q is not None):
                if self._queries(args, request)[1] <= 0:
                    length = Int32(0)
        return (length + TILE - 1) // TILE - self._first_tile(args, length)

    def _length(self, args: Args, request: Int32):
        return cutlass.min(cutlass.max(args.cache_seqlens[request], 0), args.max_tokens)

    def _first_tile(self, args: Args, length: Int32):
        """of those that are seen; the tiles of a request count from here in all but the items"""
        return cutlass.max(length - args.reach, 0) // TILE

    def _queries(self, args: Args, request: Int32):
        """ragged: first query token, number"""
        begin = args.cu_seqlens_q[request]
        return begin, args.cu_seqlens_q[request + 1] - begin

    @cute.jit
    def _prefix_sums(self, args: Args, smem: Smem):
        """1"""
        tid, _, _ = cute.arch.thread_idx()
        batch = args.cache_seqlens.shape[0]
        cost, items = Int32(0), Int32(0)
        if tid == 0:
            smem.prefix[0] = 0
            smem.items[0] = 0
        for base in cutlass.range(0, batch, self.config.num_threads, unroll=1):
            tiles = self._num_tiles(args, base + tid)
            own = Int32(self.config.item_tiles) if tiles > 0 else Int32(0)
            weight, cost_sum = self._scan(smem, tiles + own)
            count, item_sum = self._scan(smem, Int32(1) if tiles > 0 else Int32(0))
            if base + tid < batch:
                smem.prefix[base + tid + 1] = cost + weight
                smem.items[base + tid + 1] = items + count
            cost += cost_sum
            items += item_sum
        cute.arch.sync_threads()

    @cute.jit
    def _choose_parts(self, args: Args, smem: Smem) -> Int32:
        """2"""
        tid, _, _ = cute.arch.thread_idx()
        lane, warp = tid % 32, tid // 32
        batch, max_parts = args.cache_seqlens.shape[0], args.parts.shape[0]
        most = smem.prefix[batch] - self.config.item_tiles
        parts = candidate(warp, max_parts, most)
        longest, pieces = Int32(0), Int32(0)
        for p in cutlass.range(lane, parts, 32, unroll=1):
            load, split = self._part_cost(smem, batch, p, parts)
            longest = cutlass.max(longest, load)
            pieces += split
        longest = cute.arch.warp_redux_sync(longest, "max")
        pieces = cute.arch.warp_redux_sync(pieces, "add")
        best = self._cheapest(smem, longest * self.config.tile_cost + pieces * args.row_tiles)
        parts = candidate(best, max_parts, most)
        smem.cut_request[tid], smem.cut_tile[tid] = cut(smem.prefix, batch, tid, parts, self.config.item_tiles)
        return parts

    @cute.jit
    def _cheapest(self, smem: Smem, cost: Int32) -> Int32:
        """the first of the candidates, a warp each, with the least cost"""
        tid, _, _ = cute.arch.thread_idx()
        lane = tid % 32
        if lane == 0:
            smem.cost[tid // 32] = cost
        cute.arch.sync_threads()
        cost = smem.cost[lane]
        least = cute.arch.warp_redux_sync(cost, "min")
        return cute.arch.warp_redux_sync(lane if cost == least else Int32(NUM_CANDIDATES), "min")

    @cute.jit
    def _part_cost(self, smem: Smem, batch: Int32, p: Int32, parts: Int32):
        """tiles of part p, and what it adds to the number of split pieces"""
        pieces = Int32(0)
        request, tile = cut(smem.prefix, batch, p, parts, self.config.item_tiles)
        next_request, next_tile = cut(smem.prefix, batch, p + 1, parts, self.config.item_tiles)
        load = load_of(smem.prefix, request, tile, next_request, next_tile, self.config.item_tiles)
        if tile > 0:
            pieces += 1  # begins at a cut
        if (next_tile > 0) & ((next_request != request) | (tile == 0)):
            pieces += 1  # a request's first piece ends at the next cut
        return load, pieces

    @cute.jit
    def _cuts(self, args: Args, smem: Smem):
        """3"""
        p, _, _ = cute.arch.thread_idx()
        cute.arch.sync_threads()
        inside, first = self._inside(smem, p)
        sums, _ = self._scan(smem, inside + first * (1 << 16))
        through, split = sums & 0xFFFF, sums >> 16
        smem.inside[p] = through - inside
        smem.slot[p] = through - inside + split
        smem.begin[p] = smem.items[smem.cut_request[p]] + through
        cute.arch.sync_threads()

    @cute.jit
    def _inside(self, smem: Smem, p: Int32):
        """whether cut p is inside a request (0 | 1), and the first one there"""
        inside, first = Int32(0), Int32(0)
        if smem.cut_tile[p] > 0:
            inside, first = Int32(1), Int32(1)
            if (smem.cut_request[p - 1] == smem.cut_request[p]) & (smem.cut_tile[p - 1] > 0):
                first = Int32(0)
        return inside, first

    @cute.jit
    def _items(self, args: Args, smem: Smem, parts: Int32):
        """4"""
        tid, _, _ = cute.arch.thread_idx()
        batch = args.cache_seqlens.shape[0]
        for request in cutlass.range(tid, batch, self.config.num_threads, unroll=1):
            tiles = self._num_tiles(args, request)
            if tiles > 0:
                p = self._first_cut_after(smem, request, parts)
                is_split = smem.cut_request[p] == request
                end, slot = smem.cut_tile[p] if is_split else tiles, smem.slot[p] - 1 if is_split else Int32(-1)
                self._write(args, smem.items[request] + smem.inside[p], (request, Int32(0), end, slot, Int32(0)))
        if (tid > 0) & (tid < parts):
            request, tile = smem.cut_request[tid], smem.cut_tile[tid]
            if tile > 0:
                ends_inside = smem.cut_request[tid + 1] == request
                end = smem.cut_tile[tid + 1] if ends_inside else self._num_tiles(args, request)
                record = request, tile, end, smem.slot[tid], Int32(0)
                self._write(args, smem.items[request] + smem.inside[tid] + 1, record)

    @cute.jit
    def _parts(self, args: Args, smem: Smem):
        """4, once the items are there"""
        p, _, _ = cute.arch.thread_idx()
        cute.arch.sync_threads()
        if p < args.parts.shape[0]:
            begin, count = smem.begin[p], smem.begin[p + 1] - smem.begin[p]
            if count > 0:
                for i in cutlass.range_constexpr(RECORD):
                    args.parts[p, i] = args.items[begin, i]
            args.parts[p, BEGIN] = begin
            args.parts[p, COUNT] = count

    @cute.jit
    def _first_cut_after(self, smem: Smem, request: Int32, parts: Int32) -> Int32:
        """the first cut behind the beginning of `request`"""
        p = upper_bound(smem.cut_request, parts, request - 1)
        while (smem.cut_request[p] == request) & (smem.cut_tile[p] == 0):  # several cuts may have moved to one edge
            p += 1
        return p

    @cute.jit
    def _write(self, args: Args, item: Int32, record):
        request, first, end, slot, pieces = record
        length = self._length(args, request)
        unseen = self._first_tile(args, length)
        queries = self._queries(args, request) if args.cu_seqlens_q is not None else (Int32(0), Int32(0))
        for i, value in enumerate((request, first + unseen, end + unseen, slot, length, *queries, pieces)):
            args.items[item, i] = value

    @cute.jit
    def _merges(self, args: Args, smem: Smem, parts: Int32):
        """5"""
        tid, _, _ = cute.arch.thread_idx()
        batch, listed = args.cache_seqlens.shape[0], Int32(0)
        for base in cutlass.range(0, batch, self.config.num_threads, unroll=1):
            request, pieces, first_slot = base + tid, Int32(1), Int32(0)
            if base + tid < batch:
                request, pieces, first_slot = self._pieces(args, smem, base + tid, parts)
            wanted = Int32(1) if pieces != 1 else Int32(0)
            index, num = self._scan(smem, wanted)
            if wanted > 0:
                begin, num_queries = request, Int32(0)
                if const_expr(args.cu_seqlens_q is not None):
                    begin, num_queries = self._queries(args, request)
                for i, value in enumerate((begin, first_slot, pieces, num_queries)):
                    args.merges[listed + index, i] = value
            listed += num
        if tid == 0:
            args.merges[0, 0] = listed
            args.merges[0, 1] = self.merge_groups

    @cute.jit
    def _pieces(self, args: Args, smem: Smem, request: Int32, parts: Int32):
        """request, how many for the merge, 0 without tokens, and the slot of the first if they are several"""
        first_slot, pieces = Int32(0), smem.items[request + 1] - smem.items[request]
        if pieces > 0:
            p = self._first_cut_after(smem, request, parts)
            if smem.cut_request[p] == request:
                first_slot, pieces = smem.slot[p] - 1, upper_bound(smem.cut_request, parts, request) - p + 1
        return request, pieces, first_slot


def fake_args(config: ScheduleConfig):
    """symbolic arguments of `BuildSchedule.__call__` before row_tiles, max_tokens, reach and the stream"""
    from cutlass.cute.runtime import make_fake_tensor

    b = cute.sym_int()
    tensor = lambda shape, stride, align: make_fake_tensor(Int32, shape, stride=stride, assumed_align=align)
    return (
        tensor((b,), (1,), 4),
        tensor((cute.sym_int(), RECORD), (RECORD, 1), 32),
        tensor((cute.sym_int(), PART), (PART, 1), 32),
        tensor((cute.sym_int(), MERGE), (MERGE, 1), 16),
    )


def fake_cu_seqlens_q():
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(Int32, (cute.sym_int(),), stride=(1,), assumed_align=4)
