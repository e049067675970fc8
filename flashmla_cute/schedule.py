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
    def joins(self) -> bool:
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
    if config.max_pieces and config.runs:  # one for each part, and those of cut requests
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


def pack_pieces(tiles: int, pieces: int, first: int, joins: bool) -> int:
    """how long the pieces from `first` on are: so many of a tile more, then of tiles // pieces"""
    packed = (tiles // pieces << PIECE_SHIFT) + max(tiles % pieces - first, 0)
    return -packed if joins else packed


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


def next_cut(prefix: Sequence[int], pieces: Sequence[int], place: int, tile: int, limit: int, item_tiles: int):
    """The cut behind the one at (place, tile), as far as `limit` reaches; what the part between costs; and how many partial
    results it adds: a cut inside a request makes all of its pieces partial results."""
    start = prefix[place] + tile  # (a part that begins inside a request pays item_tiles once more)
    next_place, next_tile = last_edge(prefix, pieces, min(start + limit, prefix[-1]), item_tiles)
    end = prefix[next_place] + (next_tile + item_tiles if next_tile else 0)
    splits = next_tile > 0 and (next_place != place or tile == 0)
    return next_place, next_tile, end - start, pieces[next_place + 1] - pieces[next_place] if splits else 0


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


def count_pieces(cuts: Sequence[tuple[int, int]]) -> int:
    """split pieces: one behind every cut inside a request, and one before a request's first"""
    pieces = 0
    for (request, tile), (next_request, next_tile) in pairwise(cuts):
        pieces += (tile > 0) + (next_tile > 0 and (next_request != request or tile == 0))
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
    made = (_build_fixed if config.max_pieces else _build)(tiles, seqlens, row_tiles, max_parts, config)
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

    def cost(cuts):
        return max(part_loads(prefix, cuts, config.item_tiles)) * config.tile_cost + count_pieces(cuts) * row_tiles

    counts = (candidate(i, max_parts, prefix[-1] - config.item_tiles) for i in range(NUM_CANDIDATES))
    tries = ([cut(prefix, p, parts, config.item_tiles) for p in range(parts + 1)] for parts in counts)
    cuts = min(tries, key=cost)  # the first of equals
    parts = len(cuts) - 1
    cuts += [(len(tiles), 0)] * (max_parts - parts)
    inside = [0, *accumulate(int(tile > 0) for _, tile in cuts)]
    part_begin = [filled[request] + inside[p + 1] for p, (request, _) in enumerate(cuts)]
    items, merges, next_slot = [], [], 0
    for request, n in enumerate(tiles):
        edges = [0, *sorted({tile for r, tile in cuts[1:parts] if r == request and tile > 0}), n]
        num, seqlen = len(edges) - 1, seqlens[request]
        if not n:
            merges.append(Merge(request, 0, 0))
        elif num == 1:
            items.append(Item(request, 0, n, -1, seqlen))
        else:
            items += [Item(request, a, b, next_slot + i, seqlen) for i, (a, b) in enumerate(pairwise(edges))]
            merges.append(Merge(request, next_slot, num))
            next_slot += num
    return Schedule(tuple(items), tuple(part_begin), tuple(merges), parts)


# ---------------------------------------------------------------------- fixed pieces
def _build_fixed(tiles, seqlens, row_tiles, max_parts, config) -> Schedule:
    """Requests in another order: long ones, of several pieces, short ones, those without tokens.  Parts are filled up to a
    limit, with pieces of long requests, then whole short ones.  A piece costs a tile more than it has."""
    pieces = [num_pieces(n, row_tiles, config) for n in tiles]
    order = sorted(range(len(tiles)), key=lambda request: 0 if pieces[request] > 1 else 2 - pieces[request])
    longs, filled = sum(n > 1 for n in pieces), sum(n > 0 for n in pieces)
    prefix = [0, *accumulate(tiles[r] + pieces[r] + config.item_tiles * (tiles[r] > 0) for r in order)]
    before = [0, *accumulate(pieces[r] for r in order)]

    def piece_behind(place, tile):
        """the piece that begins at `tile` of those that the request at `place` costs"""
        tiles, num = prefix[place + 1] - prefix[place] - config.item_tiles, before[place + 1] - before[place]
        return _piece_edges(tiles, num).index(tile)

    def fill(limit):
        """(place, tile, first short place) where each part begins, the longest part, partial results; None: it does not fit"""
        starts, place, tile, short, longest, split = [], 0, 0, longs, 0, 0
        while place < longs or short < filled:
            if len(starts) == max_parts:
                return None
            starts.append((place, tile and tile - piece_behind(place, tile), short))
            load, first = 0, prefix[short]
            if place < longs:
                line = prefix[: longs + 1], before
                place, tile, load, more = next_cut(*line, place, tile, limit, config.item_tiles)
                split += more
            short = bisect_right(prefix, first + limit - load, short, filled + 1) - 1
            longest = max(longest, load + prefix[short] - first)
        return starts or [(0, 0, longs)], longest, split

    longest = max((-(-n // k) + 1 for n, k in zip(tiles, pieces) if n), default=0)
    limits = [limit_of(i, prefix[-1], max_parts, longest, config.item_tiles) for i in range(NUM_CANDIDATES)]
    tries = [made for made in map(fill, limits) if made]
    starts, _, _ = min(tries, key=lambda made: made[1] * config.tile_cost + made[2] * row_tiles)  # the first of equals
    ends = [*starts[1:], *[(longs, 0, filled)] * (max_parts + 1 - len(starts))]
    items, part_begin, slot_of = [], [0], {}

    def long_items(at, first, end, part):
        """of tiles first .. end - 1 of the request at place `at`; slot_of: request -> its first slot, if its pieces have any"""
        request = order[at]
        n, num, seqlen = tiles[request], pieces[request], seqlens[request]
        if config.runs and end - first == n:
            return [Item(request, 0, n, part, seqlen, pieces=pack_pieces(n, num, 0, True))]
        slot = max_parts + sum(pieces[r] for r in slot_of) if config.runs else before[at]
        slot, edges = slot_of.setdefault(request, slot), _piece_edges(n, num)
        i, j = edges.index(first), edges.index(end)
        if config.runs:
            return [Item(request, first, end, slot + i, seqlen, pieces=pack_pieces(n, num, i, False) if j - i > 1 else 0)]
        return [Item(request, edges[k], edges[k + 1], slot + k, seqlen) for k in range(i, j)]

    for p, ((place, tile, short), (end_place, end_tile, end_short)) in enumerate(zip(starts, ends)):
        for at in range(place, end_place + (end_tile > 0)):
            end = end_tile if at == end_place else tiles[order[at]]
            items += long_items(at, tile if at == place else 0, end, p)
        items += [Item(request, 0, tiles[request], -1, seqlens[request]) for request in order[short:end_short]]
        part_begin.append(len(items))
    part_begin += [len(items)] * (max_parts + 1 - len(part_begin))
    merges = [Merge(r, slot_of.get(r, 0), pieces[r]) for r in order if not tiles[r] or r in slot_of]
    return Schedule(tuple(items), tuple(part_begin), tuple(merges), len(starts))


def _piece_edges(tiles: int, pieces: int) -> list[int]:
    return [piece_edge(tiles, pieces, i) for i in range(pieces + 1)]
