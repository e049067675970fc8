"""GPU problems over e4m3 caches, made from those of tests/problems.py and held to float64 on what the cache stands for."""

from dataclasses import dataclass, replace

import torch

from flashmla_cute import DecodePlan, PagedKVCache
from flashmla_cute.reference import dequantise, pack, quantise, unpack
from flashmla_cute.testing import TOLERANCE, Case, Errors, Problem

E4M3 = torch.float8_e4m3fn
SCALE = 1 / 64  # of the cache: randn stays within +-7, which e4m3 at this scale ends at


@dataclass
class Fp8Problem(Problem):
    pool64: torch.Tensor | None = None  # what the cache stands for
    query_terms: int = 2

    @classmethod
    def of(cls, problem: Problem, q_dtype: torch.dtype | None = None, query_terms: int = 2) -> "Fp8Problem":
        """`problem` with its cache in e4m3, NaN where it was, and q as it is or in e4m3"""
        cache, q, q_scale = problem.cache, problem.q, None
        pool = quantise(cache.pool, SCALE)
        if q_dtype == E4M3:
            q_scale = q.float().abs().max().item() / 448 or 1.0
            q = quantise(q, q_scale)
        moved = PagedKVCache.from_tensors(pool, cache.block_table, cache.cache_seqlens, scale=SCALE, q_scale=q_scale)
        pool64 = dequantise(pool, moved.scale)
        return cls(problem.case, q, moved, problem.out, problem.lse, problem.sink, pool64, query_terms)

    @property
    def true_q(self) -> torch.Tensor:
        return self.q.double() * self.cache.q_scale.double() if self.q.dtype == E4M3 else self.q

    @property
    def true_pool(self) -> torch.Tensor:
        return self.pool64

    def plan(self, **arguments) -> DecodePlan:
        return super().plan(query_terms=self.query_terms, **arguments)

    def with_pool(self, pool: torch.Tensor) -> "Fp8Problem":
        """the same numbers in other memory"""
        cache, scales = self.cache, dict(scale=self.cache.scale, q_scale=self.cache.q_scale)
        return replace(self, cache=PagedKVCache.from_tensors(pool, cache.block_table, cache.cache_seqlens, **scales))


@dataclass
class ScaledProblem(Problem):
    """over tokens with scales of their own"""

    pool64: torch.Tensor | None = None

    @classmethod
    def of(cls, problem: Problem, scales: int = 4) -> "ScaledProblem":
        """`problem` with its cache in 656 bytes a token; where it was NaN, numbers, scales and rope are"""
        cache = problem.cache
        pool = pack(cache.pool[..., :512], cache.pool[..., 512:], scales)
        pool[cache.pool.isnan().any(-1)] = 0xFF
        moved = PagedKVCache.from_tensors(pool, cache.block_table, cache.cache_seqlens, scales=scales)
        return cls(problem.case, problem.q, moved, problem.out, problem.lse, problem.sink, unpack(pool))

    @property
    def true_pool(self) -> torch.Tensor:
        return self.pool64

    def with_pool(self, pool: torch.Tensor) -> "ScaledProblem":
        """the same bytes in other memory"""
        return replace(self, cache=PagedKVCache.from_tensors(pool, self.cache.block_table, self.cache.cache_seqlens))


def tolerance(problem: Fp8Problem) -> tuple[float, float]:
    """relative error of out and absolute error of lse; a one-term q has 3 bits of mantissa"""
    one_term = problem.query_terms == 1 and problem.q.dtype != E4M3
    return (6e-2, 1.5e-1) if one_term else TOLERANCE[E4M3]


def check(problem: Fp8Problem, requests: list[int] | None = None, plan: DecodePlan | None = None) -> Errors:
    out, lse = problem.run(plan)
    errors, (rel, gap) = problem.errors(out, lse, requests), tolerance(problem)
    assert not errors.where and errors.rel <= rel and errors.lse <= gap, f"{errors}\n{problem.case} q {problem.q.dtype}"
    return errors


def make(case: Case, q_dtype: torch.dtype | None = None, query_terms: int = 2) -> Fp8Problem:
    return Fp8Problem.of(Problem.make(case), q_dtype, query_terms)
