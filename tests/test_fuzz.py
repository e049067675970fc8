"""The fuzzer's bookkeeping, without a GPU."""

import json

import pytest
import torch

from flashmla_cute.testing import Errors

from . import fuzz
from .axes import COMPILED, Drawn


def test_a_run_is_made_again_by_its_seed():
    first, again = ([Drawn.of_seed(3, i, kernels=5) for i in range(20)] for _ in range(2))
    assert first == again and first != [Drawn.of_seed(4, i, kernels=5) for i in range(20)]


def test_a_run_has_as_many_kernels_as_it_is_given():
    compiled = [tuple(Drawn.of_seed(3, i, kernels=5).values[name] for name in sorted(COMPILED)) for i in range(40)]
    assert len(set(compiled)) <= 5 and compiled[:5] == compiled[5:10]


def test_needed_kernels_are_those_of_the_problems():
    """however long they are"""
    needed = fuzz.needed_kernels(3, 6)
    assert {op.name for op, _ in needed} <= {"decode", "schedule", "ragged_schedule"}
    dtypes = {Drawn.of_seed(3, i, 6).values["dtype"] for i in range(6)}
    assert {f"torch.{config.kv.dtype}" for op, config in needed if op.name == "decode"} == set(map(str, dtypes))


def test_tally():
    tally, drawn = fuzz.Tally(), Drawn.of_seed(0, 0, kernels=1)
    tally.add(drawn, Errors(1e-3, 1e-6, ""), "")
    tally.add(drawn, Errors(0.5, 1e-6, ""), "")
    tally.add(drawn, Errors(float("inf"), float("inf"), "request 3: not finite"), "")
    tally.add(drawn, None, "exit code -11")
    assert (tally.cases, tally.failures) == (4, 3)
    assert [failure["reason"] for failure in tally.failed] == [
        "rel 5.00e-01, lse 1.00e-06",
        "request 3: not finite",
        "exit code -11",
    ]
    assert max(tally.rel.values()) == 0.5 and json.dumps(tally.failed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where every problem fails")
def test_a_process_that_dies_is_replaced():
    """without a GPU each problem raises, and ends its process"""
    tally = fuzz.run(cases=3, seed=0, kernels=3, num_workers=2)
    assert (tally.cases, tally.failures) == (3, 3)
    assert len({failure["case"] for failure in tally.failed}) == 3
