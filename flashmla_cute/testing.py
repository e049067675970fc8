"""Cases with everything poisoned that must not be read, and one table of tolerances; for tests, demo and perf alike."""

import math
from dataclasses import dataclass

import torch

from .decode import mla_decode
from .kernels.config import PLAIN, TILE, DecodeOptions
from .kv_cache import PagedKVCache
from .plan import DecodePlan
from .reference import reference_decode

# relative error of out (norm of the difference / norm, over a request) and absolute error of lse, against float64
# An e4m3 cache (against what it stands for): the FP8 tensor core keeps about 14 bits of a running sum, so that the error of a
# score grows with the partial sums that led to it.
TOLERANCE = {torch.bfloat16: (4e-3, 1e-4), torch.float16: (1e-3, 1e-4), torch.float8_e4m3fn: (3e-3, 5e-3)}
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
    page: int = TILE
    latent: int = 512
    rope: int = 64
    pair: bool = False  # q as two tensors
    sink: bool = False
    options: DecodeOptions = PLAIN

    @property
    def head_dim(self) -> int:
        return self.latent + self.rope

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class Problem:
    case: Case
    q: torch.Tensor
    cache: PagedKVCache
    out: torch.Tensor  # poisoned
    lse: torch.Tensor  # poisoned
    sink: torch.Tensor | None = None

    @classmethod
    def make(cls, case: Case, device: str = "cuda") -> "Problem":
        """Fresh random inputs.  Pages in random order, NaN in spare pages and in rows past a request's end, absurd page ids in
        table entries past it, NaN in out and lse."""
        generator = torch.Generator(device=device).manual_seed(case.seed)
        shuffle = torch.Generator().manual_seed(case.seed)
        randn = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        counts = [-(-length // case.page) for length in case.lengths]
        b, num_pages = len(counts), sum(counts) + 3
        pool = torch.empty(num_pages, case.page, case.h_kv, case.head_dim, dtype=case.dtype, device=device)
        for first in range(0, num_pages, 1024):  # (in parts: float32 randoms of a large pool would not fit)
            pool[first : first + 1024] = randn(*pool[first : first + 1024].shape)
        order = torch.randperm(num_pages, generator=shuffle).int()
        table = torch.full((b, max([1, *counts]) + 2), ABSURD_PAGES[case.seed % len(ABSURD_PAGES)], dtype=torch.int32)
        used, at = torch.zeros(num_pages, dtype=torch.bool), 0
        for i, (count, length) in enumerate(zip(counts, case.lengths)):
            table[i, :count] = order[at : at + count]
            used[order[at : at + count].long()] = True
            if length % case.page:
                pool[order[at + count - 1], length % case.page :] = float("nan")
            at += count
        pool[(~used).to(device)] = float("nan")
        lengths = torch.tensor(case.lengths, dtype=torch.int32)
        cache = PagedKVCache.from_tensors(pool, table.to(device), lengths.to(device), latent=case.latent)
        q = (randn(b, case.s_q, case.h_q, case.head_dim) * case.gain).to(case.dtype)
        out_dtype = torch.float32 if case.options.out else case.dtype
        out = torch.full((b, case.s_q, case.h_q, case.latent), float("nan"), dtype=out_dtype, device=device)
        shape = (b * case.s_q, case.h_q) if case.options.lse_by_token else (b, case.h_q, case.s_q)
        lse = torch.full(shape, float("nan"), device=device)
        sink = 3 * randn(case.h_q) if case.sink else None
        return cls(case, q, cache, out, lse, sink)

    @property
    def true_q(self) -> torch.Tensor:
        """the numbers that q stands for"""
        return self.q

    @property
    def true_pool(self) -> torch.Tensor:
        return self.cache.pool

    def plan(self, **arguments) -> DecodePlan:
        """a plan with poisoned workspace"""
        plan = DecodePlan(self.cache, self.case.h_q, self.case.s_q, options=self.case.options, **arguments)
        plan.o_split.fill_(float("nan"))
        plan.lse_split.fill_(float("nan"))
        return plan

    def run(self, plan: DecodePlan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """our kernel, into the poisoned out and lse"""
        plan = plan or self.plan()
        case, outputs = self.case, dict(out=self.out, lse=self.lse)
        q = in_parts(self.q, case)
        return mla_decode(q, self.cache, plan, softmax_scale=case.softmax_scale, causal=case.causal, sink=self.sink, **outputs)

    def errors(self, out: torch.Tensor, lse: torch.Tensor, requests: list[int] | None = None) -> "Errors":
        """`out` and `lse` against float64, over `requests` (default: all)"""
        worst, case = Errors(0.0, 0.0, ""), self.case
        if case.options.lse_by_token:
            lse = lse.view(len(case.lengths), case.s_q, case.h_q).transpose(1, 2)
        if case.options.lse_log2:
            lse = lse * math.log(2.0)
        for i in requests if requests is not None else range(len(self.case.lengths)):
            ref_out, ref_lse = reference_decode(
                self.true_q[i : i + 1],
                self.true_pool,
                self.cache.block_table[i : i + 1],
                [case.lengths[i]],
                case.softmax_scale,
                case.causal,
                case.latent,
                options=case.options,
                sink=self.sink,
            )
            worst = worst.worse_of(_compare(out[i], lse[i], ref_out[0], ref_lse[0], f"request {i}"))
        return worst

    def check(self) -> "Errors":
        """runs our kernel and compares; raises AssertionError, with the case, beyond the tolerance"""
        errors = self.errors(*self.run())
        assert errors.within(self.case.dtype), f"{errors}\n{self.case}"
        return errors


def in_parts(q: torch.Tensor, case: Case) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q as mla_decode gets it; of a pair each has memory of its own"""
    return (q[..., : case.latent].contiguous(), q[..., case.latent :].contiguous()) if case.pair else q


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
