"""What a compiled kernel takes of an SM, read without any CUDA tool: registers, spills, shared memory, and ptxas's warnings.

Registers alone hide spills, and a kernel that spills or whose WGMMAs ptxas serialised still gives right results: only these
numbers show it.  The CPU tests gate every preset on them, `flashmla-cute demo` prints them where there is no GPU.

`registers` is what a launch gives every thread.  The decode kernel's roles then trade them by setmaxnreg (MLAConfig's
*_registers), which no field of a cubin shows.
"""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import compile

EM_CUDA = 190
EIATTR_FRAME_SIZE, EIATTR_REGCOUNT = 0x11, 0x2F
ELF_MAGIC = b"\x7fELF"
GATE_SECONDS = 300  # a compile takes 5-10 s
RESERVED_SMEM = 1024  # of every CTA that has shared memory, for the system: ptxas counts it, SMEM_LIMIT does not
# cudaLaunchConfig_t as the host code spells it; field 2 is the dynamic shared memory
LAUNCH_CONFIG = re.escape("!llvm.struct<(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32)>")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin."""

    name: str  # its class
    registers: int  # per thread at launch
    frame: int  # bytes of stack per thread; our kernels have no arrays there, so all of it is spilled registers
    static_smem: int
    dynamic_smem: int | None = None  # what the launch passes; a cubin does not know it, a compile does

    @property
    def smem(self) -> int:
        return self.static_smem + (self.dynamic_smem or 0)


@dataclass(frozen=True)
class Gate:
    """What one compile of an op says of its kernels."""

    kernels: dict[str, Kernel]  # by name
    spill_bytes: int  # stores + loads, ptxas's own count over all kernels
    advisories: tuple[str, ...]  # ptxas's (C75xx): setmaxnreg ignored, WGMMA serialised, ..

    @property
    def registers(self) -> int:
        """of the kernel that takes most"""
        return max(kernel.registers for kernel in self.kernels.values())

    @property
    def smem(self) -> int:
        """of the kernel that takes most"""
        return max(kernel.smem for kernel in self.kernels.values())


# ---------------------------------------------------------------------- cubin
@dataclass(frozen=True)
class _Section:
    name: str
    data: bytes
    size: int  # also of a section without data
    link: int


def _text(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()


def _sections(elf: bytes) -> list[_Section]:
    start, size, count, names = struct.unpack_from("<Q", elf, 40)[0], *struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<2I4Q2I", elf, start + size * i) for i in range(count)]
    table = elf[headers[names][4] :]
    nobits = 8  # SHT_NOBITS: a size, no bytes
    return [
        _Section(_text(table, name), b"" if kind == nobits else elf[offset : offset + length], length, link)
        for name, kind, _, _, offset, length, link, _ in headers
    ]


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, value) of a .nv.info section: a format byte, an attribute byte, then 2 bytes of value or of its length"""
    at = 0
    while at + 4 <= len(info):
        has_length, attribute, length = info[at] == 4, info[at + 1], struct.unpack_from("<H", info, at + 2)[0]
        at += 4
        if has_length:
            yield attribute, info[at : at + length]
            at += length


def from_cubin(elf: bytes) -> dict[str, Kernel]:
    """the kernels of a cubin by symbol; raises ValueError for anything else"""
    if elf[:4] != ELF_MAGIC or struct.unpack_from("<H", elf, 18)[0] != EM_CUDA:
        raise ValueError("not a cubin: no ELF of machine 190")
    sections = _sections(elf)
    symbols = next(section for section in sections if section.name == ".symtab")
    strings = sections[symbols.link].data
    values: dict[tuple[int, str], int] = {}
    for attribute, value in _attributes(next(section.data for section in sections if section.name == ".nv.info")):
        if attribute in (EIATTR_FRAME_SIZE, EIATTR_REGCOUNT):
            symbol, number = struct.unpack("<2I", value)
            values[attribute, _text(strings, struct.unpack_from("<I", symbols.data, 24 * symbol)[0])] = number
    shared = {section.name.removeprefix(".nv.shared."): section.size for section in sections}
    kernels = {}
    for section in sections:
        if section.name.startswith(".nv.info."):
            entry = section.name.removeprefix(".nv.info.")
            registers, frame = values[EIATTR_REGCOUNT, entry], values[EIATTR_FRAME_SIZE, entry]
            kernels[entry] = Kernel(_class_name(entry), registers, frame, max(shared.get(entry, 0) - RESERVED_SMEM, 0))
    return kernels


def _class_name(symbol: str) -> str:
    found = re.search(r"([A-Z]\w*?)_object_at", symbol)
    return found[1] if found else symbol


def embedded_cubin(data: bytes) -> bytes:
    """The cubin inside an exported object, where it lies as it is (and whatever follows it).  Raises ValueError."""
    at = data.find(ELF_MAGIC)
    while at >= 0:
        if len(data) >= at + 64 and struct.unpack_from("<H", data, at + 18)[0] == EM_CUDA:
            return data[at:]
        at = data.find(ELF_MAGIC, at + 1)
    raise ValueError("no cubin in this object")


def from_object(source: str | os.PathLike | bytes) -> dict[str, Kernel]:
    """the kernels of an exported object (path or content) by symbol; raises ValueError without a cubin in it"""
    return from_cubin(embedded_cubin(source if isinstance(source, bytes) else Path(source).read_bytes()))


# ---------------------------------------------------------------------- compiled op
def exported(compiled) -> bytes:
    """the object file of what `compile.compile_object` returns"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "op.o"
        compiled.export_to_c(str(path), function_name="op", export_only_tvm_ffi_symbols=True)
        return path.read_bytes()


def from_compiled(compiled) -> dict[str, Kernel]:
    """The kernels of what `compile.compile_object` returns, by class name, with the shared memory that their launches pass."""
    launches = _launches(str(compiled.ir_module))
    kernels = from_object(exported(compiled))
    return {kernel.name: replace(kernel, dynamic_smem=launches[symbol]) for symbol, kernel in kernels.items()}


def _launches(host_code: str) -> dict[str, int]:
    """Kernel symbol -> bytes of dynamic shared memory, from the LLVM dialect text of the host code.  A launch fills its config,
    then names its kernel, then calls; constants are numbered per function."""
    launches, constants, field, smem, symbol = {}, {}, None, None, None
    for line in host_code.splitlines():
        if line.startswith("  llvm.func"):
            constants = {}
        elif found := re.match(r"\s*(%\w+) = llvm\.mlir\.constant\((\d+) : i64\)", line):
            constants[found[1]] = int(found[2])
        elif found := re.match(rf"\s*(%\w+) = llvm\.getelementptr %\w+\[0, 2\] : .*{LAUNCH_CONFIG}$", line):
            field = found[1]
        elif field and (found := re.match(rf"\s*llvm\.store (%\w+), {field} : i64", line)):
            smem, field = constants[found[1]], None
        elif found := re.match(r"\s*%\w+ = llvm\.mlir\.addressof @kernels_(\w+) ", line):
            symbol = found[1]
        elif "llvm.call @_cudaLaunchKernelEx(" in line:
            launches[symbol] = smem
    return launches


# ---------------------------------------------------------------------- ptxas's own words
def ptxas_remarks(op) -> str:
    """What `ptxas -v` says of `op`, in one line.  It is the ptxas inside the DSL that makes the code which runs; an installed
    one may be of another version.  Raises RuntimeError when `op` does not compile."""
    return _compile_apart(op)[1]


def gate(op) -> Gate:
    """Compiles `op` once, without a GPU, for a test to judge.  Raises RuntimeError when that fails."""
    kernels, remarks = _compile_apart(op)
    return Gate(kernels, *_read_remarks(remarks, len(kernels)))


def _compile_apart(op) -> tuple[dict[str, Kernel], str]:
    """Kernels and remarks of a compile in a process of its own: ptxas writes past Python to file descriptor 2, and the DSL
    reads CUTE_DSL_COMPILER_OPT once a process."""
    environment = {**os.environ, "CUTE_DSL_COMPILER_OPT": "remarks{ptx}"}
    child = subprocess.run(
        [sys.executable, "-c", "from flashmla_cute import resources; resources._report()"],
        input=pickle.dumps((type(op), op.config)),
        capture_output=True,
        env=environment,
        timeout=GATE_SECONDS,
    )
    remarks = _unwrap(child.stderr.decode(errors="replace"))
    if child.returncode:
        raise RuntimeError(f"{op.name} {op.config.name} does not compile: {remarks[-2000:]}")
    return {fields["name"]: Kernel(**fields) for fields in json.loads(child.stdout)}, remarks


def _report():
    """the process of `_compile_apart`: op on stdin, kernels on stdout, remarks on stderr"""
    op_class, config = pickle.load(sys.stdin.buffer)
    kernels = from_compiled(compile.compile_object(op_class(config))).values()
    sys.stdout.write(json.dumps([vars(kernel) for kernel in kernels]))


def _unwrap(remarks: str) -> str:
    """without colours, in one line: the DSL breaks long remarks at 88 columns"""
    return " ".join(re.sub(r"\x1b\[\d*m", "", remarks).split())


def _read_remarks(remarks: str, num_kernels: int) -> tuple[int, tuple[str, ...]]:
    """spilled bytes, advisories"""
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", remarks)
    if len(spills) != num_kernels:
        raise RuntimeError(f"ptxas reports on {len(spills)} kernels of {num_kernels}: {remarks[-2000:]}")
    advisories = re.findall(r"\((C75\d\d)\) (.*?)(?= ptxas| in the function| for the function|$)", remarks)
    return sum(int(n) for pair in spills for n in pair), tuple(f"{code} {text}" for code, text in advisories)
