"""The schedule in plain Python: the twin of kernels/schedule.py, and its specification.

The tests hold the device to it record by record; `flashmla-cute demo` runs it where there is no GPU.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import isqrt

from .kernels.config import MANY_TILES, MAX_ROW_TILES, TILE, ScheduleConfig
from .kernels.parts.work import PIECE_SHIFT

NUM_CANDIDATES, MAX_TILES = 32, 1 << 29


NO_LIMIT = 1 << 30  # tokens


@dataclass(frozen=True)
class Item:
    """A span of KV tiles of one request.  `slot`: where its partial result goes, that of its first piece if it has several, or
    the sum so far if it joins them; -1: it is the whole request in one piece."""

    batch: int
    first: int
    end: int
    slot: int
    seqlen: int
    token: int = 0  # ragged: the request's first query token
    num_queries: int = 0
    pieces: int = 0  # packed lengths of its pieces, see pack_pieces; 0: one piece

    @property
    def gathers(self) -> bool:
        """it is the whole request, whose pieces are joined where it is computed"""
        return self.pieces < 0

    @property
    def edges(self) -> list[int]:
        """first, where its pieces meet, end"""
        length, long = abs(self.pieces) >> PIECE_SHIFT, abs(self.pieces) & (1 << PIECE_SHIFT) - 1
        edges = [self.first]
        while edges[-1] < self.end:
            edges.append(edges[-1] + length + (len(edges) <= long) if self.pieces else self.end)
        return edges


@dataclass(frozen=True)
class Merge:
    """Pieces of a request to merge; piece i lies in slot first_slot + i.  No pieces: a request without tokens."""

    batch: int  # ragged: its first query token
    first_slot: int
    pieces: int
    num_queries: int = 0  # ragged

    def slots(self) -> list[int]:
        return list(range(self.first_slot, self.first_slot + self.pieces))


@dataclass(frozen=True)
class Schedule:
    items: tuple[Item, ...]  # part p works on items[part_begin[p] : part_begin[p + 1]]
    part_begin: tuple[int, ...]
    merges: tuple[Merge, ...]
    num_parts: int  # of max_parts that may have work

    def part(self, p: int) -> tuple[Item, ...]:
        return self.items[self.part_begin[p] : self.part_begin[p + 1]]


def num_slots(batch: int, row_tiles: int, max_parts: int, max_tiles: int, config: ScheduleConfig = ScheduleConfig()) -> int:
    """partial results that `batch` requests of up to `max_tiles` tiles can need"""
    if config.runs:  # one for each part, and those of cut requests
        return max_parts + min(batch, max_parts - 1) * num_pieces(max_tiles, row_tiles, config)
    if config.max_pieces:
        return max(1, batch * num_pieces(max_tiles, row_tiles, config))
    return max(1, 2 * max_parts - 2)


def num_items(batch: int, row_tiles: int, max_parts: int, max_tiles: int, config: ScheduleConfig = ScheduleConfig()) -> int:
    """records that they can need: one for each request and for every cut, or one for each piece"""
    if config.max_pieces and not config.runs:
        return batch * num_pieces(max_tiles, row_tiles, config)
    return batch + max_parts


def num_pieces(tiles: int, row_tiles: int, config: ScheduleConfig) -> int:
    """pieces that a request has before the cuts"""
    if not config.max_pieces:
        return int(tiles > 0)
    pieces = isqrt(config.piece_gain * min(tiles, MANY_TILES) // (32 * min(row_tiles, MAX_ROW_TILES)))
    pieces = max(pieces, tiles // config.piece_tiles)
    return max(min(pieces, tiles // 2, config.max_pieces), int(tiles > 0))


def piece_edge(tiles: int, pieces: int, i: int) -> int:
    """first tile of piece i; the longer ones, by a tile, come first"""
    return tiles // pieces * i + min(tiles % pieces, i)


def pack_pieces(tiles: int, pieces: int, first: int, gathers: bool) -> int:
    """how long the pieces from `first` on are: so many of a tile more, then of tiles // pieces"""
    packed = (tiles // pieces << PIECE_SHIFT) + max(tiles % pieces - first, 0)
    return -packed if gathers else packed


def limit_of(i: int, total: int, max_parts: int, longest: int, item_tiles: int) -> int:
    """the i-th limit of a part's cost to try, where pieces are fixed"""
    least, step = (
        max((total - 1) // max_parts + 1, longest + item_tiles),
        (longest + 2 * item_tiles) // (NUM_CANDIDATES - 1) + 1,
    )
    return least + min(i * step, max(total - least, 0))


def last_edge(prefix: Sequence[int], pieces: Sequence[int], x: int, item_tiles: int) -> tuple[int, int]:
    """(request, tile) of the last edge of a piece that costs no more than x; pieces: those before a request"""
    request = bisect_right(prefix, x) - 1
    if request == len(prefix) - 1 or x - prefix[request] <= item_tiles:
        return request, 0
    tiles, num = prefix[request + 1] - prefix[request] - item_tiles, pieces[request + 1] - pieces[request]
    return request, max(edge for edge in _piece_edges(tiles, num) if edge <= x - prefix[request] - item_tiles)


def fill_parts(
    prefix: Sequence[int], pieces: Sequence[int], limit: int, max_parts: int, item_tiles: int
) -> list[tuple[int, int]]:
    """the cuts between parts that are filled one after the other up to a limit; the last is not the end if they are too few"""
    cuts, end = [(0, 0)], (len(prefix) - 1, 0)
    while cuts[-1] != end and len(cuts) <= max_parts:
        request, tile = cuts[-1]
        cuts.append(last_edge(prefix, pieces, min(prefix[request] + tile + limit, prefix[-1]), item_tiles))
    return cuts


def candidate(i: int, max_parts: int, most: int) -> int:
    """the i-th number of parts to try"""
    parts, most = max_parts - i, max(most, 1)
    if i >= NUM_CANDIDATES // 2:
        least = min((most - 1) // max_parts + 1, MAX_TILES)
        parts = (most - 1) // (least + (i - NUM_CANDIDATES // 2) * max(least // 8, 1)) + 1
    return max(min(parts, max_parts, most), 1)


def cut(prefix: Sequence[int], p: int, parts: int, item_tiles: int) -> tuple[int, int]:
    """cut p of 0 .. parts -> (request, tile); tile 0: before the request"""
    batch, total = len(prefix) - 1, prefix[-1]
    if p == 0 or total == 0:
        return 0, 0
    if p >= parts:
        return batch, 0
    line = total - item_tiles
    x = item_tiles + line // parts * p + line % parts * p // parts
    request = bisect_right(prefix, x, 0, batch) - 1
    tiles, tile = prefix[request + 1] - prefix[request] - item_tiles, x - prefix[request] - item_tiles
    snap = max(min(total // parts // 8, item_tiles), 1)
    if tiles - tile < snap:
        return request + 1, 0
    return (request, tile) if tile >= snap else (request, 0)


def part_loads(prefix: Sequence[int], cuts: Sequence[tuple[int, int]], item_tiles: int) -> list[int]:
    """cost in tiles of each part"""
    at = [prefix[request] + (tile + item_tiles if tile else 0) for request, tile in cuts]
    return [at[p + 1] - at[p] + (item_tiles if cuts[p][1] else 0) for p in range(len(cuts) - 1)]


def count_pieces(cuts: Sequence[tuple[int, int]], fixed: Sequence[int] | None = None) -> int:
    """Split pieces: one behind every cut inside a request, and one before a request's first.  fixed: how many each request has
    where any cut makes all of them partial results."""
    pieces = 0
    for (request, tile), (next_request, next_tile) in pairwise(cuts):
        first = next_tile > 0 and (next_request != request or tile == 0)
        if fixed is None:
            pieces += (tile > 0) + first
        elif first:
            pieces += fixed[next_request]
    return pieces


def build_schedule(
    lengths: Sequence[int],
    row_tiles: int,
    max_parts: int,
    config: ScheduleConfig = ScheduleConfig(),
    max_tokens: int = NO_LIMIT,
    reach: int = NO_LIMIT,
    cu_seqlens_q: Sequence[int] | None = None,
) -> Schedule:
    """lengths: tokens of each request, cut to max_tokens; row_tiles: 64-row tiles of a request; max_parts: CTAs that may share
    one's work; reach: tokens at a request's end that any of its query tokens sees."""
    if cu_seqlens_q is not None:
        return _ragged(lengths, row_tiles, max_parts, config, max_tokens, reach, cu_seqlens_q)
    seqlens = [min(max(n, 0), max_tokens) for n in lengths]
    unseen = [max(n - reach, 0) // TILE for n in seqlens]  # tiles
    tiles = [-(-n // TILE) - first for n, first in zip(seqlens, unseen)]
    made = _build(tiles, seqlens, row_tiles, max_parts, config)
    shifted = (replace(item, first=item.first + unseen[item.batch], end=item.end + unseen[item.batch]) for item in made.items)
    return replace(made, items=tuple(shifted))


def _ragged(lengths, row_tiles, max_parts, config, max_tokens, reach, cu_seqlens_q) -> Schedule:
    """the schedule of those that have query tokens, with where these are"""
    counts = [end - begin for begin, end in pairwise(cu_seqlens_q)]
    plain = build_schedule([n * (k > 0) for n, k in zip(lengths, counts)], row_tiles, max_parts, config, max_tokens, reach)
    items = (replace(item, token=cu_seqlens_q[item.batch], num_queries=counts[item.batch]) for item in plain.items)
    merges = (replace(merge, batch=cu_seqlens_q[merge.batch], num_queries=counts[merge.batch]) for merge in plain.merges)
    return replace(plain, items=tuple(items), merges=tuple(merges))


def _build(tiles, seqlens, row_tiles, max_parts, config) -> Schedule:
    prefix = [0, *accumulate(n + config.item_tiles * (n > 0) for n in tiles)]
    filled = [0, *accumulate(int(n > 0) for n in tiles)]
    pieces = [num_pieces(n, row_tiles, config) for n in tiles]
    first_piece = [0, *accumulate(pieces)]

    def cost(cuts):
        split = count_pieces(cuts, pieces if config.max_pieces else None)
        return max(part_loads(prefix, cuts, config.item_tiles)) * config.tile_cost + split * row_tiles

    end, indices = (len(tiles), 0), range(NUM_CANDIDATES)
    if config.max_pieces:
        longest = max((-(-n // k) for n, k in zip(tiles, pieces) if n), default=0)
        limits = (limit_of(i, prefix[-1], max_parts, longest, config.item_tiles) for i in indices)
        tries = (fill_parts(prefix, first_piece, limit, max_parts, config.item_tiles) for limit in limits)
        tries = (cuts for cuts in tries if cuts[-1] == end)
    else:
        counts = (candidate(i, max_parts, prefix[-1] - config.item_tiles) for i in indices)
        tries = ([cut(prefix, p, parts, config.item_tiles) for p in range(parts + 1)] for parts in counts)
    cuts = min(tries, key=cost)  # the first of equals
    parts = len(cuts) - 1
    cuts += [end] * (max_parts - parts)
    inside = [0, *accumulate(int(tile > 0) for _, tile in cuts)]
    part_begin = [filled[request] + inside[p + 1] for p, (request, _) in enumerate(cuts)]
    if config.max_pieces and not config.runs:  # a piece is an item
        part_begin = [first_piece[r] + (_piece_edges(tiles[r], pieces[r]).index(tile) if tile else 0) for r, tile in cuts]
    part_of = [bisect_right(cuts[: parts + 1], (request, 0)) - 1 for request in range(len(tiles))]
    items, merges, next_slot = [], [], max_parts if config.runs else 0
    for request, n in enumerate(tiles):
        edges = [0, *sorted({tile for r, tile in cuts[1:parts] if r == request and tile > 0}), n]
        whole, num, seqlen = len(edges) == 2, pieces[request], seqlens[request]
        if not n:
            merges.append(Merge(request, 0, 0))
        elif num > 1 and whole and config.runs:
            items.append(Item(request, 0, n, part_of[request], seqlen, pieces=pack_pieces(n, num, 0, True)))
        elif num > 1:
            edges, slot = (edges, next_slot) if config.runs else (_piece_edges(n, num), first_piece[request])
            items += [_run(Item(request, a, b, slot, seqlen), n, num) for a, b in pairwise(edges)]
            merges.append(Merge(request, slot, num))
            next_slot += num
        elif whole:
            items.append(Item(request, 0, n, -1, seqlen))
        else:
            num = len(edges) - 1
            items += [Item(request, a, b, next_slot + i, seqlen) for i, (a, b) in enumerate(pairwise(edges))]
            merges.append(Merge(request, next_slot, num))
            next_slot += num
    return Schedule(tuple(items), tuple(part_begin), tuple(merges), parts)


def _piece_edges(tiles: int, pieces: int) -> list[int]:
    return [piece_edge(tiles, pieces, i) for i in range(pieces + 1)]


def _run(item: Item, tiles: int, pieces: int) -> Item:
    """of fixed pieces of a cut request: `item` with the slot of its first one, and their lengths if they are several"""
    piece_of = {edge: i for i, edge in enumerate(_piece_edges(tiles, pieces))}
    first, end = piece_of[item.first], piece_of[item.end]
    packed = pack_pieces(tiles, pieces, first, False) if end - first > 1 else 0
    return replace(item, slot=item.slot + first, pieces=packed)
