"""Argument checks: a message names the argument, what was given, and what is allowed.  All of them run before any launch."""

import functools
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .kernels.config import FORMATS

DTYPES = {getattr(torch, name): fmt for name, fmt in FORMATS.items()}
INT32_MAX = 2**31 - 1
ALIGNMENT = 16  # bytes: what TMA and 16-byte loads need of bases and strides


def need(ok: bool, name: str, given, allowed: str):
    """raises ValueError unless ok"""
    if not ok:
        raise ValueError(f"{name} is {given}; allowed: {allowed}")


def is_tensor(name: str, tensor):
    """Raises TypeError unless `tensor` is a real tensor with memory behind it that needs no gradient."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; allowed: a torch.Tensor")
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        raise TypeError(f"{name} is a {type(tensor).__name__} without memory; allowed: a real CUDA tensor (not while tracing)")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} requires grad, decode has no backward; allowed: {name}.detach(), or a call under torch.no_grad()"
        )


def on_device(name: str, tensor: torch.Tensor, device: torch.device, of: str):
    need(tensor.device == device, f"{name}.device", tensor.device, f"{device}, the device of {of}")


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def is_hopper(name: str, tensor: torch.Tensor):
    """Raises ValueError for a CPU tensor, RuntimeError for a GPU that cannot run sm_90a code."""
    need(tensor.device.type == "cuda", f"{name}.device", tensor.device, "a CUDA device")
    major, minor = _capability(tensor.device.index)
    if (major, minor) != (9, 0):
        raise RuntimeError(
            f"{name} is on {tensor.device}, {torch.cuda.get_device_name(tensor.device)} of compute capability {major}.{minor}; "
            "allowed: a Hopper GPU (9.0: H100, H200, H20, GH200), the kernels are sm_90a code"
        )


def has_shape(name: str, tensor: torch.Tensor, shape: Sequence[int | None], meaning: str):
    """None in `shape` allows any extent"""
    given = tuple(tensor.shape)
    ok = len(given) == len(shape) and all(want is None or have == want for have, want in zip(given, shape))
    allowed = ", ".join("any" if want is None else str(want) for want in shape)
    need(ok, f"{name}.shape", given, f"({allowed}), which is {meaning}")


def has_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype):
    need(tensor.dtype in dtypes, f"{name}.dtype", tensor.dtype, " or ".join(map(str, dtypes)))


def has_vector_strides(name: str, tensor: torch.Tensor):
    """last axis contiguous, the others and the base multiples of 16 bytes"""
    stride, shape, step = tensor.stride(), tensor.shape, ALIGNMENT // tensor.element_size()
    need(stride[-1] == 1, f"{name}.stride(-1)", stride[-1], "1")
    for axis in range(tensor.dim() - 1):
        if shape[axis] > 1:
            need(
                stride[axis] % step == 0 and stride[axis] > 0,
                f"{name}.stride({axis})",
                stride[axis],
                f"a positive multiple of {step}",
            )
    need(tensor.data_ptr() % ALIGNMENT == 0, f"{name}.data_ptr()", hex(tensor.data_ptr()), f"a multiple of {ALIGNMENT} bytes")
