"""How the KV tiles of a batch are cut into one contiguous span per CTA: integer maths, run by schedule.py on the device and by
the tests on the CPU.  flashmla_cute/schedule.py is the same in plain Python.

Request r costs weight[r] = tiles[r] + item_tiles, or 0 without tokens; C is their exclusive prefix sum, C[b] = total.  With
n parts, cut p lies at x = item_tiles + p * (total - item_tiles) / n on that line, because the part that begins there pays
item_tiles once more: in tile x - C[r] - item_tiles of the request r that holds x.  A cut that would leave a piece shorter than
`snap` moves to the request's edge.  Tile 0 means "before request r": nothing is split there.

Batch-invariant schedules cut a request by its own length alone, into num_pieces(..) pieces that differ by one tile at most.
Their edges are too far apart for cuts at equal distances: a part takes pieces up to a limit, and the limit is chosen.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32

from ..config import MANY_TILES, MAX_ROW_TILES
from .work import PIECE_SHIFT

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
    """The largest n with n^2 * row_tiles <= gain / 32 * tiles or n * piece_tiles <= tiles, up to max_pieces and tiles / 2; at
    least 1, but 0 without tiles."""
    pieces, most = Int32(1) if tiles > 0 else Int32(0), cutlass.min(tiles // 2, max_pieces)
    rows = 32 * cutlass.min(row_tiles, MAX_ROW_TILES)
    while (pieces < most) & ((pieces + 1) * (pieces + 1) * rows <= cutlass.min(tiles, MANY_TILES) * gain):
        pieces += 1
    return cutlass.max(pieces, cutlass.min(tiles // piece_tiles, most))


@cute.jit
def piece_edge(tiles: Int32, pieces: Int32, i: Int32) -> Int32:
    """first tile of piece i; the longer ones, by a tile, come first"""
    return tiles // pieces * i + cutlass.min(tiles % pieces, i)


@cute.jit
def piece_at(tiles: Int32, pieces: Int32, tile: Int32) -> Int32:
    """the piece that holds a tile; `pieces` where it is behind the last"""
    length, long = tiles // pieces, tiles % pieces
    return tile // (length + 1) if tile < long * (length + 1) else long + (tile - long * (length + 1)) // length


@cute.jit
def limit_of(i: Int32, total: Int32, max_parts: Int32, longest: Int32, item_tiles: Constexpr[int]) -> Int32:
    """The i-th limit of a part's cost to try.  The last one suffices: every part but the last has more than the limit less the
    longest piece and two times item_tiles."""
    least = cutlass.max((total - 1) // max_parts + 1, longest + item_tiles)
    return least + cutlass.min(i * ((longest + 2 * item_tiles) // (NUM_CANDIDATES - 1) + 1), cutlass.max(total - least, 0))


@cute.jit
def last_edge(prefix: cute.Tensor, before: cute.Tensor, batch: Int32, request: Int32, x: Int32, item_tiles: Constexpr[int]):
    """(request, tile) of the last edge of a piece that costs x at most, from `request` on; before: pieces before a request"""
    low, step = request, Int32(1)
    while (low + step <= batch) & (prefix[cutlass.min(low + step, batch)] <= x):  # doubling steps: it is near
        low, step = low + step, step * 2
    high = cutlass.min(low + step, batch + 1)
    while low + 1 < high:
        middle = (low + high) // 2
        if prefix[middle] <= x:
            low = middle
        else:
            high = middle
    tile = Int32(0)
    if low < batch:
        budget = x - prefix[low] - item_tiles
        if budget > 0:
            tiles, pieces = prefix[low + 1] - prefix[low] - item_tiles, before[low + 1] - before[low]
            tile = piece_edge(tiles, pieces, piece_at(tiles, pieces, budget))
    return low, tile


@cute.jit
def next_cut(
    prefix: cute.Tensor,
    before: cute.Tensor,
    batch: Int32,
    request: Int32,
    tile: Int32,
    limit: Int32,
    item_tiles: Constexpr[int],
):
    """The cut behind the one at (request, tile), so that the part between them costs `limit` at most, that cost, and how many
    partial results it adds: a cut inside a request makes all of its pieces partial results."""
    start = prefix[request] + tile  # (a part that begins inside a request pays item_tiles once more)
    next_request, next_tile = last_edge(
        prefix, before, batch, request, start + cutlass.min(limit, prefix[batch] - start), item_tiles
    )
    end, split = prefix[next_request], Int32(0)
    if next_tile > 0:
        end += next_tile + item_tiles
        if (next_request != request) | (tile == 0):
            split = before[next_request + 1] - before[next_request]
    return next_request, next_tile, end - start, split


@cute.jit
def pack_pieces(tiles: Int32, pieces: Int32, first: Int32) -> Int32:
    """how long the pieces from `first` on are: so many of a tile more, then of tiles // pieces"""
    return (tiles // pieces << PIECE_SHIFT) + cutlass.max(tiles % pieces - first, 0)
