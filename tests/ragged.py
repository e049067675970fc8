"""Problems whose requests have different numbers of query tokens."""

from dataclasses import dataclass, replace

import torch

from flashmla_cute import DecodePlan, mla_decode
from flashmla_cute.reference import reference_decode
from flashmla_cute.testing import Errors, Problem, _compare

SPARE = 3  # rows of q behind the last request's: nothing is written for them


@dataclass
class RaggedProblem:
    """the requests of `problem` with counts[i] of its query tokens each"""

    problem: Problem
    counts: tuple[int, ...]
    q: torch.Tensor  # [tokens, h_q, d]
    cu_seqlens_q: torch.Tensor
    out: torch.Tensor  # poisoned
    lse: torch.Tensor  # poisoned

    @classmethod
    def make(cls, problem: Problem, counts: tuple[int, ...], layout=lambda q: q) -> "RaggedProblem":
        """layout: [1, tokens, h_q, d] -> the same with other strides"""
        q = torch.cat([tokens[:count] for tokens, count in zip(problem.q, counts)])
        spare = torch.full_like(problem.q[0, :1].expand(SPARE, -1, -1), float("nan"))
        q = layout(torch.cat([q, spare])[None])[0]
        begins = torch.tensor([0, *counts]).cumsum(0).to(q.device, torch.int32)
        out = torch.full((*q.shape[:2], problem.out.shape[-1]), float("nan"), dtype=problem.out.dtype, device=q.device)
        lse = torch.full(q.shape[:2], float("nan"), device=q.device)
        return cls(problem, counts, q, begins, out, lse)

    def plan(self, max_seqlen_q: int | None = None, **options) -> DecodePlan:
        """with poisoned workspace"""
        most = max_seqlen_q or max(1, *self.counts)
        plan = DecodePlan(
            self.problem.cache, self.problem.case.h_q, cu_seqlens_q=self.cu_seqlens_q, max_seqlen_q=most, **options
        )
        plan.o_split.fill_(float("nan"))
        plan.lse_split.fill_(float("nan"))
        return plan

    def run(self, plan: DecodePlan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.problem.case
        options = dict(softmax_scale=case.softmax_scale, causal=case.causal, out=self.out, lse=self.lse)
        return mla_decode(self.q, self.problem.cache, plan or self.plan(), **options)

    def rows(self, i: int) -> slice:
        begin = sum(self.counts[:i])
        return slice(begin, begin + self.counts[i])

    def errors(self, requests: list[int] | None = None) -> Errors:
        """of out and lse against float64, request by request; and whether the spare rows are as they were"""
        worst, (cache, case) = Errors(0.0, 0.0, ""), (self.problem.cache, self.problem.case)
        for i in range(len(self.counts)) if requests is None else requests:
            if self.counts[i]:
                rows, table = self.rows(i), cache.block_table[i : i + 1]
                wanted, wanted_lse = reference_decode(
                    self.q[rows][None],
                    cache.pool,
                    table,
                    [case.lengths[i]],
                    case.softmax_scale,
                    case.causal,
                    self.out.shape[-1],
                )
                worst = worst.worse_of(_compare(self.out[rows], self.lse[rows].T, wanted[0], wanted_lse[0], f"request {i}"))
        if not (self.out[-SPARE:].isnan().all() and self.lse[-SPARE:].isnan().all()):
            worst = worst.worse_of(Errors(float("inf"), float("inf"), "rows of no request were written"))
        return worst

    def check(self, record, plan: DecodePlan | None = None, requests: list[int] | None = None) -> Errors:
        """runs our kernel and compares"""
        self.run(plan)
        errors = self.errors(requests)
        record.add(self.problem.case, errors)
        assert errors.within(self.problem.case.dtype), f"{errors}\n{self.problem.case}\n{self.counts}"
        return errors

    def poisoned(self) -> "RaggedProblem":
        """the same, to be run again"""
        nan = lambda tensor: torch.full_like(tensor, float("nan"))
        return replace(self, out=nan(self.out), lse=nan(self.lse))
