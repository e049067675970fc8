"""kernels/parts/spans.py, run natively on the CPU, against its twin in flashmla_cute/schedule.py."""

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass import Constexpr, Int32
from cutlass.cute.runtime import from_dlpack

from flashmla_cute import schedule
from flashmla_cute.kernels.config import ScheduleConfig
from flashmla_cute.kernels.parts import spans

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

MAX_BATCH, MAX_PARTS, ITEM_TILES = 100, 140, 3
PIECE_SIZES = ((1, 1, 48), (32, 1, 48), (32, 32, 1), (32, 9, 1 << 25))  # (max_pieces, gain, piece_tiles)


@cute.jit
def all_cuts(prefix: cute.Tensor, out: cute.Tensor, batch: Int32, parts: Int32, item_tiles: Constexpr[int]):
    """out[p] = (request, tile) of cut p, load of part p"""
    for p in cutlass.range(parts + 1):
        out[p, 0], out[p, 1] = spans.cut(prefix, batch, p, parts, item_tiles)
    for p in cutlass.range(parts):
        out[p, 2] = spans.load_of(prefix, out[p, 0], out[p, 1], out[p + 1, 0], out[p + 1, 1], item_tiles)


@cute.jit
def all_candidates(out: cute.Tensor, max_parts: Int32, total: Int32):
    for i in cutlass.range(spans.NUM_CANDIDATES):
        out[i] = spans.candidate(i, max_parts, total)


@cute.jit
def upper_bounds(prefix: cute.Tensor, out: cute.Tensor, count: Int32):
    for x in cutlass.range(out.shape[0]):
        out[x] = spans.upper_bound(prefix, count, x)


@cute.jit
def filled_parts(prefix: cute.Tensor, pieces: cute.Tensor, out: cute.Tensor, batch: Int32, limit: Int32):
    """out[p] = (request, tile) of cut p, cost of part p, partial results that it adds"""
    request, tile, cost, split = Int32(0), Int32(0), Int32(0), Int32(0)
    for p in cutlass.range(out.shape[0]):
        out[p, 0], out[p, 1] = request, tile
        if request < batch:
            request, tile, cost, split = spans.next_cut(prefix, pieces, batch, request, tile, limit, ITEM_TILES)
            out[p, 2], out[p, 3] = cost, split


@cute.jit
def all_limits(out: cute.Tensor, total: Int32, max_parts: Int32, longest: Int32):
    for i in cutlass.range(spans.NUM_CANDIDATES):
        out[i] = spans.limit_of(i, total, max_parts, longest, ITEM_TILES)


@cute.jit
def pieces_of(out: cute.Tensor, tiles: Int32, row_tiles: Int32, sizes: Constexpr[tuple]):
    """out = number of pieces, then where each begins, then the piece that begins there"""
    out[0] = spans.num_pieces(tiles, row_tiles, *sizes)
    for i in cutlass.range(cutlass.min(out[0], 1) * (out[0] + 1)):
        out[1 + i] = spans.piece_edge(tiles, out[0], i)
        out[2 + out[0] + i] = spans.piece_at(tiles, out[0], out[1 + i])


def int32(*shape):
    tensor = torch.full(shape, -7, dtype=torch.int32)
    return tensor, from_dlpack(tensor)


class Native:
    """the device functions compiled for the CPU, once"""

    def __init__(self):
        self.prefix, self._prefix = int32(MAX_BATCH + 1)
        self.cuts, self._cuts = int32(MAX_PARTS + 1, 4)
        self.candidates, self._candidates = int32(spans.NUM_CANDIDATES)
        self.bounds, self._bounds = int32(64)
        self.items, self._items = int32(MAX_BATCH + 1)
        self.pieces, self._pieces = int32(80)
        self._run_candidates = cute.compile(all_candidates, self._candidates, Int32(1), Int32(1))
        self._run_bounds = cute.compile(upper_bounds, self._prefix, self._bounds, Int32(1))
        self._run_cuts = {
            item_tiles: cute.compile(all_cuts, self._prefix, self._cuts, Int32(1), Int32(1), item_tiles)
            for item_tiles in (0, 1, 3, 5)
        }

        self._run_fill = cute.compile(filled_parts, self._prefix, self._items, self._cuts, Int32(1), Int32(1))
        self._run_limits = cute.compile(all_limits, self._candidates, Int32(1), Int32(1), Int32(1))
        self._run_pieces = {sizes: cute.compile(pieces_of, self._pieces, Int32(1), Int32(1), sizes) for sizes in PIECE_SIZES}

    def run_cuts(self, prefix, parts, item_tiles):
        self.prefix[: len(prefix)] = torch.tensor(prefix, dtype=torch.int32)
        self._run_cuts[item_tiles](self._prefix, self._cuts, len(prefix) - 1, parts)
        return self.cuts[: parts + 1, :2].tolist(), self.cuts[:parts, 2].tolist()

    def run_fill(self, prefix, pieces, limit, parts):
        """cuts, costs, partial results"""
        self.prefix[: len(prefix)] = torch.tensor(prefix, dtype=torch.int32)
        self.items[: len(pieces)] = torch.tensor(pieces, dtype=torch.int32)
        self._run_fill(self._prefix, self._items, self._cuts, len(prefix) - 1, limit)
        cuts = [tuple(cut) for cut in self.cuts[: parts + 1, :2].tolist()]
        return cuts, self.cuts[:parts, 2].tolist(), self.cuts[:parts, 3].tolist()

    def run_limits(self, total, max_parts, longest):
        self._run_limits(self._candidates, total, max_parts, longest)
        return self.candidates.tolist()

    def run_pieces(self, tiles, row_tiles, sizes):
        self._run_pieces[sizes](self._pieces, tiles, row_tiles)
        return self.pieces[: 3 + 2 * int(self.pieces[0])].tolist() if tiles else self.pieces[:1].tolist()

    def run_candidates(self, max_parts, total):
        self._run_candidates(self._candidates, max_parts, total)
        return self.candidates.tolist()

    def run_bounds(self, ascending):
        self.prefix[: len(ascending)] = torch.tensor(ascending, dtype=torch.int32)
        self._run_bounds(self._prefix, self._bounds, len(ascending))
        return self.bounds.tolist()


@pytest.fixture(scope="module")
def native():
    return Native()


@st.composite
def batches(draw):
    """(prefix, parts, item_tiles)"""
    item_tiles = draw(st.sampled_from([0, 1, 3, 5]))
    tiles = draw(st.lists(st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 100_000)), min_size=1, max_size=MAX_BATCH))
    prefix = [0]
    for n in tiles:
        prefix.append(prefix[-1] + (n + item_tiles if n else 0))
    return prefix, draw(st.integers(1, MAX_PARTS)), item_tiles


@hypothesis.given(batch=batches())
@hypothesis.settings(max_examples=500)
def test_cut_and_load_equal_the_twin(native, batch):
    prefix, parts, item_tiles = batch
    parts = max(1, min(parts, prefix[-1]))  # as `candidate` bounds it
    cuts, loads = native.run_cuts(prefix, parts, item_tiles)
    wanted = [schedule.cut(prefix, p, parts, item_tiles) for p in range(parts + 1)]
    assert cuts == [list(cut) for cut in wanted]
    assert loads == schedule.part_loads(prefix, wanted, item_tiles)


def test_cut_does_not_overflow(native):
    """the largest batch of the largest capacity: total * p would not fit 32 bits"""
    prefix = [i * (2**31 // MAX_BATCH - 1) for i in range(MAX_BATCH + 1)]
    cuts, _ = native.run_cuts(prefix, MAX_PARTS, 3)
    assert cuts == [list(schedule.cut(prefix, p, MAX_PARTS, 3)) for p in range(MAX_PARTS + 1)]


@hypothesis.given(max_parts=st.integers(1, 1023), total=st.one_of(st.integers(0, 2000), st.integers(0, 2**31 - 1)))
@hypothesis.settings(max_examples=500)
def test_candidates_equal_the_twin(native, max_parts, total):
    wanted = [schedule.candidate(i, max_parts, total) for i in range(schedule.NUM_CANDIDATES)]
    assert native.run_candidates(max_parts, total) == wanted
    assert all(1 <= parts <= max(1, min(max_parts, total)) for parts in wanted)


@hypothesis.given(ascending=st.lists(st.integers(-3, 70), min_size=1, max_size=MAX_BATCH).map(sorted))
def test_upper_bound_counts_the_entries_up_to_x(native, ascending):
    assert native.run_bounds(ascending) == [sum(entry <= x for entry in ascending) for x in range(64)]


def test_the_twin_tries_as_many_candidates():
    assert schedule.NUM_CANDIDATES == spans.NUM_CANDIDATES


@hypothesis.given(
    tiles=st.one_of(st.integers(0, 5000), st.integers(0, 2**25)),
    row_tiles=st.one_of(st.integers(1, 9), st.integers(1, 5000)),
    sizes=st.sampled_from(PIECE_SIZES),
)
@hypothesis.settings(max_examples=500)
def test_fixed_pieces_equal_the_twin(native, tiles, row_tiles, sizes):
    """up to the longest request, 2^31 tokens"""
    max_pieces, gain, piece_tiles = sizes
    config = ScheduleConfig(max_pieces=max_pieces, piece_gain=gain, piece_tiles=piece_tiles)
    num = schedule.num_pieces(tiles, row_tiles, config)
    wanted = [num, *(schedule.piece_edge(tiles, num, i) for i in range(num + 1)), *range(num + 1)] if tiles else [0]
    assert native.run_pieces(tiles, row_tiles, sizes) == wanted


@st.composite
def fixed_batches(draw):
    """(prefix, pieces before a request, most tiles of a piece, parts) of requests in 1 .. 32 pieces"""
    tiles = draw(st.lists(st.one_of(st.just(0), st.integers(1, 5), st.integers(1, 100_000)), min_size=1, max_size=MAX_BATCH))
    prefix, pieces, longest = [0], [0], 0
    for n in tiles:
        num = draw(st.integers(1, min(n, 32))) if n else 0
        prefix.append(prefix[-1] + (n + ITEM_TILES if n else 0))
        pieces.append(pieces[-1] + num)
        longest = max(longest, -(-n // num) if n else 0)
    return prefix, pieces, longest, draw(st.integers(1, MAX_PARTS))


def wanted_cuts(prefix, pieces, limit):
    """as Native.run_fill has them"""
    cuts, costs, splits = [(0, 0)], [], []
    while cuts[-1] != (len(prefix) - 1, 0):
        *cut, cost, split = schedule.next_cut(prefix, pieces, *cuts[-1], limit, ITEM_TILES)
        cuts.append(tuple(cut))
        costs.append(cost)
        splits.append(split)
    return cuts, costs, splits


@hypothesis.given(batch=fixed_batches(), i=st.integers(0, spans.NUM_CANDIDATES - 1))
@hypothesis.settings(max_examples=500)
def test_parts_up_to_a_limit_equal_the_twin(native, batch, i):
    prefix, pieces, longest, parts = batch
    limits = [schedule.limit_of(k, prefix[-1], parts, longest, ITEM_TILES) for k in range(spans.NUM_CANDIDATES)]
    assert native.run_limits(prefix[-1], parts, longest) == limits == sorted(limits)
    cuts, costs, _ = wanted = wanted_cuts(prefix, pieces, limits[i])
    hypothesis.assume(len(costs) <= MAX_PARTS)
    assert native.run_fill(prefix, pieces, limits[i], len(costs)) == wanted
    assert costs == schedule.part_loads(prefix, cuts, ITEM_TILES) and max(costs) <= limits[i] and cuts == sorted(set(cuts))


@hypothesis.given(batch=fixed_batches())
def test_the_last_limit_suffices(batch):
    prefix, pieces, longest, parts = batch
    limit = schedule.limit_of(spans.NUM_CANDIDATES - 1, prefix[-1], parts, longest, ITEM_TILES)
    assert len(wanted_cuts(prefix, pieces, limit)[0]) <= parts + 1


def test_limits_do_not_overflow(native):
    prefix, pieces, longest = [0, 2**31 - 1], [0, 32], 2**26
    for parts in (1, 2, MAX_PARTS):
        limits = native.run_limits(prefix[-1], parts, longest)
        assert limits == [schedule.limit_of(i, prefix[-1], parts, longest, ITEM_TILES) for i in range(spans.NUM_CANDIDATES)]
        cuts, costs, splits = wanted_cuts(prefix, pieces, limits[-1])
        assert native.run_fill(prefix, pieces, limits[-1], len(costs)) == (cuts, costs, splits)
