"""The host's share: what a call costs in Python and in the launch, and what a compile and a start from the cache take.

python -m perf.host                   all of it, stored under perf/results/
python -m perf.host --no-gpu          the compile and start times alone; what needs a GPU is stored as null
python -m perf.host --cpus 0          compile on all CPUs instead of two

compile_cold_s   `compile.get` of one DecodeOp configuration in a fresh process with an empty cache, after the imports
warm_start_ms    the same in the next process, which finds the object in the cache
import_s         imports of that process: torch, the DSL and this package; the same with files the kernel has already read
eager_us         one call of mla_decode with out and lse given, until it returns: checks, look-up, two kernel launches; with
                 tensors that earlier calls have had, as in a model whose buffers stay
fresh_us         the same with q, out and lse that are new tensor objects, as where each step makes its own
launch_us        the compiled function alone, called with the arguments that mla_decode passes
overhead_us      eager_us - launch_us
python_us        the same difference where the compiled function is a Python function that does nothing (it lacks what the
                 caches of a CPU forget while the driver runs, so it is less than overhead_us)

The calls go through the layers of a small model, which share a plan: each has its own q, pool, out and lse.  They run under
torch.inference_mode, as in an engine (with gradients enabled a call also asks four tensors whether they require one: 0.2 to
0.3 us), and are queued on an idle GPU, fewer than the launch queue holds, so that no call waits for the GPU.  Exit code 2: no
Hopper GPU, nothing was measured.  1: the kernel's result was wrong, or a compile failed.
"""

import argparse
import contextlib
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from flashmla_cute import DecodePlan, PagedKVCache, compile, mla_decode, ops
from flashmla_cute.kernels.config import PRESETS
from flashmla_cute.testing import Case, Problem

from . import card, report
from .timing import Timing

RESULTS = Path(__file__).parent / "results"
CASE = Case(lengths=(64,), h_q=16)  # as little work as there is
LAYERS = 8
CALLS = 400  # in a repetition, two launches each: the queue holds 1024, and a full one makes the host wait
MIN_REPETITIONS = 20
UNTOUCHED = 7.0  # no lse of CASE comes near it
CALL_FIELDS = (
    "eager_us",
    "launch_us",
    "overhead_us",
    "python_us",
    "fresh_us",
    "spread_us",
    "calls",
    "repetitions",
    "python_error",
)
START = """
import os, sys, time
cpus = [int(cpu) for cpu in sys.argv[1].split(",")]
os.sched_setaffinity(0, cpus)
begin = time.perf_counter()
import torch
after_torch = time.perf_counter()
from flashmla_cute import compile, ops
from flashmla_cute.kernels.config import PRESETS
after_imports = time.perf_counter()
compile.get(ops.DecodeOp, PRESETS[0])
end = time.perf_counter()
print(after_torch - begin, after_imports - begin, end - after_imports)
"""


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    reason = None if options.no_gpu else card.why_unusable()
    if reason:
        print(f"perf.host: {reason}; --no-gpu measures the compile times alone", file=sys.stderr)
        return 2
    result = {**card.identity(gpu=not options.no_gpu), "clocks": None, "cpu": _cpu_model(), "cpu_count": os.cpu_count()}
    try:
        result |= measure_starts(options.cpus, options.starts)
        result |= dict.fromkeys(CALL_FIELDS)
        if not options.no_gpu:
            result["clocks"] = {"before": card.clocks_now()}
            result |= measure_calls(options.repetitions)
            result["clocks"]["after"] = card.clocks_now()
    except (RuntimeError, AssertionError) as error:  # a compile that failed, a result that is wrong
        print(f"perf.host: {error}", file=sys.stderr)
        return 1
    slug = "none" if options.no_gpu else card.slug(result["device"])
    path = report.new_path(options.out, f"{result['date']}-{slug}-host")
    report.write(path, result)
    print(_summary(result))
    print(f"stored in {path}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.host", description=__doc__.split("\n")[0])
    parser.add_argument("--no-gpu", action="store_true", help="only what needs no GPU; the rest is stored as null")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that a fresh process is pinned to, 0: all; default: 2")
    parser.add_argument("--starts", type=int, default=3, help="cold compiles, and starts from the cache; default: 3")
    parser.add_argument(
        "--repetitions", type=int, default=50, help=f"of {CALLS} calls, at least {MIN_REPETITIONS}; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default: perf/results")
    options = parser.parse_args(argv)
    available = len(os.sched_getaffinity(0))
    if not 0 <= options.cpus <= available:
        parser.error(f"--cpus is {options.cpus}; allowed: 0 to {available}")
    if options.starts < 1:
        parser.error(f"--starts is {options.starts}; allowed: 1 and more")
    if options.repetitions < MIN_REPETITIONS:
        parser.error(f"--repetitions is {options.repetitions}; fewer than {MIN_REPETITIONS} give no spread")
    return options


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _summary(result: dict) -> str:
    lines = [
        f"compile {result['compile_cold_s']:.2f} s, start from the cache {result['warm_start_ms']:.1f} ms, "
        f"imports {result['import_s']:.2f} s, on {len(result['cpus'])} of {result['cpu_count']} CPUs ({result['cpu']})"
    ]
    if result["eager_us"] is not None:
        eager_us, launch_us, overhead_us, python_us, fresh_us = (result[name] for name in CALL_FIELDS[:5])
        lines.append(f"a call {eager_us:.2f} us = launch {launch_us:.2f} us + overhead {overhead_us:.2f} us")
        lines.append(f"a call with new tensor objects {fresh_us:.2f} us")
        lines.append(f"python alone: {result['python_error']}" if python_us is None else f"python alone {python_us:.2f} us")
    return "\n".join(lines)


# ---------------------------------------------------------------------- fresh processes
def measure_starts(num_cpus: int, starts: int) -> dict:
    """medians over `starts` cold processes, each with an empty cache, and as many warm ones that find what those left"""
    cpus = sorted(os.sched_getaffinity(0))
    cpus = cpus[:num_cpus] if num_cpus else cpus
    cold, warm = [], []
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(_start(cache, cpus))
            warm.append(_start(cache, cpus))
    return {
        "config": PRESETS[0].name,
        "cpus": cpus,
        "compile_cold_s": statistics.median(start.get_s for start in cold),
        "compile_cold_all_s": [start.get_s for start in cold],
        "warm_start_ms": 1e3 * statistics.median(start.get_s for start in warm),
        "warm_start_all_ms": [1e3 * start.get_s for start in warm],
        "import_s": statistics.median(start.import_s for start in warm),
        "import_torch_s": statistics.median(start.torch_s for start in warm),
    }


@dataclass(frozen=True)
class Start:
    torch_s: float  # import of torch, a part of import_s
    import_s: float
    get_s: float  # compile.get


def _start(cache: str, cpus: list[int]) -> Start:
    """Raises RuntimeError with the last line that the process wrote."""
    command = [sys.executable, "-c", START, ",".join(map(str, cpus))]
    environment = {**os.environ, compile.CACHE_VARIABLE: cache, compile.OBJECTS_VARIABLE: ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=card.ROOT, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"a fresh process failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return Start(*map(float, done.stdout.splitlines()[-1].split()))


# ---------------------------------------------------------------------- calls
@dataclass(frozen=True)
class Layers:
    """mla_decode of each layer of a small model, with a plan and caches that no other Layers has seen"""

    calls: list[Callable]
    outs: list[torch.Tensor]
    lses: list[torch.Tensor]

    @classmethod
    def of(cls, problem: Problem) -> "Layers":
        cache, case = problem.cache, problem.case
        plan = DecodePlan(cache, case.h_q, case.s_q)
        calls, outs, lses = [], [], []
        for _ in range(LAYERS):
            layer = PagedKVCache.from_tensors(cache.pool.clone(), cache.block_table, cache.cache_seqlens)
            outs.append(torch.full_like(problem.out, float("nan")))
            lses.append(torch.full_like(problem.lse, UNTOUCHED))
            fixed = {"softmax_scale": case.softmax_scale, "causal": case.causal, "out": outs[-1], "lse": lses[-1]}
            calls.append(partial(mla_decode, problem.q.clone(), layer, plan, **fixed))
        return cls(calls, outs, lses)

    def run(self):
        for call in self.calls:
            call()

    def repeated(self) -> list[Callable]:
        return self.calls * (CALLS // LAYERS)

    def fresh(self) -> list[Callable]:
        """like `repeated`, through tensor objects made for this list alone"""
        return [partial(call.func, *_aliases(call.args), **_aliases(call.keywords)) for call in self.repeated()]

    def untouched(self) -> bool:
        return all(bool((lse == UNTOUCHED).all()) for lse in self.lses)


def _aliases(arguments):
    """`arguments`, a tuple or dict, with a new tensor object of the same memory for each tensor"""
    alias = lambda value: value.detach() if isinstance(value, torch.Tensor) else value
    if isinstance(arguments, dict):
        return {name: alias(value) for name, value in arguments.items()}
    return tuple(map(alias, arguments))


@contextlib.contextmanager
def _instead(stand_in: Callable) -> Iterator[None]:
    """Whoever looks a compiled DecodeOp up meanwhile gets `stand_in`; the look-up itself stays what it is.  A plan or cache
    that remembers the function from an earlier call keeps it: hence fresh Layers for each use."""
    functions = compile._functions
    with mock.patch.dict(functions, {key: stand_in for key in functions if key[0] is ops.DecodeOp}):
        yield


def measure_calls(repetitions: int) -> dict:
    """Raises AssertionError when the kernel is wrong, RuntimeError when mla_decode does not call what it looked up."""
    problem = Problem.make(CASE)
    problem.check()
    eager, fresh, stub = (Layers.of(problem) for _ in range(3))
    for layers in (eager, fresh):
        layers.run()
        assert all(torch.equal(out, problem.out) for out in layers.outs), f"equal layers have different results\n{CASE}"
    with _instead(_nothing):
        stub.run()
    launches = _bare_launches(problem)
    nothing = [partial(_nothing, *launch.args) for launch in launches]
    real = contextlib.nullcontext
    variants = {
        "eager": Variant(eager.repeated, real),
        "launch": Variant(lambda: launches * (CALLS // LAYERS), real),
        "python": Variant(stub.repeated, lambda: _instead(_nothing)),
        "nothing": Variant(lambda: nothing * (CALLS // LAYERS), real),
        "fresh": Variant(fresh.fresh, real),
    }
    timed = _interleave(variants, repetitions)
    us = {name: timing.us for name, timing in timed.items()}
    stubbed = stub.untouched()  # a kernel that ran all the same has written here
    return {
        "eager_us": us["eager"],
        "launch_us": us["launch"],
        "overhead_us": us["eager"] - us["launch"],
        "python_us": us["python"] - us["nothing"] if stubbed else None,
        "fresh_us": us["fresh"],
        "spread_us": {name: [timing.low, timing.high] for name, timing in timed.items() if stubbed or name != "python"},
        "calls": CALLS,
        "repetitions": repetitions,
        "python_error": None if stubbed else "mla_decode launched the kernel where it should have found the stub",
    }


def _nothing(*_):
    """a compiled function that does nothing"""


def _bare_launches(problem: Problem) -> list[Callable]:
    """the compiled function bound to the very arguments that mla_decode passes it, layer by layer"""
    (function,) = (function for (op_class, _), function in compile._functions.items() if op_class is ops.DecodeOp)
    passed = []
    with _instead(lambda *arguments: passed.append(arguments)):
        Layers.of(problem).run()
    if len(passed) != LAYERS:
        raise RuntimeError(f"{LAYERS} calls of mla_decode called the compiled function {len(passed)} times")
    return [partial(function, *arguments) for arguments in passed]


@dataclass(frozen=True)
class Variant:
    make_calls: Callable[[], list[Callable]]  # of one repetition
    context: Callable[[], contextlib.AbstractContextManager]  # in which they run


def _interleave(variants: dict[str, Variant], repetitions: int) -> dict[str, Timing]:
    """us per call of each variant, in turns, so that all see the same clocks of the CPU; the first turn is not counted"""
    samples = {name: [] for name in variants}
    for turn in range(1 + repetitions):
        for name, variant in variants.items():
            calls = variant.make_calls()
            with variant.context():
                us = _us_per_call(calls)
            torch.cuda.synchronize()
            if turn > 0:
                samples[name].append(us)
    return {name: Timing.of(values) for name, values in samples.items()}


def _us_per_call(calls: list[Callable]) -> float:
    gc.collect()
    gc.disable()  # (a collection inside would be charged to whoever it hits)
    try:
        with torch.inference_mode():
            begin = time.perf_counter()
            for call in calls:
                call()
            end = time.perf_counter()
    finally:
        gc.enable()
    return 1e6 * (end - begin) / len(calls)


if __name__ == "__main__":
    sys.exit(main())
