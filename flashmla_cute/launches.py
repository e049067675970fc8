"""What the host code of a compiled op passes to each of its kernels, read from the DSL's own lowering and from the cubin.

It is what a launch without the DSL must do again (examples/cubin_launch.py): block, dynamic shared memory, launch attributes,
and the kernel's parameters with their fields.  Offsets of parameters are the cubin's (EIATTR_KPARAM_INFO); offsets within one
follow from the type that the host code stores, and both must agree on its size.
"""

import inspect
import re
import struct
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass

from . import resources
from .kernels import append, combine, dense_decode, fp8_decode, schedule, upcast_decode
from .kernels.config import Fp8Config, MLAConfig, UpcastConfig
from .kernels.parts.tiles import BLOCK

EIATTR_KPARAM_INFO, EIATTR_REQNTID = 0x17, 0x10
DECODE = {"DenseDecode": dense_decode, "Fp8Decode": fp8_decode, "UpcastDecode": upcast_decode}
SCHEDULE = {"BuildSchedule": schedule, "BuildFixedSchedule": schedule}
MODULES = {**DECODE, "Combine": combine, **SCHEDULE, "Append": append}
SCALARS = {"i32": ("i32", 4), "i64": ("i64", 8), "f32": ("f32", 4), "ptr": ("pointer", 8), "ptr<1>": ("pointer", 8)}
TENSOR_MAP_TYPE = "array<16 x i64>"
ATTRIBUTES = {2: "cooperative", 6: "programmatic_stream_serialization"}  # of cudaLaunchAttributeID
CLUSTER = 4  # cudaLaunchAttributeClusterDimension
GRIDS = {
    **dict.fromkeys(DECODE, "x: 64-row tiles of a request (kernels/parts/rows.py: num_row_tiles); y: parts.shape[0]; z: 1"),
    "Combine": f"x: any; best ceil(w / {combine.WARPS}), w = min(max(u, min({combine.MERGE_GROUPS} u, {combine.SPREAD} SMs)), "
    f"{combine.CTAS_PER_SM * combine.WARPS} SMs), u = batch * query tokens * heads * 2 with float16 partials (* 4 with "
    "float32); y, z: 1",
    **dict.fromkeys(SCHEDULE, "one CTA"),
    "Append": f"x: ceil(tokens * kv heads / {append.WARPS}); y, z: 1",
}
LAUNCH_ATTRIBUTE = re.escape("!llvm.struct<(i32, array<4 x i8>, array<64 x i8>)>")


@dataclass(frozen=True)
class Launch:
    """one launch of the host code, as written there"""

    symbol: str
    block: tuple[int, ...]
    dynamic_smem: int
    attributes: tuple[tuple[int, int], ...]  # (cudaLaunchAttributeID, value)
    parameters: tuple[tuple[str, str], ...]  # (LLVM type, SSA value)


# ---------------------------------------------------------------------- host code
class _Reader:
    """The launches in the LLVM dialect text of an op's host code.  A launch fills its config and an array of pointers to copies
    of the arguments, then names its kernel, then calls; values are numbered per function."""

    def __init__(self):
        self.launches: list[Launch] = []
        self._new_function()

    def _new_function(self):
        self.constants: dict[str, int] = {}
        self.copies: dict[str, tuple[str, str]] = {}  # alloca -> (type, value)
        self.places: dict[str, tuple] = {}  # pointer -> what a store through it sets
        self._new_launch()

    def _new_launch(self):
        self.block, self.smem, self.attributes, self.parameters, self.symbol = {}, 0, [], {}, ""

    def line(self, text: str):
        if text.startswith("  llvm.func"):
            self._new_function()
        elif found := re.match(r"\s*(%\w+) = llvm\.mlir\.constant\((-?\d+) : i\d+\)", text):
            self.constants[found[1]] = int(found[2])
        elif found := re.match(rf"\s*(%\w+) = llvm\.getelementptr %\w+\[0, ([\d, ]+)\] : .*{resources.LAUNCH_CONFIG}$", text):
            self.places[found[1]] = ("config", *map(int, found[2].split(", ")))
        elif found := re.match(rf"\s*(%\w+) = llvm\.getelementptr %\w+\[0, (\d)\] : .*{LAUNCH_ATTRIBUTE}$", text):
            self.places[found[1]] = ("attribute", int(found[2]))
        elif found := re.match(r"\s*(%\w+) = llvm\.getelementptr %\w+\[(%\w+)\] : .* -> !llvm\.ptr, !llvm\.ptr$", text):
            self.places[found[1]] = ("parameter", self.constants.get(found[2]))
        elif found := re.match(r"\s*llvm\.store (%\w+), (%\w+) : (.*), !llvm\.ptr$", text):
            self._store(*found.groups())
        elif found := re.match(r"\s*%\w+ = llvm\.mlir\.addressof @kernels_(kernel_\w+) ", text):
            self.symbol = found[1]
        elif "llvm.call @_cudaLaunchKernelEx(" in text:
            self._launch()

    def _store(self, value: str, pointer: str, kind: str):
        place = self.places.get(pointer)
        if place is None:
            self.copies[pointer] = (kind.removeprefix("!llvm."), value)
        elif place[:2] == ("config", 1):
            self.block[place[2]] = self.constants[value]
        elif place == ("config", 2):
            self.smem = self.constants[value]
        elif place == ("attribute", 0):
            self.attributes.append([self.constants[value], 0])
        elif place == ("attribute", 2):
            self.attributes[-1][1] = self.constants[value]
        elif place[0] == "parameter":
            self.parameters[place[1]] = self.copies[value]

    def _launch(self):
        block = tuple(self.block[axis] for axis in range(3))
        parameters = tuple(self.parameters[i] for i in range(len(self.parameters)))
        attributes = tuple(map(tuple, self.attributes))
        self.launches.append(Launch(self.symbol, block, self.smem, attributes, parameters))
        self._new_launch()


def read_launches(host_code: str) -> list[Launch]:
    """in the order of the calls"""
    reader = _Reader()
    for line in host_code.splitlines():
        reader.line(line)
    return reader.launches


# ---------------------------------------------------------------------- types of parameters
def _parts(body: str) -> list[str]:
    """the comma-separated types of a struct's body"""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(body):
        depth += (character in "<(") - (character in ">)")
        if character == "," and depth == 0:
            parts.append(body[start:i].strip())
            start = i + 1
    return [part for part in (*parts, body[start:].strip()) if part]


def flatten(kind: str, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str, int, int]]:
    """(path, type, size, alignment) of every scalar of an LLVM type; raises ValueError for one that no kernel of ours takes"""
    if kind in SCALARS:
        name, size = SCALARS[kind]
        yield path, name, size, size
    elif kind == TENSOR_MAP_TYPE:
        yield path, "tensor map", 128, 64
    elif kind.startswith("struct<(") and kind.endswith(")>"):
        for i, part in enumerate(_parts(kind[len("struct<(") : -len(")>")])):
            yield from flatten(part, (*path, i))
    else:
        raise ValueError(f"a kernel parameter of type {kind}")


def layout(kind: str) -> tuple[list[dict], int]:
    """fields of a parameter with their offsets, and its size"""
    found, at, widest = [], 0, 1
    for path, name, size, alignment in flatten(kind):
        at = -(-at // alignment) * alignment
        found.append({"path": path, "type": name, "offset": at, "size": size})
        at, widest = at + size, max(widest, alignment)
    return found, -(-at // widest) * widest


# ---------------------------------------------------------------------- cubin
def parameter_offsets(cubin: bytes) -> dict[str, list[tuple[int, int]]]:
    """(offset, size) of the parameters of each kernel, in order"""
    return {
        symbol: [
            (offset, flags >> 18)
            for _, _, offset, flags in sorted(
                (struct.unpack("<IHHI", value) for attribute, value in attributes if attribute == EIATTR_KPARAM_INFO),
                key=lambda entry: entry[1],
            )
        ]
        for symbol, attributes in _kernel_attributes(cubin).items()
    }


def required_blocks(cubin: bytes) -> dict[str, tuple[int, ...]]:
    return {
        symbol: struct.unpack("<3I", value)
        for symbol, attributes in _kernel_attributes(cubin).items()
        for attribute, value in attributes
        if attribute == EIATTR_REQNTID
    }


def _kernel_attributes(cubin: bytes) -> dict[str, list[tuple[int, bytes]]]:
    prefix = ".nv.info."
    return {
        section.name.removeprefix(prefix): list(resources._attributes(section.data))
        for section in resources._sections(cubin)
        if section.name.startswith(prefix)
    }


def trimmed_cubin(data: bytes) -> bytes:
    """the cubin inside an exported object, without what follows it there"""
    cubin = resources.embedded_cubin(data)
    program_at, sections_at = struct.unpack_from("<2Q", cubin, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<4H", cubin, 54)
    headers = [struct.unpack_from("<2I4Q2I2Q", cubin, sections_at + section_size * i) for i in range(sections)]
    nobits = 8  # SHT_NOBITS: a size, no bytes
    ends = [offset + size for _, kind, _, _, offset, size, *_ in headers if kind != nobits]
    return cubin[: max(*ends, program_at + program_size * programs, sections_at + section_size * sections)]


# ---------------------------------------------------------------------- description
def describe(op, compiled, cubin: bytes) -> list[dict]:
    """One JSON object a kernel, in launch order.  Raises ValueError where host code and cubin disagree."""
    facts, offsets, blocks = resources.from_cubin(cubin), parameter_offsets(cubin), required_blocks(cubin)
    carveouts = {symbol: _carveout(attributes) for symbol, attributes in (compiled.kernel_info or {}).items()}
    described = []
    for launch in read_launches(str(compiled.ir_module)):
        kernel = facts[launch.symbol]
        if blocks[launch.symbol] != launch.block:
            raise ValueError(f"{kernel.name}: block {launch.block} in the host code, {blocks[launch.symbol]} in the cubin")
        if CLUSTER in dict(launch.attributes):
            raise ValueError(f"{kernel.name}: the description has no words for clusters yet")
        attributes = {ATTRIBUTES.get(number, f"attribute {number}"): value for number, value in launch.attributes}
        described.append(
            {
                "kernel": kernel.name,
                "symbol": launch.symbol,
                "grid": GRIDS.get(kernel.name, "see the kernel's __call__"),
                "block": list(launch.block),
                "cluster": None,
                "programmatic_dependent_launch": bool(attributes.get("programmatic_stream_serialization")),
                "launch_attributes": attributes,
                "static_smem": kernel.static_smem,
                "dynamic_smem": launch.dynamic_smem,
                "preferred_smem_carveout": carveouts.get(launch.symbol),
                "registers": kernel.registers,
                "parameters": list(_parameters(op, kernel.name, launch, offsets[launch.symbol])),
                "tensor_maps": tensor_maps(op.config) if kernel.name in DECODE else {},
            }
        )
    return described


def _carveout(attributes: dict) -> int | None:
    return next((value for key, value in attributes.items() if key.name.endswith("PREFERRED_SHARED_MEMORY_CARVEOUT")), None)


def _leaves(arguments: type, absent: set[str], prefix: str = "") -> Iterator[str]:
    """names of the leaves of a kernel's Args, without the fields `absent`, which are None and pass nothing"""
    hints = typing.get_type_hints(arguments)
    for field in fields(arguments):
        inner = next((kind for kind in typing.get_args(hints[field.name]) if is_dataclass(kind)), hints[field.name])
        if field.name in absent:
            continue
        if is_dataclass(inner):
            yield from _leaves(inner, absent, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _absent(op) -> set[str]:
    """fields of a kernel's Args that are None for `op`"""
    optional = {"cu_seqlens_q": op.name == "ragged_schedule", "scale": op.name == "fp8_append"}
    if isinstance(op.config, MLAConfig):
        rope = op.config.kv.rope > 0
        optional |= {"sink": op.config.sink, "q_rope": rope, "rope": rope}
    elif isinstance(op.config, Fp8Config | UpcastConfig):
        optional |= {"sink": op.config.base.sink}
    return {name for name, present in optional.items() if not present}


def _parameters(op, kernel: str, launch: Launch, offsets: list[tuple[int, int]]) -> Iterator[dict]:
    if len(offsets) != len(launch.parameters):
        raise ValueError(f"{kernel}: {len(launch.parameters)} parameters in the host code, {len(offsets)} in the cubin")
    names = list(_leaves(MODULES[kernel].Args, _absent(op))) if kernel in MODULES else []
    if len(names) != len(offsets):  # (a leaf that is all static passes nothing)
        names = [f"parameter {i}" for i in range(len(offsets))]
    for name, (offset, size), (kind, value) in zip(names, offsets, launch.parameters):
        found, own_size = layout(kind)
        if own_size != size:
            raise ValueError(f"{kernel} {name}: {own_size} bytes in the host code, {size} in the cubin")
        source, tensor = _source(op, value)
        named = [{**field, "name": _field_name(field["path"], field["type"], tensor)} for field in found]
        for field in named:
            del field["path"]
        shown = {} if tensor is None else {"shape": _modes(tensor.shape), "stride": _modes(tensor.stride)}
        yield {"name": name, "offset": offset, "size": size, "argument": source, **shown, "fields": named}


def _source(op, value: str):
    """(name, fake tensor) of the op's argument that a parameter is; (None, None) for one that the host code computes"""
    if not value.startswith("%arg"):
        return None, None
    names = list(inspect.signature(type(op).__call__).parameters)[1:]
    # (None is no argument of the host code)
    given = [(name, fake) for name, fake in zip(names, op.fake_args()) if fake is not None]
    name, fake = given[int(value.removeprefix("%arg"))]
    return name, fake if hasattr(fake, "stride") else None


def _modes(extents) -> list:
    """extents of a fake tensor: an integer is fixed at compile time"""
    return [extent if isinstance(extent, int) else "?" for extent in extents]


def _field_name(path: tuple[int, ...], kind: str, tensor) -> str:
    """a tensor is (pointer, (shape, stride)) of the extents that are not fixed at compile time"""
    if len(path) < 2:
        return "pointer" if path else "value"
    if kind == "tensor map":
        return "descriptor"
    what, index = ("shape", "stride")[path[1]], path[2] if len(path) > 2 else 0
    if tensor is None:
        return f"{what}_{index}"
    free = [mode for mode, extent in enumerate(getattr(tensor, what)) if not isinstance(extent, int)]
    return f"{what}[{free[index]}]"


def tensor_maps(config: MLAConfig | Fp8Config | UpcastConfig) -> dict[str, dict]:
    """How the decode kernel's TMA descriptors are encoded, by parameter and in the order of encoding.  `first_column` and
    strides are in elements of the op's argument, as expressions of the arguments; extents and boxes in elements of
    `element_type`, of which an e4m3 argument has half as many.  A box has as many along each axis as one instruction moves.
    Axes of which it takes one element come last, in the order in which the kernel gives coordinates.
    tests/runtime/test_export.py holds the boxes to those that the host code encodes."""
    return {MLAConfig: _dense_maps, Fp8Config: _fp8_maps, UpcastConfig: _upcast_maps}[type(config)](config)


def _dense_maps(config: MLAConfig) -> dict[str, dict]:
    kv, blocks, last = config.kv, config.latent_blocks, config.kv.latent - BLOCK
    make = lambda *what, **more: _tensor_map(kv.dtype, *what, **more)
    maps = {
        "q.atom": make("q", 0, _query_axes(config, "q", blocks)),
        "q_last.atom": make("q", last, _query_axes(config, "q", 1)),
        "latent.atom": make("cache", 0, _cache_axes(config, blocks)),
    }
    if kv.rope:
        q_rope, first = ("q_rope", 0) if config.q_pair else ("q", kv.latent)
        maps["q_rope.atom"] = make(q_rope, first, _query_axes(config, q_rope, 1), columns=kv.rope)
        maps["rope.atom"] = make("cache", kv.latent, _cache_axes(config, 1), columns=kv.rope)
    return {name: maps[name] for name in ("q.atom", "q_last.atom", "q_rope.atom", "latent.atom", "rope.atom") if name in maps}


def _fp8_maps(config: Fp8Config) -> dict[str, dict]:
    base, kv, slots = config.base, config.kv, config.q_slots
    q_type, packed = (base.kv.dtype, 1) if slots == 2 else ("float16", 2)  # packed: elements of q in one of the map
    q_rope, first = ("q_rope", 0) if base.q_pair else ("q", kv.latent)
    blocks, half = kv.latent // (2 * BLOCK), kv.rope // 2
    narrow = dict(columns=half, width=half, swizzle="64B")
    return {
        "q.atom": _tensor_map(q_type, "q", 0, _query_axes(base, "q", blocks * slots, blocks, BLOCK * packed)),
        "q_rope.atom": _tensor_map(q_type, q_rope, first, _query_axes(base, q_rope, slots, 1, half), **narrow),
        "latent.atom": _tensor_map("float16", "cache", 0, _cache_axes(base, blocks, 2 * BLOCK)),
        "rope.atom": _tensor_map("float16", "cache", kv.latent, _cache_axes(base, 1), **narrow),
    }


def _upcast_maps(config: UpcastConfig) -> dict[str, dict]:
    base, kv, q_type = config.base, config.kv, config.base.kv.dtype
    q_rope, first = ("q_rope", 0) if base.q_pair else ("q", kv.latent)
    halves = upcast_decode.SCALE_PAIRS
    return {
        "q.atom": _tensor_map(q_type, "q", 0, _query_axes(base, "q", kv.latent // BLOCK, kv.latent // BLOCK // 2)),
        "q_rope.atom": _tensor_map(q_type, q_rope, first, _query_axes(base, q_rope, 1)),
        "latent.atom": _tensor_map("float16", "cache", 0, _cache_axes(base, kv.latent // (2 * BLOCK), 2 * BLOCK)),
        "scales.atom": _tensor_map(
            "float16", "cache", kv.latent, _cache_axes(base, 1), columns=halves, width=halves, swizzle="none"
        ),
        "rope.atom": _tensor_map("bfloat16", "cache", kv.rope_byte, _cache_axes(base, 1)),
    }


def _axis(extent, stride, box: int = 1) -> dict:
    return {"extent": extent, "stride": stride, "box": box}


def _query_axes(config, q: str, blocks: int, box_blocks: int | None = None, step: int = BLOCK) -> list[dict]:
    """step: elements of q from a column block to the next; box_blocks: default all"""
    heads, tokens = config.row_modes
    requests = 0 if config.ragged else 1  # axes before the query tokens
    shape, stride = (lambda i: f"{q}.shape[{i}]"), (lambda i: f"{q}.stride[{i}]")
    head, token = requests + 1, requests
    if config.head_tile == 0:
        rows = [_axis(f"{shape(token)} * {shape(head)}", stride(head), heads)]
    else:
        rows = [_axis(shape(head), stride(head), heads), _axis(shape(token), stride(token), tokens)]
    columns = [_axis(blocks, step, box_blocks or blocks)] if blocks > 1 else []
    return [*rows, *columns, *([_axis(shape(0), stride(0))] if requests else [])]


def _cache_axes(config, blocks: int, step: int = BLOCK) -> list[dict]:
    outer = [_axis("cache.shape[2]", "cache.stride[2]"), _axis("cache.shape[0]", "cache.stride[0]")]
    columns = [_axis(blocks, step, blocks)] if blocks > 1 else []
    return [_axis(config.page, "cache.stride[1]", config.box_tokens), *columns, *outer]


def _tensor_map(
    element_type: str,
    argument: str,
    first_column: int,
    axes: list[dict],
    *,
    columns: int = BLOCK,
    width: int = BLOCK,
    swizzle: str = "128B",
) -> dict:
    """columns: of the innermost axis; width: of a box, columns that are not there arrive as zeros"""
    moved, single = [axis for axis in axes if axis["box"] > 1], [axis for axis in axes if axis["box"] == 1]
    return {
        "argument": argument,
        "first_column": first_column,
        "element_type": element_type,
        "axes": [_axis(columns, 1, width), *moved, *single],
        "swizzle": swizzle,
        "interleave": "none",
        "out_of_bounds": "zeros",
    }
