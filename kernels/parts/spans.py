"""How the KV tiles of a batch are cut into one contiguous span per CTA: integer maths, run by schedule.py on the device and by
the tests on the CPU.  flashmla_cute/schedule.py is the same in plain Python.

Request r costs weight[r] = tiles[r] + item_tiles, or 0 without tokens; C is their exclusive prefix sum, C[b] = total.  With
n parts, cut p lies at x = item_tiles + p * (total - item_tiles) / n on that line, because the part that begins there pays
item_tiles once more: in tile x - C[r] - item_tiles of the request r that holds x.  A cut that would leave a piece shorter than
`snap` moves to the request's edge.  Tile 0 means "before request r": nothing is split there.

Batch-invariant schedules cut a request by its own length alone, into num_pieces(..) pieces that differ by one tile at most.
Each of them is an item, C counts them all, and cut p lies at the edge of a piece that is nearest to p * total / n.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32

from ..config import MAX_ROW_TILES

NUM_CANDIDATES = 32  # one per warp
MAX_TILES = 1 << 29  # of a part, where a candidate is made from them: 3 times as many fit 32 bits


@cute.jit
def upper_bound(prefix: cute.Tensor, count: Int32, x: Int32) -> Int32:
    """number of entries among prefix[0 .. count) that are <= x; prefix ascends"""
    low, high = Int32(0), count
    while low < high:
        middle = (low + high) // 2
        if prefix[middle] <= x:
            low = middle + 1
        else:
            high = middle
    return low


@cute.jit
def candidate(i: Int32, max_parts: Int32, most: Int32) -> Int32:
    """The i-th number of parts to try: the 16 largest; then the fewest with which no part has more tiles than it must, one
    more, two more, .. (by eighths, where they are many).  No more than `most` = total - item_tiles: no two cuts are equal."""
    parts, most = max_parts - i, cutlass.max(most, 1)
    if i >= NUM_CANDIDATES // 2:
        least = cutlass.min((most - 1) // max_parts + 1, MAX_TILES)
        tiles = least + (i - NUM_CANDIDATES // 2) * cutlass.max(least // 8, 1)
        parts = (most - 1) // tiles + 1
    return cutlass.max(cutlass.min(parts, max_parts, most), 1)


@cute.jit
def cut(prefix: cute.Tensor, batch: Int32, p: Int32, parts: Int32, item_tiles: Constexpr[int]):
    """cut p of 0 .. parts -> (request, tile); tile 0: before the request"""
    total = prefix[batch]
    request, tile = batch, Int32(0)
    if p < parts:
        line = total - item_tiles
        x = item_tiles + line // parts * p + line % parts * p // parts
        request = upper_bound(prefix, batch, x) - 1
        num_tiles = prefix[request + 1] - prefix[request] - item_tiles
        tile = x - prefix[request] - item_tiles
        snap = cutlass.max(cutlass.min(total // parts // 8, item_tiles), 1)
        if num_tiles - tile < snap:
            request, tile = request + 1, Int32(0)
        elif tile < snap:
            tile = Int32(0)
    if (p == 0) | (total == 0):
        request, tile = Int32(0), Int32(0)
    return request, tile


@cute.jit
def load_of(
    prefix: cute.Tensor, request: Int32, tile: Int32, next_request: Int32, next_tile: Int32, item_tiles: Constexpr[int]
):
    """cost in tiles of the part between two cuts"""
    begin = prefix[request] + (tile + item_tiles if tile > 0 else 0)
    end = prefix[next_request] + (next_tile + item_tiles if next_tile > 0 else 0)
    return end - begin + (item_tiles if tile > 0 else 0)


# ---------------------------------------------------------------------- batch-invariant: cuts at the edges of fixed pieces
@cute.jit
def num_pieces(
    tiles: Int32, row_tiles: Int32, max_pieces: Constexpr[int], gain: Constexpr[int], piece_tiles: Constexpr[int]
) -> Int32:
    """The largest n with n^2 * row_tiles <= gain / 32 * tiles or n * piece_tiles <= tiles, up to max_pieces and tiles; at least
    1, but 0 without tiles."""
    pieces = Int32(1) if tiles > 0 else Int32(0)
    rows = 32 * cutlass.min(row_tiles, MAX_ROW_TILES)
    while (pieces < cutlass.min(tiles, max_pieces)) & ((pieces + 1) * (pieces + 1) * rows <= tiles * gain):
        pieces += 1
    return cutlass.max(pieces, cutlass.min(tiles // piece_tiles, max_pieces))


@cute.jit
def piece_begin(tiles: Int32, pieces: Int32, i: Int32) -> Int32:
    """first tile of piece i"""
    return tiles // pieces * i + tiles % pieces * i // pieces


@cute.jit
def piece_cut(prefix: cute.Tensor, items: cute.Tensor, batch: Int32, p: Int32, parts: Int32, item_tiles: Constexpr[int]):
    """cut p of 0 .. parts -> (the first item behind it, cost before that); items: those before a request"""
    total = prefix[batch]
    item, cost = items[batch], total
    if (p < parts) & (total > 0):
        x = total // parts * p + total % parts * p // parts
        request = upper_bound(prefix, batch, x) - 1
        weight, pieces = prefix[request + 1] - prefix[request], items[request + 1] - items[request]
        mean, x = weight // pieces, x - prefix[request]
        i = cutlass.min(x // mean + (x % mean + mean // 2) // mean, pieces)
        item = items[request] + i
        cost = prefix[request] + piece_begin(weight - item_tiles * pieces, pieces, i) + item_tiles * i
    return item, cost
