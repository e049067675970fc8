"""FlashMLA-CuTe behind the peers' signature (perf/peers/__init__.py): measured by the same code as they are."""

import torch

from flashmla_cute import DecodePlan, PagedKVCache, mla_decode

from .peers import need
from .problem import Problem
from .roofline import LATENT

NAME = "flashmla_cute"


def prepare(problem: Problem) -> "Ours":
    return Ours(problem)


def prepare_one_term(problem: Problem) -> "Ours":
    """the default with the low term of q dropped"""
    need(problem.row.dtype == "float8_e4m3fn", f"{problem.row.dtype}: no terms of q")
    mine = Ours(problem, query_terms=1)
    mine.tolerance = 6e-2, 1.5e-1  # as in the tests: 3 bits of mantissa are left of q
    mine.note = "q in one term; checked with a tolerance of its own, out 6e-2, lse 1.5e-1"
    return mine


def prepare_e4m3_q(problem: Problem) -> "Ours":
    need(problem.row.dtype == "float8_e4m3fn", f"{problem.row.dtype}: q in e4m3 needs a cache in it")
    mine = Ours(problem.with_e4m3_q())
    mine.note = "q in e4m3, quantised before the timing"
    return mine


def prepare_bf16_cache(problem: Problem) -> "Ours":
    need(problem.row.is_fp8, f"{problem.row.dtype}: the row itself")
    mine = Ours(problem.with_bf16_cache())
    mine.note = "over a bf16 cache of as many tokens"
    return mine


# what else an e4m3 row may be decoded with (perf.bench --variants)
VARIANTS = {
    f"{NAME}_one_term": prepare_one_term,
    f"{NAME}_e4m3_q": prepare_e4m3_q,
    f"{NAME}_bf16_cache": prepare_bf16_cache,
}


class Ours:
    launch_with_schedule = tolerance = note = None

    def __init__(self, problem: Problem, **plan_options):
        self.problem, row, q = problem, problem.row, problem.q
        scale = problem.kv_scale if row.is_fp8 and not row.is_scaled else None
        scales = {"scale": scale, "q_scale": problem.q_scale}
        make = lambda pool: PagedKVCache.from_tensors(pool, problem.block_table, problem.cache_seqlens, **scales)
        self.caches = {pool.data_ptr(): make(pool) for pool in problem.pools}
        self.plan = DecodePlan(self.caches[problem.pools[0].data_ptr()], row.h_q, row.s_q, **plan_options)
        out_dtype = q.dtype if problem.q_scale is None else torch.bfloat16
        self.out = torch.empty(*q.shape[:-1], LATENT, dtype=out_dtype, device=q.device)
        self.lse = torch.empty(row.b, row.h_q, row.s_q, dtype=torch.float32, device=q.device)

    def schedule(self):
        self.plan.update()

    def launch(self, pool: torch.Tensor):
        p = self.problem
        mla_decode(
            p.q,
            self.caches[pool.data_ptr()],
            self.plan,
            softmax_scale=p.softmax_scale,
            causal=p.row.causal,
            out=self.out,
            lse=self.lse,
        )

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.out, self.lse
