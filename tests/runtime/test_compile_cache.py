"""The compile cache: memory, disk, damaged objects, no directory, several processes.  With the smallest kernel, 0.3 s."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashmla_cute import compile, ops, resources, store
from flashmla_cute.kernels.config import FORMATS, DecodeOptions, MLAConfig, ScheduleConfig

CONFIG = MLAConfig(causal=False)
ANOTHER_CONFIG = MLAConfig(kv=FORMATS["float16"], causal=False)
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
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, compile.CACHE_VARIABLE: str(cache), "PYTHONPATH": path}
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
    processes = [start_process(compile_cache) for _ in range(4)]
    outputs = sorted(process.communicate()[0] for process in processes)
    assert outputs == ["compiled 0\n"] * 3 + ["compiled 1\n"]
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


ANOTHER = dict(  # values of fields
    kv=FORMATS["float16"],
    page=128,
    options=DecodeOptions(window=1),
    head_tile=8,
    split="float32",
    stages=2,
    lazy_rescale=0.0,
    max_pieces=32,
    piece_gain=2,
    runs=1,
    max_batch=100,
)


def changed(config):
    """`config` with another value of one field, for each"""
    for field, value in vars(config).items():
        other = not value if isinstance(value, bool) else ANOTHER[field] if field in ANOTHER else value - 8
        yield replace(config, **{field: other})


@pytest.mark.parametrize("op_class, config", [(ops.DecodeOp, CONFIG), (ops.ScheduleOp, ScheduleConfig())])
def test_every_field_of_the_config_is_in_the_key(op_class, config):
    keys = [compile._key(op_class(each)) for each in (config, *changed(config))]
    assert len(set(keys)) == len(keys) == 1 + len(vars(config))


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


# ---------------------------------------------------------------------- wrong objects
def test_a_valid_object_of_another_configuration_is_replaced(compiles, compile_cache):
    """under this name, with a record that fits its bytes: it lacks the symbol"""
    for config in (CONFIG, ANOTHER_CONFIG):
        compile.get(ops.AppendOp, config)
    forget()
    path, other = (compile_cache / compile._file_name(ops.AppendOp(config)) for config in (CONFIG, ANOTHER_CONFIG))
    for part, of_other in ((path, other), (store.record_path(path), store.record_path(other))):
        part.write_bytes(of_other.read_bytes())
    assert callable(compile.get(ops.AppendOp, CONFIG)) and len(compiles) == 3


def test_flipped_bits_are_seen(compiles, compile_cache):
    """in the cubin, where they would load and run"""
    compile.get(ops.AppendOp, CONFIG)
    forget()
    (path,) = compile_cache.glob("*.o")
    whole = path.read_bytes()
    at = whole.index(resources.embedded_cubin(whole)[:64]) + 2000
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert callable(compile.get(ops.AppendOp, CONFIG)) and len(compiles) == 2 and path.read_bytes() == whole


def test_an_object_without_record_is_replaced(compiles, compile_cache):
    compile.get(ops.AppendOp, CONFIG)
    forget()
    for record in compile_cache.glob("*.json"):
        record.unlink()
    assert not compile.is_cached(ops.AppendOp, CONFIG)
    assert callable(compile.get(ops.AppendOp, CONFIG)) and len(compiles) == 2


def test_a_cache_that_cannot_be_written_is_read(compiles, compile_cache, monkeypatch):
    compile.get(ops.AppendOp, CONFIG)
    forget()

    def refuse(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(store, "lock", refuse)  # (root may write anywhere)
    assert callable(compile.get(ops.AppendOp, CONFIG)) and compiles == [CONFIG]
    assert callable(compile.get(ops.AppendOp, ANOTHER_CONFIG)) and compiles == [CONFIG, ANOTHER_CONFIG]


def test_a_full_disk_still_works(compiles, compile_cache, monkeypatch):
    replace_file = os.replace

    def fill(source, target):
        if Path(target).parent == compile_cache:
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", fill)
    assert callable(compile.get(ops.AppendOp, CONFIG))
    assert objects(compile_cache) == [] and not list(compile_cache.glob(f"{store.UNFINISHED}*"))


# ---------------------------------------------------------------------- several at once
def compiled_by(cache) -> set[str]:
    """configurations in the cache"""
    return {entry.config for entry in store.entries(cache)}


def test_get_many_compiles_in_processes(compiles, compile_cache):
    wanted = [(ops.AppendOp, CONFIG), (ops.AppendOp, ANOTHER_CONFIG), (ops.AppendOp, CONFIG)]
    functions = compile.get_many(wanted)
    assert len(functions) == 3 and functions[0] is functions[2] is not functions[1]
    assert compiles == [], "nothing was compiled in this process"
    assert compiled_by(compile_cache) == {CONFIG.name, ANOTHER_CONFIG.name}


def test_get_many_raises_what_the_compiler_raises(compile_cache):
    with pytest.raises(Exception, match="strictly positive"):
        compile.get_many([(ops.AppendOp, CONFIG), (ops.ScheduleOp, ScheduleConfig(num_threads=0))])
    assert compiled_by(compile_cache) == {CONFIG.name}, "the others are there"


def test_get_many_without_a_cache(compiles, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compile.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    assert len(compile.get_many([(ops.AppendOp, CONFIG), (ops.AppendOp, ANOTHER_CONFIG)])) == 2
    assert compiles == [CONFIG, ANOTHER_CONFIG], "each once: processes would have compiled them for nothing"


# ---------------------------------------------------------------------- the command
@pytest.fixture
def command(compile_cache, capsys, monkeypatch):
    """runs `flashmla-cute`; returns exit status and output"""
    pytest.importorskip("rich")
    from flashmla_cute import cli

    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        status = cli.main(arguments)
        return status, capsys.readouterr().out

    return run


def test_compile_fills_the_cache(command, compile_cache):
    for told in ("2 configurations: 2 compiled in", "2 configurations: 0 compiled in"):
        status, output = command("compile", "append", "append:kv=float16")
        assert status == 0 and told in output
        forget()
    assert compiled_by(compile_cache) == {CONFIG.name, ANOTHER_CONFIG.name}


def test_list_and_clear(command, compile_cache, monkeypatch):
    assert command("cache", "list") == (0, f"{compile_cache}: 0 objects, 0.0 MB\n")
    compile.get(ops.AppendOp, CONFIG)
    environment = compile._environment_key()
    with monkeypatch.context() as patch:
        patch.setattr(compile, "_environment_key", lambda: {**environment, "dsl": "4.0.0"})
        compile.get(ops.AppendOp, ANOTHER_CONFIG)
    status, output = command("cache", "list")
    assert status == 0 and f"{compile_cache}: 2 objects" in output
    assert re.search(rf"append +{CONFIG.name} +\d+ +\d+ s +current", output)
    assert re.search(rf"append +{ANOTHER_CONFIG.name} +\d+ +\d+ s +stale", output)

    assert "1 objects removed" in command("cache", "clear")[1] and compiled_by(compile_cache) == {CONFIG.name}
    (compile_cache / f"{store.UNFINISHED}killed").mkdir()
    assert "1 objects removed" in command("cache", "clear", "--all")[1] and list(compile_cache.iterdir()) == []


def test_verify_reports_damaged_objects(command, compile_cache):
    for config in (CONFIG, ANOTHER_CONFIG):
        compile.get(ops.AppendOp, config)
    status, output = command("cache", "verify")
    assert status == 0 and output.endswith("Every object loads and has its symbol.\n")
    path = compile_cache / compile._file_name(ops.AppendOp(CONFIG))
    path.write_bytes(path.read_bytes()[:-1000])
    status, output = command("cache", "verify")
    assert status == 1 and f"{path.name}: has other bytes" in output
    assert len(re.findall(r"damaged *$", output, re.MULTILINE)) == 1
    assert path.exists(), "verify only reports"


def test_verify_sees_an_object_under_another_name(command, compile_cache):
    for config in (CONFIG, ANOTHER_CONFIG):
        compile.get(ops.AppendOp, config)
    path, other = (compile_cache / compile._file_name(ops.AppendOp(config)) for config in (CONFIG, ANOTHER_CONFIG))
    for part, of_other in ((path, other), (store.record_path(path), store.record_path(other))):
        part.write_bytes(of_other.read_bytes())
    status, output = command("cache", "verify")
    assert status == 1 and "its record is the record of another object" in output
