"""The schedule's Python twin: what every schedule must fulfil, and batches whose best schedule is known."""

from dataclasses import replace
from itertools import pairwise

import pytest

from flashmla_cute import schedule
from flashmla_cute.kernels.config import BATCH_INVARIANT, TILE, ScheduleConfig
from flashmla_cute.schedule import NO_LIMIT, Item, Merge, build_schedule
from perf.workloads import LogNormal

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

CONFIG = ScheduleConfig(item_tiles=3, tile_cost=20)
INVARIANT = replace(CONFIG, max_pieces=32)
lengths_of = st.lists(st.one_of(st.just(0), st.integers(0, 300), st.integers(0, 70000)), min_size=1, max_size=80)


cost_models = st.builds(ScheduleConfig, item_tiles=st.integers(0, 6), tile_cost=st.integers(0, 60))
fixed_pieces = st.builds(
    ScheduleConfig,
    item_tiles=st.integers(0, 6),
    max_pieces=st.integers(1, 32),
    piece_gain=st.integers(1, 256),
    piece_tiles=st.integers(1, 500),
    runs=st.integers(0, 1),
)

every_config = st.one_of(cost_models, fixed_pieces)


@st.composite
def problems(draw, configs=every_config):
    """(lengths, row_tiles, max_parts, config, max_tokens, reach)"""
    max_tokens, reach = draw(st.sampled_from([64, 450, 19_200, NO_LIMIT])), draw(st.sampled_from([NO_LIMIT, 1, 100, 1000]))
    return draw(lengths_of), draw(st.integers(1, 8)), draw(st.integers(1, 140)), draw(configs), max_tokens, reach


def spans_of(lengths, max_tokens, reach):
    """(first, end) of the tiles that are seen"""
    cut = [min(length, max_tokens) for length in lengths]
    return [(max(length - reach, 0) // TILE, -(-length // TILE)) for length in cut]


def tiles_of(lengths, max_tokens, reach):
    return [end - first for first, end in spans_of(lengths, max_tokens, reach)]


def prefix_of(tiles, item_tiles):
    prefix = [0]
    for n in tiles:
        prefix.append(prefix[-1] + (n + item_tiles if n else 0))
    return prefix


def slots_of(item):
    """of the partial results of its pieces"""
    return [] if item.joins else [item.slot + i for i in range(len(item.edges) - 1)]


def part_cost(items, item_tiles):
    return sum(item.end - item.first + item_tiles for item in items)


@hypothesis.given(problems())
def test_every_tile_once_and_in_order(problem):
    lengths, _, _, _, max_tokens, reach = problem
    items = build_schedule(*problem).items
    tiles = [(item.batch, tile) for item in items for tile in range(item.first, item.end)]
    if problem[3].max_pieces:  # (requests of one piece fill up the parts of those of several)
        tiles.sort()
    assert tiles == [(i, tile) for i, span in enumerate(spans_of(lengths, max_tokens, reach)) for tile in range(*span)]
    assert all(item.first < item.end for item in items)
    assert all(item.seqlen == min(lengths[item.batch], max_tokens) for item in items)


@hypothesis.given(problems())
def test_parts_are_consecutive_items(problem):
    _, _, max_parts, _, _, _ = problem
    plan = build_schedule(*problem)
    assert len(plan.part_begin) == max_parts + 1
    assert plan.part_begin[0] == 0 and plan.part_begin[-1] == len(plan.items)
    assert list(plan.part_begin) == sorted(plan.part_begin)
    assert not any(plan.part(p) for p in range(plan.num_parts, max_parts))


@hypothesis.given(problems())
def test_pieces_have_slots_of_their_own_and_are_merged(problem):
    lengths, row_tiles, max_parts, config, max_tokens, reach = problem
    plan = build_schedule(*problem)
    slots = [slot for item in plan.items for slot in slots_of(item) if slot >= 0]
    slots += {item.slot for item in plan.items if item.joins}  # of a part, for all its items
    assert len(set(slots)) == len(slots)
    sizes = len(lengths), row_tiles, max_parts, max(tiles_of(lengths, max_tokens, reach)), config
    assert all(0 <= slot < schedule.num_slots(*sizes) for slot in slots)
    assert len(plan.items) <= schedule.num_items(*sizes)
    items = {i: [item for item in plan.items if item.batch == i] for i in range(len(lengths))}
    pieces = {i: [slot for item in mine for slot in slots_of(item)] for i, mine in items.items()}
    assert all((slot < 0) == (len(mine) == 1) for mine in pieces.values() for slot in mine)
    merged = {merge.batch: merge.slots() for merge in plan.merges}
    assert len(merged) == len(plan.merges)
    gathered = {i for i, mine in items.items() if any(item.joins for item in mine)}
    wanted = {i: mine for i, mine in pieces.items() if len(mine) != 1 and i not in gathered}
    assert merged == wanted  # split requests in the order of their pieces; a request without tokens merges nothing


@hypothesis.given(problems(cost_models))
def test_no_two_pieces_of_a_request_in_one_part(problem):
    plan = build_schedule(*problem)
    for p in range(plan.num_parts):
        batches = [item.batch for item in plan.part(p)]
        assert len(set(batches)) == len(batches)


@hypothesis.given(problems(cost_models))
def test_load_balance(problem):
    """Cuts lie ceil(total / parts) apart at most.  Moving to a request's edge takes one at most snap - 1 on, or
    snap - 1 + item_tiles back (over the edge's own item), and a part that begins inside a request pays for one item more:
    so no part is longer than the mean, rounded up, + item_tiles + 2 (snap - 1)."""
    lengths, _, _, config, max_tokens, reach = problem
    plan = build_schedule(*problem)
    total = prefix_of(tiles_of(lengths, max_tokens, reach), config.item_tiles)[-1]
    snap = max(min(total // plan.num_parts // 8, config.item_tiles), 1)
    longest = max(part_cost(plan.part(p), config.item_tiles) for p in range(plan.num_parts))
    assert longest <= -(-total // plan.num_parts) + config.item_tiles + 2 * (snap - 1)


@hypothesis.given(problems(cost_models))
def test_chooses_the_cheapest_candidate(problem):
    """its cost, counted on the items it lists, is that of no other number of parts beaten"""
    lengths, row_tiles, max_parts, config, max_tokens, reach = problem
    plan = build_schedule(*problem)
    prefix = prefix_of(tiles_of(lengths, max_tokens, reach), config.item_tiles)

    def cost_of(parts):
        cuts = [schedule.cut(prefix, p, parts, config.item_tiles) for p in range(parts + 1)]
        longest = max(schedule.part_loads(prefix, cuts, config.item_tiles))
        return longest * config.tile_cost + schedule.count_pieces(cuts) * row_tiles

    longest = max(part_cost(plan.part(p), config.item_tiles) for p in range(plan.num_parts))
    pieces = sum(item.slot >= 0 for item in plan.items)
    most = prefix[-1] - config.item_tiles
    tried = [schedule.candidate(i, max_parts, most) for i in range(schedule.NUM_CANDIDATES)]
    assert longest * config.tile_cost + pieces * row_tiles == min(map(cost_of, tried))
    assert max_parts in tried or most < max_parts


@pytest.mark.parametrize("requests_per_part", [1, 2, 5])
def test_a_uniform_batch_that_divides_evenly_is_not_split(requests_per_part):
    lengths = [4096] * (66 * requests_per_part)
    plan = build_schedule(lengths, row_tiles=2, max_parts=66, config=CONFIG)
    assert plan.merges == ()
    assert [len(plan.part(p)) for p in range(66)] == [requests_per_part] * 66


def test_one_long_request_is_split_over_all():
    tiles = 132 * 50 - CONFIG.item_tiles
    plan = build_schedule([tiles * TILE], row_tiles=1, max_parts=132, config=CONFIG)
    assert plan.num_parts == 132 and [len(plan.part(p)) for p in range(132)] == [1] * 132
    assert plan.merges == (Merge(0, 0, 132),)
    assert {item.end - item.first for item in plan.items} == {49, 50}  # evenly: every part pays for its own item


@pytest.mark.parametrize("length", [1, 63, 64])
def test_a_single_tile_is_not_split(length):
    plan = build_schedule([length], row_tiles=1, max_parts=132, config=CONFIG)
    assert plan.items == (Item(0, 0, 1, -1, length),) and plan.merges == ()


def test_one_part_never_splits():
    plan = build_schedule([70, 0, 4096, 1], row_tiles=4, max_parts=1, config=CONFIG)
    assert plan.items == (Item(0, 0, 2, -1, 70), Item(2, 0, 64, -1, 4096), Item(3, 0, 1, -1, 1))
    assert plan.part_begin == (0, 3) and plan.merges == (Merge(1, 0, 0),)


def test_requests_without_tokens_have_no_items_and_one_empty_merge():
    plan = build_schedule([0, 0, 0], row_tiles=1, max_parts=4, config=CONFIG)
    assert plan.items == () and plan.part_begin == (0,) * 5
    assert plan.merges == (Merge(0, 0, 0), Merge(1, 0, 0), Merge(2, 0, 0))


def test_a_length_beyond_the_table_is_cut_to_it():
    plan = build_schedule([1000, 70], row_tiles=1, max_parts=1, config=CONFIG, max_tokens=192)
    assert plan.items == (Item(0, 0, 3, -1, 192), Item(1, 0, 2, -1, 70))


def test_more_pieces_cost_more_row_tiles():
    """the same request in fewer pieces when each of them is merged for more rows"""
    pieces = [len(build_schedule([8192], row_tiles=n, max_parts=66, config=CONFIG).items) for n in (1, 4, 16, 64)]
    assert pieces == sorted(pieces, reverse=True) and pieces[-1] < pieces[0]


# ---------------------------------------------------------------------- batch-invariant
def pieces_of(plan, request):
    """(first, end) of the request's pieces, and whether they have partial results"""
    mine = [item for item in plan.items if item.batch == request]
    return [(first, end, item.slot >= 0) for item in mine for first, end in pairwise(item.edges)]


@hypothesis.given(problems(fixed_pieces), st.data())
def test_a_request_is_cut_by_its_length_alone(problem, data):
    lengths, row_tiles, _, config, max_tokens, reach = problem
    plan = build_schedule(*problem)
    for i, length in enumerate(lengths):
        others = data.draw(lengths_of)
        at = data.draw(st.integers(0, len(others)))
        batch = [*others[:at], length, *others[at:]]
        other = build_schedule(batch, row_tiles, data.draw(st.integers(1, 140)), config, max_tokens, reach)
        assert pieces_of(plan, i) == pieces_of(other, at)


@hypothesis.given(problems(fixed_pieces))
def test_fixed_pieces_are_even_and_as_many_as_documented(problem):
    lengths, row_tiles, _, config, max_tokens, reach = problem
    plan = build_schedule(*problem)
    for i, n in enumerate(tiles_of(lengths, max_tokens, reach)):
        sizes = [end - first for first, end, _ in pieces_of(plan, i)]
        assert not n or (sizes[0] - sizes[-1] <= 1 and sizes == sorted(sizes, reverse=True))
        enough = lambda k, n=n: k * k * 32 * row_tiles <= config.piece_gain * n or k * config.piece_tiles <= n
        allowed = [k for k in range(1, min(n // 2, config.max_pieces) + 1) if enough(k)]
        assert len(sizes) == max(allowed, default=min(n, 1))


@hypothesis.given(problems(fixed_pieces))
def test_load_balance_of_whole_pieces(problem):
    """no part costs more than the largest limit that is tried"""
    max_parts, item_tiles = problem[2], problem[3].item_tiles
    plan = build_schedule(*problem)
    items = {item.batch for item in plan.items}
    pieces = [end - first for i in items for first, end, _ in pieces_of(plan, i)]
    sizes = sum(pieces) + len(pieces) + item_tiles * len(items), max_parts, max(pieces, default=-1) + 1, item_tiles
    assert max(span_cost(plan.part(p), item_tiles) for p in range(plan.num_parts)) <= schedule.limit_of(31, *sizes)


def span_cost(items, item_tiles):
    """of a part in the cost model: an item for each request, a tile for each piece"""
    tiles = sum(item.end - item.first + len(item.edges) - 1 for item in items)
    return tiles + item_tiles * len({item.batch for item in items})


@pytest.mark.parametrize("row_tiles, parts, gap", [(1, 132, 1.15), (2, 66, 1.08)])
def test_short_requests_fill_up_what_the_pieces_of_long_ones_leave(row_tiles, parts, gap):
    lengths, config = LogNormal(2048, 65536).draw(128), replace(BATCH_INVARIANT, runs=1)
    plan = build_schedule(lengths, row_tiles, parts, config)
    costs = [span_cost(plan.part(p), config.item_tiles) for p in range(parts)]
    assert max(costs) < gap * sum(costs) / parts


@pytest.mark.parametrize("batch, length, row_tiles, parts", [(16, 4096, 2, 66), (16, 4096, 1, 132), (64, 4096, 2, 66)])
def test_equal_requests_in_fixed_pieces_fill_the_card(batch, length, row_tiles, parts):
    plan = build_schedule([length] * batch, row_tiles, parts, INVARIANT)
    counts = [sum(len(item.edges) - 1 for item in plan.part(p)) for p in range(parts)]
    assert max(counts) == -(-sum(counts) // parts)


@hypothesis.given(problems(fixed_pieces))
def test_a_request_joins_its_pieces_where_it_is_whole(problem):
    """over its part's own slot"""
    config, plan = problem[3], build_schedule(*problem)
    part_of = [p for p in range(plan.num_parts) for _ in plan.part(p)]
    for i in {item.batch for item in plan.items}:
        items = [(p, item) for p, item in zip(part_of, plan.items) if item.batch == i]
        sizes = [end - first for first, end, _ in pieces_of(plan, i)]
        wanted = len(items) == 1 < len(sizes) and config.runs > 0
        assert [item.joins for _, item in items] == [wanted] * len(items)
        assert not wanted or items[0][0] == items[0][1].slot


@pytest.mark.parametrize("row_tiles, wanted", [(1, 4), (2, 3), (4, 2), (8, 1), (5000, 1)])
def test_more_row_tiles_take_fewer_pieces(row_tiles, wanted):
    assert schedule.num_pieces(64, row_tiles, INVARIANT) == wanted


@pytest.mark.parametrize(
    "field, value", [("max_pieces", -1), ("max_pieces", 33), ("piece_gain", 0), ("piece_gain", 257), ("piece_tiles", 0)]
)
def test_sizes_that_would_overflow_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; allowed: "):
        ScheduleConfig(**{field: value})
