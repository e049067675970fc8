"""What the card gives without a decode kernel: the numbers that its GB/s and TFLOP/s are read beside.

StreamOp reads memory the way the decode kernel does and does nothing else: one warp per CTA and one CTA per SM ask for 64 KB
tiles with the same TMA box (64 tokens x 8 column blocks, evict-first), three in flight, and drop them.  A CTA reports how many
tiles have landed, so that no rate is computed from bytes that nobody read.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Int32, Int64
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from . import compile
from .kernels.config import TILE
from .kernels.parts.loads import EVICT_FIRST, TmaLoad, TmaOperand
from .kernels.parts.sync import RingPos
from .kernels.parts.tiles import BLOCK, swizzled

COLUMNS = 512  # of a tile: the latent part of a token
TILE_BYTES = TILE * COLUMNS * 2
TILES_PER_SM = 248  # 2.1 GB on 132 SMs, the same for every CTA, so that no tail is timed
COPY_BYTES = 1 << 30
MATMUL = 8192
IDLE_S = 0.3
SETTLE_US = 0.5e6  # of matmuls before the timed ones: the power cap acts after a few hundred milliseconds


@dataclass(frozen=True)
class StreamConfig:
    stages: int = 3  # 64 KB slots, as in the decode kernel

    @property
    def name(self) -> str:
        return f"stream_{self.stages}"


@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    tiles: TmaOperand  # (row, 64, block, tile)
    landed: cute.Tensor  # out, (CTA,): tiles that this CTA has read
    num_tiles: Int32


class StreamOp:
    """reads buffer (tile, 64, 512) bf16 once, with a CTA for each element of landed"""

    name = "stream"

    def __init__(self, config: StreamConfig):
        self.config = config

    @cute.jit
    def __call__(self, buffer: cute.Tensor, landed: cute.Tensor, stream):
        num_tiles, _, _ = buffer.shape
        blocks = COLUMNS // BLOCK
        layout = cute.make_layout((TILE, BLOCK, blocks, num_tiles), stride=(COLUMNS, 1, BLOCK, TILE * COLUMNS))
        tiles = TmaOperand.make(cute.make_tensor(buffer.iterator, layout), blocks)
        self.kernel(Args(tiles, landed, num_tiles)).launch(
            grid=[landed.shape[0], 1, 1], block=[32, 1, 1], stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(self, args: Args):
        stages = self.config.stages
        sRing, full = self._allocate()
        cpasync.prefetch_descriptor(args.tiles.atom)
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(full + i, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        load = TmaLoad.make(args.tiles.atom, args.tiles.tensor, sRing, full, hint=EVICT_FIRST)
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        count = cutlass.max((args.num_tiles - cta + num_ctas - 1) // num_ctas, 0)  # tiles cta, cta + num_ctas, ..
        for i in cutlass.range_constexpr(stages):
            if i < count:
                load.start(cta + i * num_ctas, i)
        pos, landed = RingPos(Int32(0), Int32(0)), Int32(0)
        for i in cutlass.range(count, unroll=1):
            cute.arch.mbarrier_wait(full + pos.stage, pos.phase)
            landed += 1
            if i + stages < count:  # nobody reads the slot: it is free as soon as it is full
                load.start(cta + (i + stages) * num_ctas, pos.stage)
            pos = pos.next(stages)
        with cute.arch.elect_one():
            args.landed[cta] = landed

    def _allocate(self):
        stages = self.config.stages

        @cute.struct
        class Storage:
            ring: cute.struct.Align[cute.struct.MemRange[BFloat16, stages * TILE * COLUMNS], 1024]
            full: cute.struct.MemRange[Int64, stages]

        storage = SmemAllocator().allocate(Storage)
        layout = swizzled(BFloat16, TILE, COLUMNS, stages)
        return storage.ring.get_tensor(layout.outer, swizzle=layout.inner), storage.full.data_ptr()

    def fake_args(self):
        return (
            make_fake_tensor(BFloat16, (cute.sym_int(), TILE, COLUMNS), stride=(TILE * COLUMNS, COLUMNS, 1), assumed_align=128),
            make_fake_tensor(Int32, (cute.sym_int(),), stride=(1,), assumed_align=4),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )


# ---------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class Ceilings:
    """of the current CUDA device"""

    copy_gbps: float  # torch's device-to-device copy, bytes read + written
    stream_gbps: float  # reads alone, by StreamOp
    matmul_burst_tflops: float  # torch 8192^3 bf16 on random data, the best launch from idle: before a power cap acts
    matmul_tflops: float  # the same, sustained


def measure() -> Ceilings:
    """Takes a few seconds and about 5 GB of the current CUDA device.  Raises RuntimeError if the stream missed a tile."""
    return Ceilings(_copy_gbps(), _stream_gbps(), *_matmul_tflops())


def launch_us(launch: Callable[[], object], count: int) -> list[float]:
    """Device time of each of `count` launches.  All are queued before the first is waited for, so that no host time is in."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        launch()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def median_us(launch: Callable[[], object], count: int) -> float:
    """median of `count` launches after three to warm up"""
    launch_us(launch, 3)
    return statistics.median(launch_us(launch, count))


def _random_bits(num_bytes: int) -> torch.Tensor:
    """int32; zeros would move with less energy than a real cache does"""
    return torch.empty(num_bytes // 4, dtype=torch.int32, device="cuda").random_()


def _copy_gbps() -> float:
    source = _random_bits(COPY_BYTES)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_us(lambda: target.copy_(source), 20) / 1e3


def _stream_gbps() -> float:
    num_sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    num_tiles = TILES_PER_SM * num_sms
    buffer = _random_bits(num_tiles * TILE_BYTES).view(torch.bfloat16).view(num_tiles, TILE, COLUMNS)
    landed = torch.full((num_sms,), -1, dtype=torch.int32, device="cuda")
    read = compile.get(StreamOp, StreamConfig())
    us = median_us(lambda: read(buffer, landed), 20)
    if landed.sum().item() != num_tiles:
        raise RuntimeError(f"the read stream reports {landed.sum().item()} of {num_tiles} tiles: its rate means nothing")
    return num_tiles * TILE_BYTES / us / 1e3


def _matmul_tflops() -> tuple[float, float]:
    """burst, sustained"""
    a, b, c = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    multiply = lambda: torch.mm(a, b, out=c)
    multiply()  # cuBLAS chooses its kernel
    torch.cuda.synchronize()
    time.sleep(IDLE_S)
    burst = min(launch_us(multiply, 5))
    launch_us(multiply, max(10, round(SETTLE_US / burst)))
    sustained = statistics.median(launch_us(multiply, 100))
    return tuple(2 * MATMUL**3 / us / 1e6 for us in (burst, sustained))
