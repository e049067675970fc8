"""The smallest case of each kernel, checked, for compute-sanitizer to watch: see test_sanitizer.py.

`--lanes` runs the decode kernel's debug configuration, in which every writing lane arrives at the barriers.
"""

import argparse
from dataclasses import replace
from unittest import mock

import torch

from flashmla_cute import DecodePlan, PagedKVCache, compile, ops
from flashmla_cute.kernels.parts.work import BEGIN
from flashmla_cute.schedule import build_schedule
from flashmla_cute.testing import Case, Problem

CASES = {
    "direct, one full tile": Case((64,), h_q=64),
    "direct, tail page, empty request": Case((70, 0, 1), h_q=16),
    "split and merged": Case((900, 200), h_q=16),
    "two query tokens, causal": Case((130, 1), h_q=16, s_q=2),
}
DONE = "all cases agree with float64"


def with_lane_arrivals(get):
    """compile.get, but of decode's debug configuration"""
    debug = lambda op, config: replace(config, lane_arrivals=True) if op is ops.DecodeOp else config
    return lambda op, config: get(op, debug(op, config))


def decode(name: str, case: Case):
    problem = Problem.make(case)
    plan = problem.plan()
    plan.parts = plan.parts[:4]  # few CTAs: each is slow here
    plan.update()
    out, lse = problem.run(plan)
    errors = problem.errors(out, lse)
    assert errors.within(case.dtype), f"{name}: {errors}"
    print(f"{name}: {errors}")


def schedule():
    lengths = [900, 0, 70, 64] * 300
    pool, table = torch.empty(1, 64, 1, 576).bfloat16().cuda(), torch.zeros(len(lengths), 20, dtype=torch.int32, device="cuda")
    seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    plan = DecodePlan(PagedKVCache.from_tensors(pool, table, seqlens), 64)
    wanted = build_schedule(lengths, plan.row_tiles, plan.max_parts, plan.config, 20 * 64)
    assert tuple(plan.parts[:, BEGIN].tolist()) == wanted.part_begin[:-1]
    assert plan.merges[0, 0].item() == len(wanted.merges)


def append():
    cache = PagedKVCache.allocate(3, 2, 100)
    rows = torch.randn(71, 576, device="cuda").bfloat16()
    slots = torch.cat([cache.extend([69, 1]), torch.tensor([-1], device="cuda")])
    cache.append(rows[:, :512], rows[:, 512:], slots)
    assert torch.equal(cache.pool.view(-1, 576)[slots[:-1]], rows[:-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lanes", action="store_true")
    get = compile.get
    with mock.patch.object(compile, "get", with_lane_arrivals(get) if parser.parse_args().lanes else get):
        for name, case in CASES.items():
            decode(name, case)
        schedule()
        append()
    torch.cuda.synchronize()
    print(DONE)


if __name__ == "__main__":
    main()
