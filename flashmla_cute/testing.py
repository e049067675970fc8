"""Cases with everything poisoned that must not be read, and one table of tolerances; for tests, demo and perf alike."""

from dataclasses import dataclass, replace

import torch

from .decode import mla_decode
from .kernels.config import TILE
from .kv_cache import PagedKVCache
from .plan import DecodePlan
from .reference import reference_decode

# relative error of out (norm of the difference / norm, over a request) and absolute error of lse, against float64
TOLERANCE = {torch.bfloat16: (4e-3, 1e-4), torch.float16: (1e-3, 1e-4)}
ABSURD_PAGES = (-1, 0x3FFFFFFF, -(2**31), 2**31 - 1)  # what table entries past a request's end may hold


@dataclass(frozen=True)
class Case:
    """One decode problem.  Prints as the call that makes it again."""

    lengths: tuple[int, ...]
    h_q: int = 128
    h_kv: int = 1
    s_q: int = 1
    causal: bool = True
    dtype: torch.dtype = torch.bfloat16
    gain: float = 1.0  # scales q: large scores
    seed: int = 0

    @property
    def softmax_scale(self) -> float:
        return 576**-0.5


@dataclass
class Problem:
    case: Case
    q: torch.Tensor
    cache: PagedKVCache
    out: torch.Tensor  # poisoned
    lse: torch.Tensor  # poisoned

    @classmethod
    def make(cls, case: Case, device: str = "cuda") -> "Problem":
        """Fresh random inputs.  Pages in random order, NaN in spare pages and in rows past a request's end, absurd page ids in
        table entries past it, NaN in out and lse."""
        generator = torch.Generator(device=device).manual_seed(case.seed)
        shuffle = torch.Generator().manual_seed(case.seed)
        randn = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        counts = [-(-length // TILE) for length in case.lengths]
        b, num_pages = len(counts), sum(counts) + 3
        pool = torch.empty(num_pages, TILE, case.h_kv, 576, dtype=case.dtype, device=device)
        for first in range(0, num_pages, 1024):  # (in parts: float32 randoms of a large pool would not fit)
            pool[first : first + 1024] = randn(*pool[first : first + 1024].shape)
        order = torch.randperm(num_pages, generator=shuffle).int()
        table = torch.full((b, max([1, *counts]) + 2), ABSURD_PAGES[case.seed % len(ABSURD_PAGES)], dtype=torch.int32)
        used, at = torch.zeros(num_pages, dtype=torch.bool), 0
        for i, (count, length) in enumerate(zip(counts, case.lengths)):
            table[i, :count] = order[at : at + count]
            used[order[at : at + count].long()] = True
            if length % TILE:
                pool[order[at + count - 1], length % TILE :] = float("nan")
            at += count
        pool[(~used).to(device)] = float("nan")
        lengths = torch.tensor(case.lengths, dtype=torch.int32)
        cache = PagedKVCache.from_tensors(pool, table.to(device), lengths.to(device))
        q = (randn(b, case.s_q, case.h_q, 576) * case.gain).to(case.dtype)
        out = torch.full((b, case.s_q, case.h_q, 512), float("nan"), dtype=case.dtype, device=device)
        lse = torch.full((b, case.h_q, case.s_q), float("nan"), device=device)
        return cls(case, q, cache, out, lse)

    def plan(self) -> DecodePlan:
        """a plan with poisoned workspace"""
        plan = DecodePlan(self.cache, self.case.h_q, self.case.s_q)
        plan.o_split.fill_(float("nan"))
        plan.lse_split.fill_(float("nan"))
        return plan

    def run(self, plan: DecodePlan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """our kernel, into the poisoned out and lse"""
        plan = plan or self.plan()
        scale, causal = self.case.softmax_scale, self.case.causal
        return mla_decode(self.q, self.cache, plan, softmax_scale=scale, causal=causal, out=self.out, lse=self.lse)

    def errors(self, out: torch.Tensor, lse: torch.Tensor, requests: list[int] | None = None) -> "Errors":
        """`out` and `lse` against float64, over `requests` (default: all)"""
        worst = Errors(0.0, 0.0, "")
        for i in requests if requests is not None else range(len(self.case.lengths)):
            one = replace(self.case, lengths=(self.case.lengths[i],))
            ref_out, ref_lse = reference_decode(
                self.q[i : i + 1],
                self.cache.pool,
                self.cache.block_table[i : i + 1],
                list(one.lengths),
                one.softmax_scale,
                one.causal,
                512,
            )
            worst = worst.worse_of(_compare(out[i], lse[i], ref_out[0], ref_lse[0], f"request {i}"))
        return worst

    def check(self) -> "Errors":
        """runs our kernel and compares; raises AssertionError, with the case, beyond the tolerance"""
        errors = self.errors(*self.run())
        assert errors.within(self.case.dtype), f"{errors}\n{self.case}"
        return errors


@dataclass(frozen=True)
class Errors:
    rel: float  # of out
    lse: float  # absolute; where a request's |lse| exceeds 50, relative to the largest / 50
    where: str  # what is wrong beyond a number: NaN, a wrong -inf

    def worse_of(self, other: "Errors") -> "Errors":
        return Errors(max(self.rel, other.rel), max(self.lse, other.lse), self.where or other.where)

    def within(self, dtype: torch.dtype) -> bool:
        rel, lse = TOLERANCE[dtype]
        return not self.where and self.rel <= rel and self.lse <= lse


def _compare(out, lse, ref_out, ref_lse, name) -> Errors:
    out, lse = out.double(), lse.double()
    if not torch.equal(lse == float("-inf"), ref_lse == float("-inf")):
        return Errors(float("inf"), float("inf"), f"{name}: lse is -inf in other rows than the reference's")
    empty = ref_lse == float("-inf")
    if not (out.isfinite().all() and lse[~empty].isfinite().all()):
        at = (~out.isfinite()).nonzero()[:1].tolist()
        return Errors(float("inf"), float("inf"), f"{name}: not finite, first at {at}")
    norm = ref_out.norm().item()
    difference = (out - ref_out).norm().item()
    rel = difference / norm if norm > 0 else (0.0 if difference == 0 else float("inf"))
    # A score is 36 sums in the tensor core, each cut at 2^-23: a bias of up to 18 * 2^-23 = 2e-6 of its size, so where scores
    # exceed 50, 1e-4 is 2e-6 of the largest.  (FlashMLA on the same inputs: 1.0e-6, ours 1.2e-6, bias of both -5.5e-7.)
    gap = 0.0
    if (~empty).any():
        gap = (lse - ref_lse)[~empty].abs().max().item() / max(1.0, ref_lse[~empty].abs().max().item() / 50)
    return Errors(rel, gap, "")
