"""kernels/parts/tiles.py, run natively on the CPU: shared memory layouts, and where accumulator elements are."""

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass import BFloat16, Constexpr, Float32, Int16, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.cute.runtime import from_dlpack

from flashmla_cute.kernels.config import TILE
from flashmla_cute.kernels.parts.tiles import BLOCK, column_blocks, element, fragment_row, swizzled

ATOM_BYTES = 1024  # shared memory is aligned to it: the swizzle looks at address bits


@cute.jit
def read_back(memory: cute.Tensor, direct: cute.Tensor, blocked: cute.Tensor):
    """what lies in `memory` at (row, column, slot), and at (row, 64, block, slot) of its column blocks"""
    rows, columns, slots = direct.shape
    layout = swizzled(Int16, rows, columns, slots)
    s = cute.make_tensor(cute.recast_ptr(memory.iterator, layout.inner, Int16), layout.outer)
    blocks = column_blocks(s)
    for row in cutlass.range(rows):
        for column in cutlass.range(columns):
            for slot in cutlass.range(slots):
                direct[row, column, slot] = s[row, column, slot]
                blocked[row, column, slot] = blocks[row, column % BLOCK, column // BLOCK, slot]


@cute.jit
def accumulator(out: cute.Tensor, columns: Constexpr[int]):
    """out[thread, element] = row + 64 * column, as the DSL's own thread-value layout of the MMA has it"""
    source, k_major = warpgroup.OperandSource.SMEM, OperandMajorMode.K
    op = warpgroup.MmaF16BF16Op(BFloat16, Float32, (TILE, columns, 16), source, k_major, k_major)
    layout = cute.make_tiled_mma(op).tv_layout_C
    for thread in cutlass.range(128):
        for i in cutlass.range(columns // 2):
            out[thread, i] = Int32(layout((thread, i)))


def counting_memory(size):
    """size 16-bit words 0, 1, 2, .., aligned as shared memory is"""
    memory = torch.empty(size + ATOM_BYTES // 2, dtype=torch.int16)
    first = -memory.data_ptr() % ATOM_BYTES // 2
    return memory[first : first + size].copy_(torch.arange(size).short())


@pytest.fixture(scope="module", params=[(64, 512, 2), (64, 128, 1), (64, 64, 1)], ids=str)
def addresses(request):
    """address, in 16-bit words, of each (row, column, slot), directly and through column_blocks"""
    memory = counting_memory(torch.Size(request.param).numel())
    direct, blocked = torch.zeros(2, *request.param, dtype=torch.int16)
    arguments = from_dlpack(memory, assumed_align=ATOM_BYTES), from_dlpack(direct), from_dlpack(blocked)
    cute.compile(read_back, *arguments)(*arguments)
    return direct.int() & 0xFFFF, blocked.int() & 0xFFFF


def test_swizzled_layout(addresses):
    """Bijective; column blocks of 128-byte rows, whose 16-byte chunks are permuted by the row: what TMA and WGMMA expect."""
    direct, _ = addresses
    rows, columns, _ = direct.shape
    assert direct.flatten().sort().values.tolist() == list(range(direct.numel()))
    row, column, slot = torch.meshgrid(*(torch.arange(n) for n in direct.shape), indexing="ij")
    chunk = column % BLOCK // 8 ^ row % 8
    wanted = slot * rows * columns + column // BLOCK * rows * BLOCK + row * BLOCK + chunk * 8 + column % 8
    assert torch.equal(direct, wanted.int())


def test_column_blocks_is_another_view_of_the_same_elements(addresses):
    direct, blocked = addresses
    assert torch.equal(direct, blocked)


@pytest.mark.parametrize("columns", [64, 256])
def test_accumulator_rows_and_elements(columns):
    """fragment_row and element say where the MMA puts its results, and cover the tile once"""
    out = torch.full((128, columns // 2), -1, dtype=torch.int32)
    cute.compile(accumulator, from_dlpack(out), columns, options="--gpu-arch sm_90a")(from_dlpack(out))
    found, seen = out.tolist(), set()
    for thread in range(128):
        for r in range(2):
            for i in range(columns // 4):
                row, column = fragment_row(thread) + 8 * r, 8 * (i // 2) + i % 2 + 2 * (thread % 4)
                assert found[thread][element(r, i)] == row + TILE * column, f"thread {thread}, row {r}, element {i}"
                seen.add((row, column))
    assert len(seen) == TILE * columns
