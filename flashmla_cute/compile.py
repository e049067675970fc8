"""(op, config) -> a launchable function: memory, packaged objects, the disk cache, and only then a compile.

What runs is always the exported object loaded back, after a compile and after a cache hit alike (0.7 us a call, where the
object that cute.compile returns takes 1.1).  The cache key is the op's name, its whole config, the target, the versions of
the DSL and TVM-FFI, the CUDA flavour of the DSL, and the bytes of every source file that the op is traced from.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from . import store, workers


def _import_tvm_ffi():
    """Loading an object imports TVM-FFI: 110 ms of the 118 that the first load took on an H100's host.  Its import asks torch
    whether there is a GPU, which would initialise CUDA, and a process could no longer fork: NVML knows without that."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import tvm_ffi  # noqa: F401
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_import_tvm_ffi()
ARCH = "sm_90a"
CACHE_VARIABLE = "FLASHMLA_CUTE_CACHE"
OBJECTS_VARIABLE = "FLASHMLA_CUTE_OBJECTS"
_functions: dict[tuple, Callable] = {}
_compile_lock = threading.Lock()  # cute.compile is not thread-safe: concurrent calls abort the process


def cache_dir() -> Path:
    """where compiled objects are kept: $FLASHMLA_CUTE_CACHE, else ~/.cache/flashmla_cute"""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else Path.home() / ".cache" / "flashmla_cute"


def packaged_dirs() -> list[Path]:
    """directories that `flashmla-cute export` made and $FLASHMLA_CUTE_OBJECTS names; they are read, never written"""
    return [Path(folder) for folder in os.environ.get(OBJECTS_VARIABLE, "").split(os.pathsep) if folder]


def get(op_class: type, config) -> Callable:
    """The compiled function of `op_class(config)`; compiles at most once per machine.  Raises what the compiler raises."""
    function = _functions.get((op_class, config))
    if function is None:
        with _compile_lock:
            function = _functions.get((op_class, config))
            if function is None:
                function = _functions[op_class, config] = _load_or_compile(op_class(config))
    return function


def get_many(wanted: Iterable[tuple[type, object]]) -> list[Callable]:
    """`get` of several (op class, config).  Those that would have to be compiled are compiled first, in parallel processes and
    into the disk cache; a progress bar shows them on a terminal."""
    wanted = list(wanted)
    missing = [pair for pair in dict.fromkeys(wanted) if not is_cached(*pair)]
    if len(missing) > 1 and _writable(cache_dir()):
        workers.run(_fill_cache, missing, f"compiling for {ARCH}")
    return [get(*pair) for pair in wanted]  # (what failed there compiles here, and raises its error)


def is_cached(op_class: type, config) -> bool:
    """whether `get` would not have to compile"""
    if (op_class, config) in _functions:
        return True
    op = op_class(config)
    path = cache_dir() / _file_name(op)
    in_cache = path.exists() and store.record_path(path).exists()
    return in_cache or any(True for _ in store.packaged(packaged_dirs(), content(op)))


def compile_object(op):
    """One compile of `op` for sm_90a, without a GPU.  Returns the DSL's compiled object."""
    import cutlass.cute as cute

    return cute.compile(op, *op.fake_args(), options=f"--enable-tvm-ffi --gpu-arch {ARCH}")


def export_object(compiled, op, path: str) -> None:
    """writes what `compile_object` returned as an object file with one public symbol"""
    compiled.export_to_c(path, function_name=symbol(op), export_only_tvm_ffi_symbols=True)


# ---------------------------------------------------------------------- key
@functools.cache
def _environment_key() -> dict:
    """versions and sources, the same for every op of a process"""
    import cutlass._mlir._mlir_libs._cutlass_ir as library

    kernels = Path(importlib.import_module("flashmla_cute.kernels").__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(kernels.rglob("*.py")), Path(__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "arch": ARCH,
        "sources": digest.hexdigest(),
        "dsl": importlib.metadata.version("nvidia-cutlass-dsl"),
        "tvm_ffi": importlib.metadata.version("apache-tvm-ffi"),
        "flavour": Path(library.__file__).name.split(".")[1],  # _cutlass_ir.cu12.cpython-..: another ptxas
    }


@functools.cache
def _source_hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def content(op) -> dict:
    """all that the object of `op` depends on"""
    source = _source_hash(inspect.getsourcefile(type(op)))
    return {"op": op.name, "config": asdict(op.config), "source": source, **_environment_key()}


def _key(op) -> str:
    return store.key_of(content(op))


def symbol(op) -> str:
    return store.symbol_of(op.name, _key(op))


def _file_name(op) -> str:
    return f"{op.name}-{op.config.name}-{_key(op)}.o"


def is_current(record: dict) -> bool:
    """whether an object was compiled from this package as it is now, by these versions"""
    environment, package = _environment_key(), Path(__file__).parent
    ours = {_source_hash(str(path)) for path in package.glob("*.py")}
    return record["source"] in ours and all(record[field] == environment[field] for field in environment)


# ---------------------------------------------------------------------- disk
def _load_or_compile(op) -> Callable:
    function = _load_packaged(op) or _load_or_fill(op)
    if function is None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / _file_name(op)
            _compile_to(path, op)
            function = store.load(path, symbol(op))
    return function


def _load_packaged(op) -> Callable | None:
    for path, entry in store.packaged(packaged_dirs(), content(op)):
        try:
            return store.load(path, symbol(op), entry["files"]["object"]["sha256"])
        except (store.Damaged, OSError) as error:
            store.warn_once(f"{path} is not used: {error}")
    return None


def _load_or_fill(op) -> Callable | None:
    """through the cache directory; None where that is not usable"""
    path, wanted = cache_dir() / _file_name(op), symbol(op)
    try:
        return store.load(path, wanted)  # (objects appear by a rename: reading one takes no lock, nor the right to write)
    except (store.Damaged, OSError):
        pass
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with store.lock(path):  # processes that start cold together compile once
            if path.exists():
                try:
                    return store.load(path, wanted)
                except store.Damaged:
                    store.remove(path)
            _compile_to(path, op)
            return store.load(path, wanted)
    except OSError:
        return None


def _compile_to(path: Path, op):
    compiled = compile_object(op)
    store.write(path, content(op), lambda target: export_object(compiled, op, target))


def _fill_cache(op_class: type, config) -> None:
    get(op_class, config)


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
