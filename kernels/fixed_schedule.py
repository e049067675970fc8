"""Schedule of fixed pieces, for batch invariance: every request has the pieces that its length alone asks for.

What differs from kernels/schedule.py.  A cut lies between two pieces, and these are too long for cuts at equal distances.  So
  1  requests are taken in another order: `long` ones, of several pieces, then those of one piece, then those without tokens
     and a piece costs a tile more than it has: o of the one before is stored or joined meanwhile
  2  warp i tries a limit of its own.  It fills the parts one after the other up to it: first with pieces of long requests, from
     where the part before has stopped, then with whole short ones, as many as still fit.  The cheapest limit wins
  4  an item is a piece, in the slot of its own number; or with config.runs a run of pieces: then a request that is not cut is
     merged by the CTA that has it (parts/pieces.py), over one slot of its part's own, and only the pieces of cut requests, of
     which there are fewer than parts, have slots of theirs
  5  the merge keeps to one order of a request's pieces
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr
from cutlass.memory import SmemAllocator

from .parts.spans import (
    NUM_CANDIDATES,
    last_edge,
    limit_of,
    next_cut,
    num_pieces,
    pack_pieces,
    piece_at,
    piece_edge,
    upper_bound,
)
from .schedule import Args, BuildSchedule

UNFIT = 0x7FFFFFFF  # the cost of a limit with which the work does not fit into the parts


@dataclass(frozen=True)
class Smem:
    prefix: cute.Tensor  # (place + 1,) cost of the requests before a place in the order
    pieces: cute.Tensor  # (place + 1,) their pieces
    order: cute.Tensor  # (place,) the request there
    bounds: cute.Tensor  # (2,) places of long requests, and of long and short ones
    cut_request: cute.Tensor  # (part + 1,) place
    cut_tile: cute.Tensor  # (part + 1,)
    short: cute.Tensor  # (part + 1,) first place of a part's short requests
    inside: cute.Tensor  # (part + 1,) cuts inside a request before it
    slot: cute.Tensor  # (part + 1,) of the piece that begins at the cut
    begin: cute.Tensor  # (part + 1,) first item behind the cut
    cost: cute.Tensor  # (candidate,)
    warp_sum: cute.Tensor  # (warp,)

    def tiles(self, place, item_tiles):
        return cutlass.max(self.prefix[place + 1] - self.prefix[place] - item_tiles - self.num_pieces(place), 0)

    def num_pieces(self, place):
        return self.pieces[place + 1] - self.pieces[place]


class BuildFixedSchedule(BuildSchedule):
    merge_groups = 1

    def _allocate(self):
        places, num_cuts = self.config.max_batch, self.config.num_threads
        sizes = dict(prefix=places + 1, pieces=places + 1, order=places, bounds=2)
        sizes |= dict.fromkeys(("cut_request", "cut_tile", "short", "inside", "slot", "begin"), num_cuts)
        sizes |= dict(cost=NUM_CANDIDATES, warp_sum=32)
        at, views, memory = 0, {}, SmemAllocator().allocate_array(Int32, sum(sizes.values()))
        for name, size in sizes.items():
            views[name], at = cute.make_tensor(memory + at, cute.make_layout(size)), at + size
        return Smem(**views)

    # ------------------------------------------------------------------ steps
    @cute.jit
    def _num_pieces(self, args: Args, tiles: Int32):
        config = self.config
        return num_pieces(tiles, args.row_tiles, config.max_pieces, config.piece_gain, config.piece_tiles)

    @cute.jit
    def _kind(self, args: Args, request: Int32) -> Int32:
        """1 for a long request, 1 << 16 for a short one"""
        kind = Int32(0)
        if request < args.cache_seqlens.shape[0]:
            pieces = self._num_pieces(args, self._num_tiles(args, request))
            if pieces > 1:
                kind = Int32(1)
            elif pieces == 1:
                kind = Int32(1 << 16)
        return kind

    @cute.jit
    def _prefix_sums(self, args: Args, smem: Smem):
        """1"""
        tid, _, _ = cute.arch.thread_idx()
        batch, counts = args.cache_seqlens.shape[0], Int32(0)
        for base in cutlass.range(0, batch, self.config.num_threads, unroll=1):
            _, more = self._scan(smem, self._kind(args, base + tid))
            counts += more
        longs, filled = counts & 0xFFFF, (counts & 0xFFFF) + (counts >> 16)
        if tid == 0:
            smem.prefix[0] = 0
            smem.pieces[0] = 0
            smem.bounds[0] = longs
            smem.bounds[1] = filled
        self._sort(args, smem, longs, filled)
        cost, pieces = Int32(0), Int32(0)
        for base in cutlass.range(0, batch, self.config.num_threads, unroll=1):
            tiles = Int32(0)
            if base + tid < batch:
                tiles = self._num_tiles(args, smem.order[base + tid])
            own, num = Int32(self.config.item_tiles) if tiles > 0 else Int32(0), self._num_pieces(args, tiles)
            weight, cost_sum = self._scan(smem, tiles + num + own)
            count, piece_sum = self._scan(smem, num)
            if base + tid < batch:
                smem.prefix[base + tid + 1] = cost + weight
                smem.pieces[base + tid + 1] = pieces + count
            cost += cost_sum
            pieces += piece_sum
        cute.arch.sync_threads()

    @cute.jit
    def _sort(self, args: Args, smem: Smem, longs: Int32, filled: Int32):
        tid, _, _ = cute.arch.thread_idx()
        batch, before = args.cache_seqlens.shape[0], Int32(0)
        for base in cutlass.range(0, batch, self.config.num_threads, unroll=1):
            kind = self._kind(args, base + tid)
            through, more = self._scan(smem, kind)
            rank = before + through - kind
            place = filled + base + tid - (rank & 0xFFFF) - (rank >> 16)
            if kind == 1:
                place = rank & 0xFFFF
            elif kind > 1:
                place = longs + (rank >> 16)
            if base + tid < batch:
                smem.order[place] = base + tid
            before += more
        cute.arch.sync_threads()

    @cute.jit
    def _choose_parts(self, args: Args, smem: Smem) -> Int32:
        """2"""
        tid, _, _ = cute.arch.thread_idx()
        batch, max_parts, longest = args.cache_seqlens.shape[0], args.parts.shape[0], Int32(0)
        for place in cutlass.range(tid, smem.bounds[1], self.config.num_threads, unroll=1):
            longest = cutlass.max(longest, (smem.tiles(place, self.config.item_tiles) - 1) // smem.num_pieces(place) + 2)
        limits = smem.prefix[batch], max_parts, self._max(smem, longest), self.config.item_tiles
        _, cost = self._fill(args, smem, limit_of(tid // 32, *limits), False)
        limit = limit_of(self._cheapest(smem, cost), *limits)
        smem.cut_request[tid], smem.cut_tile[tid], smem.short[tid] = smem.bounds[0], Int32(0), smem.bounds[1]
        cute.arch.sync_threads()
        if tid < 32:
            parts, _ = self._fill(args, smem, limit, True)
            if tid == 0:
                smem.warp_sum[0] = parts
        cute.arch.sync_threads()
        return smem.warp_sum[0]

    @cute.jit
    def _max(self, smem: Smem, value: Int32) -> Int32:
        """over the CTA's threads"""
        tid, _, _ = cute.arch.thread_idx()
        value = cute.arch.warp_redux_sync(value, "max")
        cute.arch.sync_threads()
        if tid % 32 == 0:
            smem.warp_sum[tid // 32] = value
        cute.arch.sync_threads()
        return cute.arch.warp_redux_sync(smem.warp_sum[tid % 32], "max")

    @cute.jit
    def _fill(self, args: Args, smem: Smem, limit: Int32, keep: Constexpr[bool]):
        """how many parts it takes, and their cost"""
        longs, filled, max_parts, item_tiles = smem.bounds[0], smem.bounds[1], args.parts.shape[0], self.config.item_tiles
        place, tile, short, parts = Int32(0), Int32(0), longs, Int32(0)
        longest, pieces = Int32(0), Int32(0)
        while ((place < longs) | (short < filled)) & (parts < max_parts):
            if const_expr(keep):
                smem.cut_request[parts], smem.short[parts] = place, short
                if tile > 0:  # (a piece's edge, where every piece before it has a tile more)
                    pieces_before = piece_at(self._span(smem, place), smem.num_pieces(place), tile)
                    smem.cut_tile[parts] = tile - pieces_before
            load, first = Int32(0), smem.prefix[short]
            if place < longs:
                place, tile, load, split = next_cut(smem.prefix, smem.pieces, longs, place, tile, limit, item_tiles)
                pieces += split
            fits = first + cutlass.min(limit - load, smem.prefix[filled] - first)
            short, _ = last_edge(smem.prefix, smem.pieces, filled, short, fits, item_tiles)
            parts, longest = parts + 1, cutlass.max(longest, load + smem.prefix[short] - first)
        cost = longest * self.config.tile_cost + pieces * args.row_tiles
        if (place < longs) | (short < filled):
            cost = Int32(UNFIT)
        return cutlass.max(parts, 1), cost

    def _span(self, smem: Smem, place: Int32):
        """of the request at `place`, in the tiles that it costs"""
        return smem.prefix[place + 1] - smem.prefix[place] - self.config.item_tiles

    @cute.jit
    def _cuts(self, args: Args, smem: Smem):
        """3"""
        p, _, _ = cute.arch.thread_idx()
        place, tile = smem.cut_request[p], smem.cut_tile[p]
        inside, first = self._inside(smem, p)
        if first > 0:  # a cut makes all of a request's pieces partial results
            first = smem.num_pieces(place)
        sums, _ = self._scan(smem, inside + first * (1 << 16))
        through, split, piece, shorts = sums & 0xFFFF, sums >> 16, Int32(0), smem.short[p] - smem.bounds[0]
        if tile > 0:
            piece = piece_at(smem.tiles(place, self.config.item_tiles), smem.num_pieces(place), tile)
            smem.slot[p] = args.parts.shape[0] + split - smem.num_pieces(place) + piece
        smem.inside[p] = through - inside
        smem.begin[p] = (place + through if self.config.runs else smem.pieces[place] + piece) + shorts
        cute.arch.sync_threads()

    def _items(self, args: Args, smem: Smem, parts: Int32):
        """4"""
        self._runs(args, smem, parts) if self.config.runs else self._long_pieces(args, smem, parts)
        self._short_items(args, smem, parts)

    @cute.jit
    def _short_items(self, args: Args, smem: Smem, parts: Int32):
        tid, _, _ = cute.arch.thread_idx()
        for place in cutlass.range(smem.bounds[0] + tid, smem.bounds[1], self.config.num_threads, unroll=1):
            p = upper_bound(smem.short, parts, place)  # the part behind its own
            item, tiles = smem.begin[p] - (smem.short[p] - place), smem.tiles(place, self.config.item_tiles)
            self._write(args, item, (smem.order[place], Int32(0), tiles, Int32(-1), Int32(0)))

    @cute.jit
    def _long_pieces(self, args: Args, smem: Smem, parts: Int32):
        tid, _, _ = cute.arch.thread_idx()
        longs = smem.bounds[0]
        for piece in cutlass.range(tid, smem.pieces[longs], self.config.num_threads, unroll=1):
            place = upper_bound(smem.pieces, longs, piece) - 1
            tiles, pieces, i = smem.tiles(place, self.config.item_tiles), smem.num_pieces(place), piece - smem.pieces[place]
            first, end = piece_edge(tiles, pieces, i), piece_edge(tiles, pieces, i + 1)
            shorts = smem.short[self._cut_behind(smem, place, first, parts) - 1] - longs
            self._write(args, piece + shorts, (smem.order[place], first, end, piece, Int32(0)))

    @cute.jit
    def _cut_behind(self, smem: Smem, place: Int32, tile: Int32, parts: Int32) -> Int32:
        """the first cut behind a tile of the request at `place`"""
        p = upper_bound(smem.cut_request, parts, place - 1)
        while (p < parts) & (smem.cut_request[p] == place) & (smem.cut_tile[p] <= tile):
            p += 1
        return p

    @cute.jit
    def _runs(self, args: Args, smem: Smem, parts: Int32):
        tid, _, _ = cute.arch.thread_idx()
        longs = smem.bounds[0]
        for place in cutlass.range(tid, longs, self.config.num_threads, unroll=1):
            p = self._cut_behind(smem, place, Int32(0), parts)
            end, slot = smem.tiles(place, self.config.item_tiles), p - 1  # the part's own
            if smem.cut_request[p] == place:
                end, slot = smem.cut_tile[p], self._first_slot(smem, p)
            self._write_run(args, smem, place + smem.inside[p] + smem.short[p - 1] - longs, place, Int32(0), end, slot)
        if (tid > 0) & (tid < parts):
            place, tile = smem.cut_request[tid], smem.cut_tile[tid]
            if tile > 0:
                end = smem.tiles(place, self.config.item_tiles)
                if smem.cut_request[tid + 1] == place:
                    end = smem.cut_tile[tid + 1]
                self._write_run(args, smem, smem.begin[tid], place, tile, end, smem.slot[tid])

    def _first_slot(self, smem: Smem, p: Int32):
        """of a request, from its first cut p"""
        place = smem.cut_request[p]
        return smem.slot[p] - piece_at(smem.tiles(place, self.config.item_tiles), smem.num_pieces(place), smem.cut_tile[p])

    @cute.jit
    def _write_run(self, args: Args, smem: Smem, item: Int32, place: Int32, first: Int32, end: Int32, slot: Int32):
        """the item of a run of pieces, with their lengths if they are several"""
        packed, tiles, pieces = Int32(0), smem.tiles(place, self.config.item_tiles), smem.num_pieces(place)
        begin = piece_at(tiles, pieces, first)
        if piece_at(tiles, pieces, end) - begin > 1:
            packed = pack_pieces(tiles, pieces, begin)
            if end - first == tiles:
                packed = -packed
        self._write(args, item, (smem.order[place], first, end, slot, packed))

    @cute.jit
    def _pieces(self, args: Args, smem: Smem, place: Int32, parts: Int32):
        """request, how many for the merge, 0 without tokens, and the slot of the first if they are several"""
        first_slot, pieces = Int32(0), smem.num_pieces(place)
        if pieces > 1:
            first_slot = smem.pieces[place]
            if const_expr(self.config.runs > 0):
                p = self._cut_behind(smem, place, Int32(0), parts)
                if smem.cut_request[p] == place:
                    first_slot = self._first_slot(smem, p)
                else:
                    pieces, first_slot = Int32(1), Int32(0)
        return smem.order[place], pieces, first_slot
