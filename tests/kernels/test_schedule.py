"""The schedule kernel against its Python twin, record by record."""

import random
from dataclasses import fields
from itertools import pairwise

import pytest
import torch

from flashmla_cute import DecodePlan, PagedKVCache
from flashmla_cute.kernels.config import BATCH_INVARIANT, TILE, ScheduleConfig
from flashmla_cute.kernels.parts.work import BEGIN, COUNT, MERGE_GROUPS, RECORD
from flashmla_cute.schedule import Item, Merge, Schedule, build_schedule

pytestmark = pytest.mark.gpu

BATCHES = (1, 2, 3, 8, 31, 33, 66, 131, 132, 133, 264, 1000, 1023, 1024, 1025, 2000)
SHAPES = ((16, 1), (128, 1), (128, 2), (200, 3))  # (heads, query tokens): 1, 2, 4, 10 row tiles
CONFIGS = {"balanced": ScheduleConfig(), "batch-invariant": BATCH_INVARIANT}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
KINDS = {
    "any": lambda r: r.randrange(0, 5000),
    "short": lambda r: r.randrange(0, 130),
    "one tile": lambda r: r.randrange(1, 65),
    "mostly empty": lambda r: r.randrange(1, 9000) * (r.random() < 0.05),
    "a few giants": lambda r: r.randrange(0, 100) if r.random() < 0.97 else r.randrange(50_000, 200_000),
    "negative ones": lambda r: r.randrange(-100, 300),
    "equal": lambda r: 4096,
    "all empty": lambda r: 0,
}


def make_plan(lengths: list[int], num_heads: int, num_queries: int, max_pages: int = 4000, **options) -> DecodePlan:
    """(the schedule reads neither pages nor the block table's entries)"""
    pool = torch.empty(1, TILE, 1, 576, dtype=torch.bfloat16, device="cuda")
    table = torch.empty(1, max_pages, dtype=torch.int32, device="cuda").expand(len(lengths), -1)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    invariant = options.get("config", CONFIGS["balanced"]).max_pieces > 0
    cache = PagedKVCache.from_tensors(pool, table, seqlens)
    plan = DecodePlan(cache, num_heads, num_queries, batch_invariant=invariant, **options)
    poison(plan)
    plan.update()
    return plan


def poison(plan: DecodePlan):
    for tensor in (plan.items, plan.parts, plan.merges):
        tensor.fill_(-77)


def read(plan: DecodePlan) -> Schedule:
    """what the device wrote"""
    parts, merges = plan.parts.tolist(), plan.merges.tolist()
    part_begin = [*(part[BEGIN] for part in parts), parts[-1][BEGIN] + parts[-1][COUNT]]
    records = plan.items[: part_begin[-1]].tolist()
    assert len(fields(Item)) == RECORD
    for part in parts:  # its items, and a copy of the first
        assert part[:RECORD] == records[part[BEGIN]] if part[COUNT] else part[COUNT] == 0
    assert [part[COUNT] for part in parts] == [end - begin for begin, end in pairwise(part_begin)]
    items = tuple(Item(*record[: len(fields(Item))]) for record in records)
    assert merges[0][1:] == [1 if plan.config.max_pieces else MERGE_GROUPS, -77, -77]
    listed = tuple(Merge(*row) for row in merges[1 : 1 + merges[0][0]])
    return Schedule(items, tuple(part_begin), listed, sum(part[COUNT] > 0 for part in parts))


def assert_equals_twin(plan: DecodePlan, lengths: list[int]):
    found = read(plan)
    begins = None if plan.cu_seqlens_q is None else plan.cu_seqlens_q.tolist()
    wanted = build_schedule(lengths, plan.row_tiles, plan.max_parts, plan.config, plan.capacity, plan.reach, begins)
    for name in ("part_begin", "merges", "items"):
        some, others = getattr(found, name), getattr(wanted, name)
        differ = next((i for i, (a, b) in enumerate(zip(some, others)) if a != b), min(len(some), len(others)))
        where = f"{name}[{differ}]: {some[differ : differ + 1]}, the twin has {others[differ : differ + 1]}"
        assert some == others, f"{where}\n{lengths}, {plan.row_tiles} row tiles, {plan.max_parts} parts"


@every_config
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_twin(kind, config):
    for seed, batch in enumerate(BATCHES):
        drawn = random.Random(seed)
        lengths = [KINDS[kind](drawn) for _ in range(batch)]
        heads, queries = SHAPES[seed % len(SHAPES)]
        assert_equals_twin(make_plan(lengths, heads, queries, config=config), lengths)


@every_config
def test_many_small_batches(config):
    drawn = random.Random(1)
    for _ in range(300):
        lengths = [drawn.choice((0, 1, 64, 65, drawn.randrange(20_000))) for _ in range(drawn.randrange(1, 20))]
        heads, queries = drawn.choice(SHAPES)
        assert_equals_twin(make_plan(lengths, heads, queries, config=config), lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_as_items(kind):
    """as where the decode kernel does not join them: float32 partials"""
    drawn = random.Random(6)
    for heads, batch in ((16, 1), (128, 40), (16, 300)):
        lengths = [KINDS[kind](drawn) for _ in range(batch)]
        assert_equals_twin(make_plan(lengths, heads, 1, config=BATCH_INVARIANT, partials=torch.float32), lengths)


@pytest.mark.parametrize("max_pieces, piece_gain", [(1, 1), (5, 1), (32, 32)])
def test_other_fixed_pieces(max_pieces, piece_gain):
    config, drawn = ScheduleConfig(max_pieces=max_pieces, piece_gain=piece_gain), random.Random(5)
    for batch in (1, 7, 132, 300):
        lengths = [drawn.randrange(0, 9000) for _ in range(batch)]
        assert_equals_twin(make_plan(lengths, 128, 1, config=config), lengths)


@pytest.mark.parametrize("item_tiles, tile_cost", [(0, 20), (1, 1), (5, 0), (3, 1000)])
def test_other_cost_models(item_tiles, tile_cost):
    config, drawn = ScheduleConfig(item_tiles=item_tiles, tile_cost=tile_cost), random.Random(2)
    for batch in (1, 7, 132, 300):
        lengths = [drawn.randrange(0, 9000) for _ in range(batch)]
        assert_equals_twin(make_plan(lengths, 128, 1, config=config), lengths)


def test_lengths_beyond_the_table_are_cut_to_it():
    lengths = [10_000, 130, 128, 129, 2**31 - 64, 0]
    plan = make_plan(lengths, 16, 1, max_pages=2)
    assert_equals_twin(plan, lengths)
    assert {item.batch: item.seqlen for item in read(plan).items} == {0: 128, 1: 128, 2: 128, 3: 128, 4: 128}


@every_config
def test_the_largest_batch(config):
    drawn, batch = random.Random(3), ScheduleConfig().max_batch
    lengths = [drawn.randrange(0, 300) for _ in range(batch)]
    assert_equals_twin(make_plan(lengths, 16, 1, max_pages=5, config=config), lengths)
    with pytest.raises(ValueError, match=f"cache.batch is {batch + 1}; allowed: up to {batch}"):
        make_plan([1] * (batch + 1), 16, 1)


@every_config
def test_more_row_tiles_than_sms(config):
    lengths = [1000, 0, 70]
    plan = make_plan(lengths, 128, 100, config=config)
    assert plan.max_parts == 1
    assert_equals_twin(plan, lengths)


@every_config
def test_a_graph_replays_it_for_other_lengths(config):
    drawn, batch = random.Random(4), 100
    plan = make_plan([64] * batch, 128, 1, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update()
    for kind in KINDS.values():
        lengths = [kind(drawn) for _ in range(batch)]
        plan.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        poison(plan)
        graph.replay()
        assert_equals_twin(plan, lengths)
