"""Processes and devices: what an import leaves alone, forks and spawned workers, GPUs that are not the current one."""

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashmla_cute import DecodePlan, PagedKVCache, checks, compile, mla_decode, ops
from flashmla_cute.kernels.config import MLAConfig
from flashmla_cute.testing import Case, Problem

from ..problems import clone, same_bits

ROOT = Path(__file__).parents[2]
CASE = Case((70, 0, 3000), h_q=16, s_q=2)
gpu = pytest.mark.gpu
CPU_OR_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])


def work(device: str) -> list:
    """something that a worker does; where there is no GPU, a compile.  -> the result's first bytes"""
    if device == "cpu":
        return [callable(compile.get(ops.AppendOp, MLAConfig(causal=False)))]
    problem = Problem.make(CASE, device)
    problem.check()
    return problem.out.view(torch.int16)[:, :, :, :4].flatten().tolist()


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


# ---------------------------------------------------------------------- import
IMPORT = """
import sys
import cuda.bindings.driver as driver, cuda.bindings.runtime as runtime, torch

def refuse(name):
    def called(*arguments, **options):
        sys.exit(f"the import called {name}")
    return called

for module, names in (
    (torch.cuda, ("_lazy_init", "init", "current_device", "get_device_properties")),
    (torch._C, ("_cuda_getDeviceCount", "_cuda_init")),
    (driver, ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuCtxGetCurrent")),
    (runtime, ("cudaGetDevice", "cudaGetDeviceCount", "cudaSetDevice", "cudaFree")),
):
    for name in names:
        if module is torch._C and not hasattr(module, name):
            continue  # (a torch without CUDA)
        assert hasattr(module, name), name
        setattr(module, name, refuse(f"{module.__name__}.{name}"))
import flashmla_cute, flashmla_cute.compat, flashmla_cute.cli, flashmla_cute.ops, flashmla_cute.testing
assert not torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork()
print("imported")
"""


def test_an_import_leaves_cuda_alone():
    """so that a process may still fork, or choose its device by CUDA_VISIBLE_DEVICES"""
    run = python(IMPORT)
    assert run.stdout == "imported\n", run.stdout + run.stderr


def test_an_import_does_not_load_dynamo():
    """(1 to 2 s that only users of torch.compile should pay)"""
    run = python(
        "import sys, torch; old = 'torch._dynamo' in sys.modules; import flashmla_cute; "
        "print(old or 'torch._dynamo' not in sys.modules)"
    )
    assert run.stdout == "True\n", run.stdout + run.stderr


# ---------------------------------------------------------------------- fork, spawn
FORK = """
import os, sys, traceback
import flashmla_cute, flashmla_cute.compat
from tests.runtime.test_processes import work

def child():
    pid = os.fork()
    if pid == 0:
        try:
            print(*work(sys.argv[1]), flush=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return pid

children = [child() for _ in range(2)]
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
assert codes == [0, 0], codes
print(*work(sys.argv[1]))
"""


@CPU_OR_GPU
def test_fork_after_import(device, tmp_path):
    """two children at once, with a cold compile cache on the CPU, and then the parent"""
    cache = {compile.CACHE_VARIABLE: str(tmp_path)} if device == "cpu" else {}
    run = python(FORK, device, **cache)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1, "they disagree"


@CPU_OR_GPU
def test_spawned_workers(device, tmp_path, monkeypatch):
    if device == "cpu":
        monkeypatch.setenv(compile.CACHE_VARIABLE, str(tmp_path))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(work, [device] * 4))
    assert all(result == work(device) for result in results), "they disagree"


# ---------------------------------------------------------------------- devices
@pytest.fixture
def two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    torch.cuda.set_device(0)
    yield
    torch.cuda.set_device(0)


def test_tensors_of_two_gpus_are_refused_by_name():
    on = lambda index: SimpleNamespace(device=torch.device("cuda", index))
    checks.on_device("out", on(1), torch.device("cuda:1"), "q")
    with pytest.raises(ValueError, match=re.escape("out.device is cuda:0; allowed: cuda:1, the device of q")):
        checks.on_device("out", on(0), torch.device("cuda:1"), "q")


@gpu
def test_a_device_that_is_not_current(two_gpus):
    """plans, decodes and appends on the tensors' device, whichever is current, and leaves that as it is"""
    here, there = (Problem.make(CASE, f"cuda:{i}") for i in range(2))
    for problem in (here, there, here, there):  # the kernels are loaded on either while the other one has them
        assert problem.check().within(CASE.dtype) and torch.cuda.current_device() == 0
    assert torch.equal(here.out.cpu(), there.out.cpu()) and torch.equal(here.lse.cpu(), there.lse.cpu())
    out, lse = mla_decode(there.q, there.cache, there.plan())
    assert out.device == lse.device == torch.device("cuda:1")
    with torch.cuda.device(1):
        here.check()
    cache = PagedKVCache.allocate(2, 1, 100, device="cuda:1")
    rows = torch.randn(70, 576, device="cuda:1").bfloat16()
    cache.append(rows[:, :512], rows[:, 512:], cache.extend([70]))
    assert torch.equal(cache.pool[cache.block_table[0].long()].view(-1, 576)[:70], rows)
    assert torch.cuda.current_device() == 0


@gpu
def test_a_graph_on_a_device_that_is_not_current(two_gpus):
    problem = Problem.make(CASE, "cuda:1")
    plan = problem.plan()
    plain = clone(problem.run(plan))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(1), torch.cuda.graph(graph):
        plan.update()
        problem.run(plan)
    for tensor in (problem.out, problem.lse):
        tensor.fill_(float("nan"))
    torch.cuda.synchronize(1)
    with torch.cuda.device(1):
        graph.replay()
    assert same_bits(plain, (problem.out, problem.lse))


@gpu
def test_a_thread_for_each_device(two_gpus):
    start = threading.Barrier(2)

    def serve(index: int) -> list:
        torch.cuda.set_device(index)
        problem = Problem.make(CASE, f"cuda:{index}")
        plan = problem.plan()
        start.wait()
        results = []
        for _ in range(50):
            plan.update()
            results.append(mla_decode(problem.q, problem.cache, plan))
        torch.cuda.synchronize(index)
        assert problem.errors(*results[0]).within(CASE.dtype)
        return [(out.cpu(), lse.cpu()) for out, lse in results]

    with ThreadPoolExecutor(2) as threads:
        mine, others = threads.map(serve, range(2))
    assert all(same_bits(mine[0], result) for result in (*mine, *others))


@gpu
@pytest.mark.parametrize("name", ["q", "out", "lse", "cache", "pool", "block_table", "cache_seqlens"])
def test_tensors_on_two_devices(two_gpus, name):
    problem, other = (Problem.make(CASE, f"cuda:{i}") for i in range(2))
    plan, cache = problem.plan(), problem.cache
    problem.run(plan)  # (remembered)
    tensors = {key: getattr(cache, key) for key in ("pool", "block_table", "cache_seqlens")}
    if name in tensors:
        with pytest.raises(ValueError, match=r"\.device is cuda:\d; allowed: cuda:\d"):
            PagedKVCache.from_tensors(**{**tensors, name: getattr(other.cache, name)})
        return
    arguments = dict(q=problem.q, cache=cache, plan=plan, out=problem.out, lse=problem.lse)
    with pytest.raises(ValueError, match=r"\.device is cuda:\d; allowed: cuda:\d"):
        mla_decode(**{**arguments, name: getattr(other, name)})


@gpu
def test_a_plan_of_another_device(two_gpus):
    problem, other = (Problem.make(CASE, f"cuda:{i}") for i in range(2))
    with pytest.raises(ValueError, match="plan is made for another cache_seqlens"):
        mla_decode(problem.q, problem.cache, DecodePlan(other.cache, CASE.h_q, CASE.s_q))
