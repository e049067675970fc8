"""The shapes that are measured, by name, each with the reason it is there.

A row is one decode call: b requests of s_q query tokens and h_q heads against s_k cached tokens.  h_q is heads per GPU:
DeepSeek's 128 heads are 128 under data-parallel attention, and 64, 32, 16 under tensor parallelism 2, 4, 8.
"""

import random
import statistics
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class LogNormal:
    """Request lengths as a server sees them: most are short, a few very long.  The same lengths in every run and process."""

    median: int
    longest: int
    sigma: float = 1.2  # of the logarithm: the mean is then twice the median
    seed: int = 0

    def draw(self, count: int) -> tuple[int, ...]:
        """`count` lengths, in random order; the first is `longest`, so that every draw has the case that breaks a schedule"""
        source = random.Random(self.seed)
        lengths = [self.median * source.lognormvariate(0.0, self.sigma) for _ in range(count - 1)]
        lengths = [self.longest, *(max(1, min(self.longest, round(n))) for n in lengths)]
        source.shuffle(lengths)
        return tuple(lengths)


@dataclass(frozen=True)
class Row:
    b: int  # requests
    h_q: int  # query heads
    s_k: int | LogNormal  # tokens of each request
    why: str
    s_q: int = 1  # query tokens of each request
    h_kv: int = 1
    dtype: str = "bfloat16"  # of the cache; float8_e4m3fn, or fp8_ds_mla with scales for each token: q and out in bf16
    page: int = 64  # tokens of a cache page

    @property
    def causal(self) -> bool:
        """on where it means something; a single query token sees everything"""
        return self.s_q > 1

    @property
    def is_fp8(self) -> bool:
        return self.dtype == "float8_e4m3fn" or self.is_scaled

    @property
    def is_scaled(self) -> bool:
        return self.dtype == "fp8_ds_mla"

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return self.s_k.draw(self.b) if isinstance(self.s_k, LogNormal) else (self.s_k,) * self.b

    @property
    def varlen(self) -> bool:
        return isinstance(self.s_k, LogNormal)

    @property
    def tokens(self) -> int:
        """cached tokens of all requests"""
        return sum(self.lengths)

    @property
    def key(self) -> "Row":
        """the same row whatever the reason: rows that several workloads share are measured once"""
        return replace(self, why="")

    def __str__(self) -> str:
        spread = f"~{statistics.median(self.lengths):.0f}..{max(self.lengths)}" if self.varlen else str(self.s_k)
        heads = f"h{self.h_q}{f'/{self.h_kv}' if self.h_kv > 1 else ''}"
        page = "" if self.page == 64 else f" page{self.page}"
        return f"b{self.b} s_q{self.s_q} {heads} s_k{spread} {self.dtype}{page}"


FP8 = (
    Row(128, 16, 8192, "memory-bound: half the bytes, half the time?"),
    Row(128, 64, 8192, "memory-bound, with 64 rows to convert values for"),
    Row(128, 128, 8192, "two CTAs convert each tile: tensor cores and shared memory decide"),
    Row(128, 128, 8192, "compute-bound", s_q=2),
    Row(64, 16, 4096, "every request is split in two"),
    Row(16, 16, 4096, "one tile in eight is an item's first"),
    Row(1, 16, 4096, "latency: what quantising q costs"),
    Row(1, 16, 65536, "one request over the whole chip"),
    Row(1, 128, 4096, "latency with two row tiles"),
    Row(1, 128, 65536, "one request over the whole chip, two row tiles"),
)

PAGES = (64, 8, 16, 32, 96, 128, 256, 1024)

WORKLOADS = {
    "pages": tuple(
        Row(128, h_q, 8192, "what a page size costs: boxes of a whole tile, or eight of 8 tokens", page=page)
        for h_q in (16, 128)
        for page in PAGES
    ),
    "core": (
        Row(128, 128, 8192, "FlashMLA's headline shape: tensor cores and memory both near their limits"),
        Row(128, 128, 32768, "the same without start, end and splits: the steady state of the main loop"),
        Row(128, 128, 8192, "two query tokens (MTP): compute-bound, FlashMLA's best ratio", s_q=2),
        Row(128, 128, 16384, "compute-bound and long: the power cap decides", s_q=2),
        Row(128, 64, 8192, "one row tile per request: memory-bound with half the tensor work of h128"),
        Row(128, 16, 8192, "tensor parallelism 8: purely memory-bound, three quarters of the row tile is padding"),
        Row(1, 128, 4096, "latency of one request: launch, splits and merge are most of it"),
        Row(1, 128, 16384, "one request, twice as many tiles as SM pairs"),
        Row(1, 16, 4096, "the smallest useful launch"),
    ),
    "latency": (
        Row(1, 128, 4096, "fixed costs"),
        Row(1, 128, 16384, "fixed costs and two tiles a CTA"),
        Row(1, 128, 65536, "one request over the whole chip"),
        Row(1, 16, 4096, "fixed costs, one row tile"),
        Row(1, 16, 65536, "memory-bound over all SMs, 132 pieces to merge"),
        Row(1, 16, 8192, "speculative decoding of one request: 64 rows in one tile", s_q=4),
        Row(4, 128, 8192, "few requests: is a request split evenly?"),
        Row(16, 128, 4096, "requests and SMs do not divide: quantisation of the schedule"),
        Row(16, 16, 4096, "the same with one row tile"),
        Row(64, 16, 4096, "half the SMs: every request is split in two"),
        Row(32, 16, 2048, "short requests with two query tokens", s_q=2),
        Row(32, 128, 8192, "between latency and throughput"),
    ),
    "throughput": (
        Row(128, 128, 4096, "short: prologue and epilogue of a request still show"),
        Row(128, 128, 8192, "FlashMLA's headline shape"),
        Row(128, 128, 32768, "steady state"),
        Row(128, 128, 8192, "compute-bound", s_q=2),
        Row(128, 128, 16384, "compute-bound, long", s_q=2),
        Row(128, 64, 8192, "tensor parallelism 2"),
        Row(128, 32, 8192, "tensor parallelism 4"),
        Row(128, 16, 8192, "tensor parallelism 8"),
        Row(128, 16, 8192, "tensor parallelism 8 with four query tokens: 64 rows, no padding", s_q=4),
    ),
    "varlen": (
        Row(128, 16, LogNormal(2048, 65536), "a server's mixture of lengths: the schedule has to balance it, memory-bound"),
        Row(128, 128, LogNormal(2048, 65536), "the same mixture with two row tiles a request"),
    ),
    "models": (
        Row(1, 96, 4096, "heads of a 175B-class model; one request"),
        Row(1, 128, 4096, "DeepSeek-V3; one request"),
        Row(8, 96, 4096, "a small batch, which still fits into memory with expanded heads"),
        Row(8, 128, 4096, "a small batch, which still fits into memory with expanded heads"),
        Row(128, 96, 8192, "a full batch; a row tile and a half of heads"),
        Row(128, 128, 8192, "a full batch"),
    ),
    "fp8": tuple(replace(row, dtype=dtype) for row in FP8 for dtype in ("float8_e4m3fn", "fp8_ds_mla", "bfloat16")),
    "e4m3": tuple(replace(row, dtype="float8_e4m3fn") for row in FP8),  # for --variants
    "quick": (
        Row(1, 16, 4096, "smallest"),
        Row(4, 16, 4096, "splits and the causal mask", s_q=2),
        Row(8, 128, 4096, "two row tiles"),
    ),
}


def rows(names: list[str]) -> dict[Row, list[str]]:
    """each distinct row of the named workloads -> the workloads it belongs to, in order"""
    found, owners = {}, {}
    for name in names:
        for row in WORKLOADS[name]:
            found.setdefault(row.key, row)
            owners.setdefault(row.key, []).append(name)
    return {row: owners[key] for key, row in found.items()}
