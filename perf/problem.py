"""Inputs of a row on the GPU, and the float64 results that every implementation is held to before it is timed."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flashmla_cute.kernels.config import SCALED_FORMATS
from flashmla_cute.reference import dequantise, pack, quantise, reference_decode, unpack
from flashmla_cute.testing import TOLERANCE

from .roofline import LATENT, ROPE
from .workloads import Row

FILL_TOKENS = 1 << 20  # of a pool filled at a time: one random-number launch has to stay below 2^31 elements
MAX_CHECKED = 4  # requests compared with float64


@dataclass
class Problem:
    """One row with fresh random inputs.  Everything is the same for all implementations, and only read."""

    row: Row
    q: torch.Tensor  # [b, s_q, h_q, 576]
    pools: list[torch.Tensor]  # copies, each [pages, page, h_kv, 576] or bytes, of independent contents
    block_table: torch.Tensor  # [b, pages of the longest request] int32, exactly as wide: FA3's workspace grows with it
    cache_seqlens: torch.Tensor  # [b] int32
    softmax_scale: float = (LATENT + ROPE) ** -0.5
    q_scale: float | None = None  # of an e4m3 q
    kv_scale: ClassVar[float] = 1 / 64  # of an e4m3 cache: normal numbers stay within its +-448

    @classmethod
    def make(cls, row: Row, copies: int, seed: int, device: str = "cuda") -> "Problem":
        """Pages in random order, as after hours of serving.  Unlike in the tests nothing is poisoned: peers may read (and then
        drop) what lies past a request's end, so spare table entries name page 0 and spare cache slots hold finite numbers."""
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = torch.uint8 if row.is_scaled else getattr(torch, row.dtype)
        q_dtype, width = torch.bfloat16 if row.is_fp8 else dtype, LATENT + ROPE
        if row.is_scaled:
            width = SCALED_FORMATS[4].bytes_per_token
        counts = [-(-length // row.page) for length in row.lengths]
        num_pages = sum(counts)
        pools = [torch.empty(num_pages, row.page, row.h_kv, width, dtype=dtype, device=device) for _ in range(copies)]
        for pool in pools:
            for part in pool.split(FILL_TOKENS // row.page):
                wide = part
                if row.is_fp8:
                    wide = torch.empty(*part.shape[:3], LATENT + ROPE, device=device)
                wide.normal_(generator=generator)
                if row.is_scaled:
                    part.copy_(pack(wide[..., :LATENT], wide[..., LATENT:], 4))
                elif row.is_fp8:
                    part.copy_(quantise(wide, cls.kv_scale))
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).int().split(counts)
        table = torch.zeros(row.b, max(counts), dtype=torch.int32)
        for pages, request in zip(order, table):
            request[: len(pages)] = pages
        q = torch.empty(row.b, row.s_q, row.h_q, LATENT + ROPE, dtype=q_dtype, device=device).normal_(generator=generator)
        return cls(row, q, pools, table.to(device), torch.tensor(row.lengths, dtype=torch.int32, device=device))

    def with_e4m3_q(self) -> "Problem":
        """the same with q rounded to e4m3: float64 results are those of what it stands for"""
        return replace(self, q=quantise(self.q, self.kv_scale), q_scale=self.kv_scale)

    def with_bf16_cache(self, seed: int = 0) -> "Problem":
        """as many pools of as many tokens in bf16, of other contents"""
        return Problem.make(replace(self.row, dtype="bfloat16"), len(self.pools), seed, self.q.device.type)

    def expected(self, copy: int) -> "Expected":
        """float64 results with pool `copy`, of a few requests: first, last, longest and one between"""
        lengths, last = self.row.lengths, self.row.b - 1
        requests = sorted({0, last, lengths.index(max(lengths)), last // 3})[:MAX_CHECKED]
        pool, table = self.pools[copy], self.block_table[requests]
        if self.row.is_fp8:  # what it stands for, of the pages that count
            pages, table = table.unique(return_inverse=True)
            pool = pool.view(torch.uint8)[pages.long()].view(pool.dtype)
            pool = unpack(pool) if self.row.is_scaled else dequantise(pool, torch.tensor(self.kv_scale))
        q = self.q[requests]
        if self.q_scale is not None:
            q = dequantise(q, torch.tensor(self.q_scale))
        out, lse = reference_decode(q, pool, table, [lengths[i] for i in requests], self.softmax_scale, self.row.causal, LATENT)
        return Expected(requests, out, lse)


@dataclass(frozen=True)
class Check:
    """how far a result is from float64"""

    rel_err: float  # of out: norm of the difference / norm, the worst request
    lse_err: float | None  # absolute, the worst row; None: the implementation returns no lse
    failure: str | None  # why it must not be timed


@dataclass(frozen=True)
class Expected:
    requests: list[int]
    out: torch.Tensor  # [request, s_q, h_q, latent] float64
    lse: torch.Tensor  # [request, h_q, s_q] float64

    def check(
        self, out: torch.Tensor, lse: torch.Tensor | None, dtype: str, tolerance: tuple[float, float] | None = None
    ) -> Check:
        """by the tolerances of the tests (flashmla_cute.testing), for us and for peers alike, unless one is given"""
        max_rel, max_lse = tolerance or TOLERANCE[getattr(torch, "float8_e4m3fn" if dtype == "fp8_ds_mla" else dtype)]
        difference = (out[self.requests].double() - self.out).flatten(1).norm(dim=1)
        rel = (difference / self.out.flatten(1).norm(dim=1)).max().item()
        gap = None if lse is None else (lse[self.requests].double() - self.lse).abs().max().item()
        wrong = []
        if not rel <= max_rel:  # (so written, NaN fails)
            wrong.append(f"out is off by {rel:.2e}, allowed {max_rel:.0e}")
        if gap is not None and not gap <= max_lse:
            wrong.append(f"lse is off by {gap:.2e}, allowed {max_lse:.0e}")
        return Check(rel, gap, "; ".join(wrong) or None)
