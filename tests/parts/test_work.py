"""kernels/parts/work.py: the records that travel with the items of a part."""

import random

import pytest

from flashmla_cute.kernels.config import DIMS, FORMATS, KVFormat, MLAConfig
from flashmla_cute.kernels.parts.work import record_slots

RINGS = sorted({MLAConfig(kv=KVFormat(dtype, *dims)).ring_slots for dtype in FORMATS for dims in DIMS} | {2})


def overwritten(tiles: list[int], ring_slots: int, records: int) -> bool:
    """Whether a record is written before the one in its place has been read.  The ring is filled as early as can be: a slot's
    next content is requested when it has been left, and everything is left as late as it can be."""
    contents = [(item, part) for item, count in enumerate(tiles) for part in ("q", *range(count))]
    held, read = {}, set()
    for n, (item, part) in enumerate(contents):
        if n >= ring_slots:
            left_item, left_part = contents[n - ring_slots]
            if left_part == 0:  # VALUE leaves an item's first tile: it has read the record
                read.add(left_item)
        if part == "q":
            before = held.get(item % records)
            if before is not None and before not in read:
                return True
            held[item % records] = item
    return False


@pytest.mark.parametrize("ring_slots", RINGS)
def test_no_record_is_overwritten_before_it_has_been_read(ring_slots):
    drawn = random.Random(ring_slots)
    short = [1] * 100
    mixed = [[drawn.choice((1, 1, 1, 2, 3, 20)) for _ in range(100)] for _ in range(200)]
    records = record_slots(ring_slots)
    assert not any(overwritten(tiles, ring_slots, records) for tiles in (short, *mixed))
    assert records & (records - 1) == 0


@pytest.mark.parametrize("ring_slots", [slots for slots in RINGS if slots > 3])
def test_two_records_are_too_few_for_deep_rings(ring_slots):
    """(as it was: random problems on a GPU, with many requests of one tile, found it)"""
    assert overwritten([1] * 100, ring_slots, 2)
