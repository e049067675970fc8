"""`flashmla-cute demo`: a batch of requests of very different lengths, served for some steps and checked in every one.

On a Hopper GPU the kernels run.  Elsewhere they are compiled, and the schedule and the arithmetic of split and merge are run on
the CPU over the same paged cache; the first line then says that no kernel ran.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import ceilings, compile, doctor, heuristics, ops, resources
from .decode import mla_decode
from .kernels.config import FORMATS, SMEM_LIMIT, TILE, MLAConfig, ScheduleConfig
from .kv_cache import PagedKVCache
from .plan import DecodePlan
from .reference import emulate_decode
from .schedule import build_schedule
from .testing import TOLERANCE, Case, Errors, Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIGMA = 1.3  # of the lognormal lengths; their median is max_seqlen / 12
TIMED_LAUNCHES = 20
SMS = 132  # of an H100 SXM, where there is no card to ask
EMULATED = dict(batch=8, heads=16, max_seqlen=2000)  # what float64 on a CPU does in seconds
EMULATED_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Options:
    """what the command line gives; the defaults are its defaults"""

    batch: int = 48
    heads: int = 128
    queries: int = 1
    steps: int = 4
    dtype: str = "bf16"
    max_seqlen: int = 32768
    seed: int = 0

    @property
    def decode_config(self) -> MLAConfig:
        """the configuration that mla_decode chooses for this batch"""
        head_tile = heuristics.choose_head_tile(self.queries, self.heads, 1, mergeable=True)
        return MLAConfig(kv=self.format, causal=self.queries > 1, head_tile=head_tile)

    @property
    def format(self):
        return FORMATS[str(DTYPES[self.dtype]).removeprefix("torch.")]


# ---------------------------------------------------------------------- the batch
def prompt_lengths(options: Options, count: int, seed: int) -> list[int]:
    """lognormal, within 1 .. max_seqlen"""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * SIGMA + math.log(options.max_seqlen / 12)
    return torch.exp(drawn).round().clamp(1, options.max_seqlen).int().tolist()


def first_prompts(options: Options) -> list[int]:
    """of the first step: an empty slot, both ends of the range, the rest drawn; a batch of one has just the longest"""
    if options.batch == 1:
        return [options.max_seqlen]
    return [0, options.max_seqlen, 1, *prompt_lengths(options, options.batch, options.seed)][: options.batch]


class Traffic:
    """A batch that changes from step to step, with the evidence of what it holds.

    Each step every request gets `queries` tokens, a new one enters the empty slot with its prompt, and another leaves, the last
    slots first: there is always a request of length 0, unless the batch is one request, which stays.  Every token goes into the
    paged cache and is kept a second time, in one plain tensor per request, for the check.
    """

    def __init__(self, options: Options, device: str):
        self.options, self.device = options, device
        self.empty = 0 if options.batch > 1 else None
        self.random = torch.Generator(device).manual_seed(options.seed)
        self.prompts, later = first_prompts(options), prompt_lengths(options, options.steps, options.seed + 1)
        self.arrivals = iter(later)
        growth = options.steps * options.queries
        pages = lambda lengths: sum(-(-(length + growth) // TILE) for length in lengths)
        self.cache = PagedKVCache.allocate(
            pages(self.prompts) + pages(later),
            options.batch,
            options.max_seqlen + growth,
            dtype=DTYPES[options.dtype],
            device=device,
        )
        self.tokens = [self._randn(0, options.format.head_dim) for _ in range(options.batch)]

    @property
    def lengths(self) -> list[int]:
        return [tokens.shape[0] for tokens in self.tokens]

    def start(self):
        """all prompts, then the first step's tokens"""
        self._extend(self.prompts)
        self._extend([0 if i == self.empty else self.options.queries for i in range(self.options.batch)])

    def step(self):
        """one enters, one leaves, the others grow"""
        counts = [self.options.queries] * self.options.batch
        if self.empty is not None:
            counts[self.empty] += next(self.arrivals)
            self.empty = (self.empty - 1) % self.options.batch
            self.cache.release(self.empty)
            self.tokens[self.empty] = self.tokens[self.empty][:0]
            counts[self.empty] = 0
        self._extend(counts)

    def queries(self) -> torch.Tensor:
        return self._randn(self.options.batch, self.options.queries, self.options.heads, self.options.format.head_dim)

    def problem(self, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Problem:
        """the same question over the kept tokens, laid out page after page: nothing of the cache's bookkeeping is in it"""
        counts = [-(-length // TILE) for length in self.lengths]
        pool = torch.zeros(max(sum(counts), 1), TILE, 1, q.shape[-1], dtype=q.dtype, device=self.device)
        table = torch.zeros(len(counts), max(1, *counts), dtype=torch.int32, device=self.device)
        first = 0
        for row, count, tokens in zip(table, counts, self.tokens):
            pool[first : first + count].view(-1, q.shape[-1])[: tokens.shape[0]] = tokens
            row[:count] = torch.arange(first, first + count)
            first += count
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        case = Case(tuple(self.lengths), h_q=q.shape[2], s_q=q.shape[1], dtype=q.dtype)
        return Problem(case, q, PagedKVCache.from_tensors(pool, table, lengths), out, lse)

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random, device=self.device).to(DTYPES[self.options.dtype])

    def _extend(self, counts: list[int]):
        new = [self._randn(n, self.options.format.head_dim) for n in counts]
        self.tokens = [torch.cat(pair) for pair in zip(self.tokens, new)]
        slots, rows, latent = self.cache.extend(counts), torch.cat(new), self.options.format.latent
        if self.device == "cpu":  # (the append kernel's work)
            self.cache.pool.view(-1, rows.shape[1])[slots] = rows
        else:
            self.cache.append(rows[:, :latent], rows[:, latent:], slots)


# ---------------------------------------------------------------------- on a Hopper GPU
class Server:
    """Plan and decode of a batch as an engine would run them: captured once, replayed at every step for other lengths."""

    def __init__(self, cache: PagedKVCache, options: Options, q: torch.Tensor):
        self.plan = DecodePlan(cache, options.heads, options.queries)
        self.q = q.clone()
        self.out, self.lse = mla_decode(self.q, cache, self.plan)  # (outside the capture: loads the kernels)
        decode = lambda: mla_decode(self.q, cache, self.plan, out=self.out, lse=self.lse)
        self.update_graph, self.decode_graph = self._capture(self.plan.update), self._capture(decode)

    def _capture(self, launch) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        return graph

    def run(self, q: torch.Tensor):
        self.q.copy_(q)
        self.out.fill_(float("nan"))
        self.lse.fill_(float("nan"))
        self.update_graph.replay()
        self.decode_graph.replay()

    def decode_us(self) -> float:
        return ceilings.median_us(self.decode_graph.replay, TIMED_LAUNCHES)

    def update_us(self) -> float:
        return ceilings.median_us(self.update_graph.replay, TIMED_LAUNCHES)


@dataclass(frozen=True)
class Cost:
    """what decoding these lengths takes at least: every cached token read once, q read, out written"""

    flops: int
    num_bytes: int

    @classmethod
    def of(cls, options: Options, tokens: int) -> "Cost":
        kv, rows = options.format, options.queries * options.heads
        io = options.batch * rows * (kv.head_dim + kv.latent) * kv.itemsize
        return cls(2 * rows * tokens * (kv.head_dim + kv.latent), tokens * kv.bytes_per_token + io)

    def tflops(self, us: float) -> float:
        return self.flops / us / 1e6

    def gbps(self, us: float) -> float:
        return self.num_bytes / us / 1e3


def serve(options: Options, console: Console) -> int:
    """the demo on the current CUDA device"""
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {describe(options)}")
    for op_class, config in ops_of(options):
        how = "loaded from the cache" if compile.is_cached(op_class, config) else f"compiled for {compile.ARCH}"
        with timed(console, f"{op_class.name} {how}"):
            compile.get(op_class, config)
    with timed(console, "ceilings of this card measured"):
        limits = ceilings.measure()
    with timed(console, "prompts appended to the paged cache"):
        traffic = Traffic(options, "cuda")
        traffic.start()
        torch.cuda.synchronize()
    server = Server(traffic.cache, options, traffic.queries())
    table = step_table("out err", "lse err", "plan us", "decode us", "TFLOP/s", "GB/s")
    worst = Errors(0.0, 0.0, "")
    for step in range(options.steps):
        if step:
            traffic.step()
        q = traffic.queries()
        server.run(q)
        errors = traffic.problem(q, server.out, server.lse).errors(server.out, server.lse)
        worst, us, cost = worst.worse_of(errors), server.decode_us(), Cost.of(options, sum(traffic.lengths))
        numbers = f"{server.update_us():.1f}", f"{us:.1f}", f"{cost.tflops(us):.0f}", f"{cost.gbps(us):.0f}"
        table.add_row(*step_cells(step, traffic), f"{errors.rel:.1e}", f"{errors.lse:.1e}", *numbers)
    console.print(table)
    console.print(
        f"Ceilings, same run: {limits.matmul_tflops:.0f} TFLOP/s (8192^3 bf16 matmul, sustained), "
        f"{limits.stream_gbps:.0f} GB/s (the kernel's own TMA loads, reading only), {limits.copy_gbps:.0f} GB/s (copy).",
        highlight=False,
    )
    report_padding(options, traffic, us, console)
    rel, lse = TOLERANCE[DTYPES[options.dtype]]
    return verdict("kernels", worst.within(DTYPES[options.dtype]), worst, f"{rel:g} and {lse:g}", console)


def report_padding(options: Options, traffic: Traffic, us: float, console: Console):
    """The same kernel with every request as long as the longest.  The padded table entries name pages of the pool in turn, so
    that they cost no memory, and are read again only after the whole pool."""
    cache, longest = traffic.cache, max(traffic.lengths)
    pages, used = -(-longest // TILE), cache.block_table[cache.block_table >= 0]
    order = torch.arange(options.batch * pages, device=used.device) % used.numel()
    lengths = torch.full_like(cache.cache_seqlens, longest)
    padded = PagedKVCache.from_tensors(cache.pool, used[order].view(options.batch, pages), lengths)
    padded_us = Server(padded, options, traffic.queries()).decode_us()
    ratio = Cost.of(options, options.batch * longest).num_bytes / Cost.of(options, sum(traffic.lengths)).num_bytes
    console.print(
        f"Padded to the longest request ({longest} tokens), the last step would have moved {ratio:.1f} x the bytes and taken "
        f"{padded_us / us:.1f} x the time ({padded_us:.0f} us).",
        highlight=False,
    )


# ---------------------------------------------------------------------- without one
def explain(options: Options, console: Console, reason: str) -> int:
    """the demo where no kernel can run"""
    console.print(f"No kernel can run here: {reason}.", soft_wrap=True, highlight=False)
    console.print(f"So this compiles them, cuts the work of the batch, and emulates it.  {describe(options)}\n", soft_wrap=True)
    report_resources(options, console)
    report_schedule(options, console)
    return emulate(replace(options, **{name: min(getattr(options, name), most) for name, most in EMULATED.items()}), console)


def report_resources(options: Options, console: Console):
    table = Table("kernel", "registers a thread", "spilled bytes", "shared memory, bytes", box=box.SIMPLE_HEAD)
    for op_class, config in ops_of(options):
        with timed(console, f"{op_class.name} compiled for {compile.ARCH}"):
            kernels = resources.from_compiled(compile.compile_object(op_class(config)))
        for kernel in kernels.values():
            table.add_row(kernel.name, str(kernel.registers), str(kernel.frame), str(kernel.smem))
    console.print(table)
    moved = {name: n for name, n in vars(options.decode_config).items() if name.endswith("_registers")}
    roles = ", ".join(f"{name.removesuffix('_registers').upper()} {n}" for name, n in moved.items())
    console.print(
        f"After launch DenseDecode moves registers between its roles: {roles} a thread; a role not named keeps those of the "
        f"launch.  A CTA may have {SMEM_LIMIT} bytes of shared memory.\n",
        highlight=False,
    )


def report_schedule(options: Options, console: Console):
    """how the lengths of the first step are cut for an H100"""
    lengths = first_prompts(options)
    row_tiles = heuristics.row_tiles(options.decode_config.head_tile, options.queries, options.heads, 1)
    max_parts = heuristics.max_parts(row_tiles, SMS)
    schedule = build_schedule(lengths, row_tiles, max_parts)
    loads = [sum(item.end - item.first for item in schedule.part(p)) for p in range(schedule.num_parts)]
    mean, longest = sum(loads) / len(loads), -(-max(lengths) // TILE)
    split, pieces = sum(merge.pieces > 0 for merge in schedule.merges), sum(item.slot >= 0 for item in schedule.items)
    table = Table("cut for an H100 (132 SMs)", "", box=box.SIMPLE_HEAD)
    table.add_row("requests, tokens, longest", f"{len(lengths)}, {sum(lengths)}, {max(lengths)}")
    table.add_row("64-row tiles: CTAs that walk the same KV tiles", f"{row_tiles}")
    table.add_row("parts, of at most SMs / row tiles", f"{schedule.num_parts} of {max_parts}")
    table.add_row("items: spans of one request's KV tiles", f"{len(schedule.items)}")
    table.add_row("requests split, pieces to merge", f"{split}, {pieces}")
    table.add_row("KV tiles of a part: least, mean, most", f"{min(loads)}, {mean:.1f}, {max(loads)}")
    table.add_row("if the longest request were not split", f"{longest} ({longest / mean:.1f} x the mean)")
    console.print(table)


def emulate(options: Options, console: Console) -> int:
    """split and merge in float64, item by item, over a paged cache on the CPU"""
    console.print(f"\nEmulated in float64 on the CPU: {describe(options)}", highlight=False)
    traffic = Traffic(options, "cpu")
    traffic.start()
    kv, row_tiles = options.format, heuristics.row_tiles(options.decode_config.head_tile, options.queries, options.heads, 1)
    table, worst = step_table("out err", "lse err", "items", "pieces"), Errors(0.0, 0.0, "")
    for step in range(options.steps):
        if step:
            traffic.step()
        q, cache = traffic.queries(), traffic.cache
        schedule = build_schedule(traffic.lengths, row_tiles, heuristics.max_parts(row_tiles, SMS))
        out, lse = emulate_decode(q, cache.pool, cache.block_table, schedule, kv.head_dim**-0.5, True, kv.latent)
        errors = traffic.problem(q, out, lse).errors(out, lse)
        worst = worst.worse_of(errors)
        pieces = sum(item.slot >= 0 for item in schedule.items)
        cells = f"{errors.rel:.1e}", f"{errors.lse:.1e}", str(len(schedule.items)), str(pieces)
        table.add_row(*step_cells(step, traffic), *cells)
    console.print(table)
    agrees = not worst.where and max(worst.rel, worst.lse) <= EMULATED_TOLERANCE
    return verdict("emulation", agrees, worst, f"{EMULATED_TOLERANCE:g}", console)


# ---------------------------------------------------------------------- both
def run(options: Options, console: Console) -> int:
    """0 if every step agrees with float64, else 1"""
    reason = doctor.obstacle()
    if reason:
        return explain(options, console, reason)
    with torch.cuda.device(doctor.hopper()):
        return serve(options, console)


def ops_of(options: Options) -> tuple:
    return (
        (ops.DecodeOp, options.decode_config),
        (ops.ScheduleOp, ScheduleConfig()),
        (ops.AppendOp, MLAConfig(kv=options.format, causal=False)),
    )


def describe(options: Options) -> str:
    some = lambda count, noun: f"{count} {noun}{'s' * (count > 1)}"
    return (
        f"{some(options.batch, 'request')} of up to {options.max_seqlen} tokens, {some(options.heads, 'head')}, "
        f"{some(options.queries, 'query token')} a step, {options.dtype}."
    )


@contextmanager
def timed(console: Console, what: str) -> Iterator[None]:
    start = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{what}: {time.monotonic() - start:.1f} s", soft_wrap=True, highlight=False)


def step_table(*columns: str) -> Table:
    table = Table("step", "tokens", "longest", *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.justify = "right"
    return table


def step_cells(step: int, traffic: Traffic) -> tuple[str, ...]:
    return str(step), str(sum(traffic.lengths)), str(max(traffic.lengths))


def verdict(subject: str, agrees: bool, worst: Errors, allowed: str, console: Console) -> int:
    """the last line, and the exit status"""
    numbers = f"worst relative error of out {worst.rel:.1e}, error of lse {worst.lse:.1e}, allowed {allowed}"
    if agrees:
        console.print(f"The {subject}: every step agrees with float64 ({numbers}).", highlight=False)
        return 0
    console.print(f"The {subject}: NOT in agreement with float64 ({numbers}). {worst.where}", style="red", highlight=False)
    return 1
