"""What mla_decode leaves to the compiled function when a call is like an earlier one: that function must refuse it by itself.

Without a GPU, CPU tensors pose as CUDA tensors: a call that nothing refuses then fails for want of a driver.
"""

import ctypes
from dataclasses import dataclass

import pytest
import torch

from flashmla_cute import compile, ops
from flashmla_cute.kernels.config import MLAConfig
from flashmla_cute.kernels.parts.work import MERGE, PART, RECORD

CUDA = 2  # kDLCUDA
B, S, H = 2, 3, 16
BF16 = torch.bfloat16


@dataclass
class Posing:
    """a tensor whose DLPack capsule names a CUDA device"""

    tensor: torch.Tensor
    index: int = 0

    def __dlpack__(self, **_):
        capsule = self.tensor.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        device = pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)  # behind the data pointer: type, index
        (ctypes.c_int32 * 2).from_address(device)[:] = CUDA, self.index
        return capsule

    def __dlpack_device__(self):
        return CUDA, self.index


def empty(*shape, dtype=BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def misaligned(*shape) -> torch.Tensor:
    memory = empty(torch.Size(shape).numel() + 16)
    first = -memory.data_ptr() % 16 // 2 + 4  # 8 bytes off
    return memory[first : first + torch.Size(shape).numel()].view(shape)


def good() -> dict:
    """a batch without tokens: nothing is read but the schedule, which says so"""
    return dict(
        q=empty(B, S, H, 576),
        pool=empty(4, 64, 1, 576),
        block_table=empty(B, 5, dtype=torch.int32),
        items=empty(B + 4, RECORD, dtype=torch.int32),
        parts=empty(4, PART, dtype=torch.int32),
        merges=empty(1 + B, MERGE, dtype=torch.int32),
        out=empty(B, S, H, 512),
        lse=empty(B, H, S, dtype=torch.float32),
        o_split=empty(6, S, H, 512, dtype=torch.float16),
        lse_split=empty(6, S, H, dtype=torch.float32),
    )


REFUSED = {
    "q dtype": dict(q=empty(B, S, H, 576, dtype=torch.float16)),
    "q float32": dict(q=empty(B, S, H, 576, dtype=torch.float32)),
    "q batch": dict(q=empty(B + 1, S, H, 576)),
    "q tokens": dict(q=empty(B, S + 1, H, 576)),
    "q heads": dict(q=empty(B, S, H - 1, 576)),
    "q dims": dict(q=empty(B, S, H, 512)),
    "q axes": dict(q=empty(B, S * H, 576)),
    "q columns": dict(q=empty(B, S, H, 1152)[..., ::2]),
    "q stride": dict(q=empty(B, S, H, 580)[..., :576]),
    "q misaligned": dict(q=misaligned(B, S, H, 576)),
    "out dtype": dict(out=empty(B, S, H, 512, dtype=torch.float16)),
    "out batch": dict(out=empty(B - 1, S, H, 512)),
    "out tokens": dict(out=empty(B, S - 1, H, 512)),
    "out heads": dict(out=empty(B, S, H + 1, 512)),
    "out dims": dict(out=empty(B, S, H, 576)),
    "out columns": dict(out=empty(B, S, H, 1024)[..., ::2]),
    "out stride": dict(out=empty(B, S, H, 516)[..., :512]),
    "out misaligned": dict(out=misaligned(B, S, H, 512)),
    "lse dtype": dict(lse=empty(B, H, S)),
    "lse batch": dict(lse=empty(B + 1, H, S, dtype=torch.float32)),
    "lse axes": dict(lse=empty(B, S, H, dtype=torch.float32)),
    "all heads": dict(q=empty(B, S, 8, 576), out=empty(B, S, 8, 512), lse=empty(B, 8, S, dtype=torch.float32)),
    "all tokens": dict(q=empty(B, 1, H, 576), out=empty(B, 1, H, 512), lse=empty(B, H, 1, dtype=torch.float32)),
    "all requests": dict(q=empty(1, S, H, 576), out=empty(1, S, H, 512), lse=empty(1, H, S, dtype=torch.float32)),
    "block_table batch": dict(block_table=empty(B + 1, 5, dtype=torch.int32)),
    "pool dtype": dict(pool=empty(4, 64, 1, 576, dtype=torch.float16)),
    "pool page": dict(pool=empty(4, 32, 1, 576)),
    "partials": dict(o_split=empty(6, S, H, 512, dtype=torch.float32)),
}


@pytest.fixture(scope="module")
def call():
    """the compiled function, with arguments by name; those in `cpu` stay there, those in `elsewhere` are on another GPU"""
    import tvm_ffi

    function = compile.get(ops.DecodeOp, MLAConfig())

    def call(arguments: dict, cpu=(), elsewhere=()):
        def place(name, tensor):
            if name in cpu:
                return tensor
            if torch.cuda.is_available() and name not in elsewhere:
                return moved(tensor)
            return tvm_ffi.from_dlpack(Posing(tensor, int(name in elsewhere)))

        return function(*(place(*item) for item in arguments.items()), 0.04, 132, None, None)

    return call


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """to the GPU, with its strides and alignment"""
    memory = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size() + 16, dtype=tensor.dtype, device="cuda")
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    return memory[offset:].as_strided(tensor.shape, tensor.stride())


def test_good_arguments_are_launched(call):
    if torch.cuda.is_available():
        call(good())
        torch.cuda.synchronize()
    else:
        with pytest.raises(RuntimeError, match="cudaErrorInsufficientDriver"):
            call(good())


@pytest.mark.parametrize("case", REFUSED)
def test_refused(call, case):
    with pytest.raises(ValueError, match="on argument #"):
        call({**good(), **REFUSED[case]})


@pytest.mark.parametrize("name", ["q", "out", "lse"])
def test_other_devices_are_refused(call, name):
    with pytest.raises(ValueError, match=r"expected device_type=cuda"):
        call(good(), cpu={name})
    with pytest.raises(ValueError, match=r"device index"):
        call(good(), elsewhere={name})


@pytest.mark.parametrize("name", ["q", "out", "lse"])
def test_what_has_no_memory_is_refused(call, name):
    with pytest.raises(Exception, match=r"(?i)meta|device|type"):
        call({**good(), name: good()[name].to("meta")}, cpu={name})
    with pytest.raises(TypeError, match="expected Tensor"):
        call({**good(), name: 3.0}, cpu={name})
