"""The compile cache: memory, disk, damaged objects, no directory, several processes.  With the smallest kernel, 0.3 s."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashmla_cute import compile, ops
from flashmla_cute.kernels.config import FORMATS, MLAConfig, ScheduleConfig

CONFIG = MLAConfig(causal=False)
ROOT = Path(__file__).parents[2]
# gets the kernel, and says how often this process compiled
GET = """
from flashmla_cute import compile, ops
from flashmla_cute.kernels.config import MLAConfig
compiles, compile_object = [], compile.compile_object
compile.compile_object = lambda op: (compiles.append(op), compile_object(op))[1]
function = compile.get(ops.AppendOp, MLAConfig(causal=False))
assert callable(function)
print("compiled", len(compiles))
"""


@pytest.fixture
def compiles(compile_cache, monkeypatch):
    """the configurations compiled so far, from an empty cache"""
    listed, compile_object = [], compile.compile_object
    monkeypatch.setattr(compile, "compile_object", lambda op: (listed.append(op.config), compile_object(op))[1])
    return listed


def forget():
    compile._functions.clear()


def start_process(cache):
    environment = {**os.environ, compile.CACHE_VARIABLE: str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", GET], stdout=subprocess.PIPE, text=True, env=environment)


def objects(cache):
    return sorted(path.name for path in cache.glob("*.o"))


def test_memory_hit(compiles):
    function = compile.get(ops.AppendOp, CONFIG)
    assert compile.get(ops.AppendOp, CONFIG) is function and compiles == [CONFIG]


def test_disk_hit(compiles, compile_cache):
    assert not compile.is_cached(ops.AppendOp, CONFIG)
    compile.get(ops.AppendOp, CONFIG)
    forget()
    assert compile.is_cached(ops.AppendOp, CONFIG)
    assert callable(compile.get(ops.AppendOp, CONFIG)) and compiles == [CONFIG]
    assert len(objects(compile_cache)) == 1 and compile_cache.stat().st_mode & 0o777 == 0o700


def test_disk_hit_in_another_process(compile_cache):
    for wanted in ("compiled 1\n", "compiled 0\n"):
        process = start_process(compile_cache)
        assert process.communicate()[0] == wanted and process.returncode == 0


def test_processes_that_start_cold_compile_once(compile_cache):
    processes = [start_process(compile_cache) for _ in range(3)]
    outputs = sorted(process.communicate()[0] for process in processes)
    assert outputs == ["compiled 0\n", "compiled 0\n", "compiled 1\n"]
    assert len(objects(compile_cache)) == 1


@pytest.mark.parametrize("keep", [0, 100, -1000], ids=["empty", "a stub", "a tail missing"])
def test_a_truncated_object_is_replaced(compiles, compile_cache, keep):
    compile.get(ops.AppendOp, CONFIG)
    forget()
    (path,) = compile_cache.glob("*.o")
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert callable(compile.get(ops.AppendOp, CONFIG)) and len(compiles) == 2
    assert path.read_bytes() == whole, "compiles of the same kernel give the same bytes"


def test_foreign_bytes_are_replaced(compiles, compile_cache):
    compile.get(ops.AppendOp, CONFIG)
    forget()
    (path,) = compile_cache.glob("*.o")
    path.write_bytes(b"not an object at all" * 100)
    assert callable(compile.get(ops.AppendOp, CONFIG)) and len(compiles) == 2


def test_an_unusable_directory_still_works(compiles, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compile.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))  # (root may write anywhere else)
    assert callable(compile.get(ops.AppendOp, CONFIG)) and compiles == [CONFIG]
    assert not compile.is_cached(ops.ScheduleOp, ScheduleConfig())
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_failing_compile_leaves_nothing(compile_cache, monkeypatch):
    monkeypatch.setattr(compile, "compile_object", lambda op: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compile.get(ops.AppendOp, CONFIG)
    assert objects(compile_cache) == [] and not compile.is_cached(ops.AppendOp, CONFIG)


ANOTHER = dict(
    kv=FORMATS["float16"], head_tile=8, split="float32", stages=2, lazy_rescale=0.0, max_batch=100
)  # values of fields
ONLY_VALUE = ("page",)


def changed(config):
    """`config` with another value of one field, for each that may have one"""
    for field, value in vars(config).items():
        if field not in ONLY_VALUE:
            other = not value if isinstance(value, bool) else ANOTHER[field] if field in ANOTHER else value - 8
            yield replace(config, **{field: other})


@pytest.mark.parametrize("op_class, config", [(ops.DecodeOp, CONFIG), (ops.ScheduleOp, ScheduleConfig())])
def test_every_field_of_the_config_is_in_the_key(op_class, config):
    keys = [compile._key(op_class(each)) for each in (config, *changed(config))]
    assert len(set(keys)) == len(keys) == 1 + len(set(vars(config)) - set(ONLY_VALUE))


def test_the_op_and_its_source_are_in_the_key():
    class AppendOp(ops.AppendOp):
        """the same name and config, from this file"""

    keys = [compile._key(op_class(CONFIG)) for op_class in (ops.AppendOp, ops.DecodeOp, AppendOp)]
    assert len(set(keys)) == 3


def test_sources_and_versions_are_in_the_key(monkeypatch):
    before, environment = compile._key(ops.AppendOp(CONFIG)), compile._environment_key()
    assert set(environment) == {"sources", "dsl", "tvm_ffi", "flavour", "arch"}
    for name in environment:
        with monkeypatch.context() as patch:
            patch.setattr(compile, "_environment_key", lambda name=name: {**environment, name: "another"})
            assert compile._key(ops.AppendOp(CONFIG)) != before, name


def test_the_default_directory(monkeypatch):
    monkeypatch.delenv(compile.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/nobody"))
    assert compile.cache_dir() == Path("/nobody/.cache/flashmla_cute")
    monkeypatch.setenv(compile.CACHE_VARIABLE, "/elsewhere")
    assert compile.cache_dir() == Path("/elsewhere")
