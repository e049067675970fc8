"""Problems whose requests have different numbers of query tokens."""

import math
from dataclasses import dataclass, replace

import torch

from flashmla_cute import DecodePlan, PagedKVCache, mla_decode
from flashmla_cute.reference import reference_decode
from flashmla_cute.testing import Case, Errors, Problem, _compare, in_parts

SPARE = 3  # rows of q behind the last request's: nothing is written for them


@dataclass
class RaggedProblem:
    """the requests of a Problem with counts[i] of its query tokens each"""

    case: Case  # its s_q is the most that a request may have
    counts: tuple[int, ...]
    q: torch.Tensor  # [tokens, h_q, d]
    cu_seqlens_q: torch.Tensor
    cache: PagedKVCache
    out: torch.Tensor  # poisoned
    lse: torch.Tensor  # poisoned
    sink: torch.Tensor | None = None

    @classmethod
    def make(cls, problem: Problem, counts: tuple[int, ...]) -> "RaggedProblem":
        q = torch.cat([tokens[:count] for tokens, count in zip(problem.q, counts)])
        q = torch.cat([q, torch.full_like(problem.q[0, :1].expand(SPARE, -1, -1), float("nan"))])
        begins = torch.tensor([0, *counts]).cumsum(0).to(q.device, torch.int32)
        nan = lambda *shape, dtype: torch.full(shape, float("nan"), dtype=dtype, device=q.device)
        out = nan(*q.shape[:2], problem.out.shape[-1], dtype=problem.out.dtype)
        return cls(problem.case, counts, q, begins, problem.cache, out, nan(*q.shape[:2], dtype=torch.float32), problem.sink)

    def plan(self, max_seqlen_q: int | None = None, **options) -> DecodePlan:
        """with poisoned workspace"""
        most = max_seqlen_q or max(1, *self.counts)
        queries = dict(cu_seqlens_q=self.cu_seqlens_q, max_seqlen_q=most)
        plan = DecodePlan(self.cache, self.case.h_q, **{"options": self.case.options, **queries, **options})
        plan.o_split.fill_(float("nan"))
        plan.lse_split.fill_(float("nan"))
        return plan

    def run(self, plan: DecodePlan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """our kernel, into the poisoned out and lse"""
        case, outputs = self.case, dict(out=self.out, lse=self.lse)
        options = dict(softmax_scale=case.softmax_scale, causal=case.causal, sink=self.sink)
        return mla_decode(in_parts(self.q, case), self.cache, plan or self.plan(), **options, **outputs)

    def rows(self, i: int) -> slice:
        begin = sum(self.counts[:i])
        return slice(begin, begin + self.counts[i])

    def errors(self, out: torch.Tensor, lse: torch.Tensor, requests: list[int] | None = None) -> Errors:
        """against float64, request by request; and whether the rows of no request are as they were"""
        worst, case, latent = Errors(0.0, 0.0, ""), self.case, out.shape[-1]
        lse = lse * math.log(2.0) if case.options.lse_log2 else lse
        for i in range(len(self.counts)) if requests is None else requests:
            if self.counts[i]:
                rows, table, lengths = self.rows(i), self.cache.block_table[i : i + 1], [case.lengths[i]]
                inputs = (self.q[rows][None], self.cache.pool, table, lengths, case.softmax_scale, case.causal, latent)
                wanted, wanted_lse = reference_decode(*inputs, options=case.options, sink=self.sink)
                worst = worst.worse_of(_compare(out[rows], lse[rows].T, wanted[0], wanted_lse[0], f"request {i}"))
        spare = slice(sum(self.counts), None)
        if not (out[spare].isnan().all() and lse[spare].isnan().all()):
            worst = worst.worse_of(Errors(float("inf"), float("inf"), "rows of no request were written"))
        return worst

    def check(self, record, plan: DecodePlan | None = None, requests: list[int] | None = None) -> Errors:
        """runs our kernel and compares"""
        errors = self.errors(*self.run(plan), requests)
        record.add(self.case, errors)
        assert errors.within(self.case.dtype), f"{errors}\n{self.case}\n{self.counts}"
        return errors


def with_q(problem: Problem | RaggedProblem, move) -> Problem | RaggedProblem:
    """move: [batch, tokens, heads, d] -> the same with other strides"""
    if isinstance(problem, RaggedProblem):
        return replace(problem, q=move(problem.q[None])[0])
    return replace(problem, q=move(problem.q))
