"""Shared memory layouts, and where a thread's accumulator elements are."""

import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32
from cutlass.cute.nvgpu import warpgroup

from ..config import TILE
from .ptx import opaque

BLOCK = 64  # 16-bit columns of a 128-byte swizzled block


TYPES = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32, "float8_e4m3fn": Float8E4M3FN}


def element_type(config):
    return TYPES[config.kv.dtype]


def split_type(config):
    return TYPES[config.split]


def out_type(config):
    return TYPES[config.out]


def swizzled(dtype, *shape, by_rows=False):
    """(row, column, ..) K-major with the 128-byte swizzle, the 64-byte one where rows are no wider, none where they are 16
    bytes.  Its atoms, 8 rows x 64 columns, lie block after block;
    by_rows: row group after row group, so that 8 rows of all columns are one piece of memory, which a TMA box can fill."""
    kinds = warpgroup.SmemLayoutAtomKind
    kind = {8 * 16: kinds.K_INTER, 8 * 64: kinds.K_SW64}.get(shape[1] * dtype.width, kinds.K_SW128)
    atom = warpgroup.make_smem_layout_atom(kind, dtype)
    order = (1, 0, *range(2, len(shape))) if by_rows else tuple(range(len(shape)))
    return cute.tile_to_shape(atom, shape, order=order)


def column_blocks(s):
    """(row, column, slot) -> (row, 64, block, slot)"""
    return cute.flat_divide(s, (TILE, BLOCK))[None, None, 0, None, None]


def row_boxes(s, rows, width=BLOCK):
    """(row, column, slot) -> (row, width, block, group of `rows` rows, slot)"""
    boxes = cute.flat_divide(s, (rows, width))
    return cute.make_tensor(boxes.iterator, cute.select(boxes.layout, mode=[0, 1, 3, 2, 4]))


def thread_in_warpgroup():
    """Opaque, so that addresses are recomputed where they are used; masked after it, so that LLVM knows the value is not
    negative and / and % are one instruction each (masked before it: 5024 instead of 4280 instructions in the kernel)."""
    tid, _, _ = cute.arch.thread_idx()
    return opaque(tid) & 127


def fragment_row(tid):
    """the accumulator rows of a thread are this one and this one + 8"""
    return (tid // 32) * 16 + (tid % 32) // 4


def element(row, i):
    """index of a row's (0 | 1) i-th element in an accumulator; its column is 8 * (i // 2) + i % 2 + 2 * (tid % 4)"""
    return 4 * (i // 2) + 2 * row + i % 2
