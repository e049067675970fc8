"""Decode from raw cubins through the CUDA driver API: no DSL, no TVM-FFI, no torch at run time.

    flashmla-cute export schedule dense_bfloat16_512_64_page64_full_flat --out objects
    python examples/cubin_launch.py objects

Three kernels run: schedule, decode, combine.  What each must be passed is read from the JSON file beside its cubin: fields of
parameters, shared memory, block, attributes, and how the TMA descriptors of the decode kernel are encoded.
Out and lse are compared with float64 attention in numpy.  Needs cuda-python and numpy, and a Hopper GPU.
Exit status: 0 if they agree, else 1.
"""

import argparse
import ctypes
import json
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cuda.bindings import driver

LATENT, HEAD_DIM, PAGE, TILE = 512, 576, 64, 64
RECORD, PART, MERGE = 8, 16, 4  # int32 of an item, of a part, and of a request to merge
CTAS_PER_SM = 4  # of combine's grid, which may have any size
LENGTHS, HEADS = (3000, 0, 77, 64), 16
SCALE = HEAD_DIM**-0.5
TOLERANCE_OUT, TOLERANCE_LSE = 4e-3, 1e-4
FORMATS = {"pointer": "<Q", "i32": "<i", "i64": "<q", "f32": "<f"}


class Unable(Exception):
    """why nothing can run here"""


def call(function, *arguments):
    """a driver API call; returns what it gives beside the status"""
    status, *results = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{function.__name__}: {status.name}")
    return results[0] if len(results) == 1 else results


# ---------------------------------------------------------------------- device memory
@dataclass(frozen=True)
class Array:
    """a dense tensor on the device; strides in elements"""

    pointer: int
    shape: tuple[int, ...]
    itemsize: int

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(int(np.prod(self.shape[i + 1 :], dtype=np.int64)) for i in range(len(self.shape)))

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.itemsize

    @classmethod
    def empty(cls, shape: tuple[int, ...], itemsize: int) -> "Array":
        """filled with 0xff bytes: NaN, or -1"""
        array = cls(0, shape, itemsize)
        pointer = int(call(driver.cuMemAlloc, array.num_bytes))
        call(driver.cuMemsetD8, pointer, 0xFF, array.num_bytes)
        return cls(pointer, shape, itemsize)

    @classmethod
    def of(cls, host: np.ndarray) -> "Array":
        host = np.ascontiguousarray(host)
        array = cls.empty(host.shape, host.itemsize)
        call(driver.cuMemcpyHtoD, array.pointer, host.ctypes.data, host.nbytes)
        return array

    def to_host(self, dtype) -> np.ndarray:
        host = np.empty(self.shape, dtype)
        call(driver.cuMemcpyDtoH, host.ctypes.data, self.pointer, host.nbytes)
        return host


def to_bf16(values: np.ndarray) -> np.ndarray:
    """bits, rounded to nearest even"""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


# ---------------------------------------------------------------------- parameters
def pack(parameter: dict, value) -> bytes:
    """One kernel parameter.  value: an Array, a number, the bytes of a tensor map, or the extents of a coordinate tensor, which
    are all that the kernel gets of it."""
    if isinstance(value, bytes):
        assert len(value) == parameter["size"]
        return value
    packed = bytearray(parameter["size"])
    for field in parameter["fields"]:
        struct.pack_into(FORMATS[field["type"]], packed, field["offset"], field_value(field["name"], value))
    return bytes(packed)


def field_value(name: str, value):
    """`pointer`, `shape[i]` and `stride[i]` of an Array; `shape_i`, the i-th extent; `value`"""
    if name == "value":
        return value
    if name == "pointer":
        return value.pointer
    kind, index = re.fullmatch(r"(shape|stride)(?:\[|_)(\d+)\]?", name).groups()
    return (getattr(value, kind) if isinstance(value, Array) else value)[int(index)]


def evaluate(expression, arrays: dict[str, Array]) -> int:
    """a number, or a product of extents as in "q.shape[1] * q.shape[2]" """
    if isinstance(expression, int):
        return expression
    product = 1
    for factor in expression.split(" * "):
        name, kind, index = re.fullmatch(r"(\w+)\.(shape|stride)\[(\d)\]", factor).groups()
        product *= getattr(arrays[name], kind)[int(index)]
    return product


def axes_of(described: dict, arrays: dict[str, Array]) -> list[tuple[int, int, int]]:
    """(extent, bytes of its stride, box) of every axis of a tensor map"""
    itemsize = arrays[described["argument"]].itemsize
    sized = [(evaluate(a["extent"], arrays), evaluate(a["stride"], arrays), a["box"]) for a in described["axes"]]
    return [(extent, stride * itemsize, box) for extent, stride, box in sized]


def tensor_map(described: dict, arrays: dict[str, Array]) -> bytes:
    array, axes = arrays[described["argument"]], axes_of(described, arrays)
    kinds = driver.CUtensorMapDataType
    encoded = call(
        driver.cuTensorMapEncodeTiled,
        {
            "bfloat16": kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            "float16": kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        }[described["element_type"]],
        len(axes),
        array.pointer + described["first_column"] * array.itemsize,
        [driver.cuuint64_t(extent) for extent, _, _ in axes],
        [driver.cuuint64_t(stride) for _, stride, _ in axes[1:]],
        [driver.cuuint32_t(box) for _, _, box in axes],
        [driver.cuuint32_t(1)] * len(axes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,  # (zeros)
    )
    return struct.pack("<16Q", *(int(word) for word in encoded.opaque))


def coordinate_extents(described: dict, arrays: dict[str, Array]) -> tuple[int, ...]:
    """the extents of a tensor map's axes that are not fixed at compile time"""
    return tuple(evaluate(axis["extent"], arrays) for axis in described["axes"] if isinstance(axis["extent"], str))


# ---------------------------------------------------------------------- kernels
class Kernel:
    """one kernel of a cubin, launched as its description says"""

    def __init__(self, module, description: dict):
        self.description = description
        self.function = call(driver.cuModuleGetFunction, module, description["symbol"].encode())
        attributes = driver.CUfunction_attribute
        settings = {
            attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: description["dynamic_smem"],
            attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: description["preferred_smem_carveout"],
        }
        for attribute, value in settings.items():
            if value is not None:
                call(driver.cuFuncSetAttribute, self.function, attribute, value)

    def launch(self, stream, grid: tuple[int, int, int], values: dict):
        """values: by parameter name, see `pack`"""
        parameters = self.description["parameters"]
        buffers = [ctypes.create_string_buffer(pack(p, values[p["name"]]), p["size"]) for p in parameters]
        pointers = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(buffer) for buffer in buffers))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self.description["block"]
        config.sharedMemBytes, config.hStream = self.description["dynamic_smem"], stream
        if self.description["programmatic_dependent_launch"]:
            attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
            value.programmaticStreamSerializationAllowed = 1
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value = value
            config.attrs, config.numAttrs = [attribute], 1
        call(driver.cuLaunchKernelEx, config, self.function, ctypes.addressof(pointers), 0)


def find(folder: Path, op: str) -> dict:
    """the description of the one object of `op` in `folder`"""
    manifest = json.loads((folder / "manifest.json").read_text())
    entries = [entry for entry in manifest["objects"] if entry["op"] == op]
    if len(entries) != 1:
        raise Unable(f"{folder} has {len(entries)} objects of {op}, this needs one: see the head of this file")
    return json.loads((folder / entries[0]["files"]["description"]["name"]).read_text())


def load(folder: Path, description: dict) -> dict[str, Kernel]:
    """kernels by class name"""
    module = call(driver.cuModuleLoadData, (folder / description["cubin"]).read_bytes())
    return {kernel["kernel"]: Kernel(module, kernel) for kernel in description["kernels"]}


# ---------------------------------------------------------------------- the problem
@dataclass(frozen=True)
class Problem:
    """a batch of requests over a paged cache, on the host; bf16 as bits"""

    q: np.ndarray  # (request, query token, head, 576)
    cache: np.ndarray  # (page, token, kv head, 576)
    block_table: np.ndarray  # (request, tile)
    lengths: np.ndarray  # (request,)

    @classmethod
    def make(cls) -> "Problem":
        random = np.random.default_rng(0)
        counts = [-(-length // PAGE) for length in LENGTHS]
        order = random.permutation(sum(counts)).astype(np.int32)
        table = np.full((len(LENGTHS), max(counts)), -1, np.int32)  # entries past a request's end are never read
        for row, (count, end) in enumerate(zip(counts, np.cumsum(counts))):
            table[row, :count] = order[end - count : end]
        cache = to_bf16(random.standard_normal((sum(counts), PAGE, 1, HEAD_DIM)))
        q = to_bf16(random.standard_normal((len(LENGTHS), 1, HEADS, HEAD_DIM)))
        return cls(q, cache, table, np.array(LENGTHS, np.int32))

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """out (request, 1, head, 512) and lse (request, head, 1), in float64"""
        out, lse = np.zeros((len(LENGTHS), 1, HEADS, LATENT)), np.full((len(LENGTHS), HEADS, 1), -np.inf)
        for i, length in enumerate(self.lengths):
            if length:
                pages = self.block_table[i, : -(-length // PAGE)]
                k = from_bf16(self.cache[pages]).reshape(-1, HEAD_DIM)[:length]
                s = from_bf16(self.q[i, 0]) @ k.T * SCALE
                top = s.max(axis=1, keepdims=True)
                p = np.exp(s - top)
                out[i, 0] = p @ k[:, :LATENT] / p.sum(axis=1, keepdims=True)
                lse[i] = top + np.log(p.sum(axis=1, keepdims=True))
        return out, lse


def arrays_of(problem: Problem, num_parts: int, split_itemsize: int) -> dict[str, Array]:
    """all that the three kernels read and write, by the names of the op's arguments"""
    batch, slots = len(LENGTHS), max(1, 2 * num_parts - 2)
    return {
        "q": Array.of(problem.q),
        "cache": Array.of(problem.cache),
        "block_table": Array.of(problem.block_table),
        "cache_seqlens": Array.of(problem.lengths),
        "items": Array.empty((batch + num_parts, RECORD), 4),
        "parts": Array.empty((num_parts, PART), 4),
        "merges": Array.empty((1 + batch, MERGE), 4),
        "out": Array.empty((batch, 1, HEADS, LATENT), 2),
        "lse": Array.empty((batch, HEADS, 1), 4),
        "o_split": Array.empty((slots, 1, HEADS, LATENT), split_itemsize),
        "lse_split": Array.empty((slots, 1, HEADS), 4),
    }


def decode_values(description: dict, arrays: dict[str, Array], encode=tensor_map) -> dict:
    """the decode kernel's parameters by name"""
    values = {"h_kv": arrays["cache"].shape[2], "scale_log2": SCALE * np.log2(np.e), "cap_factor": 0.0}
    for name, described in description["tensor_maps"].items():
        values[name] = encode(described, arrays)
        values[name.replace(".atom", ".tensor")] = coordinate_extents(described, arrays)
    return values | arguments(description, arrays)


def arguments(description: dict, arrays: dict[str, Array]) -> dict:
    """the parameters of a kernel that are arguments of its op"""
    return {p["name"]: arrays[p["argument"]] for p in description["parameters"] if p["argument"] in arrays}


def decode(folder: Path, problem: Problem, num_sms: int) -> tuple[np.ndarray, np.ndarray]:
    decode_op, schedule_op = find(folder, "decode"), find(folder, "schedule")
    if decode_op["config"]["head_tile"] or decode_op["config"]["kv"]["dtype"] != "bfloat16" or decode_op["config"]["causal"]:
        raise Unable("this example runs a bf16 configuration with head_tile 0 that is not causal: see the head of this file")
    build = load(folder, schedule_op)["BuildSchedule"]
    kernels = load(folder, decode_op)
    attention, combine = kernels["DenseDecode"], kernels["Combine"]
    row_tiles = -(-HEADS // TILE)
    num_parts = max(1, num_sms // row_tiles)  # one CTA on each SM
    split_itemsize = {"float16": 2, "float32": 4}[decode_op["config"]["split"]]
    arrays = arrays_of(problem, num_parts, split_itemsize)
    stream = call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
    call(driver.cuCtxSynchronize)  # (the fills ran on the default stream)

    sizes = {
        "row_tiles": row_tiles,
        "max_tokens": problem.block_table.shape[1] * PAGE,
        "reach": problem.block_table.shape[1] * PAGE,
    }
    build.launch(stream, (1, 1, 1), arguments(build.description, arrays) | sizes)
    attention.launch(stream, (row_tiles, num_parts, 1), decode_values(attention.description, arrays))
    units = len(LENGTHS) * HEADS * LATENT * split_itemsize // (32 * 16)  # 32 vectors of 16 bytes each
    combine.launch(stream, (min(units, CTAS_PER_SM * num_sms), 1, 1), arguments(combine.description, arrays))
    call(driver.cuStreamSynchronize, stream)
    return from_bf16(arrays["out"].to_host(np.uint16)), arrays["lse"].to_host(np.float32).astype(np.float64)


def compare(out: np.ndarray, lse: np.ndarray, problem: Problem) -> bool:
    """prints the errors; False beyond the tolerance"""
    ref_out, ref_lse = problem.reference()
    rows = np.isfinite(ref_lse)
    same_rows = np.array_equal(rows, np.isfinite(lse)) and np.all(lse[~rows] == -np.inf)
    rel = float(np.linalg.norm(out - ref_out) / np.linalg.norm(ref_out))
    gap = float(np.abs(lse - ref_lse)[rows].max()) if same_rows else np.inf
    print(
        f"relative error of out {rel:.1e} (allowed {TOLERANCE_OUT:.0e}), error of lse {gap:.1e} (allowed {TOLERANCE_LSE:.0e})"
    )
    return rel <= TOLERANCE_OUT and gap <= TOLERANCE_LSE  # (a NaN is not)


def start_driver() -> int:
    """makes the first GPU current; returns its number of SMs"""
    try:
        call(driver.cuInit, 0)
        count = call(driver.cuDeviceGetCount)
    except RuntimeError as error:  # (also where there is no libcuda)
        raise Unable(f"no CUDA device: {error}") from None
    if count == 0:
        raise Unable("no CUDA device")
    device, attributes = call(driver.cuDeviceGet, 0), driver.CUdevice_attribute
    ask = lambda what: call(driver.cuDeviceGetAttribute, what, device)
    major = ask(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    minor = ask(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    if (major, minor) != (9, 0):
        raise Unable(f"the kernels are sm_90a code, the first CUDA device has compute capability {major}.{minor}")
    call(driver.cuCtxSetCurrent, call(driver.cuDevicePrimaryCtxRetain, device))
    return ask(attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)


def main() -> int:
    parser = argparse.ArgumentParser(description="Decode from raw cubins, without the DSL.")
    parser.add_argument("objects", type=Path, help="directory that `flashmla-cute export` wrote")
    folder = parser.parse_args().objects
    try:
        num_sms, problem = start_driver(), Problem.make()
        agrees = compare(*decode(folder, problem, num_sms), problem)
    except Unable as reason:
        print(reason, file=sys.stderr)
        return 1
    print("agrees with float64" if agrees else "does NOT agree with float64")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
