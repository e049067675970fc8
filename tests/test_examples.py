"""The examples: they build or run here, until they say that there is no GPU; on a GPU they must agree with their reference."""

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from flashmla_cute import export, ops
from flashmla_cute.kernels.config import MLAConfig, ScheduleConfig

from .conftest import why_no_gpu

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SECONDS = 300


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    export.export([(ops.ScheduleOp, ScheduleConfig()), (ops.DecodeOp, MLAConfig(causal=False))], folder)
    return folder


@pytest.fixture(scope="module")
def program(objects):
    """examples/cpp, built"""
    headers = cuda_headers()
    if shutil.which("g++") is None or headers is None:
        pytest.skip("g++ or the CUDA headers (nvcc) are not here")
    made = objects / "decode"
    settings = {"PYTHON": sys.executable, "OBJECTS": objects, "OUT": made, "CUDA": headers}
    if shutil.which("make"):
        command = ["make", *(f"{name}={value}" for name, value in settings.items())]
    else:  # as the Makefile does
        command = by_hand(settings)
    run = subprocess.run(command, cwd=EXAMPLES / "cpp", capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 0 and "warning" not in run.stderr, run.stdout + run.stderr
    return made


def cuda_headers() -> Path | None:
    """where nvcc's own toolkit is"""
    if shutil.which("nvcc") is None:
        return None
    told = subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"_HERE_=(.*)/bin$", told, re.MULTILINE)
    root = Path(found[1]) if found else None
    return root if root and (root / "include" / "cuda_runtime_api.h").exists() else None


def by_hand(settings: dict) -> list[str]:
    """the Makefile's command, where there is no make"""
    ask = lambda *words: subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True).stdout.split()
    libraries = [*ask("tvm_ffi.config", "--libdir"), *ask("cutlass.cute.export.aot_config", "--libdir")]
    cuda, folder = settings["CUDA"], settings["OBJECTS"]
    places = [f"-L{place}" for place in (*libraries, cuda / "lib64", cuda / "lib")]
    return [
        *("g++", "-O2", "-Wall", *ask("tvm_ffi.config", "--cxxflags"), f"-I{folder}", f"-I{cuda / 'include'}", "decode.cpp"),
        *map(str, folder.glob("*.o")),
        *(*places, "-ltvm_ffi", "-lcute_dsl_runtime", *(f"-Wl,-rpath,{place}" for place in libraries)),
        *("-lcudart_static", "-ldl", "-lrt", "-lpthread", "-o", str(settings["OUT"])),
    ]


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS)


def launch_script(objects):
    pytest.importorskip("cuda.bindings")
    return run(sys.executable, EXAMPLES / "cubin_launch.py", objects)


# ---------------------------------------------------------------------- without a GPU
def test_the_program_says_that_there_is_no_gpu(program):
    if why_no_gpu() is None:
        pytest.skip("there is one")
    result = run(program)
    assert result.returncode == 1 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert re.match(r"no CUDA device|the kernels are sm_90a code", result.stderr)


def test_the_program_needs_no_python(program):
    needed = run("ldd", program).stdout
    assert "libtvm_ffi.so" in needed and "libcute_dsl_runtime.so" in needed
    assert "libpython" not in needed and "not found" not in needed


def test_the_script_says_that_there_is_no_gpu(objects):
    if why_no_gpu() is None:
        pytest.skip("there is one")
    result = launch_script(objects)
    assert result.returncode == 1 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert re.match(r"no CUDA device|the kernels are sm_90a code", result.stderr)


@pytest.fixture(scope="module")
def script():
    """examples/cubin_launch.py as a module"""
    pytest.importorskip("cuda.bindings")
    spec = importlib.util.spec_from_file_location("cubin_launch", EXAMPLES / "cubin_launch.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # (its dataclasses look themselves up)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_script_imports_neither_dsl_nor_torch():
    pytest.importorskip("cuda.bindings")
    code = "import sys, cubin_launch; print({'cutlass', 'tvm_ffi', 'torch', 'flashmla_cute'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr


def fake_arrays(script) -> dict:
    shapes = {"q": (3, 1, 16, 576), "cache": (11, 64, 1, 576), "out": (3, 1, 16, 512), "block_table": (3, 7)}
    return {name: script.Array(0x7000 * i, shape, 2) for i, (name, shape) in enumerate(shapes.items(), 1)}


def test_the_script_packs_parameters_as_described(objects, script):
    arrays = fake_arrays(script)
    attention, combine = script.find(objects, "decode")["kernels"]
    (out,) = [parameter for parameter in combine["parameters"] if parameter["argument"] == "out"]
    packed = struct.pack("<Q3i4x3q", arrays["out"].pointer, 3, 1, 16, 16 * 512, 16 * 512, 512)
    assert script.pack(out, arrays["out"]) == packed
    (table,) = [parameter for parameter in attention["parameters"] if parameter["argument"] == "block_table"]
    assert script.pack(table, arrays["block_table"]) == struct.pack("<Q2iq", arrays["block_table"].pointer, 3, 7, 7)


def test_the_script_reads_tensor_maps_as_described(objects, script):
    arrays = fake_arrays(script)
    maps = script.find(objects, "decode")["kernels"][0]["tensor_maps"]
    axes = {name: script.axes_of(described, arrays) for name, described in maps.items()}
    assert axes["q.atom"] == [(64, 2, 64), (16, 1152, 64), (8, 128, 8), (3, 16 * 1152, 1)]
    assert axes["latent.atom"] == [(64, 2, 64), (64, 1152, 64), (8, 128, 8), (1, 1152, 1), (11, 64 * 1152, 1)]
    assert axes["rope.atom"] == [(64, 2, 64), (64, 1152, 64), (1, 1152, 1), (11, 64 * 1152, 1)]
    assert script.coordinate_extents(maps["q_last.atom"], arrays) == (16, 3)


# ---------------------------------------------------------------------- the model, through the reference
SMALL = ("--rows", 3, "--requests", 7, "--longest", 300, "--new-tokens", 12, "--layers", 2, "--hidden", 128, "--heads", 4)


def load_example(name: str):
    """examples/NAME.py as a module"""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # (dataclasses look their module up)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_example():
    pytest.importorskip("transformers", minversion="4.56")
    yield load_example("deepseek_v3_decode")
    del sys.modules["deepseek_v3_decode"]


def run_model(example, capsys, *options) -> tuple[int, str]:
    status = example.main(list(map(str, options)))
    return status, capsys.readouterr().out


def test_the_model_says_that_there_is_no_gpu():
    pytest.importorskip("transformers", minversion="4.56")
    if why_no_gpu() is None:
        pytest.skip("there is one")
    result = run(sys.executable, EXAMPLES / "deepseek_v3_decode.py")
    assert result.returncode == 1 and result.stdout == "" and result.stderr.splitlines()[-1].startswith("no Hopper GPU")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_agrees_with_eager(model_example, capsys, dtype):
    status, out = run_model(model_example, capsys, "--attention", "reference", "--dtype", dtype, *SMALL)
    assert status == 0 and "agrees with the eager model" in out and " 0 differ" in out, out
    pages, taken = map(int, re.search(r"pages +(\d+) served requests that took (\d+) in all", out).groups())
    assert taken > pages, "no page was used again"


def _without_mscale(example, monkeypatch):
    decode = example.Reference.decode
    monkeypatch.setattr(example.Reference, "decode", lambda self, q, cache, scale: decode(self, q, cache, 192**-0.5))


def _with_the_token_itself_hidden(example, monkeypatch):
    decode = example.Reference.decode

    def one_less(self, q, cache, scale):
        shorter = example.PagedKVCache.from_tensors(cache.pool, cache.block_table, (cache.cache_seqlens - 1).clamp(min=0))
        return decode(self, q, shorter, scale)

    monkeypatch.setattr(example.Reference, "decode", one_less)


@pytest.mark.parametrize("broken", [_without_mscale, _with_the_token_itself_hidden])
def test_the_model_would_see_a_mistake(model_example, capsys, monkeypatch, broken):
    broken(model_example, monkeypatch)
    status, out = run_model(model_example, capsys, "--attention", "reference", *SMALL)
    assert status == 1 and "does NOT agree" in out, out


# ---------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_agrees_with_eager_on_the_kernels(model_example, capsys, dtype):
    sizes = ("--rows", 6, "--requests", 20, "--longest", 2500, "--new-tokens", 40)
    status, out = run_model(model_example, capsys, "--dtype", dtype, *sizes)
    assert status == 0 and " 0 differ" in out, out


@pytest.mark.gpu
def test_cpp_agrees_with_double_precision(program):
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "agrees with double precision" in result.stdout


@pytest.mark.gpu
def test_cubins_agree_with_float64(objects):
    result = launch_script(objects)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "agrees with float64" in result.stdout
