"""mla_decode and DecodePlan on the GPU: streams, CUDA graphs, plans that are shared, arguments that are refused."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from flashmla_cute import DecodePlan, PagedKVCache, compile, mla_decode
from flashmla_cute.testing import ABSURD_PAGES, Case, Problem

from ..problems import check, clone, num_split, poisoned, same_bits, small_cases, varied_lengths, with_pool

pytestmark = pytest.mark.gpu

A_WHILE = 50_000_000  # cycles: 25 ms and more


def test_new_outputs_are_returned(record):
    for case in small_cases(torch.bfloat16):
        problem = Problem.make(case)
        out, lse = mla_decode(problem.q, problem.cache, problem.plan(), causal=case.causal)
        assert out.dtype == problem.q.dtype and lse.dtype == torch.float32
        errors = problem.errors(out, lse)
        record.add(case, errors)
        assert errors.within(case.dtype), f"{errors}\n{case}"
        again = problem.run()
        assert again[0] is problem.out and again[1] is problem.lse and same_bits((out, lse), again)


def test_under_no_grad_parameters_are_accepted():
    problem = Problem.make(Case((70,), h_q=16))
    plain = clone(problem.run())
    with torch.no_grad():
        assert same_bits(plain, mla_decode(problem.q.requires_grad_(), problem.cache, problem.plan()))


# ---------------------------------------------------------------------- streams
def test_the_current_stream_is_used():
    """q, lengths and the cache are written on a side stream, after a long wait: launches elsewhere would read NaN"""
    problem = Problem.make(Case((700, 0, 65), h_q=16, s_q=2))
    plan = problem.plan()
    plain = clone(problem.run(plan))
    q, pool, lengths = problem.q.clone(), problem.cache.pool.clone(), problem.cache.cache_seqlens.clone()
    for tensor in (problem.q, problem.cache.pool, problem.out, problem.lse):
        tensor.fill_(float("nan"))
    problem.cache.cache_seqlens.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        problem.q.copy_(q)
        problem.cache.pool.copy_(pool)
        problem.cache.cache_seqlens.copy_(lengths)
        plan.update()
        problem.run(plan)
    assert not stream.query(), "nothing waits for the GPU"
    stream.synchronize()
    assert same_bits(plain, (problem.out, problem.lse))


def test_two_streams_with_a_plan_each():
    problems = [
        Problem.make(Case(varied_lengths(30, 2000, 0, seed=1), h_q=128, seed=1)),
        Problem.make(Case(varied_lengths(5, 5000, 0, seed=2), h_q=16, s_q=2, seed=2)),
    ]
    plans, streams = [problem.plan() for problem in problems], [torch.cuda.Stream() for _ in problems]
    alone = [clone(problem.run(plan)) for problem, plan in zip(problems, plans)]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for problem, plan, stream, mine in zip(problems, plans, streams, results):
            with torch.cuda.stream(stream):
                plan.update()
                mine.append(mla_decode(problem.q, problem.cache, plan))
    torch.cuda.synchronize()
    for wanted, mine in zip(alone, results):
        assert all(same_bits(wanted, got) for got in mine)


def test_two_threads_with_a_stream_and_a_plan_each(decode_kernels, monkeypatch):
    """planning, decoding and remembering at once, from the first, cold call on"""
    monkeypatch.setattr(compile, "_functions", {})
    problems = [
        Problem.make(Case(varied_lengths(30, 2000, 0, seed=1), h_q=128, seed=1)),
        Problem.make(Case(varied_lengths(5, 5000, 0, seed=2), h_q=16, s_q=2, seed=2)),
    ]
    torch.cuda.synchronize()
    start = threading.Barrier(len(problems))

    def serve(problem: Problem):
        results = []
        start.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            plan = problem.plan()
            for _ in range(50):
                plan.update()
                results.append(mla_decode(problem.q, problem.cache, plan))
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(len(problems)) as threads:
        served = list(threads.map(serve, problems))
    for problem, results in zip(problems, served):
        assert problem.errors(*results[0]).within(problem.case.dtype)
        assert all(same_bits(results[0], others) for others in results)


def test_back_to_back_launches_of_dependent_layers():
    """programmatic dependent launch must not let a layer read what the layer before has not written"""
    problem = Problem.make(Case(varied_lengths(16, 1000, 1, seed=3), h_q=64))
    plan, layers = problem.plan(), 12

    def run(pause):
        q, steps = problem.q, []
        for _ in range(layers):
            plan.update()
            out, lse = mla_decode(q, problem.cache, plan)
            q = torch.cat([out, problem.q[..., 512:]], -1)
            steps.append((out, lse))
            if pause:
                torch.cuda.synchronize()
        return steps

    paused = run(True)
    for _ in range(5):
        assert all(same_bits(a, b) for a, b in zip(paused, run(False)))


# ---------------------------------------------------------------------- CUDA graphs
class Captured:
    """plan and decode in one graph, over tensors that are rewritten in place between replays"""

    def __init__(self, case: Case, num_pages: int, max_pages: int):
        batch, self.case = len(case.lengths), case
        pool = torch.zeros(num_pages, 64, case.h_kv, 576, dtype=case.dtype, device="cuda")
        table = torch.zeros(batch, max_pages, dtype=torch.int32, device="cuda")
        self.cache = PagedKVCache.from_tensors(pool, table, torch.ones(batch, dtype=torch.int32, device="cuda"))
        self.q = torch.zeros(batch, case.s_q, case.h_q, 576, dtype=case.dtype, device="cuda")
        self.plan = DecodePlan(self.cache, case.h_q, case.s_q)
        self.out, self.lse = mla_decode(self.q, self.cache, self.plan, causal=case.causal)  # loads the kernels
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.plan.update()
            mla_decode(self.q, self.cache, self.plan, causal=case.causal, out=self.out, lse=self.lse)

    def replay(self, lengths: tuple[int, ...], seed: int) -> Problem:
        """the graph over a fresh problem of these lengths"""
        fresh = Problem.make(replace(self.case, lengths=lengths, seed=seed))
        pages, columns = fresh.cache.pool.shape[0], min(fresh.cache.block_table.shape[1], self.cache.block_table.shape[1])
        self.cache.pool.fill_(float("nan"))
        self.cache.pool[:pages] = fresh.cache.pool
        self.cache.block_table.fill_(ABSURD_PAGES[seed % len(ABSURD_PAGES)])
        self.cache.block_table[:, :columns] = fresh.cache.block_table[:, :columns]
        self.cache.cache_seqlens.copy_(fresh.cache.cache_seqlens)
        self.q.copy_(fresh.q)
        for tensor in (self.out, self.lse, self.plan.o_split, self.plan.lse_split):
            tensor.fill_(float("nan"))
        self.graph.replay()
        return fresh


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("h_q, h_kv, s_q", [(128, 1, 1), (16, 1, 2), (16, 2, 3)])
def test_a_graph_follows_lengths_tables_and_queries(record, dtype, h_q, h_kv, s_q):
    """from no splits to many, to rows without tokens, and back"""
    steps = [
        (64, 64, 64, 64),
        (9000, 0, 100, 1),
        (0, 0, 0, 0),
        (1, 2, 3, 4),
        (0, 9000, 9000, 0),
        (500, 501, 502, 503),
        (0, 0, 0, 20_000),
        (64, 64, 64, 64),
    ]
    captured = Captured(Case(steps[0], h_q, h_kv, s_q, dtype=dtype), num_pages=400, max_pages=320)
    splits = []
    for seed, lengths in enumerate(steps):
        fresh = captured.replay(lengths, seed)
        errors = fresh.errors(captured.out, captured.lse)
        record.add(fresh.case, errors)
        assert errors.within(dtype), f"replay {seed}: {errors}\n{fresh.case}"
        splits.append(num_split(captured.plan))
    assert splits[0] == splits[2] == 0 and splits[1] > 0 and splits[4] > 0 and splits[6] == 1


def test_a_graph_gives_the_bits_of_an_eager_call():
    case = Case((3000, 0, 65, 700), h_q=32, s_q=2)
    captured = Captured(case, num_pages=100, max_pages=60)
    fresh = captured.replay(case.lengths, 5)
    cache = with_pool(fresh, captured.cache.pool.clone(), captured.cache.block_table.clone()).cache
    eager = mla_decode(fresh.q, cache, DecodePlan(cache, case.h_q, case.s_q))
    assert same_bits(eager, (captured.out, captured.lse))


def test_a_graph_is_captured_with_a_cold_library(decode_kernels, monkeypatch):
    """the kernel is loaded, from the compile cache, while the capture runs"""
    problem = Problem.make(Case((70, 0, 500), h_q=24, h_kv=3, s_q=5, causal=False))
    plan, graph = problem.plan(), torch.cuda.CUDAGraph()
    monkeypatch.setattr(compile, "_functions", {})
    with torch.cuda.graph(graph):
        problem.run(plan)
    assert problem.out.isnan().all(), "capturing launches nothing"
    graph.replay()
    errors = problem.errors(problem.out, problem.lse)
    assert errors.within(problem.case.dtype), errors


def num_allocations() -> int:
    return torch.cuda.memory_stats()["allocation.all.allocated"]


def test_a_step_neither_allocates_nor_waits():
    """with outputs given: eagerly, remembered or not, and in a capture"""
    problem = Problem.make(Case((3000, 0, 65), h_q=16, s_q=2))
    plan = problem.plan()
    torch.cuda.synchronize()
    before = num_allocations()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        for _ in range(3):
            plan.update()
            problem.run(plan)
        assert not torch.cuda.current_stream().query(), "something has waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert num_allocations() == before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = num_allocations()
        plan.update()
        problem.run(plan)
        assert num_allocations() == before


# ---------------------------------------------------------------------- plans
def test_one_plan_serves_all_layers(record):
    first = Problem.make(Case(varied_lengths(20, 1500, 0, seed=4), h_q=64, s_q=2))
    plan = first.plan()
    for layer in range(4):
        pool = torch.where(first.cache.pool.isnan(), first.cache.pool, torch.randn_like(first.cache.pool) * (1 + layer))
        check(with_pool(first, pool), record, plan=plan)


def test_update_follows_the_lengths(record):
    problem = Problem.make(Case((2000, 3000, 64), h_q=16))
    plan = problem.plan()
    check(problem, record, plan=plan)
    shorter = (130, 0, 1)
    problem.cache.cache_seqlens.copy_(torch.tensor(shorter, dtype=torch.int32))
    plan.update()
    problem = replace(
        problem, case=replace(problem.case, lengths=shorter), out=poisoned(problem.out), lse=poisoned(problem.lse)
    )
    check(problem, record, plan=plan)


def test_a_length_beyond_the_table_is_cut_to_it():
    problem = Problem.make(Case((192, 192), h_q=16))
    cache = PagedKVCache.from_tensors(problem.cache.pool, problem.cache.block_table[:, :3], problem.cache.cache_seqlens)
    problem = replace(problem, cache=cache)
    plain = clone(problem.run())
    cache.cache_seqlens.copy_(torch.tensor([193, 2**30], dtype=torch.int32))
    assert same_bits(plain, problem.run())


def test_an_empty_batch():
    problem = Problem.make(Case((64,), h_q=16))
    cache = PagedKVCache.from_tensors(problem.cache.pool, problem.cache.block_table[:0], problem.cache.cache_seqlens[:0])
    out, lse = mla_decode(problem.q[:0], cache, DecodePlan(cache, 16))
    assert out.shape == (0, 1, 16, 512) and lse.shape == (0, 16, 1)
    torch.cuda.synchronize()


# ---------------------------------------------------------------------- refused before any launch
def half_off(tensor: torch.Tensor) -> torch.Tensor:
    """the same numbers, 8 bytes behind a multiple of 16"""
    memory = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype, device=tensor.device)
    return memory[4 : 4 + tensor.numel()].view(tensor.shape).copy_(tensor)


REFUSED = {
    "q on the CPU": (lambda p: dict(q=p.q.cpu()), "q.device is cpu"),
    "q of another dtype": (lambda p: dict(q=p.q.half()), "q.dtype is torch.float16"),
    "q of another batch": (lambda p: dict(q=p.q[:1]), "q.shape is (1, 2, 16, 576)"),
    "q of other heads": (lambda p: dict(q=p.q[:, :, :8]), "q.shape is (2, 2, 8, 576)"),
    "q with strided columns": (lambda p: dict(q=p.q.transpose(2, 3).contiguous().transpose(2, 3)), "q.stride(-1) is 16"),
    "q misaligned": (lambda p: dict(q=half_off(p.q)), "q.data_ptr() is 0x"),
    "q expanded": (lambda p: dict(q=p.q[:1].expand(2, -1, -1, -1)), "q.stride(0) is 0"),
    "out on the CPU": (lambda p: dict(out=p.out.cpu()), "out.device is cpu"),
    "out of another dtype": (lambda p: dict(out=p.out.float()), "out.dtype is torch.float32"),
    "out of another shape": (lambda p: dict(out=p.out[:, :1]), "out.shape is (2, 1, 16, 512)"),
    "out misaligned": (lambda p: dict(out=half_off(p.out)), "out.data_ptr() is 0x"),
    "lse on the CPU": (lambda p: dict(lse=p.lse.cpu()), "lse.device is cpu"),
    "lse of another dtype": (lambda p: dict(lse=p.lse.double()), "lse.dtype is torch.float64"),
    "lse expanded": (lambda p: dict(lse=p.lse[:, :1].expand(-1, 16, -1)), "lse.stride(1) is 0"),
    "lse of another shape": (lambda p: dict(lse=p.lse.transpose(1, 2)), "lse.shape is (2, 2, 16)"),
    "the plan of other lengths": (lambda p: dict(plan=Problem.make(p.case).plan()), "plan is made for another cache_seqlens"),
    "the plan of other heads": (lambda p: dict(plan=DecodePlan(p.cache, 32, 2)), "q.shape is (2, 2, 16, 576)"),
    "a narrower table": (
        lambda p: dict(cache=PagedKVCache.from_tensors(p.cache.pool, p.cache.block_table[:, :2], p.cache.cache_seqlens)),
        "cache.block_table.shape is (2, 2)",
    ),
}


@pytest.mark.parametrize("later", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_any_launch(what, later):
    """later: when a like call was launched and is remembered"""
    change, message = REFUSED[what]
    problem = Problem.make(Case((70, 300), h_q=16, s_q=2))
    arguments = dict(q=problem.q, cache=problem.cache, plan=problem.plan(), out=problem.out, lse=problem.lse)
    if later:
        mla_decode(**arguments)
        for tensor in (problem.out, problem.lse):
            tensor.fill_(float("nan"))
    changed = change(problem)
    with pytest.raises(ValueError) as caught:
        mla_decode(**{**arguments, **changed})
    assert message in str(caught.value) and "allowed: " in str(caught.value), str(caught.value)
    torch.cuda.synchronize()
    for name in {"out", "lse"} - set(changed):
        assert arguments[name].isnan().all(), f"{name} was written"
    problem.run(arguments["plan"])
    assert problem.errors(problem.out, problem.lse).within(problem.case.dtype), "the right arguments still work"


def test_a_plan_of_another_batch_is_refused():
    problem, other = Problem.make(Case((70, 300), h_q=16)), Problem.make(Case((70, 300, 5), h_q=16))
    with pytest.raises(ValueError, match=r"q\.shape is \(2, 1, 16, 576\); allowed: \(3, 1, 16, 576\)"):
        problem.run(other.plan())
    assert problem.out.isnan().all()
