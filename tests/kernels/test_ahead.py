"""What a decode CTA reads before the kernels before it have ended may be anything: results must not depend on it."""

import random

import pytest
import torch

from flashmla_cute.testing import Case, Problem

from ..problems import check, clone, same_bits

pytestmark = pytest.mark.gpu

CASES = [Case((4096,), 128), Case((64, 1, 700), 16), Case((300, 0, 65, 9000), 40), Case((1000,) * 40, 16)]


def launch_behind(problem: Problem, plan, records: torch.Tensor):
    """writes `records` where the plan's are, then schedule and decode with nothing between them"""
    plan.parts.copy_(records)
    plan.update()
    return clone(problem.run(plan))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_records_before_the_schedule(record, case):
    """nonsense, other parts' records, and the right ones"""
    problem, generator = Problem.make(case), torch.Generator("cuda").manual_seed(1)
    plan = problem.plan()
    check(problem, record, plan=plan)
    wanted, true = clone((problem.out, problem.lse)), plan.parts.clone()
    for limit in (1 << 31, 1 << 16, 64, 2):
        nonsense = torch.randint(-limit, limit - 1, true.shape, generator=generator, device="cuda", dtype=torch.int64)
        assert same_bits(launch_behind(problem, plan, nonsense.int()), wanted), f"records up to {limit}"
    for records in (true.roll(1, 0), true.flip(0), true + 1, torch.full_like(true, (1 << 31) - 1), true):
        assert same_bits(launch_behind(problem, plan, records), wanted)


def test_a_graph_over_changing_lengths_and_tables():
    """each replay's CTAs guess from the replay before"""
    drawn, longest = random.Random(4), (4096, 900, 70)
    problem = Problem.make(Case(longest, 16))
    table, lengths, seqlens = problem.cache.block_table, list(longest), problem.cache.cache_seqlens
    plan, graph = problem.plan(), torch.cuda.CUDAGraph()
    problem.run(plan)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        plan.update()
        problem.run(plan)
    for step in range(8):
        if step == 4:  # the same tokens on other pages
            order = torch.randperm(problem.cache.pool.shape[0], device="cuda")
            valid = (table >= 0) & (table < len(order))
            moved = torch.where(valid, order[table.clamp(0, len(order) - 1).long()].int(), table)
            problem.cache.pool[order] = problem.cache.pool.clone()
            table.copy_(moved)
        lengths = [drawn.randrange(1, most + 1) for most in longest]
        seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        replayed = clone((problem.out, problem.lse))
        fresh = problem.plan()
        assert same_bits(clone(problem.run(fresh)), replayed), f"step {step}, lengths {lengths}"
