"""FlashMLA-CuTe behind the peers' signature (perf/peers/__init__.py): measured by the same code as they are."""

import torch

from flashmla_cute import DecodePlan, PagedKVCache, mla_decode

from .problem import Problem
from .roofline import LATENT

NAME = "flashmla_cute"


def prepare(problem: Problem) -> "Ours":
    return Ours(problem)


class Ours:
    launch_with_schedule = None

    def __init__(self, problem: Problem, **plan_options):
        self.problem, row, q = problem, problem.row, problem.q
        scale = problem.kv_scale if row.is_fp8 and not row.is_scaled else None
        make = lambda pool: PagedKVCache.from_tensors(pool, problem.block_table, problem.cache_seqlens, scale=scale)
        self.caches = {pool.data_ptr(): make(pool) for pool in problem.pools}
        self.plan = DecodePlan(self.caches[problem.pools[0].data_ptr()], row.h_q, row.s_q, **plan_options)
        self.out = torch.empty(*q.shape[:-1], LATENT, dtype=q.dtype, device=q.device)
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
