"""Dense MLA decode for sm_90a: paged bf16 or fp16 latent cache, one CTA per 64 query rows and span of KV tiles.

The maths, for 64 query rows (query tokens x heads), KV tiles of 64 tokens; k = latent ++ rope, v = latent.  The numbers below
are those of 512 ++ 64; DIMS in config.py has the others.
  s       = q k^T * scale_log2                         mask: token >= limit(row)  ->  -inf
  row_max = max(s), moved only when exceeded by more than `lazy_rescale`; numerator and row_sum share it, so o is exact
  p       = exp2(s - row_max);  rescale = exp2(old row_max - row_max);  row_sum = row_sum * rescale + sum(p)
  o       = o * rescale + p v                          out = o / row_sum,  lse = ln2 * (row_max + log2(row_sum))

            ring: 3 slots of 64 rows x 512 columns (64 KB)         SCORE registers: q columns 0..447, s, p
  page --> [ latent tile ][ latent tile ][ q of next item ] -----> s = q k^T -- p, rescale --> smem p (8 KB), rescale
  page --> [ rope tile 8 KB ]   [ q columns 448..575, 16 KB ] --^                                 |
                                                       VALUE left: o[:, 0:256]  <-- p v --> VALUE right: o[:, 256:512]
A tile comes in one instruction for its latent and one for its rope; where pages do not hold whole tiles, in eight each.
An item's slots are: q, tile first, .., tile end - 1.  Letting q travel through the ring hides its load behind the
previous item's last tiles, and the item's record rides along in smem.  There is no producer warp: the register file has no
room for one beside 184 + 160 + 160 on each quarter of the SM, so two warps of VALUE make all requests.

  role         warps  registers  waits on                                  signals
  SCORE        0-3    184        slot_full rope_full q_tail_full p_empty   p_full pv_go rope_empty, slot_empty of a q slot
  VALUE_LEFT   4-7    160        p_full pv_go                              p_empty slot_empty
    warp 4     4                 rope_empty                                rope_full q_tail_full, by TMA
  VALUE_RIGHT  8-11   160        p_full pv_go                              p_empty slot_empty
    warp 8     8                 slot_empty                                slot_full, by TMA
    warp 11    11                before all that: prefetches to the L2 while the kernels before end (parts/ahead.py)

  barrier        arrivals  phase completes when                            who waits
  slot_full[3]   1 + tx    the slot's bytes have landed                    SCORE
  slot_empty[3]  8         8 VALUE warps, or 4 SCORE warps x 2 (q slot)    warp 8, to refill it
  rope_full      1 + tx    the rope columns of the next tile have landed   SCORE
  rope_empty     4         q k^T of a tile has read rope and q tail        warp 4, to refill them
  q_tail_full    2 + tx    q columns 448..511, 512..575 have landed        SCORE
  p_full         4         p and rescale of a tile are stored              VALUE (implies slot_full: s came from it)
  p_empty        8         p and rescale of a tile are consumed            SCORE
  pv_go          4         the tensor core is about to be free             VALUE
  begun          1         the kernels before have ended                   nobody: the prefetch asks (parts/ahead.py)

Steady state; tile c's scores are in SCORE's registers when its round starts, no wgmma of SCORE is in flight:
  S1 SCORE  mask and soften tile c: row_max, rescale, p in registers; pinned before S2 by a store
  S2 SCORE  issue the first 12 of the 36 k-steps of q k^T of tile c + 1: the tensor core is fed while p is stored
  S3 SCORE  wait p_empty, store p and rescale of tile c -> p_full
  S4 SCORE  issue the other k-steps; a register operand makes issuing as slow as executing, so p must not wait for them
  S5 SCORE  first commit group done -> pv_go; all done -> rope_empty; advance the ring
  V1 VALUE  wait p_full; rescale o if any row moved; in the last tile zero the rows of v past the end
  V2 VALUE  wait pv_go; issue o += p v
  V3 warp 4 in its shadow: wait rope_empty of tile c + 1, request the rope of tile c + 2 (or the next item's, and its q tail)
  V4 VALUE  p v done -> p_empty, slot_empty
  V5 warp 8 wait slot_empty (both halves), request the slot's next content (q or a tile, three slots ahead)
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from .config import SMEM_LIMIT, TILE, MLAConfig
from .parts.ahead import Guess
from .parts.handover import publish, store_fragment, store_row_values
from .parts.loads import NoLoad, TmaOperand, cache_load, cache_operand, query_load, query_operand
from .parts.mask import Mask
from .parts.pieces import FixedPieces, Piece
from .parts.ptx import opaque, uniform
from .parts.requests import Feed, Refill
from .parts.results import Outputs, join_sink, read_item, store_item_o
from .parts.rows import RowTile, num_row_tiles
from .parts.softmax import LOG2_E, OnlineSoftmax, rescale_rows, soft_cap
from .parts.sync import BarrierTable, RingPos, arrive, warp_arrivals
from .parts.tiles import (
    BLOCK,
    column_blocks,
    element_type,
    fragment_row,
    out_type,
    split_type,
    swizzled,
    thread_in_warpgroup,
)
from .parts.work import PART, RECORD, Work, record_of, record_slots

STEPS = BLOCK // 16  # k-steps of a column block
OPEN_STEPS = 8  # of the register k-steps are issued in S2; 0, 4, 8: 940, 906, 896 us at b128 s_q2 h128 s8192
SCORE_WARPS, VALUE_WARPS = 4, 8
FEED_WARP, REFILL_WARP = 4, 8  # the first warps of VALUE_LEFT and VALUE_RIGHT
AHEAD_WARP = 11  # has nothing to do until the first tile is there
SMEM, RMEM = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM


class NamedBarrier(IntEnum):
    ZERO_LEFT = 1  # + half


# ---------------------------------------------------------------------- bundles
# The bundle says where a tensor lives: args.x in gmem, smem.x in smem.  Locals: prefix g, s, r, t (descriptors).
@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    q: TmaOperand  # columns 0..511, (head, query token, 64, 8, request)
    q_last: TmaOperand  # columns 448..511, (head, query token, 64, 1, request)
    q_rope: TmaOperand | None  # columns 512..575, likewise
    latent: TmaOperand  # (token, 64, 8, kv head, page)
    rope: TmaOperand | None  # (token, 64, 1, kv head, page)
    block_table: cute.Tensor  # (request, tile)
    items: cute.Tensor  # (item, RECORD)
    parts: cute.Tensor  # (part, PART)
    result: Outputs
    sink: cute.Tensor | None  # (head,)
    h_kv: Int32
    scale_log2: Float32  # of what the softmax gets
    cap_factor: Float32  # see soft_cap


@dataclass(frozen=True)
class Smem:
    ring: cute.Tensor  # (row, 512, stage)
    q_ring: cute.Tensor  # the same memory as a q slot has it
    q_last: cute.Tensor  # (row, 64, 1)
    q_rope: cute.Tensor  # (row, 64, 1)
    rope: cute.Tensor  # (token, 64, 1)
    p: cute.Tensor  # (row, token)
    rescale: cute.Tensor  # (row,)
    inv_sum: cute.Tensor  # (row, item parity); pieces of an item share one: they have two tiles or more
    joined: cute.Tensor | None  # (row, 4): parts/pieces.py
    item: cute.Tensor  # (RECORD, record slot)
    anchor: cute.Tensor  # (thread of SCORE,), never read


@dataclass(frozen=True)
class Barriers(BarrierTable):
    """pointers to mbarriers, in smem order"""

    slot_full: cute.Pointer
    slot_empty: cute.Pointer
    rope_full: cute.Pointer
    rope_empty: cute.Pointer
    q_tail_full: cute.Pointer
    p_full: cute.Pointer
    p_empty: cute.Pointer
    pv_go: cute.Pointer
    begun: cute.Pointer

    @classmethod
    def table(cls, config):
        """name -> (how many, arrivals per phase)"""
        lanes = config.lane_arrivals
        tma = warp_arrivals(1, True) + 1 if lanes else 1
        score, value = warp_arrivals(SCORE_WARPS, lanes), warp_arrivals(VALUE_WARPS, lanes)
        return dict(
            slot_full=(config.ring_slots, tma),
            slot_empty=(config.ring_slots, value),
            rope_full=(1, tma),
            rope_empty=(1, score),
            q_tail_full=(1, 2 * tma if config.kv.rope else tma),
            p_full=(1, score),
            p_empty=(1, value),
            pv_go=(1, score),
            begun=(1, 1),
        )


# ---------------------------------------------------------------------- MMAs, shared memory
def mma_qk(config, q_source):
    dtype, k_major = element_type(config), OperandMajorMode.K
    return warpgroup.MmaF16BF16Op(dtype, Float32, (TILE, TILE, 16), q_source, k_major, k_major)


def mma_pv(config):
    shape = (TILE, config.kv.latent // 2, 16)
    return warpgroup.MmaF16BF16Op(element_type(config), Float32, shape, SMEM, OperandMajorMode.K, OperandMajorMode.MN)


def allocate(config):
    dtype, latent = element_type(config), config.kv.latent
    elements = lambda n: cute.struct.Align[cute.struct.MemRange[dtype, n], 1024]

    @cute.struct
    class Storage:
        ring: elements(config.ring_slots * TILE * latent)
        q_last: elements(TILE * BLOCK)
        q_rope: elements(TILE * BLOCK)
        rope: elements(TILE * BLOCK)
        p: elements(TILE * TILE)
        rescale: cute.struct.MemRange[Float32, TILE]
        inv_sum: cute.struct.MemRange[Float32, 2 * TILE]
        joined: cute.struct.MemRange[Float32, 4 * TILE if config.fixed_pieces else 0]
        item: cute.struct.MemRange[Int32, record_slots(config.ring_slots) * RECORD]
        anchor: cute.struct.MemRange[Float32, 32 * SCORE_WARPS]
        bars: cute.struct.MemRange[Int64, Barriers.total(config)]

    size = Storage.size_in_bytes()
    ring = f"{config.ring_slots} slots * {TILE} rows * {latent} columns * {config.kv.itemsize}"
    assert size <= SMEM_LIMIT, f"{config.name}: {size} bytes of shared memory, {ring} of them the ring; {SMEM_LIMIT} allowed"
    storage = SmemAllocator().allocate(Storage)
    view = lambda field, *shape, **by: (lambda s: field.get_tensor(s.outer, s.inner, dtype))(swizzled(dtype, *shape, **by))
    plain = lambda field, *shape: field.get_tensor(cute.make_layout(shape))
    smem = Smem(
        ring=view(storage.ring, TILE, latent, config.ring_slots, by_rows=config.box_tokens < TILE),
        q_ring=view(storage.ring, TILE, latent, config.ring_slots),
        q_last=view(storage.q_last, TILE, BLOCK, 1),
        q_rope=view(storage.q_rope, TILE, BLOCK, 1),
        rope=view(storage.rope, TILE, BLOCK, 1),
        p=view(storage.p, TILE, TILE),
        rescale=plain(storage.rescale, TILE),
        inv_sum=plain(storage.inv_sum, TILE, 2),
        joined=plain(storage.joined, TILE, 4) if config.fixed_pieces else None,
        item=plain(storage.item, RECORD, record_slots(config.ring_slots)),
        anchor=plain(storage.anchor, 32 * SCORE_WARPS),
    )
    return smem, Barriers.carve(config, storage.bars.data_ptr())


# ---------------------------------------------------------------------- SCORE's operands
@dataclass(frozen=True)
class ScoreTiles:
    """operands of q k^T"""

    tQ: cute.Tensor  # (1, 1, 4): columns 448..511
    tQRope: cute.Tensor  # (1, 1, 4): columns 512..575
    tK: cute.Tensor  # (1, 1, 32, stage)
    tRope: cute.Tensor  # (1, 1, 4)
    rQ: tuple  # 7 column blocks, 0..447
    rS: cute.Tensor
    rP: cute.Tensor

    @classmethod
    def make(cls, config, smem):
        ss, rs = cute.make_tiled_mma(mma_qk(config, SMEM)), cute.make_tiled_mma(mma_qk(config, RMEM))
        w = ss.get_slice(0)  # (slice 0: descriptors stay warp-uniform)
        make_a, make_b = lambda s: w.make_fragment_A(w.partition_A(s)), lambda s: w.make_fragment_B(w.partition_B(s))
        a_block, acc, dtype = rs.partition_shape_A((TILE, BLOCK)), ss.partition_shape_C((TILE, TILE)), element_type(config)
        return cls(
            tQ=make_a(smem.q_last[None, None, 0]),
            tQRope=make_a(smem.q_rope[None, None, 0]),
            tK=make_b(smem.ring),
            tRope=make_b(smem.rope[None, None, 0]),
            rQ=tuple(cute.make_rmem_tensor(a_block, dtype) for _ in range(config.latent_blocks - 1)),
            rS=cute.make_rmem_tensor(acc, Float32),
            rP=cute.make_rmem_tensor(acc, dtype),
        )


# ---------------------------------------------------------------------- the kernel
class DenseDecode:
    def __init__(self, config: MLAConfig):
        self.config = config
        self.q_steps = (config.latent_blocks - 1) * STEPS  # k-steps with q in registers; the others' q stays in smem
        self.open_steps = min(OPEN_STEPS, self.q_steps - STEPS)  # of them, issued in S2
        self.group_a = self.q_steps - 1  # of them, in S2's first commit group; pv_go is sent when it is done
        self.rope_steps = config.kv.rope // 16

    # ------------------------------------------------------------------ host
    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (request, query token, head, 576), or the first 512 columns; ragged: (token, head, 576)
        q_rope: cute.Tensor | None,  # the other columns, (request, query token, head, 64); ragged likewise
        cache: cute.Tensor,  # (page, token, kv head, 576)
        block_table: cute.Tensor,  # (request, page) int32
        items: cute.Tensor,  # (item, RECORD) int32
        parts: cute.Tensor,  # (part, PART) int32
        result: Outputs,
        sink: cute.Tensor | None,  # (head,) f32
        softmax_scale: Float32,
        stream,
    ):
        config, latent, rope, blocks = self.config, self.config.kv.latent, self.config.kv.rope, self.config.latent_blocks
        _, _, h_kv, _ = cache.shape
        _, s_q, h_q, _ = result.o_split.shape
        cap = config.options.softcap
        rope_of, rope_column = (q_rope, 0) if config.q_pair else (q, latent)
        args = Args(
            q=query_operand(config, q, 0, BLOCK, blocks),
            q_last=query_operand(config, q, latent - BLOCK, BLOCK, 1),
            q_rope=query_operand(config, rope_of, rope_column, rope, 1, step=BLOCK) if rope else None,
            latent=cache_operand(config, cache, 0, BLOCK, blocks),
            rope=cache_operand(config, cache, latent, rope, 1, step=BLOCK) if rope else None,
            block_table=block_table,
            items=items,
            parts=parts,
            result=result,
            sink=sink,
            h_kv=h_kv,
            scale_log2=Float32(cap * LOG2_E) if cap else softmax_scale * LOG2_E,
            cap_factor=softmax_scale * (2 * LOG2_E / cap) if cap else Float32(0.0),
        )
        row_tiles = num_row_tiles(config.head_tile, s_q, h_q, h_kv)
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
            for operand in (args.q, args.q_last, args.q_rope, args.latent, args.rope):
                if const_expr(operand is not None):
                    cpasync.prefetch_descriptor(operand.atom)
            with cute.arch.elect_one():
                bars.init(self.config)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        row_tile, part, _ = cute.arch.block_idx()
        _, s_q, h_q, _ = args.result.o_split.shape
        rows = RowTile.of(self.config.head_tile, row_tile, s_q, h_q, args.h_kv)
        guess = Guess.read(args.parts, part, self.config.page, args.block_table)
        if warp_idx == AHEAD_WARP:
            guess.prefetch(self._tile_loads(args, smem, bars, rows), self.config.ring_slots - 1, row_tile, bars.begun)
        cute.arch.griddepcontrol_wait()  # q, cache, schedule and lengths may come from the kernels before
        cute.arch.griddepcontrol_launch_dependents()
        if warp_idx == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(bars.begun)
        requests = (warp_idx == FEED_WARP) | (warp_idx == REFILL_WARP)
        work = Work.of(args.items, args.parts, part, rows, self.config.ragged, guess, requests)
        if warp_idx < SCORE_WARPS:
            cute.arch.setmaxregister_increase(self.config.score_registers)
            if work.count > 0:
                self.score(args, smem, bars, work, rows)
        else:
            cute.arch.setmaxregister_decrease(self.config.value_registers)
            if work.count > 0:
                if warp_idx < REFILL_WARP:
                    self.value(0, args, smem, bars, work, rows)
                else:
                    self.value(1, args, smem, bars, work, rows)

    def _pieces(self, args, smem):
        return FixedPieces(self.config, args.result, args.sink, smem.inv_sum, smem.joined)

    def _tile_loads(self, args, smem, bars, rows):
        """of the latent and the rope columns (None: there are none)"""
        latent, rope = cache_load(self.config, args.latent, rows, smem.ring, bars.slot_full), None
        if self.config.kv.rope:
            rope = cache_load(self.config, args.rope, rows, smem.rope, bars.rope_full)
        return latent, rope

    # ------------------------------------------------------------------ role SCORE
    @cute.jit
    def score(self, args: Args, smem: Smem, bars: Barriers, work: Work, rows: RowTile):
        config = self.config
        x, softmax = ScoreTiles.make(config, smem), OnlineSoftmax.make(args.scale_log2, config.lazy_rescale)
        pieces = self._pieces(args, smem)
        pos, parity = RingPos(Int32(0), Int32(0)), Int32(0)  # parity of the running tile count
        for it in cutlass.range(work.count, unroll=1):
            cute.arch.mbarrier_wait(bars.slot_full + pos.stage, pos.phase)
            item, item_rows = read_item(config, args.result, record_of(smem.item, it), rows)
            piece = Piece.first_of(item)
            self._load_q(x, smem, bars, pos.stage)
            pos = pos.next(config.ring_slots)
            mask = Mask(item_rows, item.seqlen, config.causal, config.options.window)
            clear = mask.clear()
            softmax.reset()
            cute.arch.mbarrier_wait(bars.q_tail_full, it & 1)

            self._open_qk(x, bars, pos)  # first tile: no S1, S3
            self._close_qk(x, bars, pos, parity)
            self._await_qk(bars, False)
            pos = pos.next(config.ring_slots)
            for tile in cutlass.range(item.first, item.end - 1, unroll=1):
                self._cap(x, args)
                mask.apply(x.rS, tile, clear)  # S1
                softmax.step(x.rS, x.rP)
                self._pin_softmax(softmax, smem)
                self._open_qk(x, bars, pos)  # S2
                self._store_p(x.rP, softmax.rescale, smem, bars, parity)  # S3
                piece = pieces.end(softmax, it, item, item_rows, piece, tile)
                publish(bars.p_full, config.lane_arrivals)
                self._close_qk(x, bars, pos, parity ^ 1)  # S4
                self._await_qk(bars, True)  # S5
                pos = pos.next(config.ring_slots)
                parity ^= 1
            self._cap(x, args)
            mask.apply(x.rS, item.end - 1, clear)  # last tile: no S2, S4, S5
            softmax.step(x.rS, x.rP)
            inv_sum = softmax.finalize()
            join_sink(config, inv_sum, softmax, args.sink, item, item_rows)
            self._store_p(x.rP, softmax.rescale, smem, bars, parity)
            store_row_values(inv_sum, smem.inv_sum[None, it & 1])
            pieces.end_item(softmax, item, item_rows, piece)
            publish(bars.p_full, config.lane_arrivals)
            arrive(bars.pv_go, config.lane_arrivals)
            parity ^= 1
            pieces.store_lse(softmax, item, item_rows, piece)

    @cute.jit
    def _load_q(self, x: ScoreTiles, smem: Smem, bars: Barriers, stage: Int32):
        """q slot -> registers, and hand the slot back"""
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), element_type(self.config))
        tid, _, _ = cute.arch.thread_idx()
        copy = cute.make_tiled_copy_A(atom, cute.make_tiled_mma(mma_qk(self.config, RMEM))).get_slice(tid)
        for j in cutlass.range_constexpr(len(x.rQ)):
            cute.copy(atom, copy.partition_S(column_blocks(smem.q_ring)[None, None, j, stage]), copy.retile(x.rQ[j]))
        cute.arch.sync_warp()
        arrive(bars.slot_empty + stage, self.config.lane_arrivals, VALUE_WARPS // SCORE_WARPS)

    @cute.jit
    def _pin_softmax(self, softmax: OnlineSoftmax, smem: Smem):
        """A store that needs every exp2 of the tile stays before S2's mbarrier wait; arithmetic does not: without it ptxas
        sinks 17 of the 34 exp2 below the HGMMAs of S2, which makes p late in S3, and spills 4 bytes."""
        smem.anchor[thread_in_warpgroup()] = softmax.row_sum[0] + softmax.row_sum[1]

    @cute.jit
    def _open_qk(self, x: ScoreTiles, bars: Barriers, pos: RingPos):
        """S2: the k-steps of q's column block 7, and the first of those in registers"""
        ss = cute.make_mma_atom(mma_qk(self.config, SMEM))
        ss.set(warpgroup.Field.ACCUMULATE, False)
        cute.arch.mbarrier_wait(bars.slot_full + pos.stage, pos.phase)
        warpgroup.fence()
        for k in cutlass.range_constexpr(STEPS):
            cute.gemm(ss, x.rS, x.tQ[None, None, k], x.tK[None, None, self.q_steps + k, pos.stage], x.rS)
            ss.set(warpgroup.Field.ACCUMULATE, True)
        self._register_steps(x, pos.stage, 0, self.open_steps)

    @cute.jit
    def _close_qk(self, x: ScoreTiles, bars: Barriers, pos: RingPos, rope_parity: Int32):
        """S4, in two commit groups: the end of the first one is the cue for p v"""
        ss = cute.make_mma_atom(mma_qk(self.config, SMEM))
        ss.set(warpgroup.Field.ACCUMULATE, True)
        if const_expr(self.rope_steps == 0):  # (only lest SCORE run ahead of rope_empty)
            cute.arch.mbarrier_wait(bars.rope_full, rope_parity)
        warpgroup.fence()
        self._register_steps(x, pos.stage, self.open_steps, self.group_a)
        warpgroup.commit_group()
        self._register_steps(x, pos.stage, self.group_a, self.q_steps)
        if const_expr(self.rope_steps > 0):
            cute.arch.mbarrier_wait(bars.rope_full, rope_parity)
            warpgroup.fence()
            for k in cutlass.range_constexpr(self.rope_steps):
                cute.gemm(ss, x.rS, x.tQRope[None, None, k], x.tRope[None, None, k], x.rS)
        warpgroup.commit_group()

    @cute.jit
    def _register_steps(self, x: ScoreTiles, stage: Int32, first: Constexpr[int], end: Constexpr[int]):
        rs = cute.make_mma_atom(mma_qk(self.config, RMEM))
        rs.set(warpgroup.Field.ACCUMULATE, True)
        for k in cutlass.range_constexpr(first, end):
            if const_expr(k % STEPS == 0 or k == first):
                stage = opaque(stage)  # else LLVM forms all descriptors up front: > 63 uniform registers, R2UR, spills
            cute.gemm(rs, x.rS, x.rQ[k // STEPS][None, None, k % STEPS], x.tK[None, None, k, stage], x.rS)

    @cute.jit
    def _await_qk(self, bars: Barriers, p_pending: Constexpr[bool]):
        if const_expr(p_pending):
            warpgroup.wait_group(1)
            arrive(bars.pv_go, self.config.lane_arrivals)
        warpgroup.wait_group(0)
        arrive(bars.rope_empty, self.config.lane_arrivals)

    def _cap(self, x: ScoreTiles, args: Args):
        if self.config.options.softcap:
            soft_cap(x.rS, args.cap_factor)

    @cute.jit
    def _store_p(self, rP, rRescale, smem: Smem, bars: Barriers, parity: Int32):
        cute.arch.mbarrier_wait(bars.p_empty, parity ^ 1)  # passes at once for the very first tile
        store_fragment(rP, smem.p, cute.make_tiled_mma(mma_qk(self.config, SMEM)))
        store_row_values(rRescale, smem.rescale)  # (before p: 32 bytes of spills)

    # ------------------------------------------------------------------ roles VALUE_LEFT (half 0) and VALUE_RIGHT (half 1)
    @cute.jit
    def value(self, half: Constexpr[int], args: Args, smem: Smem, bars: Barriers, work: Work, rows: RowTile):
        config, columns = self.config, self.config.kv.latent // 2
        mma = cute.make_tiled_mma(mma_pv(config))
        w = mma.get_slice(0)
        # v = latent^T: the same memory read as (column, token)
        transposed = cute.make_ordered_layout((config.kv.latent, TILE, config.ring_slots), order=(1, 0, 2))
        sV = cute.local_tile(cute.composition(smem.ring, transposed), (columns, TILE, config.ring_slots), (half, 0, 0))
        tV, tP = w.make_fragment_B(w.partition_B(sV)), w.make_fragment_A(w.partition_A(smem.p))
        rO = cute.make_rmem_tensor(mma.partition_shape_C((TILE, columns)), Float32)
        warp_idx = uniform(cute.arch.warp_idx())
        row = fragment_row(thread_in_warpgroup())
        loads, cursor = self._value_loads(half, args, smem, bars, work, rows), None
        pieces = self._pieces(args, smem)
        if const_expr(half == 0):
            cursor = loads.start()
            if warp_idx == FEED_WARP:
                cursor = loads.request(cursor)
        else:
            cursor = loads.start()
            if warp_idx == REFILL_WARP:
                for stage in cutlass.range(config.ring_slots, unroll=1):
                    cursor = loads.request(cursor, stage)
                cursor = loads.wait_and_request(cursor, RingPos(Int32(0), Int32(0)))  # the first q slot
        pos, parity = RingPos(Int32(1), Int32(0)), Int32(0)
        for it in cutlass.range(work.count, unroll=1):
            if const_expr(half == 0):  # V3, the item's first tile
                if warp_idx == FEED_WARP:
                    cursor = loads.wait_and_request(cursor, parity)
            rO.fill(0.0)
            cute.arch.mbarrier_wait(bars.p_full, parity)  # the item's record has landed too
            item, item_rows = read_item(config, args.result, record_of(smem.item, it), rows)
            piece = Piece.first_of(item)
            for tile in cutlass.range(item.first, item.end, unroll=1):
                cute.arch.mbarrier_wait(bars.p_full, parity)  # V1
                rescale_rows(rO, smem.rescale[row], smem.rescale[row + 8])
                if tile * TILE + TILE > item.seqlen:
                    self._zero_tail(half, smem.ring, pos.stage, item.seqlen - tile * TILE)
                cute.arch.mbarrier_wait(bars.pv_go, parity)  # V2
                self._accumulate(rO, tP, tV[None, None, None, pos.stage])
                if const_expr(half == 0):  # V3, in the shadow of p v
                    if warp_idx == FEED_WARP:
                        if tile + 1 < item.end:
                            cursor = loads.wait_and_request(cursor, parity ^ 1)
                warpgroup.wait_group(0)
                arrive(bars.p_empty, config.lane_arrivals)  # V4
                arrive(bars.slot_empty + pos.stage, config.lane_arrivals)
                if const_expr(half == 1):  # V5
                    if warp_idx == REFILL_WARP:
                        cursor = loads.wait_and_request(cursor, pos)
                pos = pos.next(config.ring_slots)
                parity ^= 1
                piece = pieces.end_tile(half, rO, it, item, item_rows, piece, tile)
            if const_expr(half == 1):  # V5, the next item's q slot
                if warp_idx == REFILL_WARP:
                    if it + 1 < work.count:
                        cursor = loads.wait_and_request(cursor, pos)
            pos = pos.next(config.ring_slots)
            slot, inv_sum = pieces.last(it, item, piece)
            store_item_o(config, half, rO, inv_sum, args.result, replace(item, slot=slot), item_rows)

    def _value_loads(self, half, args, smem, bars, work, rows):
        """what the role's first warp requests: VALUE_LEFT's feeds rope and q tail, VALUE_RIGHT's refills the ring"""
        config = self.config
        latent, rope = self._tile_loads(args, smem, bars, rows)
        if half == 0:
            q_last, q_rope = query_load(config, args.q_last, rows, smem.q_last, bars.q_tail_full), None
            rope = rope or NoLoad(bars.rope_full, config.lane_arrivals)
            if config.kv.rope:
                q_rope = query_load(config, args.q_rope, rows, smem.q_rope, bars.q_tail_full)
            return Feed(rope, q_last, q_rope, config.page, args.block_table, work, bars.rope_empty)
        q = query_load(config, args.q, rows, smem.q_ring, bars.slot_full)
        return Refill(q, latent, config.page, args.block_table, work, smem.item, bars.slot_empty)

    @cute.jit
    def _accumulate(self, rO, tP, tV):
        mma = cute.make_mma_atom(mma_pv(self.config))
        mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for k in cutlass.range_constexpr(STEPS):
            cute.gemm(mma, rO, tP[None, None, k], tV[None, None, k], rO)
        warpgroup.commit_group()

    @cute.jit
    def _zero_tail(self, half: Constexpr[int], sRing, stage: Int32, valid: Int32):
        """zero the token rows >= valid of my half's columns: a stale NaN there would survive the product with p = 0"""
        rZero = cute.make_rmem_tensor(8, element_type(self.config))
        rZero.fill(0.0)
        tid, blocks = thread_in_warpgroup(), self.config.latent_blocks // 2
        wide = min(blocks, 2)  # column blocks of a pass, 8 threads each
        rows = 128 // (8 * wide)
        row, block, chunk = tid // (8 * wide), half * blocks + tid % (8 * wide) // 8, tid % 8
        sBlocks = column_blocks(sRing)  # (sliced by stage first: +48 instructions, 8 branches)
        for j in cutlass.range_constexpr(TILE // rows):  # (unrolled: a loop costs uniform registers)
            if rows * j + row >= valid:
                for k in cutlass.range_constexpr(blocks // wide):
                    sRow = sBlocks[rows * j + row, None, block + wide * k, stage]
                    cute.autovec_copy(rZero, cute.local_tile(sRow, (8,), (chunk,)))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=NamedBarrier.ZERO_LEFT + half, number_of_threads=128)


# ---------------------------------------------------------------------- compile-time signature
@dataclass(frozen=True)
class FakeArgs:
    """symbolic arguments of `DenseDecode.__call__`: the ABI, for JIT, export and tests"""

    q: cute.Tensor
    q_rope: cute.Tensor | None
    cache: cute.Tensor
    block_table: cute.Tensor
    items: cute.Tensor
    parts: cute.Tensor
    result: Outputs
    sink: cute.Tensor | None

    @classmethod
    def of(cls, config: MLAConfig):
        from cutlass.cute.runtime import make_fake_tensor

        dtype, kv = element_type(config), config.kv
        b, s_q, h_q, slots, tokens = (cute.sym_int() for _ in range(5))
        wide = lambda divisibility=8: cute.sym_int64(divisibility=divisibility)  # 8 elements: what TMA and stores need
        tensor = lambda dt, shape, stride, align: make_fake_tensor(dt, shape, stride=stride, assumed_align=align)
        vectors = lambda dt, *shape: tensor(dt, shape, (*(wide() for _ in shape[1:]), 1), 16)
        rows = (tokens, h_q) if config.ragged else (b, s_q, h_q)
        lse_shape = (tokens, h_q) if config.options.lse_by_token or config.ragged else (b, h_q, s_q)
        lse = tensor(Float32, lse_shape, tuple(wide(1) for _ in lse_shape), 4)
        o_split = tensor(split_type(config), (slots, s_q, h_q, kv.latent), (wide(kv.latent), wide(kv.latent), kv.latent, 1), 16)
        return cls(
            q=vectors(dtype, *rows, kv.latent if config.q_pair else kv.head_dim),
            q_rope=vectors(dtype, *rows, kv.rope) if config.q_pair else None,
            cache=vectors(dtype, cute.sym_int(), config.page, cute.sym_int(), kv.head_dim),
            block_table=tensor(Int32, (b, cute.sym_int()), (wide(1), 1), 4),
            items=tensor(Int32, (cute.sym_int(), RECORD), (RECORD, 1), 32),
            parts=tensor(Int32, (cute.sym_int(), PART), (PART, 1), 32),
            result=Outputs(
                vectors(out_type(config), *rows, kv.latent),
                lse,
                o_split,
                tensor(Float32, (slots, s_q, h_q), (wide(1), wide(1), 1), 4),
            ),
            sink=tensor(Float32, (h_q,), (1,), 4) if config.sink else None,
        )
