"""(op, config) -> a launchable function: memory, then the disk cache, then a compile.

What runs is always the exported object loaded back, after a compile and after a cache hit alike (0.7 us a call, where the
object that cute.compile returns takes 1.1).  The cache key is the op's name, its whole config, the target, the versions of
the DSL and TVM-FFI, the CUDA flavour of the DSL, and the bytes of every source file that the op is traced from.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

ARCH = "sm_90a"
CACHE_VARIABLE = "FLASHMLA_CUTE_CACHE"
_functions: dict[tuple, Callable] = {}
_compile_lock = threading.Lock()  # cute.compile is not thread-safe: concurrent calls abort the process


def cache_dir() -> Path:
    """where compiled objects are kept: $FLASHMLA_CUTE_CACHE, else ~/.cache/flashmla_cute"""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else Path.home() / ".cache" / "flashmla_cute"


def get(op_class: type, config) -> Callable:
    """The compiled function of `op_class(config)`; compiles at most once per machine.  Raises what the compiler raises."""
    function = _functions.get((op_class, config))
    if function is None:
        with _compile_lock:
            function = _functions.get((op_class, config))
            if function is None:
                function = _functions[op_class, config] = _load_or_compile(op_class(config))
    return function


def is_cached(op_class: type, config) -> bool:
    """whether `get` would not have to compile"""
    return (op_class, config) in _functions or (cache_dir() / _file_name(op_class(config))).exists()


def compile_object(op):
    """One compile of `op` for sm_90a, without a GPU.  Returns the DSL's compiled object."""
    import cutlass.cute as cute

    return cute.compile(op, *op.fake_args(), options=f"--enable-tvm-ffi --gpu-arch {ARCH}")


# ---------------------------------------------------------------------- key
@functools.cache
def _environment_key() -> dict:
    """versions and sources, the same for every op of a process"""
    import cutlass._mlir._mlir_libs._cutlass_ir as library

    package = Path(__file__).parent
    kernels = Path(importlib.import_module("flashmla_cute.kernels").__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(kernels.rglob("*.py")), package / "compile.py"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "arch": ARCH,
        "sources": digest.hexdigest(),
        "dsl": importlib.metadata.version("nvidia-cutlass-dsl"),
        "tvm_ffi": importlib.metadata.version("apache-tvm-ffi"),
        "flavour": Path(library.__file__).name.split(".")[1],  # _cutlass_ir.cu12.cpython-..: another ptxas
    }


def _key(op) -> str:
    source = hashlib.sha256(Path(inspect.getsourcefile(type(op))).read_bytes()).hexdigest()
    content = {"op": op.name, "config": asdict(op.config), "source": source, **_environment_key()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _symbol(op) -> str:
    return f"flashmla_cute_{op.name}_{_key(op)}"


def _file_name(op) -> str:
    return f"{op.name}-{op.config.name}-{_key(op)}.o"


# ---------------------------------------------------------------------- disk
def _load_or_compile(op) -> Callable:
    folder, name = cache_dir(), _file_name(op)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _file_lock(folder / f"{name}.lock"):  # processes that start cold together compile once
            path = folder / name
            function = _load(path, op)
            if function is None:
                _export(op, path)
                function = _load(path, op)
    except OSError:  # no usable cache directory: compile for this process alone
        function = None
    if function is None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            _export(op, path)
            function = _load(path, op)
    if function is None:
        raise RuntimeError(f"{name}: the object just compiled cannot be loaded back")
    return function


def _load(path: Path, op) -> Callable | None:
    """None when there is no such object, or it is damaged: it is then removed"""
    if not path.exists():
        return None
    import cutlass.cute as cute

    try:
        return getattr(cute.runtime.load_module(str(path), enable_tvm_ffi=True), _symbol(op))
    except Exception:  # truncated or foreign bytes raise whatever the object loader finds first
        with contextlib.suppress(OSError):
            path.unlink()
        return None


def _export(op, path: Path):
    compiled = compile_object(op)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".o")
    os.close(handle)
    try:
        compiled.export_to_c(scratch, function_name=_symbol(op), export_only_tvm_ffi_symbols=True)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


@contextlib.contextmanager
def _file_lock(path: Path):
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
