"""Decode on several GPUs of one host: heads, cached tokens or requests divided, against one GPU that does it all.

python -m perf.parallel --ranks 2 --name parallel

For each row and method, checked against float64 first: the time of a call in a CUDA graph, which is that of the slowest rank,
all ranks starting together, methods in turns; and the time without a graph, the host's cost included.

one              every GPU does the whole row
tensor           heads / ranks on the whole cache; no exchange
data             requests / ranks; no exchange (the outputs stay where they are)
context          tokens / ranks, partial results of all heads to all ranks, merged there
context_scatter  the same, every rank merging its share of the heads

Exit code 2: there are not enough Hopper GPUs, nothing was measured.  1: a method failed.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from flashmla_cute import DecodePlan, PagedKVCache, mla_decode
from flashmla_cute.parallel import ContextParallel, DataParallel, Interleaved, TensorParallel

from . import card, report, roofline, timing
from .peers import Refused
from .problem import Check, Expected, Problem
from .workloads import Row

RESULTS = Path(__file__).parent / "results"
ROUNDS, EAGER_CALLS, TIMEOUT_S = 20, 50, 300
PAGE = 64
ROWS = (
    Row(1, 128, 65536, "one long request: only its tokens or heads can be divided"),
    Row(16, 128, 16384, "few long requests"),
    Row(128, 128, 8192, "a full batch"),
    Row(16, 128, 16384, "two query tokens, which context parallel reads pages twice for", s_q=2),
    Row(16, 16, 16384, "few heads: memory-bound, dividing heads wins nothing"),
)


@dataclass
class Method:
    launch: Callable[[int], tuple]  # copy of the cache -> out, lse, over what `expected` says
    expected: Callable[[Expected], Expected]
    cache_share: float  # of the whole cache that a GPU holds


def one(problem: Problem) -> Method:
    return Method(_local(problem, problem.q, slice(None)), lambda expected: expected, 1.0)


def tensor(problem: Problem) -> Method:
    heads = TensorParallel(problem.row.h_q, problem.q.device).heads
    narrow = lambda e: replace(e, out=e.out[:, :, heads], lse=e.lse[:, heads])
    return Method(_local(problem, problem.q[:, :, heads].contiguous(), slice(None)), narrow, 1.0)


def data(problem: Problem) -> Method:
    mine = DataParallel(problem.row.lengths, problem.q.device).requests
    if not mine:
        raise Refused(f"{problem.row.b} requests, fewer than ranks")
    there = lambda e: [i for i, request in enumerate(e.requests) if request in mine]
    narrow = lambda e: Expected([mine.index(e.requests[i]) for i in there(e)], e.out[there(e)], e.lse[there(e)])
    return Method(_local(problem, problem.q[mine], mine), narrow, 1 / dist.get_world_size())


def context(problem: Problem, scatter: bool = False) -> Method:
    """stripes of a page: a rank's block table has every n-th page of the whole one"""
    rank, size, row = dist.get_rank(), dist.get_world_size(), problem.row
    table = problem.block_table[:, rank::size].contiguous()
    own = PagedKVCache.from_tensors(problem.pools[0], table, problem.cache_seqlens)
    cp = ContextParallel(own, Interleaved(size, PAGE), row.h_q, row.s_q, scatter_heads=scatter)
    caches = [cp.cache(pool) for pool in problem.pools]
    share = cp.shares[rank]
    heads = slice(share.start, share.stop)
    launch = lambda copy: cp.decode(problem.q, caches[copy], softmax_scale=problem.softmax_scale)
    return Method(launch, lambda e: replace(e, out=e.out[:, :, heads], lse=e.lse[:, heads]), 1 / size)


METHODS = {
    "one": one,
    "tensor": tensor,
    "data": data,
    "context": context,
    "context_scatter": lambda problem: context(problem, scatter=True),
}


def _local(problem: Problem, q: torch.Tensor, requests) -> Callable[[int], tuple]:
    """mla_decode of some requests and heads on this GPU alone"""
    table, lengths = problem.block_table[requests], problem.cache_seqlens[requests]
    caches = [PagedKVCache.from_tensors(pool, table, lengths) for pool in problem.pools]
    plan, scale = DecodePlan(caches[0], q.shape[2], q.shape[1]), problem.softmax_scale
    return lambda copy: mla_decode(q, caches[copy], plan, softmax_scale=scale, causal=problem.row.causal)


# ---------------------------------------------------------------------- one rank
def measure_row(row: Row, seed: int, device: str) -> list[dict]:
    """records of all methods on rank 0, nothing on the others"""
    copies = timing.num_copies(roofline.kv_bytes(row) // dist.get_world_size())
    launches = timing.num_launches(copies, roofline.expected_us(row))
    problem = Problem.make(row, copies, seed, device=device)
    expected = problem.expected(0)
    records, methods, graphs = {}, {}, {}  # (a graph reads its method's plan and caches: they live as long as it does)
    for name, prepare in METHODS.items():
        record = records[name] = {"method": name, "b": row.b, "s_q": row.s_q, "h_q": row.h_q, "s_k": max(row.lengths)}
        record |= dict.fromkeys(("us", "us_spread", "eager_us", "rel_err", "lse_err", "cache_bytes_per_gpu", "error"))
        with _agreeing(record):
            methods[name] = prepare(problem)
            record |= _checked(methods[name], expected, row)
        if record["error"] is None:
            with _agreeing(record):
                record["eager_us"] = _eager(methods[name].launch, copies)
                graphs[name] = _capture(methods[name].launch, copies, launches)
        if record["error"]:
            graphs.pop(name, None)
    for name, samples in _replay(graphs, launches).items():
        spread = statistics.quantiles(samples, n=10, method="inclusive")
        records[name] |= {"us": statistics.median(samples), "us_spread": [spread[0], spread[-1]]}
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(records.values()))
    return [_slowest(of_ranks) for of_ranks in zip(*gathered)] if dist.get_rank() == 0 else []


def _checked(method: Method, expected: Expected, row: Row) -> dict:
    """fields of the record: how far a first call is from float64"""
    mine, results = method.expected(expected), method.launch(0)
    check = mine.check(*results, row.dtype) if mine.requests else Check(0.0, 0.0, None)
    share = int(method.cache_share * roofline.kv_bytes(row))
    return {"rel_err": check.rel_err, "lse_err": check.lse_err, "cache_bytes_per_gpu": share, "error": check.failure}


@contextlib.contextmanager
def _agreeing(record: dict):
    """what is raised becomes the record's error, and so does the error of another rank: all go on together, or none"""
    try:
        yield
    except Refused as reason:
        record["error"] = f"refused: {reason}"
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}".split("\n")[0]
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, record["error"])
    record["error"] = next((error for error in errors if error), None)


def _slowest(of_ranks: tuple[dict, ...]) -> dict:
    """one record of the same method on all ranks"""
    merged = dict(of_ranks[0])
    for key in ("us", "eager_us", "rel_err", "lse_err"):
        merged[key] = max((record[key] for record in of_ranks if record[key] is not None), default=None)
    merged["us_spread"] = max((record["us_spread"] for record in of_ranks if record["us_spread"]), default=None)
    return merged


def _together():
    """what follows on the current stream starts at the same time on all ranks"""
    dist.all_reduce(torch.zeros(1, device="cuda"))


def _eager(launch: Callable, copies: int) -> float:
    for copy in range(copies):
        launch(copy)
    _together()
    return _events(lambda: [launch(call % copies) for call in range(EAGER_CALLS)])() * 1e3 / EAGER_CALLS


def _capture(launch: Callable, copies: int, launches: int) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # (NCCL's watchdog thread asks for events meanwhile)
        for i in range(launches):
            launch(i % copies)
    return graph


def _replay(graphs: dict[str, torch.cuda.CUDAGraph], launches: int) -> dict[str, list[float]]:
    """us per launch on this rank, by method"""
    elapsed = {name: [] for name in graphs}
    for _ in range(ROUNDS + 2):
        for name, graph in graphs.items():
            _together()
            elapsed[name].append(_events(graph.replay))
    return {name: [1e3 * ask() / launches for ask in asks[2:]] for name, asks in elapsed.items()}


def _events(work: Callable) -> Callable[[], float]:
    """runs `work`; what is returned waits, and says how many ms it took"""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    return lambda: (end.synchronize(), start.elapsed_time(end))[1]


def process(rank: int, size: int, port: int, seed: int, path: Path, result: dict):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    device = f"cuda:{rank}"
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=torch.device(device))
    for row in ROWS:
        if rank == 0:
            print(row, file=sys.stderr, flush=True)
        result["rows"] += measure_row(row, seed, device)
        torch.cuda.empty_cache()
        if rank == 0:
            report.write(path, result)
    if rank == 0:
        result["clocks"] = {"after": card.clocks_now()}
        report.write(path, result)
        print(table(result))
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------------- all ranks
def table(result: dict) -> str:
    lines = [f"{'b':>4} {'s_q':>3} {'h':>4} {'s_k':>7} " + "".join(f"{name:>24}" for name in METHODS)]
    shapes = dict.fromkeys((r["b"], r["s_q"], r["h_q"], r["s_k"]) for r in result["rows"])
    for shape in shapes:
        mine = {r["method"]: r for r in result["rows"] if (r["b"], r["s_q"], r["h_q"], r["s_k"]) == shape}
        cells = "".join(f"{_cell(mine.get(name), mine.get('one')):>24}" for name in METHODS)
        lines.append("{:>4} {:>3} {:>4} {:>7} ".format(*shape) + cells)
    lines += [f"{r['method']}, b{r['b']} s_q{r['s_q']} h{r['h_q']}: {r['error']}" for r in result["rows"] if r["error"]]
    return "\n".join([*lines, "us in a CUDA graph, how many times faster than one GPU, (us without a graph)"])


def _cell(record: dict | None, whole: dict | None) -> str:
    if not record or not (record["us"] or record["eager_us"]):
        return "-"
    us = f"{record['us']:.1f}" if record["us"] else "-"
    ratio = f" {whole['us'] / record['us']:.2f}x" if whole and whole["us"] and record["us"] else ""
    return f"{us}{ratio} ({record['eager_us']:.0f})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.parallel", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs, default: %(default)s")
    parser.add_argument("--name", default="parallel", help="of the result, default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result, default: perf/results")
    options = parser.parse_args(argv)
    reason = card.why_unusable()
    if reason is None and torch.cuda.device_count() < options.ranks:
        reason = f"--ranks is {options.ranks}, this host has {torch.cuda.device_count()} GPUs"
    if reason is None and options.ranks < 2:
        reason = f"--ranks is {options.ranks}; allowed: 2 or more"
    if reason:
        print(f"perf.parallel: {reason}", file=sys.stderr)
        return 2
    result = {**card.identity(), "ranks": options.ranks, "seed": options.seed, "clocks": {}, "rows": []}
    path = report.new_path(options.out, f"{result['date']}-{card.slug(result['device'])}-{options.name}")
    report.write(path, result)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (options.ranks, port, options.seed, path, result)
    torch.multiprocessing.start_processes(process, arguments, options.ranks, start_method="spawn")
    stored = json.loads(path.read_text())
    print(f"stored in {path}")
    failed = [r for r in stored["rows"] if r["error"] and not r["error"].startswith("refused")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
