"""The smallest case of each kernel: the first thing to run on a new machine, in a few seconds."""

import pytest
import torch

from flashmla_cute import PagedKVCache
from flashmla_cute.kernels.config import TILE
from flashmla_cute.testing import Case, Problem

from .kernels.test_schedule import assert_equals_twin, make_plan
from .problems import check, num_split, plan_of_parts

pytestmark = pytest.mark.gpu


def test_schedule():
    lengths = [5000, 0, 70]
    assert_equals_twin(make_plan(lengths, 16, 1), lengths)


def test_decode(record):
    problem = Problem.make(Case((20,), h_q=16))
    plan = problem.plan()
    check(problem, record, plan=plan)
    assert num_split(plan) == 0


def test_decode_with_a_split_and_its_merge(record):
    problem = Problem.make(Case((500, 0), h_q=16))
    plan = plan_of_parts(problem, 3)
    check(problem, record, plan=plan)
    assert num_split(plan) == 1


def test_append():
    cache = PagedKVCache.allocate(2, 1, 100)
    rows = torch.randn(70, 576, device="cuda").bfloat16()
    cache.append(rows[:, :512], rows[:, 512:], cache.extend([70]))
    assert torch.equal(cache.pool[cache.block_table[0].long()].view(-1, 576)[:70], rows)
    assert cache.block_table.shape == (1, 2) and cache.page == TILE
