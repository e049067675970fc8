"""Dense MLA decode of an e4m3 cache for sm_90a: scores in FP8, values in f16; dense_decode.py's roles and work.

The maths, for 64 query rows and KV tiles of 64 tokens; q8, k8 are e4m3, x = q_scale * kv_scale * softmax_scale * log2 e:
  q       = q_scale(row) * (high + low)                 two e4m3 terms, exact for bf16 (parts/convert.py); or given as e4m3
  s       = (low k8^T + high k8^T) * x(row)             QGMMA m64n64k32: K is used as it lies in the cache
  p, row_max, row_sum, rescale as in dense_decode.py;   p in f16
  o^T     = o^T * rescale + v16^T p^T                   v16 = f16(latent), exact, in registers (parts/transposed.py)
  out     = o * kv_scale / row_sum

            ring: 5 slots of 64 rows x 576 bytes (36 KB)           SCORE registers: high, low columns 384..575, s, p
  page --> [ latent + rope tile ][ .. ][ .. ] -----------> s = q k^T -- p, rescale --> smem p[2] (8 KB), rescale[2]
           [ q 0..255 | 512..543 ][ q 256..511 | 544..575 ]  ^- low columns 0..383, 24 KB         |
                 \\--> VALUE left:  v^T columns 0..255, f16, 4 registers a k-step --> o^T[0:256]    <-- p^T --+
                  \\-> VALUE right: v^T columns 256..511                          --> o^T[256:512]  <-- p^T --/
An item's slots are: q (two slots of 16-bit columns, or one of e4m3), tile first, .., tile end - 1.

  role         warps  waits on              signals
  SCORE        0-3    slot_full p_empty     p_full, slot_empty of a q slot
  VALUE_LEFT   4-7    p_full                p_empty slot_empty
  VALUE_RIGHT  8-11   p_full                p_empty slot_empty
    warp 8     8      slot_empty            slot_full, by TMA
    warp 11    11     before all that: prefetches to the L2 while the kernels before end (parts/ahead.py)
All have the 168 registers of the launch.

  barrier        arrivals  phase completes when                             who waits
  slot_full[5]   1 + tx    the slot's bytes have landed                     SCORE
  slot_empty[5]  8         8 VALUE warps, or 4 SCORE warps x 2 (q slot)     warp 8, to refill it
  p_full[2]      4         p and rescale of a tile are stored               VALUE (implies slot_full: s came from it)
  p_empty[2]     8         p and rescale of a tile are consumed             SCORE
  begun          1         the kernels before have ended                    nobody: the prefetch asks

Steady state; SCORE's steps are S1 .. S4 of dense_decode.py, without a cue for p v: it runs beside q k^T.  VALUE:
  V1 wait p_full; rescale o^T if any row moved; in the last tile zero the tokens past the end
  V2 16 k-steps of o^T += v^T p^T; while one is under way, the bytes of the next become f16
  V3 -> p_empty, slot_empty
  V4 warp 8: wait slot_empty, request the slot's next content
"""

from dataclasses import dataclass
from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float8E4M3FN, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from .config import SMEM_LIMIT, TILE, Fp8Config
from .parts.ahead import Guess
from .parts.convert import HIGH_STEPS, LOW_STEPS, QuerySlots
from .parts.handover import publish, store_fragment, store_row_values
from .parts.loads import PairLoad, TmaOperand, cache_load, cache_operand, query_load, query_operand
from .parts.mask import Mask
from .parts.ptx import opaque, uniform
from .parts.requests import Refill
from .parts.results import Outputs, join_sink, read_item, store_item_columns, store_item_lse
from .parts.rows import RowTile, num_row_tiles
from .parts.softmax import LOG2_E, OnlineSoftmax, soft_cap
from .parts.sync import BarrierTable, RingPos, arrive, warp_arrivals
from .parts.tiles import BLOCK, TYPES, column_blocks, swizzled, thread_in_warpgroup
from .parts.transposed import BLOCKS, Columns, rescale_columns, to_operand
from .parts.work import RECORD, Work, record_of, record_slots

F8 = Float8E4M3FN
PAIRS = 256  # 16-bit columns of a ring slot's latent part
ROPE_PAIRS = 32
BLOCK_STEPS = 4  # k-steps of a 128-byte block
P_SLOTS = 2
INV_SLOTS = 4  # SCORE may be two one-tile items ahead of a VALUE warp that has yet to read inv_sum
SCORE_WARPS, VALUE_WARPS = 4, 8
REFILL_WARP = 8
AHEAD_WARP = 11  # has nothing to do until the first tile is there
SMEM, RMEM = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM


class NamedBarrier(IntEnum):
    LOW_TERM = 1


# ---------------------------------------------------------------------- bundles
@dataclass(frozen=True)
class Scales:
    """device, f32, one element"""

    kv: cute.Tensor
    q: cute.Tensor  # of q given as e4m3


@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    q: TmaOperand  # latent columns, (head, query token, 64, 4 blocks a slot, request)
    q_rope: TmaOperand  # (head, query token, 32, block, request)
    latent: TmaOperand  # (token, 64, 4, kv head, page), in 16-bit pairs of columns
    rope: TmaOperand  # (token, 32, 1, kv head, page)
    block_table: cute.Tensor  # (request, tile)
    items: cute.Tensor  # (item, RECORD)
    parts: cute.Tensor  # (part, PART)
    result: Outputs
    scales: Scales
    sink: cute.Tensor | None  # (head,)
    h_kv: Int32
    softmax_scale: Float32


@dataclass(frozen=True)
class Smem:
    """ring and rope are the same memory as pairs of columns, as e4m3, and as q's 16-bit columns"""

    ring: cute.Tensor  # (row, 256, stage)
    rope: cute.Tensor  # (row, 32, stage)
    ring8: cute.Tensor  # (row, 512, stage)
    rope8: cute.Tensor  # (row, 64, stage)
    q: cute.Tensor  # (row, 256, stage)
    q_rope: cute.Tensor  # (row, 32, stage)
    low: cute.Tensor | None  # (row, 256, 1), low term of q columns 0..255
    p: cute.Tensor  # (row, token, 2)
    rescale: cute.Tensor  # (row, 2)
    inv_sum: cute.Tensor  # (row, INV_SLOTS)
    item: cute.Tensor  # (RECORD, record slot)
    anchor: cute.Tensor  # (thread of SCORE,), never read
    raw: tuple  # unswizzled pointers of ring, rope, low


@dataclass(frozen=True)
class Barriers(BarrierTable):
    """pointers to mbarriers, in smem order"""

    slot_full: cute.Pointer
    slot_empty: cute.Pointer
    p_full: cute.Pointer
    p_empty: cute.Pointer
    begun: cute.Pointer

    @classmethod
    def table(cls, config):
        """name -> (how many, arrivals per phase)"""
        lanes = config.base.lane_arrivals
        score, value = warp_arrivals(SCORE_WARPS, lanes), warp_arrivals(VALUE_WARPS, lanes)
        return dict(
            slot_full=(config.stages, warp_arrivals(1, True) + 1 if lanes else 1),
            slot_empty=(config.stages, value),
            p_full=(P_SLOTS, score),
            p_empty=(P_SLOTS, value),
            begun=(1, 1),
        )


# ---------------------------------------------------------------------- MMAs, shared memory
def mma_qk(q_source):
    return warpgroup.MmaF8Op(F8, F8, Float32, (TILE, TILE, 32), q_source, OperandMajorMode.K, OperandMajorMode.K)


def mma_fragment(source):
    """16 bit: its operand A in registers is that of mma_qk in pairs of bytes, its accumulator the same"""
    return warpgroup.MmaF16BF16Op(Float16, Float32, (TILE, TILE, 16), source, OperandMajorMode.K, OperandMajorMode.K)


def allocate(config):
    low_columns = 32 * LOW_STEPS if config.q_terms == 2 else 0
    q_type = TYPES[config.q_dtype] if config.q_slots == 2 else Float16
    elements = lambda dtype, n: cute.struct.Align[cute.struct.MemRange[dtype, n], 1024]

    @cute.struct
    class Storage:
        ring: elements(Float16, config.stages * TILE * PAIRS)
        rope: elements(Float16, config.stages * TILE * ROPE_PAIRS)
        low: elements(F8, TILE * low_columns)
        p: elements(Float16, P_SLOTS * TILE * TILE)
        rescale: cute.struct.MemRange[Float32, P_SLOTS * TILE]
        inv_sum: cute.struct.MemRange[Float32, INV_SLOTS * TILE]
        item: cute.struct.MemRange[Int32, record_slots(config.stages) * RECORD]
        anchor: cute.struct.MemRange[Float32, 32 * SCORE_WARPS]
        bars: cute.struct.MemRange[Int64, Barriers.total(config)]

    size = Storage.size_in_bytes()
    assert size <= SMEM_LIMIT, f"{config.name}: {size} bytes of shared memory, {SMEM_LIMIT} allowed"
    storage = SmemAllocator().allocate(Storage)
    n, plain = config.stages, lambda field, *shape: field.get_tensor(cute.make_layout(shape))
    view = lambda field, t, *shape, **by: (lambda s: field.get_tensor(s.outer, swizzle=s.inner, dtype=t))(
        swizzled(t, *shape, **by)
    )
    by = dict(by_rows=config.base.box_tokens < TILE)
    smem = Smem(
        ring=view(storage.ring, Float16, TILE, PAIRS, n, **by),
        rope=view(storage.rope, Float16, TILE, ROPE_PAIRS, n),
        ring8=view(storage.ring, F8, TILE, 2 * PAIRS, n, **by),
        rope8=view(storage.rope, F8, TILE, 2 * ROPE_PAIRS, n),
        q=view(storage.ring, q_type, TILE, PAIRS, n),
        q_rope=view(storage.rope, q_type, TILE, ROPE_PAIRS, n),
        low=view(storage.low, F8, TILE, low_columns, 1) if low_columns else None,
        p=view(storage.p, Float16, TILE, TILE, P_SLOTS),
        rescale=plain(storage.rescale, TILE, P_SLOTS),
        inv_sum=plain(storage.inv_sum, TILE, INV_SLOTS),
        item=plain(storage.item, RECORD, record_slots(config.stages)),
        anchor=plain(storage.anchor, 32 * SCORE_WARPS),
        raw=tuple(field.data_ptr() for field in (storage.ring, storage.rope, storage.low)),
    )
    return smem, Barriers.carve(config, storage.bars.data_ptr())


# ---------------------------------------------------------------------- SCORE's operands
@dataclass(frozen=True)
class ScoreTiles:
    """operands of q k^T.  The k-steps of a tile: the low term's in smem, the others of the low term, the high term's."""

    tLow: cute.Tensor | None  # (1, 1, 8)
    tK: cute.Tensor  # (1, 1, 16, stage)
    tRope: cute.Tensor  # (1, 1, 2, stage)
    rHigh: tuple  # 128-column blocks 0 .. 4, the last one half as wide
    rLow: tuple  # blocks 2, 3, 4; none with one term
    rS: cute.Tensor
    rP: cute.Tensor

    @classmethod
    def make(cls, config, smem):
        ss, rs = cute.make_tiled_mma(mma_qk(SMEM)), cute.make_tiled_mma(mma_qk(RMEM))
        w, two = ss.get_slice(0), config.q_terms == 2  # (slice 0: descriptors stay warp-uniform)
        make_b = lambda s: w.make_fragment_B(w.partition_B(s))
        block = lambda j: cute.make_rmem_tensor(rs.partition_shape_A((TILE, 128 if j < 4 else 64)), F8)
        acc = ss.partition_shape_C((TILE, TILE))
        return cls(
            tLow=w.make_fragment_A(w.partition_A(smem.low[None, None, 0])) if two else None,
            tK=make_b(smem.ring8),
            tRope=make_b(smem.rope8),
            rHigh=tuple(block(j) for j in range(5)),
            rLow=tuple(block(j) for j in range(LOW_STEPS // BLOCK_STEPS, 5)) if two else (),
            rS=cute.make_rmem_tensor(acc, Float32),
            rP=cute.make_rmem_tensor(acc, Float16),
        )


def num_steps(config):
    return HIGH_STEPS * config.q_terms


# ---------------------------------------------------------------------- the kernel
class Fp8Decode:
    def __init__(self, config: Fp8Config):
        self.config = config

    # ------------------------------------------------------------------ host
    @cute.jit
    def __call__(
        self,
        queries: tuple,  # q (request, query token, head, 576), None; or its first 512 columns, the others; ragged: (token, ..)
        cache: cute.Tensor,  # (page, token, kv head, 576) e4m3
        block_table: cute.Tensor,  # (request, page) int32
        work: tuple,  # items (item, RECORD), parts (part, PART), int32
        result: Outputs,
        scales: Scales,
        softmax: tuple,  # scale, sink (head,) f32 or None
        stream,
    ):
        config, (q, q_rope), (items, parts), (softmax_scale, sink) = self.config, queries, work, softmax
        _, _, h_kv, _ = cache.shape
        _, s_q, h_q, _ = result.o_split.shape
        pairs = cute.recast_tensor(cache, Float16)
        if const_expr(config.q_slots == 1):
            q = cute.recast_tensor(q, Float16)
            q_rope = cute.recast_tensor(q_rope, Float16) if config.base.q_pair else None
        rope_of, rope_column = (q_rope, 0) if config.base.q_pair else (q, config.q_slots * PAIRS)
        args = Args(
            q=query_operand(config.base, q, 0, BLOCK, PAIRS // BLOCK * config.q_slots, PAIRS // BLOCK),
            q_rope=query_operand(config.base, rope_of, rope_column, ROPE_PAIRS, config.q_slots, 1),
            latent=cache_operand(config.base, pairs, 0, BLOCK, PAIRS // BLOCK),
            rope=cache_operand(config.base, pairs, PAIRS, ROPE_PAIRS, 1),
            block_table=block_table,
            items=items,
            parts=parts,
            result=result,
            scales=scales,
            sink=sink,
            h_kv=h_kv,
            softmax_scale=softmax_scale,
        )
        row_tiles = num_row_tiles(config.base.head_tile, s_q, h_q, h_kv)
        self.kernel(args).launch(
            grid=[row_tiles, parts.shape[0], 1],
            block=[32 * (SCORE_WARPS + VALUE_WARPS), 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            hint_smem_base_uniform=True,
            use_pdl=True,
        )

    # ------------------------------------------------------------------ device: dispatch
    @cute.kernel
    def kernel(self, args: Args):
        smem, bars = allocate(self.config)
        warp_idx = uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for operand in (args.q, args.q_rope, args.latent, args.rope):
                cpasync.prefetch_descriptor(operand.atom)
            with cute.arch.elect_one():
                bars.init(self.config)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        config, base = self.config, self.config.base
        row_tile, part, _ = cute.arch.block_idx()
        _, s_q, h_q, _ = args.result.o_split.shape
        rows = RowTile.of(base.head_tile, row_tile, s_q, h_q, args.h_kv)
        guess = Guess.read(args.parts, part, base.page, args.block_table)
        if warp_idx == AHEAD_WARP:
            tile = self._tile_load(args, smem, bars, rows)
            guess.prefetch((tile.first, tile.second), config.stages - config.q_slots, row_tile, bars.begun)
        cute.arch.griddepcontrol_wait()  # q, cache, schedule and lengths may come from the kernels before
        cute.arch.griddepcontrol_launch_dependents()
        if warp_idx == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(bars.begun)
        work = Work.of(args.items, args.parts, part, rows, base.ragged, guess, warp_idx == REFILL_WARP)
        if warp_idx < SCORE_WARPS:
            if work.count > 0:
                self.score(args, smem, bars, work, rows)
        else:
            if work.count > 0:
                if warp_idx < REFILL_WARP:
                    self.value(0, args, smem, bars, work, rows)
                else:
                    self.value(1, args, smem, bars, work, rows)

    def _tile_load(self, args, smem, bars, rows):
        base, full = self.config.base, bars.slot_full
        return PairLoad(
            cache_load(base, args.latent, rows, smem.ring, full), cache_load(base, args.rope, rows, smem.rope, full)
        )

    def _refill(self, args, smem, bars, work, rows):
        base, full = self.config.base, bars.slot_full
        q = PairLoad(query_load(base, args.q, rows, smem.q, full), query_load(base, args.q_rope, rows, smem.q_rope, full))
        tile = self._tile_load(args, smem, bars, rows)
        return Refill(q, tile, base.page, args.block_table, work, smem.item, bars.slot_empty, self.config.q_slots)

    # ------------------------------------------------------------------ role SCORE
    @cute.jit
    def score(self, args: Args, smem: Smem, bars: Barriers, work: Work, rows: RowTile):
        config, base = self.config, self.config.base
        rScale, rUnit, rCap = (cute.make_rmem_tensor(2, Float32) for _ in range(3))
        x, softmax = ScoreTiles.make(config, smem), OnlineSoftmax.make(rScale, base.lazy_rescale)
        pos, p = RingPos(Int32(0), Int32(0)), RingPos(Int32(0), Int32(0))
        kv_scale = args.scales.kv[0]
        for it in cutlass.range(work.count, unroll=1):
            cute.arch.mbarrier_wait(bars.slot_full + pos.stage, pos.phase)
            item, item_rows = read_item(base, args.result, record_of(smem.item, it), rows)
            if const_expr(config.q_slots == 1):
                self._load_q(x, smem, bars, pos)
                rUnit.fill(args.scales.q[0])
                pos = pos.next(config.stages)
            else:
                after = pos.next(config.stages)
                cute.arch.mbarrier_wait(bars.slot_full + after.stage, after.phase)
                self._quantise_q(x, rUnit, smem, bars, (pos.stage, after.stage))
                pos = after.next(config.stages)
            self._set_scales(rScale, rCap, rUnit, args, kv_scale)
            mask = Mask(item_rows, item.seqlen, base.causal, base.options.window)
            clear = mask.clear()
            softmax.reset()

            self._open_qk(x, bars, pos)  # first tile: no S1, S3
            self._close_qk(x, pos)
            warpgroup.wait_group(0)
            pos = pos.next(config.stages)
            for tile in cutlass.range(item.first, item.end - 1, unroll=1):
                self._cap(x, rCap)
                mask.apply(x.rS, tile, clear)  # S1
                softmax.step(x.rS, x.rP)
                self._pin_softmax(softmax, smem)
                self._open_qk(x, bars, pos)  # S2
                self._store_p(x.rP, softmax.rescale, smem, bars, p)  # S3
                publish(bars.p_full + p.stage, config.base.lane_arrivals)
                self._close_qk(x, pos)  # S4
                warpgroup.wait_group(0)
                pos, p = pos.next(config.stages), p.next(P_SLOTS)
            self._cap(x, rCap)
            mask.apply(x.rS, item.end - 1, clear)  # last tile: no S2, S4, S5
            softmax.step(x.rS, x.rP)
            inv_sum = softmax.finalize()
            join_sink(base, inv_sum, softmax, args.sink, item, item_rows)
            for r in cutlass.range_constexpr(2):
                inv_sum[r] = inv_sum[r] * kv_scale
            self._store_p(x.rP, softmax.rescale, smem, bars, p)
            store_row_values(inv_sum, smem.inv_sum[None, it % INV_SLOTS])
            publish(bars.p_full + p.stage, config.base.lane_arrivals)
            p = p.next(P_SLOTS)
            store_item_lse(base, softmax, args.result, item, item_rows)

    @cute.jit
    def _set_scales(self, rScale, rCap, rUnit, args: Args, kv_scale: Float32):
        """rUnit: what a row's e4m3 numbers of q are multiplied by.  rScale: of what the softmax gets; rCap: see soft_cap."""
        cap = self.config.base.options.softcap
        for r in cutlass.range_constexpr(2):
            to_score = rUnit[r] * kv_scale * args.softmax_scale
            rScale[r] = to_score * LOG2_E if const_expr(cap == 0.0) else Float32(cap * LOG2_E)
            if const_expr(cap > 0.0):
                rCap[r] = to_score * (2 * LOG2_E / cap)

    def _cap(self, x: ScoreTiles, rCap):
        if self.config.base.options.softcap:
            soft_cap(x.rS, rCap)

    @cute.jit
    def _load_q(self, x: ScoreTiles, smem: Smem, bars: Barriers, pos: RingPos):
        """q given as e4m3: its slot, read in pairs -> registers, and hand the slot back"""
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), Float16)
        tid, _, _ = cute.arch.thread_idx()
        copy = cute.make_tiled_copy_A(atom, cute.make_tiled_mma(mma_fragment(RMEM))).get_slice(tid)
        for j in cutlass.range_constexpr(5):
            source = self._block(smem, j, pos.stage)
            cute.copy(atom, copy.partition_S(source), copy.retile(cute.recast_tensor(x.rHigh[j], Float16)))
        cute.arch.sync_warp()
        arrive(bars.slot_empty + pos.stage, self.config.base.lane_arrivals, VALUE_WARPS // SCORE_WARPS)

    def _block(self, smem, j, stage):
        """128-byte block j of a slot; 4: the rope part"""
        return column_blocks(smem.q)[None, None, j, stage] if j < 4 else smem.q_rope[None, None, stage]

    @cute.jit
    def _quantise_q(self, x: ScoreTiles, rScale, smem: Smem, bars: Barriers, stages):
        """q given in 16 bits: its two slots -> one or two e4m3 terms in registers and smem, and hand the slots back"""
        config = self.config
        slots = QuerySlots.make(*smem.raw, stages, TYPES[config.q_dtype])
        scales = slots.row_scales(rScale)
        self._sync_score()  # no warp's q k^T reads the low term of the item before
        for j in cutlass.range_constexpr(5):
            low = x.rLow[max(0, j - LOW_STEPS // BLOCK_STEPS)] if const_expr(config.q_terms == 2) else None
            for r in cutlass.range_constexpr(2):
                slots.split(r, BLOCK_STEPS * j, scales[r], x.rHigh[j], low)
        cute.arch.fence_proxy("async.shared", space="cta")
        self._sync_score()
        for stage in stages:
            arrive(bars.slot_empty + stage, config.base.lane_arrivals, VALUE_WARPS // SCORE_WARPS)

    @cute.jit
    def _sync_score(self):
        cute.arch.barrier(barrier_id=NamedBarrier.LOW_TERM, number_of_threads=32 * SCORE_WARPS)

    @cute.jit
    def _pin_softmax(self, softmax: OnlineSoftmax, smem: Smem):
        """as in dense_decode.py: without it ptxas sinks half of the exp2 below the products of S2"""
        smem.anchor[thread_in_warpgroup()] = softmax.row_sum[0] + softmax.row_sum[1]

    @cute.jit
    def _open_qk(self, x: ScoreTiles, bars: Barriers, pos: RingPos):
        """S2"""
        cute.arch.mbarrier_wait(bars.slot_full + pos.stage, pos.phase)
        warpgroup.fence()
        self._steps(x, pos.stage, 0, self.config.open_steps)

    @cute.jit
    def _close_qk(self, x: ScoreTiles, pos: RingPos):
        """S4"""
        warpgroup.fence()
        self._steps(x, pos.stage, self.config.open_steps, num_steps(self.config))
        warpgroup.commit_group()

    @cute.jit
    def _steps(self, x: ScoreTiles, stage: Int32, first: Constexpr[int], end: Constexpr[int]):
        """k-steps first .. end - 1: the low term goes first, while sums are small, because the tensor core aligns to them"""
        ss, rs = cute.make_mma_atom(mma_qk(SMEM)), cute.make_mma_atom(mma_qk(RMEM))
        for i in cutlass.range_constexpr(first, end):
            k = i % HIGH_STEPS
            if const_expr(k % 4 == 0 or i == first):
                stage = opaque(stage)  # else LLVM forms all descriptors up front: > 63 uniform registers, R2UR, spills
            tB = x.tK[None, None, k, stage] if k < 16 else x.tRope[None, None, k - 16, stage]
            low = i < num_steps(self.config) - HIGH_STEPS
            blocks, at = (x.rLow, k - LOW_STEPS) if low else (x.rHigh, k)
            if const_expr(low and k < LOW_STEPS):
                ss.set(warpgroup.Field.ACCUMULATE, i > 0)
                cute.gemm(ss, x.rS, x.tLow[None, None, k], tB, x.rS)
            else:
                rs.set(warpgroup.Field.ACCUMULATE, i > 0)
                cute.gemm(rs, x.rS, blocks[at // BLOCK_STEPS][None, None, at % BLOCK_STEPS], tB, x.rS)

    @cute.jit
    def _store_p(self, rP, rRescale, smem: Smem, bars: Barriers, p: RingPos):
        cute.arch.mbarrier_wait(bars.p_empty + p.stage, p.phase ^ 1)  # passes at once for the very first two tiles
        store_fragment(rP, smem.p[None, None, p.stage], cute.make_tiled_mma(mma_fragment(SMEM)))
        store_row_values(rRescale, smem.rescale[None, p.stage])

    # ------------------------------------------------------------------ roles VALUE_LEFT (half 0) and VALUE_RIGHT (half 1)
    @cute.jit
    def value(self, half: Constexpr[int], args: Args, smem: Smem, bars: Barriers, work: Work, rows: RowTile):
        config, base = self.config, self.config.base
        w = cute.make_tiled_mma(mma_fragment(RMEM)).get_slice(0)
        tP = w.make_fragment_B(w.partition_B(smem.p))  # p^T: its K is the token, as it lies
        rO = tuple(cute.make_rmem_tensor(w.partition_shape_C((TILE, TILE)), Float32) for _ in range(BLOCKS))
        warp_idx = uniform(cute.arch.warp_idx())
        columns = Columns.make(warp_idx - SCORE_WARPS, smem.raw[0], base.box_tokens)
        loads, cursor = None, None
        if const_expr(half == 1):
            loads = self._refill(args, smem, bars, work, rows)
            cursor = loads.start()
            if warp_idx == REFILL_WARP:
                for stage in cutlass.range(config.stages, unroll=1):
                    cursor = loads.request(cursor, stage)
                for slot in cutlass.range(config.q_slots, unroll=1):
                    cursor = loads.wait_and_request(cursor, RingPos(slot, Int32(0)))
        pos, p = RingPos(Int32(config.q_slots), Int32(0)), RingPos(Int32(0), Int32(0))
        for it in cutlass.range(work.count, unroll=1):
            for block in cutlass.range_constexpr(BLOCKS):
                rO[block].fill(0.0)
            cute.arch.mbarrier_wait(bars.p_full + p.stage, p.phase)  # the item's record has landed too
            item, item_rows = read_item(base, args.result, record_of(smem.item, it), rows)
            for tile in cutlass.range(item.first, item.end, unroll=1):
                cute.arch.mbarrier_wait(bars.p_full + p.stage, p.phase)  # V1
                rescale_columns(rO, smem.rescale[None, p.stage])
                if tile * TILE + TILE > item.seqlen:
                    columns.zero_tail(pos.stage, item.seqlen - tile * TILE)
                self._accumulate(rO, tP[None, None, None, p.stage], columns, pos.stage)  # V2
                arrive(bars.p_empty + p.stage, base.lane_arrivals)  # V3
                arrive(bars.slot_empty + pos.stage, base.lane_arrivals)
                cursor = self._refresh(loads, cursor, warp_idx, pos)  # V4
                pos, p = pos.next(config.stages), p.next(P_SLOTS)
            for _ in cutlass.range(config.q_slots, unroll=1):  # the next item's q, which SCORE quantises meanwhile
                if it + 1 < work.count:
                    cursor = self._refresh(loads, cursor, warp_idx, pos)
                pos = pos.next(config.stages)
            first = (warp_idx - SCORE_WARPS) * (16 * BLOCKS)
            store_item_columns(base, first, rO, smem.inv_sum[None, it % INV_SLOTS], args.result, item, item_rows)

    @cute.jit
    def _refresh(self, loads, cursor, warp_idx: Int32, pos: RingPos):
        """warp 8: once the slot is free, request its next content"""
        if const_expr(loads is not None):
            if warp_idx == REFILL_WARP:
                cursor = loads.wait_and_request(cursor, pos)
        return cursor

    @cute.jit
    def _accumulate(self, rO, tP, columns: Columns, stage: Int32):
        """V2: two k-steps in flight, one group each (three do not fit, and ptxas would serialise them all)"""
        mma = cute.make_mma_atom(mma_fragment(RMEM))
        mma.set(warpgroup.Field.ACCUMULATE, True)
        shape = cute.make_tiled_mma(mma_fragment(RMEM)).partition_shape_A((TILE, 16))
        steps = [(block, k) for block in range(BLOCKS) for k in range(TILE // 16)]
        raw = columns.load(stage, *steps[0])
        for i in cutlass.range_constexpr(len(steps)):
            (block, k), left, rV = steps[i], len(steps) - 1 - i, cute.make_rmem_tensor(shape, Float16)
            to_operand(raw, rV)
            if const_expr(left > 0):
                raw = columns.load(stage, *steps[i + 1])
            warpgroup.fence()
            cute.gemm(mma, rO[block], rV[None, None, 0], tP[None, None, k], rO[block])
            warpgroup.commit_group()
            warpgroup.wait_group(min(1, left))


# ---------------------------------------------------------------------- compile-time signature
@dataclass(frozen=True)
class FakeArgs:
    """symbolic tensors of ops.Fp8DecodeOp that are not those of a 16-bit cache: the ABI, for JIT, export and tests"""

    q: cute.Tensor
    q_rope: cute.Tensor | None
    cache: cute.Tensor

    @classmethod
    def of(cls, config: Fp8Config, q, q_rope, cache):
        """q, q_rope, cache: of the base configuration"""
        from cutlass.cute.runtime import make_fake_tensor

        def like(fake, dtype):
            wide = lambda: cute.sym_int64(divisibility=128 // dtype.width)  # multiples of 16 bytes, what TMA needs
            stride = (*(wide() for _ in fake.shape[1:]), 1)
            return make_fake_tensor(dtype, fake.shape, stride=stride, assumed_align=16)

        q_type = TYPES[config.q_dtype]
        return cls(like(q, q_type), None if q_rope is None else like(q_rope, q_type), like(cache, F8))


def fake_scales() -> Scales:
    from cutlass.cute.runtime import make_fake_tensor

    return Scales(*(make_fake_tensor(Float32, (1,), stride=(1,), assumed_align=4) for _ in range(2)))
