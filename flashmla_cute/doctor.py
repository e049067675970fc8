"""What of this machine and of its packages the kernels need, what is there, and what to do about the rest."""

import ctypes
import importlib.metadata
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from . import compile, ops
from .kernels.config import MLAConfig
from .kv_cache import PagedKVCache

OK, WARNING, PROBLEM = "ok", "warning", "problem"
STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "red"}
DISTRIBUTION = "flashmla-cute"
PINNED = ("nvidia-cutlass-dsl", "apache-tvm-ffi", "cuda-python", "torch")
# What the back end of a DSL flavour needs of the driver, as cuDriverGetVersion counts.  CUDA 12 and 13 binaries load under any
# driver of their major version or a later one; below the exact one it is minor-version compatibility that carries them.
FLAVOURS = {"cu12": (12000, 12090), "cu13": (13000, 13000)}


@dataclass(frozen=True)
class Line:
    status: str
    subject: str
    finding: str
    remedy: str = ""


# ---------------------------------------------------------------------- what demo asks too
def hopper() -> int | None:
    """index of the first GPU that runs sm_90a code"""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if torch.cuda.get_device_capability(index) == (9, 0):
            return index
    return None


def obstacle() -> str | None:
    """why no kernel can run on this machine; None if one can"""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if driver_version() is None:
        return "there is no NVIDIA driver (libcuda.so.1 is not found)"
    if not torch.cuda.is_available():
        return "the NVIDIA driver gives torch no GPU"
    if hopper() is None:
        return f"the kernels are sm_90a code, and no GPU here is a Hopper (compute capability 9.0): {_gpus()}"
    return None


def driver_version() -> int | None:
    """The newest CUDA version that the driver supports, 1000 * major + 10 * minor; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _gpus() -> str:
    names = [
        f"{torch.cuda.get_device_name(i)} ({'.'.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    return ", ".join(names)


# ---------------------------------------------------------------------- checks
def _driver() -> Line:
    version = driver_version()
    if version is None:
        return Line(PROBLEM, "driver", "libcuda.so.1 is not found", "install the NVIDIA driver, 575 or newer")
    return Line(OK, "driver", f"supports CUDA {_cuda(version)}")


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _gpu() -> Line:
    reason = obstacle()
    if reason:
        return Line(PROBLEM, "GPU", reason, "use a machine with an H100, H200, H20 or GH200; compiling works on this one")
    index = hopper()
    properties = torch.cuda.get_device_properties(index)
    return Line(OK, "GPU", f"{index}: {properties.name}, {properties.multi_processor_count} SMs")


def _torch() -> Iterator[Line]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if torch.version.cuda:
        yield Line(OK, "torch build", build)
    else:
        yield Line(PROBLEM, "torch build", build, "install a CUDA build of torch: pytorch.org has the command")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        remedy = "pip install torch-c-dlpack-ext, or a newer torch: without it tvm-ffi compiles an extension at import"
        yield Line(WARNING, "torch tensors", "no DLPack exchange API in this torch", remedy)


def _versions() -> Iterator[Line]:
    """installed versions against the pins of the installed package's metadata"""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Line(WARNING, DISTRIBUTION, "runs from a folder, so its pins are not known", "pip install -e .")
        return
    pins = {match[1]: match[2] for match in map(re.compile(r"([\w-]+)([^;]*)$").match, requirements) if match}
    for name in PINNED:
        pin, version = pins[name], importlib.metadata.version(name)
        if satisfies(version, pin):
            yield Line(OK, name, f"{version} ({pin})")
        else:
            yield Line(WARNING, name, f"{version} is outside the tested {pin}", f"pip install '{name}{pin}'")


def satisfies(version: str, pin: str) -> bool:
    """A pin of clauses >=, <, != only, compared by release number; != names one exact version."""
    clauses = [re.fullmatch(r"(>=|<|!=)([\w.]+)", clause.strip()).groups() for clause in pin.split(",")]
    given = _release(version)
    holds = {
        ">=": lambda bound: given >= _release(bound),
        "<": lambda bound: given < _release(bound),
        "!=": lambda bound: version != bound,
    }
    return all(holds[operator](bound) for operator, bound in clauses)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split("."))


def _flavour() -> Line:
    import cutlass._mlir._mlir_libs._cutlass_ir as library

    loaded = next((name for name in FLAVOURS if name in Path(library.__file__).name), None)
    if loaded is None:
        return Line(WARNING, "DSL flavour", f"unknown: {Path(library.__file__).name}")
    installed = [name for name in FLAVOURS if _is_installed(f"nvidia-cutlass-dsl-libs-{name}")]
    driver, (least, exact) = driver_version(), FLAVOURS[loaded]
    finding = f"{loaded} (installed: {', '.join(installed)})"
    if driver is None and len(installed) > 1:
        return Line(WARNING, "DSL flavour", f"{finding}; without a driver the newest is taken", "install one only")
    if driver is not None and driver < exact:
        status, finding = PROBLEM if driver < least else WARNING, f"{finding}; the driver supports CUDA {_cuda(driver)}"
        return Line(status, "DSL flavour", finding, f"a driver for CUDA {_cuda(exact)}, or the flavour for this one")
    return Line(OK, "DSL flavour", finding)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cache() -> Line:
    folder, variable = compile.cache_dir(), compile.CACHE_VARIABLE
    where = f"{folder} (${variable})" if os.environ.get(variable) else str(folder)
    made = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not made.is_dir() or not os.access(made, os.R_OK | os.W_OK | os.X_OK):
        return Line(WARNING, "cache", f"{where}: not a writable directory, every process compiles", f"set {variable}")
    if made != folder:
        return Line(OK, "cache", f"{where}: not there yet, the first compile makes it")
    if stat.S_IMODE(folder.stat().st_mode) & 0o022:
        return Line(WARNING, "cache", f"{where}: others may write code there that runs here", f"chmod go-w {folder}")
    sizes = [path.stat().st_size for path in folder.glob("*.o")]
    return Line(OK, "cache", f"{where}: {len(sizes)} objects, {sum(sizes) / 1e6:.1f} MB")


def _compiler() -> Line:
    start = time.monotonic()
    try:
        compile.compile_object(ops.AppendOp(MLAConfig(causal=False)))
    except Exception as error:  # whatever the compiler raises is the finding
        return Line(PROBLEM, "compiler", f"{type(error).__name__}: {error}", "reinstall nvidia-cutlass-dsl")
    return Line(OK, "compiler", f"the append kernel compiles for {compile.ARCH} in {time.monotonic() - start:.1f} s")


def _launch() -> Iterator[Line]:
    """one token written by a kernel and read back, where one can run"""
    if obstacle():
        return
    try:
        with torch.cuda.device(hopper()):
            cache = PagedKVCache.allocate(1, 1, 64)
            token = torch.randn(1, 576, dtype=torch.bfloat16, device="cuda")
            cache.append(token[:, :512], token[:, 512:], cache.extend([1]))
            same = torch.equal(cache.pool[0, 0], token)
    except Exception as error:
        yield Line(PROBLEM, "launch", f"{type(error).__name__}: {error}", "see the lines above")
        return
    if same:
        yield Line(OK, "launch", "a token came back as written")
    else:
        yield Line(PROBLEM, "launch", "a token came back changed", "report it, with these lines")


def findings() -> list[Line]:
    python = f"{sys.version.split()[0]}, {sys.platform} {os.uname().machine}"
    return [
        Line(OK, "Python", python),
        _driver(),
        _gpu(),
        *_torch(),
        *_versions(),
        _flavour(),
        _cache(),
        _compiler(),
        *_launch(),
    ]


def run(console: Console) -> int:
    """prints the findings; 0 if a kernel can run here, else 1"""
    lines = findings()
    width = max(len(line.subject) for line in lines)
    for line in lines:
        text = Text(f"{line.status:8}", style=STYLES[line.status])
        console.print(text.append(f"{line.subject:{width}}  {line.finding}", style="default"), soft_wrap=True)
        if line.remedy:
            console.print(Text(f"{'':8}{'':{width}}  -> {line.remedy}"), soft_wrap=True)
    problems = sum(line.status == PROBLEM for line in lines)
    if problems:
        console.print(f"\nNo kernel can run on this machine: {problems} problem{'s' * (problems > 1)}.")
        return 1
    console.print("\nKernels can run on this machine.")
    return 0
