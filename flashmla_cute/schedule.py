"""The schedule in plain Python: the twin of kernels/schedule.py, and its specification.

The tests hold the device to it record by record; `flashmla-cute demo` runs it where there is no GPU.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from .kernels.config import TILE, ScheduleConfig

NUM_CANDIDATES = 32


@dataclass(frozen=True)
class Item:
    """A span of KV tiles of one request.  `slot`: where its partial result goes; -1: it is the whole request."""

    batch: int
    first: int
    end: int
    slot: int
    seqlen: int


@dataclass(frozen=True)
class Merge:
    """Pieces of a request to merge; piece i lies in slot first_slot + max(0, 2i - 1).  No pieces: a request without tokens."""

    batch: int
    first_slot: int
    pieces: int

    def slots(self) -> list[int]:
        return [self.first_slot + max(0, 2 * i - 1) for i in range(self.pieces)]


@dataclass(frozen=True)
class Schedule:
    items: tuple[Item, ...]  # part p works on items[part_begin[p] : part_begin[p + 1]]
    part_begin: tuple[int, ...]
    merges: tuple[Merge, ...]
    num_parts: int  # of max_parts that have work

    def part(self, p: int) -> tuple[Item, ...]:
        return self.items[self.part_begin[p] : self.part_begin[p + 1]]


def num_slots(max_parts: int) -> int:
    """partial results that any batch can need"""
    return max(1, 2 * max_parts - 2)


def candidate(i: int, max_parts: int, most: int) -> int:
    """the i-th number of parts to try"""
    parts = max_parts - i
    if i >= NUM_CANDIDATES // 2:
        parts = max_parts * (NUM_CANDIDATES - i) // (NUM_CANDIDATES // 2 + 1)
    return max(min(parts, most), 1)


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
    lengths: Sequence[int], row_tiles: int, max_parts: int, config: ScheduleConfig = ScheduleConfig(), max_tiles: int = 1 << 30
) -> Schedule:
    """lengths: tokens of each request; row_tiles: 64-row tiles of a request; max_parts: CTAs that may share one's work."""
    tiles = [min((max(n, 0) + TILE - 1) // TILE, max_tiles) for n in lengths]
    prefix = [0, *accumulate(t + config.item_tiles if t else 0 for t in tiles)]
    filled = [0, *accumulate(int(t > 0) for t in tiles)]

    def cuts_of(parts):
        return [cut(prefix, p, parts, config.item_tiles) for p in range(parts + 1)]

    def cost(parts):
        cuts = cuts_of(parts)
        return max(part_loads(prefix, cuts, config.item_tiles)) * config.tile_cost + count_pieces(cuts) * row_tiles

    parts = min(
        (candidate(i, max_parts, prefix[-1] - config.item_tiles) for i in range(NUM_CANDIDATES)), key=cost
    )  # the first of equals
    cuts = cuts_of(parts) + [(len(tiles), 0)] * (max_parts - parts)
    inside = [0, *accumulate(int(tile > 0) for _, tile in cuts)]
    part_begin = [filled[request] + inside[p + 1] for p, (request, _) in enumerate(cuts)]
    items, merges = [], []
    for request, n in enumerate(tiles):
        length = min(lengths[request], max_tiles * TILE)
        mine = [p for p in range(1, parts) if cuts[p][0] == request and cuts[p][1] > 0]
        if not n or mine:
            merges.append(Merge(request, 2 * mine[0] - 2 if mine else 0, len(mine) + 1 if mine else 0))
        if n:
            edges = [0, *(cuts[p][1] for p in mine), n]
            slots = [2 * mine[0] - 2 if mine else -1, *(2 * p - 1 for p in mine)]
            items += [Item(request, a, b, slot, length) for a, b, slot in zip(edges, edges[1:], slots)]
    return Schedule(tuple(items), tuple(part_begin), tuple(merges), parts)
