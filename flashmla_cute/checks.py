"""Argument checks: a message names the argument, what was given, and what is allowed.  All of them run before any launch.

While torch.compile traces, tensors have shapes, strides and dtypes but no memory: addresses and the card are then left to the
operators of torch_ops.py.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .kernels.config import DIMS, FORMATS, FP8_FORMATS, SCALED_FORMATS, KVFormat

DTYPES = {getattr(torch, name): fmt for name, fmt in FORMATS.items()}
FP8_DTYPES = {getattr(torch, name): fmt for name, fmt in FP8_FORMATS.items()}
POOL_DTYPES = (*DTYPES, *FP8_DTYPES, torch.uint8)  # the last: e4m3 numbers among scales and bf16
ALIGNMENT = 16  # bytes: what TMA and 16-byte loads need of bases and strides
tracing = torch.compiler.is_compiling


def need(ok: bool, name: str, given, allowed: str):
    """raises ValueError unless ok"""
    if not ok:
        raise ValueError(f"{name} is {given}; allowed: {allowed}")


def is_tensor(name: str, tensor):
    """Raises TypeError unless `tensor` is a real tensor with memory behind it that needs no gradient."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; allowed: a torch.Tensor")
    if not tracing() and (isinstance(tensor, FakeTensor) or tensor.is_meta):
        raise TypeError(f"{name} is a {type(tensor).__name__} without memory; allowed: a real CUDA tensor")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} requires grad, decode has no backward; allowed: {name}.detach(), or a call under torch.no_grad()"
        )


def on_device(name: str, tensor: torch.Tensor, device: torch.device, of: str):
    if tensor.device != device:
        raise ValueError(f"{name}.device is {tensor.device}; allowed: {device}, the device of {of}")


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def is_hopper(name: str, tensor: torch.Tensor):
    """Raises ValueError for a CPU tensor, RuntimeError for a GPU that cannot run sm_90a code."""
    if tracing():
        return
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
    if len(given) != len(shape) or not all(want is None or have == want for have, want in zip(given, shape)):
        allowed = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}.shape is {given}; allowed: ({allowed}), which is {meaning}")


def has_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype):
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}.dtype is {tensor.dtype}; allowed: {' or '.join(map(str, dtypes))}")


def as_scale(name: str, scale: torch.Tensor | float | None, device: torch.device) -> torch.Tensor:
    """A scale as the kernels read it, [1] float32 on `device`; None: 1; a tensor is not copied.  Raises like the others."""
    if isinstance(scale, torch.Tensor):
        is_tensor(name, scale)
        on_device(name, scale, device, "the pool")
        has_dtype(name, scale, torch.float32)
        need(scale.numel() == 1, f"{name}.shape", tuple(scale.shape), "one element")
        return scale.reshape(1)
    try:
        number = 1.0 if scale is None else float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is a {type(scale).__name__}; allowed: a number or a tensor of one") from None
    need(0.0 < number < math.inf, name, number, "a positive finite number")
    return torch.tensor([number], dtype=torch.float32).to(device)


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
    if not tracing() and tensor.data_ptr() % ALIGNMENT != 0:
        raise ValueError(f"{name}.data_ptr() is {tensor.data_ptr():#x}; allowed: a multiple of {ALIGNMENT} bytes")


def format_of(name: str, pool: torch.Tensor, latent: int | None = None, scales: int | None = None) -> KVFormat:
    """How a token lies in `pool`.  latent: None finds it by the width of a token, unique among the pairs of the table; scales:
    of a token in a pool of bytes, None: 4."""
    has_dtype(name, pool, *POOL_DTYPES)
    width = pool.shape[-1] if pool.dim() else 0
    if pool.dtype == torch.uint8:
        kv = SCALED_FORMATS[scales or 4]
        need(latent in (None, kv.latent), "latent", latent, f"{kv.latent} in a pool of bytes")
        allowed = f"a last axis of {kv.bytes_per_token} bytes: {kv.latent} e4m3, 4 float32 scales, {kv.rope} bfloat16"
        need(width == kv.bytes_per_token, f"{name}.shape", tuple(pool.shape), allowed)
        return kv
    need(not scales, "scales", scales, f"0 or None with a pool of {pool.dtype}")
    fp8 = FP8_DTYPES.get(pool.dtype)
    dims = [(fp8.latent, fp8.rope)] if fp8 else DIMS
    pairs = [pair for pair in dims if sum(pair) == width and latent in (None, pair[0])]
    allowed = ", ".join(f"{a} + {b}" for a, b in dims)
    if latent is not None:
        need(latent in {a for a, _ in dims}, "latent", latent, f"the first of latent + rope = {allowed}")
    if not pairs:
        raise ValueError(f"{name}.shape is {tuple(pool.shape)}; allowed: a last axis of latent + rope = {allowed}")
    return fp8 or KVFormat(DTYPES[pool.dtype].dtype, *pairs[0])


def has_no_overlap(name: str, tensor: torch.Tensor):
    """every element has memory of its own, as far as strides of 0 go"""
    for axis in range(tensor.dim()):
        need(
            tensor.stride(axis) > 0 or tensor.shape[axis] <= 1,
            f"{name}.stride({axis})",
            tensor.stride(axis),
            "positive: it is written to",
        )
