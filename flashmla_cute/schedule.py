"""The schedule in plain Python: the twin of kernels/schedule.py, and its specification.

The tests hold the device to it record by record; `flashmla-cute demo` runs it where there is no GPU.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import isqrt

from .kernels.config import MAX_ROW_TILES, TILE, ScheduleConfig

NUM_CANDIDATES, MAX_TILES = 32, 1 << 29


NO_LIMIT = 1 << 30  # tokens


@dataclass(frozen=True)
class Item:
    """A span of KV tiles of one request.  `slot`: where its partial result goes; -1: it is the whole request."""

    batch: int
    first: int
    end: int
    slot: int
    seqlen: int
    token: int = 0  # ragged: the request's first query token
    num_queries: int = 0


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
    if config.max_pieces:
        return max(1, batch * num_pieces(max_tiles, row_tiles, config))
    return max(1, 2 * max_parts - 2)


def num_items(batch: int, row_tiles: int, max_parts: int, max_tiles: int, config: ScheduleConfig = ScheduleConfig()) -> int:
    """records that they can need"""
    return batch * num_pieces(max_tiles, row_tiles, config) if config.max_pieces else batch + max_parts


def num_pieces(tiles: int, row_tiles: int, config: ScheduleConfig) -> int:
    """pieces that a request has before the cuts"""
    if not config.max_pieces:
        return int(tiles > 0)
    pieces = isqrt(config.piece_gain * tiles // (32 * min(row_tiles, MAX_ROW_TILES)))
    pieces = max(pieces, tiles // config.piece_tiles)
    return max(min(pieces, tiles, config.max_pieces), int(tiles > 0))


def piece_begin(tiles: int, pieces: int, i: int) -> int:
    """first tile of piece i"""
    return tiles * i // pieces


def piece_cut(prefix: Sequence[int], items: Sequence[int], p: int, parts: int, item_tiles: int) -> tuple[int, int]:
    """cut p of 0 .. parts, at the nearest edge of a piece -> (the first item behind it, cost before that)"""
    batch, total = len(prefix) - 1, prefix[-1]
    if p >= parts or total == 0:
        return items[batch], total
    x = total * p // parts
    request = bisect_right(prefix, x, 0, batch) - 1
    weight, pieces = prefix[request + 1] - prefix[request], items[request + 1] - items[request]
    mean = weight // pieces
    i = min((x - prefix[request] + mean // 2) // mean, pieces)
    tiles = weight - item_tiles * pieces
    return items[request] + i, prefix[request] + piece_begin(tiles, pieces, i) + item_tiles * i


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
    num_tiles = prefix[request + 1] - prefix[request] - item_tiles
    tile = x - prefix[request] - item_tiles
    snap = max(min(total // parts // 8, item_tiles), 1)
    if num_tiles - tile < snap:
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
        pieces += tile > 0
        pieces += next_tile > 0 and (next_request != request or tile == 0)
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
    pieces = [num_pieces(n, row_tiles, config) for n in tiles]
    prefix = [0, *accumulate(n + config.item_tiles * k for n, k in zip(tiles, pieces))]
    make = _of_fixed_pieces if config.max_pieces else _of_cuts
    made = make(tiles, seqlens, prefix, [0, *accumulate(pieces)], row_tiles, max_parts, config)
    shifted = (replace(item, first=item.first + unseen[item.batch], end=item.end + unseen[item.batch]) for item in made.items)
    return replace(made, items=tuple(shifted))


def _ragged(lengths, row_tiles, max_parts, config, max_tokens, reach, cu_seqlens_q) -> Schedule:
    """the schedule of those that have query tokens, with where these are"""
    counts = [end - begin for begin, end in pairwise(cu_seqlens_q)]
    plain = build_schedule([n * (k > 0) for n, k in zip(lengths, counts)], row_tiles, max_parts, config, max_tokens, reach)
    items = (replace(item, token=cu_seqlens_q[item.batch], num_queries=counts[item.batch]) for item in plain.items)
    merges = (replace(merge, batch=cu_seqlens_q[merge.batch], num_queries=counts[merge.batch]) for merge in plain.merges)
    return replace(plain, items=tuple(items), merges=tuple(merges))


def _cheapest(cost: Callable[[int], int], max_parts: int, most: int) -> int:
    """number of parts: the first of equals"""
    return min((candidate(i, max_parts, most) for i in range(NUM_CANDIDATES)), key=cost)


def _of_cuts(tiles, seqlens, prefix, filled, row_tiles, max_parts, config) -> Schedule:
    """cut where it balances the batch"""

    def cuts_of(parts):
        return [cut(prefix, p, parts, config.item_tiles) for p in range(parts + 1)]

    def cost(parts):
        cuts = cuts_of(parts)
        return max(part_loads(prefix, cuts, config.item_tiles)) * config.tile_cost + count_pieces(cuts) * row_tiles

    parts = _cheapest(cost, max_parts, prefix[-1] - config.item_tiles)
    cuts = cuts_of(parts) + [(len(tiles), 0)] * (max_parts - parts)
    inside = [0, *accumulate(int(tile > 0) for _, tile in cuts)]
    part_begin = [filled[request] + inside[p + 1] for p, (request, _) in enumerate(cuts)]
    items, merges, next_slot = [], [], 0
    for request, n in enumerate(tiles):
        edges = [tile for r, tile in cuts[1:parts] if r == request and tile > 0]
        num = len(edges) + 1 if edges else 0
        if not n or edges:
            merges.append(Merge(request, next_slot if edges else 0, num))
        if n:
            slots = range(next_slot, next_slot + num) if edges else [-1]
            items += [Item(request, a, b, slot, seqlens[request]) for (a, b), slot in zip(pairwise([0, *edges, n]), slots)]
        next_slot += num
    return Schedule(tuple(items), tuple(part_begin), tuple(merges), parts)


def _of_fixed_pieces(tiles, seqlens, prefix, first, row_tiles, max_parts, config) -> Schedule:
    """each request in the pieces that its own length asks for"""

    def cuts_of(parts):
        return [piece_cut(prefix, first, p, parts, config.item_tiles) for p in range(parts + 1)]

    def longest(parts):
        return max(end - begin for (_, begin), (_, end) in pairwise(cuts_of(parts)))

    parts = _cheapest(longest, max_parts, first[-1])
    part_begin = [item for item, _ in cuts_of(parts)] + [first[-1]] * (max_parts - parts)
    items, merges = [], []
    for request, n in enumerate(tiles):
        num = first[request + 1] - first[request]
        edges = [piece_begin(n, num, i) for i in range(num + 1)] if n else []
        for i, (a, b) in enumerate(pairwise(edges)):
            items.append(Item(request, a, b, first[request] + i if num > 1 else -1, seqlens[request]))
        if num != 1:
            merges.append(Merge(request, first[request] if num else 0, num))
    return Schedule(tuple(items), tuple(part_begin), tuple(merges), parts)
