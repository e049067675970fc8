"""Which tiling and how many parts a problem gets."""

import pytest

from flashmla_cute import heuristics
from flashmla_cute.kernels.config import TILE, MLAConfig


@pytest.mark.parametrize(
    "s_q, h_q, h_kv, mergeable, head_tile",
    [
        (1, 128, 1, True, 0),
        (1, 128, 1, False, 0),  # one token: its stride does not matter
        (4, 16, 1, True, 0),
        (4, 16, 1, False, 16),
        (2, 128, 1, False, 64),
        (2, 5, 1, False, 8),
        (3, 1, 1, False, 1),
        (1, 128, 8, True, 64),
        (2, 128, 8, True, 16),
        (2, 63, 3, False, 32),
        (2, 8, 8, True, 1),
    ],
)
def test_head_tile(s_q, h_q, h_kv, mergeable, head_tile):
    assert heuristics.choose_head_tile(s_q, h_q, h_kv, mergeable) == head_tile


def test_every_choice_is_a_configuration_that_holds_all_rows():
    for s_q in (1, 2, 5, 64):
        for h_kv in (1, 2, 3, 7):
            for group in range(1, 200):
                for mergeable in (False, True):
                    head_tile = heuristics.choose_head_tile(s_q, group * h_kv, h_kv, mergeable)
                    MLAConfig(head_tile=head_tile)  # raises ValueError for one that does not exist
                    rows = heuristics.row_tiles(head_tile, s_q, group * h_kv, h_kv) * TILE
                    assert rows >= s_q * group * h_kv, (s_q, h_kv, group, mergeable)


@pytest.mark.parametrize("row_tiles, num_sms, parts", [(1, 132, 132), (2, 132, 66), (3, 132, 44), (5, 132, 26), (200, 132, 1)])
def test_max_parts(row_tiles, num_sms, parts):
    assert heuristics.max_parts(row_tiles, num_sms) == parts
    assert parts * row_tiles <= max(num_sms, row_tiles), "more CTAs than SMs"
