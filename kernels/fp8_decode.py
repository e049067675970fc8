"""Dense MLA decode of an e4m3 cache for sm_90a: scores in FP8, values in f16; dense_decode.py's roles and work.

The maths, for 64 query rows and KV tiles of 64 tokens; q8, k8 are e4m3, x = q_scale * kv_scale * softmax_scale * log2 e:
  q       = q_scale(row) * (high + low)                 two e4m3 terms, exact for bf16 (parts/convert.py); or given as e4m3
  s       = (low k8^T + high k8^T) * x(row)             QGMMA m64n64k32: K is used as it lies in the cache
  p, row_max, row_sum, rescale as in dense_decode.py;   p in f16
  o       = o * rescale + p v16                         v16 = f16(latent), exact; an f16 tile may be MN-major, an e4m3 one not
  out     = o * kv_scale / row_sum

            ring: 3 slots of 64 rows x 576 bytes (36 KB)           SCORE registers: high, low columns 256..575, s, p
  page --> [ latent + rope tile ][ .. ][ .. ] -----------> s = q k^T -- p, rescale --> smem p[2] (8 KB), rescale[2]
           [ q 0..255 | 512..543 ][ q 256..511 | 544..575 ]  ^- low columns 0..255, 16 KB         |
                 \\--> VALUE left:  f16 units (32 tokens x 256, 16 KB) --> o[:, 0:256]    <-- p v --+
                  \\-> VALUE right: f16 units                          --> o[:, 256:512]  <-- p v --/
An item's slots are: q (two slots of 16-bit columns, or one of e4m3), tile first, .., tile end - 1.

  role         warps  registers  waits on                              signals
  SCORE        0-3    184        slot_full p_empty                     p_full pv_go slot_empty
  VALUE_LEFT   4-7    160        slot_full p_full pv_go                p_empty slot_empty
  VALUE_RIGHT  8-11   160        slot_full p_full pv_go                p_empty slot_empty
    warp 8     8                 slot_empty                            slot_full, by TMA

  barrier        arrivals  phase completes when                                          who waits
  slot_full[3]   1 + tx    the slot's bytes have landed                                  all
  slot_empty[3]  12        scored and converted; a q slot: 4 SCORE warps x 3             warp 8, to refill it
  p_full[2]      4         p and rescale of a tile are stored                            VALUE
  p_empty[2]     8         p and rescale of a tile are consumed                          SCORE
  pv_go[2]       4         the tensor core is about to be free                           VALUE, without a spare unit

Steady state; SCORE's steps are dense_decode.py's S1 .. S5.  VALUE, while p v of tile c - 1 runs:
  V1 wait p_full of tile c - 1, rescale o, wait pv_go, issue o += p v: two commit groups, one a unit
  V2 wait slot_full of tile c; convert its first half as soon as a unit is free (with a spare one, before V1), then its second
  V3 zero the rows of v past the end -> slot_empty;   p v done -> p_empty;   all four warps have converted
  V4 warp 8: wait slot_empty of tile c, request the slot's next content
"""

from dataclasses import dataclass
from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float8E4M3FN, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from .config import SMEM_LIMIT, TILE, Fp8Config
from .parts.convert import HIGH_STEPS, LOW_STEPS, UNIT_BYTES, UNIT_TOKENS, Converter, QuerySlots
from .parts.handover import publish, store_fragment, store_row_values
from .parts.loads import PairLoad, TmaOperand, cache_load, cache_operand, query_load, query_operand
from .parts.mask import Mask
from .parts.ptx import opaque, uniform
from .parts.requests import Refill
from .parts.results import Outputs, join_sink, read_item, store_item_lse, store_item_o
from .parts.rows import RowTile, num_row_tiles
from .parts.softmax import LOG2_E, OnlineSoftmax, rescale_rows, soft_cap
from .parts.sync import BarrierTable, RingPos, arrive, warp_arrivals
from .parts.tiles import BLOCK, TYPES, column_blocks, fragment_row, swizzled, thread_in_warpgroup
from .parts.work import RECORD, Work, record_of, record_slots

F8 = Float8E4M3FN
PAIRS = 256  # 16-bit columns of a ring slot's latent part
ROPE_PAIRS = 32
BLOCK_STEPS = 4  # k-steps of a 128-byte block
LAST_STEPS = 4  # k-steps in S4's second commit group; pv_go is sent when the first is done
P_SLOTS = 2
INV_SLOTS = 4  # SCORE may be two one-tile items ahead of a VALUE warp that has yet to read inv_sum
SCORE_WARPS, VALUE_WARPS = 4, 8
REFILL_WARP = 8
SMEM, RMEM = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM


class NamedBarrier(IntEnum):
    CONVERTED = 1  # + half
    LOW_TERM = 3


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
    v: cute.Tensor  # (token, 256, half x unit)
    p: cute.Tensor  # (row, token, 2)
    rescale: cute.Tensor  # (row, 2)
    inv_sum: cute.Tensor  # (row, INV_SLOTS)
    item: cute.Tensor  # (RECORD, record slot)
    anchor: cute.Tensor  # (thread of SCORE,), never read
    raw: tuple  # unswizzled pointers of ring, rope, low, v


@dataclass(frozen=True)
class Barriers(BarrierTable):
    """pointers to mbarriers, in smem order"""

    slot_full: cute.Pointer
    slot_empty: cute.Pointer
    p_full: cute.Pointer
    p_empty: cute.Pointer
    pv_go: cute.Pointer

    @classmethod
    def table(cls, config):
        """name -> (how many, arrivals per phase)"""
        lanes = config.base.lane_arrivals
        score, value = warp_arrivals(SCORE_WARPS, lanes), warp_arrivals(VALUE_WARPS, lanes)
        return dict(
            slot_full=(config.stages, warp_arrivals(1, True) + 1 if lanes else 1),
            slot_empty=(config.stages, score + value),
            p_full=(P_SLOTS, score),
            p_empty=(P_SLOTS, value),
            pv_go=(P_SLOTS, score),
        )


# ---------------------------------------------------------------------- MMAs, shared memory
def mma_qk(q_source):
    return warpgroup.MmaF8Op(F8, F8, Float32, (TILE, TILE, 32), q_source, OperandMajorMode.K, OperandMajorMode.K)


def mma_fragment(source):
    """16 bit: its operand A in registers is that of mma_qk in pairs of bytes, its accumulator the same"""
    return warpgroup.MmaF16BF16Op(Float16, Float32, (TILE, TILE, 16), source, OperandMajorMode.K, OperandMajorMode.K)


def mma_pv(config):
    shape = (TILE, config.kv.latent // 2, 16)
    return warpgroup.MmaF16BF16Op(Float16, Float32, shape, SMEM, OperandMajorMode.K, OperandMajorMode.MN)


def allocate(config):
    low_columns = 32 * LOW_STEPS if config.q_terms == 2 else 0
    q_type = TYPES[config.q_dtype] if config.q_slots == 2 else Float16
    elements = lambda dtype, n: cute.struct.Align[cute.struct.MemRange[dtype, n], 1024]

    @cute.struct
    class Storage:
        ring: elements(Float16, config.stages * TILE * PAIRS)
        rope: elements(Float16, config.stages * TILE * ROPE_PAIRS)
        low: elements(F8, TILE * low_columns)
        v: elements(Float16, 2 * config.v_units * UNIT_TOKENS * 256)
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
        v=view(storage.v, Float16, UNIT_TOKENS, 256, 2 * config.v_units),
        p=view(storage.p, Float16, TILE, TILE, P_SLOTS),
        rescale=plain(storage.rescale, TILE, P_SLOTS),
        inv_sum=plain(storage.inv_sum, TILE, INV_SLOTS),
        item=plain(storage.item, RECORD, record_slots(config.stages)),
        anchor=plain(storage.anchor, 32 * SCORE_WARPS),
        raw=tuple(field.data_ptr() for field in (storage.ring, storage.rope, storage.low, storage.v)),
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
        cute.arch.griddepcontrol_wait()  # q, cache, schedule and lengths may come from the kernels before
        cute.arch.griddepcontrol_launch_dependents()
        row_tile, part, _ = cute.arch.block_idx()
        _, s_q, h_q, _ = args.result.o_split.shape
        rows = RowTile.of(self.config.base.head_tile, row_tile, s_q, h_q, args.h_kv)
        work = Work.of(args.items, args.parts, part, rows, self.config.base.ragged)
        if warp_idx < SCORE_WARPS:
            cute.arch.setmaxregister_increase(self.config.base.score_registers)
            if work.count > 0:
                self.score(args, smem, bars, work, rows)
        else:
            cute.arch.setmaxregister_decrease(self.config.base.value_registers)
            if work.count > 0:
                if warp_idx < REFILL_WARP:
                    self.value(0, args, smem, bars, work, rows)
                else:
                    self.value(1, args, smem, bars, work, rows)

    def _refill(self, args, smem, bars, work, rows):
        base, full = self.config.base, bars.slot_full
        q = PairLoad(query_load(base, args.q, rows, smem.q, full), query_load(base, args.q_rope, rows, smem.q_rope, full))
        tile = PairLoad(
            cache_load(base, args.latent, rows, smem.ring, full), cache_load(base, args.rope, rows, smem.rope, full)
        )
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
            self._await_qk(bars, pos, p, False)
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
                self._await_qk(bars, pos, p, True)  # S5
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
            arrive(bars.pv_go + p.stage, config.base.lane_arrivals)
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
        arrive(bars.slot_empty + pos.stage, self.config.base.lane_arrivals, 1 + VALUE_WARPS // SCORE_WARPS)

    def _block(self, smem, j, stage):
        """128-byte block j of a slot; 4: the rope part"""
        return column_blocks(smem.q)[None, None, j, stage] if j < 4 else smem.q_rope[None, None, stage]

    @cute.jit
    def _quantise_q(self, x: ScoreTiles, rScale, smem: Smem, bars: Barriers, stages):
        """q given in 16 bits: its two slots -> one or two e4m3 terms in registers and smem, and hand the slots back"""
        config = self.config
        slots = QuerySlots.make(*smem.raw[:3], stages, TYPES[config.q_dtype])
        scales = slots.row_scales(rScale)
        self._sync_score()  # no warp's q k^T reads the low term of the item before
        for j in cutlass.range_constexpr(5):
            low = x.rLow[max(0, j - LOW_STEPS // BLOCK_STEPS)] if const_expr(config.q_terms == 2) else None
            for r in cutlass.range_constexpr(2):
                slots.split(r, BLOCK_STEPS * j, scales[r], x.rHigh[j], low)
        cute.arch.fence_proxy("async.shared", space="cta")
        self._sync_score()
        for stage in stages:
            arrive(bars.slot_empty + stage, config.base.lane_arrivals, 1 + VALUE_WARPS // SCORE_WARPS)

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
        """S4, in two commit groups: the end of the first one is the cue for p v"""
        total = num_steps(self.config)
        warpgroup.fence()
        self._steps(x, pos.stage, self.config.open_steps, total - LAST_STEPS)
        warpgroup.commit_group()
        self._steps(x, pos.stage, total - LAST_STEPS, total)
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
    def _await_qk(self, bars: Barriers, pos: RingPos, p: RingPos, p_pending: Constexpr[bool]):
        if const_expr(p_pending):
            warpgroup.wait_group(1)
            arrive(bars.pv_go + p.stage, self.config.base.lane_arrivals)
        warpgroup.wait_group(0)
        arrive(bars.slot_empty + pos.stage, self.config.base.lane_arrivals)

    @cute.jit
    def _store_p(self, rP, rRescale, smem: Smem, bars: Barriers, p: RingPos):
        cute.arch.mbarrier_wait(bars.p_empty + p.stage, p.phase ^ 1)  # passes at once for the very first two tiles
        store_fragment(rP, smem.p[None, None, p.stage], cute.make_tiled_mma(mma_fragment(SMEM)))
        store_row_values(rRescale, smem.rescale[None, p.stage])

    # ------------------------------------------------------------------ roles VALUE_LEFT (half 0) and VALUE_RIGHT (half 1)
    @cute.jit
    def value(self, half: Constexpr[int], args: Args, smem: Smem, bars: Barriers, work: Work, rows: RowTile):
        config, base, units = self.config, self.config.base, self.config.v_units
        w = cute.make_tiled_mma(mma_pv(config)).get_slice(0)
        # v = latent^T: the same memory read as (column, token)
        transposed = cute.make_ordered_layout((256, UNIT_TOKENS, 2 * units), order=(1, 0, 2))
        tV, tP = (
            w.make_fragment_B(w.partition_B(cute.composition(smem.v, transposed))),
            w.make_fragment_A(w.partition_A(smem.p)),
        )
        rO = cute.make_rmem_tensor(w.partition_shape_C((TILE, 256)), Float32)
        warp_idx = uniform(cute.arch.warp_idx())
        blocks = smem.raw[3].toint() + half * units * UNIT_BYTES + (warp_idx & 3) * (UNIT_TOKENS * 128)
        converter = Converter.make(warp_idx - SCORE_WARPS, smem.raw[0], blocks, base.box_tokens)
        loads, cursor = None, None
        if const_expr(half == 1):
            loads = self._refill(args, smem, bars, work, rows)
            cursor = loads.start()
            if warp_idx == REFILL_WARP:
                for stage in cutlass.range(config.stages, unroll=1):
                    cursor = loads.request(cursor, stage)
                for slot in cutlass.range(config.q_slots, unroll=1):
                    cursor = loads.wait_and_request(cursor, RingPos(slot, Int32(0)))
        pos, p, unit = RingPos(Int32(config.q_slots), Int32(0)), RingPos(Int32(0), Int32(0)), Int32(0)
        for it in cutlass.range(work.count, unroll=1):
            rO.fill(0.0)
            cute.arch.mbarrier_wait(bars.slot_full + pos.stage, pos.phase)  # the item's record has landed too
            item, item_rows = read_item(base, args.result, record_of(smem.item, it), rows)
            self._sync(half)  # no warp's p v reads the units any more
            converter.run(pos.stage, unit * UNIT_BYTES, 0)
            converter.run(pos.stage, self._unit(unit, 1) * UNIT_BYTES, 1)
            self._release(converter, bars, pos.stage, unit, item.seqlen - item.first * TILE)
            self._sync(half)
            cursor = self._refresh(loads, cursor, warp_idx, pos)
            pos = pos.next(config.stages)
            for tile in cutlass.range(item.first + 1, item.end, unroll=1):
                after = self._unit(unit, 2)
                if config.has_spare_unit:
                    if config.q_slots == 2 and tile == item.first + 1:
                        # (its slot was q's: before q has landed, a wait for the phase after q's would pass)
                        cute.arch.mbarrier_wait(bars.p_full + p.stage, p.phase)
                    self._convert_first(converter, bars, pos, after)
                self._accumulate(half, rO, tP, tV, smem, bars, (p, unit))  # V1, of the tile before
                if const_expr(units == 2):
                    warpgroup.wait_group(1)
                    self._sync(half)
                if not config.has_spare_unit:
                    self._convert_first(converter, bars, pos, after)  # V2
                warpgroup.wait_group(units - 2)
                self._sync(half)
                converter.run(pos.stage, self._unit(after, 1) * UNIT_BYTES, 1)
                self._release(converter, bars, pos.stage, after, item.seqlen - tile * TILE)  # V3
                warpgroup.wait_group(0)
                arrive(bars.p_empty + p.stage, config.base.lane_arrivals)
                self._sync(half)
                cursor = self._refresh(loads, cursor, warp_idx, pos)  # V4
                pos, p, unit = pos.next(config.stages), p.next(P_SLOTS), after
            self._accumulate(half, rO, tP, tV, smem, bars, (p, unit))
            warpgroup.wait_group(0)
            arrive(bars.p_empty + p.stage, config.base.lane_arrivals)
            p, unit = p.next(P_SLOTS), self._unit(unit, 2)
            row = fragment_row(thread_in_warpgroup())
            inv_sum = (smem.inv_sum[row, it % INV_SLOTS], smem.inv_sum[row + 8, it % INV_SLOTS])
            store_item_o(base, half, rO, inv_sum, args.result, item, item_rows)
            for _ in cutlass.range(config.q_slots, unroll=1):  # the next item's q, which SCORE quantises meanwhile
                if it + 1 < work.count:
                    cursor = self._refresh(loads, cursor, warp_idx, pos)
                pos = pos.next(config.stages)

    @cute.jit
    def _convert_first(self, converter: Converter, bars: Barriers, pos: RingPos, unit: Int32):
        cute.arch.mbarrier_wait(bars.slot_full + pos.stage, pos.phase)
        converter.run(pos.stage, unit * UNIT_BYTES, 0)

    @cute.jit
    def _refresh(self, loads, cursor, warp_idx: Int32, pos: RingPos):
        """warp 8: once the slot is free, request its next content"""
        if const_expr(loads is not None):
            if warp_idx == REFILL_WARP:
                cursor = loads.wait_and_request(cursor, pos)
        return cursor

    @cute.jit
    def _sync(self, half: Constexpr[int]):
        cute.arch.barrier(barrier_id=NamedBarrier.CONVERTED + half, number_of_threads=128)

    @cute.jit
    def _unit(self, unit: Int32, k: Constexpr[int]) -> Int32:
        """unit + k in the ring of units"""
        after = unit + k - self.config.v_units
        return after + self.config.v_units if after < 0 else after

    @cute.jit
    def _release(self, converter: Converter, bars: Barriers, stage: Int32, unit: Int32, valid: Int32):
        """the slot has been read, the tile lies in two units"""
        cute.arch.sync_warp()
        arrive(bars.slot_empty + stage, self.config.base.lane_arrivals)
        if valid < TILE:
            converter.zero_rows((unit * UNIT_BYTES, self._unit(unit, 1) * UNIT_BYTES), valid)
        cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def _accumulate(self, half: Constexpr[int], rO, tP, tV, smem: Smem, bars: Barriers, at):
        """V1: two commit groups, one a unit"""
        p, unit = at
        row = fragment_row(thread_in_warpgroup())
        cute.arch.mbarrier_wait(bars.p_full + p.stage, p.phase)
        rescale_rows(rO, smem.rescale[row, p.stage], smem.rescale[row + 8, p.stage])
        if not self.config.has_spare_unit:  # (waiting or not, us at b128 h128 s8192: 2 units 472, 545; 3 units 393, 387)
            cute.arch.mbarrier_wait(bars.pv_go + p.stage, p.phase)
        mma = cute.make_mma_atom(mma_pv(self.config))
        mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for k in cutlass.range_constexpr(TILE // 16):
            at_unit = half * self.config.v_units + self._unit(unit, k // 2)
            cute.gemm(mma, rO, tP[None, None, k, p.stage], tV[None, None, k % 2, at_unit], rO)
            if const_expr(k % 2 == 1):
                warpgroup.commit_group()


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
