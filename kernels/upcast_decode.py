"""Dense MLA decode for sm_90a of an e4m3 cache whose tokens have scales of their own: scores and values in f16.

A token is 656 bytes: 512 e4m3, 4 f32 scales (of 128 columns each), 64 bf16 rope columns.  The maths, for 64 query rows and KV
tiles of 64 tokens:
  k16     = f16(latent * scale)                        once a tile, by VALUE; both products read it
  q16     = f16(q * 2^n(row))                          exact for bf16: n brings the row's largest element to 128 .. 255
  s       = q16 k16^T + (q_rope * 2^n) k_rope^T        the first product in f16, the second in bf16, in one accumulator
  p, row_max, row_sum, rescale as in dense_decode.py;  p in f16
  o       = o * rescale + p k16                        out = o / row_sum

         raw ring: 2 slots of 64 rows x 512 bytes (32 KB), 1 KB scales    SCORE registers: q16 columns 0..447, s, p
  page --> [ latent tile ][ .. ] --> VALUE: k16, 2 tiles of 64 KB  ------> s = q k^T -- p, rescale --> smem p (8 KB), rescale
           [ q 0..255    ][ q 256..511 ]     |        q16 columns 448..511 ^                       |
  page --> [ rope tile 8 KB ]   [ q_rope 8 KB ] ----------------------------'                       |
                                             '-> VALUE left: o[:, 0:256]  <-- p k16 --> VALUE right: o[:, 256:512]
An item's slots are: two of q, tile first, .., tile end - 1.  A VALUE warpgroup converts its own 256 columns.

  role         warps  registers  waits on                                  signals
  SCORE        0-3    184        q_full q_rope_full tile_full rope_full    p_full pv_go rope_empty, slot_empty of a q slot
                                 p_empty
  VALUE_LEFT   4-7    160        slot_full p_full pv_go                    slot_empty tile_full p_empty
    warp 4     4                 rope_empty                                rope_full q_rope_full, by TMA
  VALUE_RIGHT  8-11   160        slot_full p_full pv_go                    slot_empty tile_full p_empty
    warp 8     8                 slot_empty                                q_full slot_full, by TMA

  barrier        arrivals  phase completes when                            who waits
  q_full[2]      1 + tx    half of q has landed in the slot                SCORE
  slot_full[2]   1 + tx    a tile has landed in the slot                   VALUE: with q's phases it would see every other one
  slot_empty[2]  8         8 VALUE warps, or 4 SCORE warps x 2 (q slot)    warp 8, to refill it
  tile_full[2]   8         all columns of a tile are converted             SCORE
  rope_full      1 + tx    the rope columns of the next tile have landed   SCORE
  rope_empty     4         q k^T of a tile has read rope and q_rope        warp 4, to refill them
  q_rope_full    1 + tx    the rope columns of q have landed               SCORE
  p_full         4         p and rescale of a tile are stored              VALUE
  p_empty        8         p and rescale of a tile are consumed            SCORE
  pv_go          4         the tensor core is about to be free             VALUE
No barrier says that a converted tile may be overwritten: VALUE has multiplied it then, and p came from its scores.

Steady state; SCORE's steps are dense_decode.py's S1 .. S5, S2 waiting for tile_full.  VALUE, tile c:
  V1 wait p_full of tile c; rescale o, wait pv_go, issue o += p k16 in two commit groups of 32 tokens
  V2 warp 4 in its shadow: wait rope_empty of tile c + 1, request the rope of tile c + 2
  V3 wait slot_full of tile c + 2; as soon as a commit group is done, convert the tokens that lay there
  V4 p k16 done -> p_empty;  converted -> slot_empty;  zero the rows past the end -> tile_full
  V5 warp 8 wait slot_empty (both halves), request the slot's next content
"""

from dataclasses import dataclass
from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Constexpr, Float16, Float32, Int32, Int64, Uint8, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from .config import SCALE_BYTES, SMEM_LIMIT, TILE, UpcastConfig
from .parts.convert import UNIT_TOKENS, Converter, power_of_two
from .parts.handover import publish, store_fragment, store_row_values
from .parts.loads import PairLoad, TmaOperand, cache_load, cache_operand, query_load, query_operand
from .parts.mask import Mask
from .parts.ptx import max_magnitude, opaque, scaled_f16, scaled_halves, uniform
from .parts.requests import Feed, Refill
from .parts.results import Outputs, join_sink, read_item, store_item_lse, store_item_o
from .parts.rows import RowTile, num_row_tiles
from .parts.softmax import LOG2_E, OnlineSoftmax, rescale_rows, soft_cap
from .parts.sync import BarrierTable, RingPos, arrive, warp_arrivals
from .parts.tiles import BLOCK, TYPES, column_blocks, fragment_row, swizzled, thread_in_warpgroup
from .parts.work import RECORD, Work, record_of, record_slots

PAIRS = 256  # 16-bit columns of a raw slot
SCALE_PAIRS = SCALE_BYTES // 2
Q_SLOTS, TILES = 2, 2  # raw slots of q; converted tiles
BLOCKS, STEPS = 8, BLOCK // 16  # column blocks of k16, k-steps of a block
REGISTER_STEPS = (BLOCKS - 1) * STEPS  # k-steps with q in registers; the others' q is in smem
OPEN_STEPS = 8  # of them, issued in S2
BLOCK_BYTES = TILE * 128  # of k16
TILE_BYTES = BLOCKS * BLOCK_BYTES
SCORE_WARPS, VALUE_WARPS = 4, 8
FEED_WARP, REFILL_WARP = 4, 8  # the first warps of VALUE_LEFT and VALUE_RIGHT
SMEM, RMEM = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM


class NamedBarrier(IntEnum):
    MULTIPLIED = 1  # + half
    QUERY = 3


# ---------------------------------------------------------------------- bundles
@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    q: TmaOperand  # latent columns, (head, query token, 64, 4 blocks a slot, request)
    q_rope: TmaOperand  # (head, query token, 64, 1, request)
    latent: TmaOperand  # (token, 64, 4, kv head, page), in 16-bit pairs of columns
    scales: TmaOperand  # (token, 8, 1, kv head, page), in halves of an f32
    rope: TmaOperand  # (token, 64, 1, kv head, page)
    block_table: cute.Tensor  # (request, tile)
    items: cute.Tensor  # (item, RECORD)
    parts: cute.Tensor  # (part, PART)
    result: Outputs
    sink: cute.Tensor | None  # (head,)
    h_kv: Int32
    softmax_scale: Float32


@dataclass(frozen=True)
class Smem:
    ring: cute.Tensor  # (row, 256, slot), pairs of e4m3
    q: cute.Tensor  # the same memory as q's 16-bit columns
    scales: cute.Tensor  # (row, 8, slot)
    k: cute.Tensor  # (row, 512, tile)
    rope: cute.Tensor  # (row, 64, 1)
    q_last: cute.Tensor  # (row, 64, 1), q16 columns 448..511
    q_rope: cute.Tensor  # (row, 64, 1), bf16
    q_rope_raw: cute.Tensor  # the same memory as TMA fills it
    p: cute.Tensor  # (row, token)
    rescale: cute.Tensor  # (row,)
    inv_sum: cute.Tensor  # (row, item parity)
    item: cute.Tensor  # (RECORD, record slot)
    anchor: cute.Tensor  # (warp of SCORE,), never read; there is no room for more
    raw: tuple  # unswizzled pointers of ring, scales, k


@dataclass(frozen=True)
class Barriers(BarrierTable):
    """pointers to mbarriers, in smem order"""

    q_full: cute.Pointer
    slot_full: cute.Pointer
    slot_empty: cute.Pointer
    tile_full: cute.Pointer
    rope_full: cute.Pointer
    rope_empty: cute.Pointer
    q_rope_full: cute.Pointer
    p_full: cute.Pointer
    p_empty: cute.Pointer
    pv_go: cute.Pointer

    @classmethod
    def table(cls, config):
        """name -> (how many, arrivals per phase)"""
        lanes = config.base.lane_arrivals
        tma = warp_arrivals(1, True) + 1 if lanes else 1
        score, value = warp_arrivals(SCORE_WARPS, lanes), warp_arrivals(VALUE_WARPS, lanes)
        return dict(
            q_full=(config.stages, tma),
            slot_full=(config.stages, tma),
            slot_empty=(config.stages, value),
            tile_full=(TILES, value),
            rope_full=(1, tma),
            rope_empty=(1, score),
            q_rope_full=(1, tma),
            p_full=(1, score),
            p_empty=(1, value),
            pv_go=(1, score),
        )


# ---------------------------------------------------------------------- MMAs, shared memory
def mma_qk(dtype, q_source):
    return warpgroup.MmaF16BF16Op(dtype, Float32, (TILE, TILE, 16), q_source, OperandMajorMode.K, OperandMajorMode.K)


def mma_pv():
    return warpgroup.MmaF16BF16Op(Float16, Float32, (TILE, 256, 16), SMEM, OperandMajorMode.K, OperandMajorMode.MN)


def allocate(config):
    elements = lambda n: cute.struct.Align[cute.struct.MemRange[Float16, n], 1024]

    @cute.struct
    class Storage:
        ring: elements(config.stages * TILE * PAIRS)
        scales: elements(config.stages * TILE * SCALE_PAIRS)
        k: elements(TILES * TILE * 2 * PAIRS)
        rope: elements(TILE * BLOCK)
        q_last: elements(TILE * BLOCK)
        q_rope: elements(TILE * BLOCK)
        p: elements(TILE * TILE)
        rescale: cute.struct.MemRange[Float32, TILE]
        inv_sum: cute.struct.MemRange[Float32, 2 * TILE]
        item: cute.struct.MemRange[Int32, record_slots(config.stages) * RECORD]
        anchor: cute.struct.MemRange[Float32, SCORE_WARPS]
        bars: cute.struct.MemRange[Int64, Barriers.total(config)]

    size = Storage.size_in_bytes()
    assert size <= SMEM_LIMIT, f"{config.name}: {size} bytes of shared memory, {SMEM_LIMIT} allowed"
    storage = SmemAllocator().allocate(Storage)
    n, q_type = config.stages, TYPES[config.base.kv.dtype]
    plain = lambda field, *shape: field.get_tensor(cute.make_layout(shape))
    view = lambda field, t, *shape, **by: (lambda s: field.get_tensor(s.outer, swizzle=s.inner, dtype=t))(
        swizzled(t, *shape, **by)
    )
    smem = Smem(
        ring=view(storage.ring, Float16, TILE, PAIRS, n, by_rows=config.base.box_tokens < TILE),
        q=view(storage.ring, q_type, TILE, PAIRS, n),
        scales=view(storage.scales, Float16, TILE, SCALE_PAIRS, n),
        k=view(storage.k, Float16, TILE, 2 * PAIRS, TILES),
        rope=view(storage.rope, BFloat16, TILE, BLOCK, 1),
        q_last=view(storage.q_last, Float16, TILE, BLOCK, 1),
        q_rope=view(storage.q_rope, BFloat16, TILE, BLOCK, 1),
        q_rope_raw=view(storage.q_rope, q_type, TILE, BLOCK, 1),
        p=view(storage.p, Float16, TILE, TILE),
        rescale=plain(storage.rescale, TILE),
        inv_sum=plain(storage.inv_sum, TILE, 2),
        item=plain(storage.item, RECORD, record_slots(n)),
        anchor=plain(storage.anchor, SCORE_WARPS),
        raw=tuple(field.data_ptr() for field in (storage.ring, storage.scales, storage.k)),
    )
    return smem, Barriers.carve(config, storage.bars.data_ptr())


# ---------------------------------------------------------------------- SCORE's operands
@dataclass(frozen=True)
class ScoreTiles:
    """operands of q k^T"""

    tQ: cute.Tensor  # (1, 1, 4): columns 448..511
    tQRope: cute.Tensor  # (1, 1, 4): columns 512..575
    tK: cute.Tensor  # (1, 1, 32, tile)
    tRope: cute.Tensor  # (1, 1, 4)
    rQ: tuple  # 7 column blocks, 0..447
    rS: cute.Tensor
    rP: cute.Tensor

    @classmethod
    def make(cls, smem):
        f16, bf16 = (cute.make_tiled_mma(mma_qk(dtype, SMEM)).get_slice(0) for dtype in (Float16, BFloat16))
        rs, acc = cute.make_tiled_mma(mma_qk(Float16, RMEM)), f16.partition_shape_C((TILE, TILE))
        make_a, make_b = lambda w, s: w.make_fragment_A(w.partition_A(s)), lambda w, s: w.make_fragment_B(w.partition_B(s))
        return cls(
            tQ=make_a(f16, smem.q_last[None, None, 0]),
            tQRope=make_a(bf16, smem.q_rope[None, None, 0]),
            tK=make_b(f16, smem.k),
            tRope=make_b(bf16, smem.rope[None, None, 0]),
            rQ=tuple(cute.make_rmem_tensor(rs.partition_shape_A((TILE, BLOCK)), Float16) for _ in range(BLOCKS - 1)),
            rS=cute.make_rmem_tensor(acc, Float32),
            rP=cute.make_rmem_tensor(acc, Float16),
        )


def position(count: Int32) -> RingPos:
    """of use number `count` of a ring of two"""
    return RingPos(count & 1, count >> 1 & 1)


# ---------------------------------------------------------------------- the kernel
class UpcastDecode:
    def __init__(self, config: UpcastConfig):
        self.config = config

    # ------------------------------------------------------------------ host
    @cute.jit
    def __call__(
        self,
        queries: tuple,  # q (request, query token, head, 576), None; or its first 512 columns, the others; ragged: (token, ..)
        cache: cute.Tensor,  # (page, token, kv head, 656) bytes
        block_table: cute.Tensor,  # (request, page) int32
        work: tuple,  # items (item, RECORD), parts (part, PART), int32
        result: Outputs,
        softmax: tuple,  # scale, sink (head,) f32 or None
        stream,
    ):
        base, kv, (q, q_rope), (items, parts), (softmax_scale, sink) = self.config.base, self.config.kv, queries, work, softmax
        _, _, h_kv, _ = cache.shape
        _, s_q, h_q, _ = result.o_split.shape
        pairs, rope = cute.recast_tensor(cache, Float16), cute.recast_tensor(cache, BFloat16)
        rope_of, rope_column = (q_rope, 0) if base.q_pair else (q, kv.latent)
        args = Args(
            q=query_operand(base, q, 0, BLOCK, BLOCKS, BLOCKS // Q_SLOTS),
            q_rope=query_operand(base, rope_of, rope_column, kv.rope, 1),
            latent=cache_operand(base, pairs, 0, BLOCK, PAIRS // BLOCK),
            scales=cache_operand(base, pairs, PAIRS, SCALE_PAIRS, 1),
            rope=cache_operand(base, rope, kv.rope_byte // 2, kv.rope, 1),
            block_table=block_table,
            items=items,
            parts=parts,
            result=result,
            sink=sink,
            h_kv=h_kv,
            softmax_scale=softmax_scale,
        )
        row_tiles = num_row_tiles(base.head_tile, s_q, h_q, h_kv)
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
        base = self.config.base
        smem, bars = allocate(self.config)
        warp_idx = uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for operand in (args.q, args.q_rope, args.latent, args.scales, args.rope):
                cpasync.prefetch_descriptor(operand.atom)
            with cute.arch.elect_one():
                bars.init(self.config)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()  # q, cache, schedule and lengths may come from the kernels before
        cute.arch.griddepcontrol_launch_dependents()
        row_tile, part, _ = cute.arch.block_idx()
        _, s_q, h_q, _ = args.result.o_split.shape
        rows = RowTile.of(base.head_tile, row_tile, s_q, h_q, args.h_kv)
        work = Work.of(args.items, args.parts, part, rows, base.ragged)
        if warp_idx < SCORE_WARPS:
            cute.arch.setmaxregister_increase(base.score_registers)
            if work.count > 0:
                self.score(args, smem, bars, work, rows)
        else:
            cute.arch.setmaxregister_decrease(base.value_registers)
            if work.count > 0:
                if warp_idx < REFILL_WARP:
                    self.value(0, args, smem, bars, work, rows)
                else:
                    self.value(1, args, smem, bars, work, rows)

    # ------------------------------------------------------------------ role SCORE
    @cute.jit
    def score(self, args: Args, smem: Smem, bars: Barriers, work: Work, rows: RowTile):
        base, lanes = self.config.base, self.config.base.lane_arrivals
        rScale, rCap, rUnit = (cute.make_rmem_tensor(2, Float32) for _ in range(3))
        x, softmax = ScoreTiles.make(smem), OnlineSoftmax.make(rScale, base.lazy_rescale)
        tiles = Int32(0)
        for it in cutlass.range(work.count, unroll=1):
            for i in cutlass.range_constexpr(Q_SLOTS):
                cute.arch.mbarrier_wait(bars.q_full + i, it & 1)
            cute.arch.mbarrier_wait(bars.q_rope_full, it & 1)
            item, item_rows = read_item(base, args.result, record_of(smem.item, it), rows)
            self._load_q(x, rUnit, smem, bars, (tiles & 1, tiles & 1 ^ 1))
            self._set_scales(rScale, rCap, rUnit, args.softmax_scale)
            mask = Mask(item_rows, item.seqlen, base.causal, base.options.window)
            clear = mask.clear()
            softmax.reset()

            self._open_qk(x, bars, tiles)  # first tile: no S1, S3
            self._close_qk(x, bars, tiles)
            self._await_qk(bars, False)
            for tile in cutlass.range(item.first, item.end - 1, unroll=1):
                self._cap(x, rCap)
                mask.apply(x.rS, tile, clear)  # S1
                softmax.step(x.rS, x.rP)
                self._pin_softmax(softmax, smem)
                self._open_qk(x, bars, tiles + 1)  # S2
                self._store_p(x.rP, softmax.rescale, smem, bars, tiles)  # S3
                publish(bars.p_full, lanes)
                self._close_qk(x, bars, tiles + 1)  # S4
                self._await_qk(bars, True)  # S5
                tiles += 1
            self._cap(x, rCap)
            mask.apply(x.rS, item.end - 1, clear)  # last tile: no S2, S4, S5
            softmax.step(x.rS, x.rP)
            inv_sum = softmax.finalize()
            join_sink(base, inv_sum, softmax, args.sink, item, item_rows)
            self._store_p(x.rP, softmax.rescale, smem, bars, tiles)
            store_row_values(inv_sum, smem.inv_sum[None, it & 1])
            publish(bars.p_full, lanes)
            arrive(bars.pv_go, lanes)
            tiles += 1
            store_item_lse(base, softmax, args.result, item, item_rows)

    @cute.jit
    def _load_q(self, x: ScoreTiles, rUnit, smem: Smem, bars: Barriers, stages):
        """q's two slots and its rope -> f16 in registers, the last block and the rope in smem; hand the slots back"""
        dtype = TYPES[self.config.base.kv.dtype]
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), dtype)
        tid, _, _ = cute.arch.thread_idx()
        copy = cute.make_tiled_copy_A(atom, cute.make_tiled_mma(mma_qk(dtype, RMEM))).get_slice(tid)
        sQ, sRope = column_blocks(smem.q), smem.q_rope_raw[None, None, 0]
        r, most = cute.make_rmem_tensor(x.rQ[0].shape, dtype), cute.make_rmem_tensor(2, Int32)
        load = lambda source, to: cute.copy(atom, copy.partition_S(source), copy.retile(to))
        most.fill(0)
        for j in cutlass.range(BLOCKS // 2, unroll=1):  # (static, it would keep q in registers until it is converted: spills)
            for stage in stages:
                load(sQ[None, None, j, stage], r)
                self._most(most, r)
        load(sRope, r)
        self._most(most, r)
        scales = [self._row_scale(most[row], rUnit, row) for row in range(2)]
        bf16 = cute.make_rmem_tensor(x.rP.shape, BFloat16)
        for i in cutlass.range_constexpr(cute.size(r)):
            bf16[i] = (r[i].to(Float32) * scales[i // 2 % 2]).to(BFloat16)
        cute.arch.sync_warp()  # (a warp's rows are its own)
        store_fragment(bf16, smem.q_rope[None, None, 0], cute.make_tiled_mma(mma_qk(BFloat16, SMEM)))
        for j in cutlass.range_constexpr(BLOCKS):
            load(sQ[None, None, j % 4, stages[j // 4]], r)
            words, f16 = cute.recast_tensor(r, Int32), cute.recast_tensor(x.rP if j == BLOCKS - 1 else x.rQ[j], Int32)
            for i in cutlass.range_constexpr(cute.size(words)):
                scale = scales[i % 2]
                f16[i] = scaled_f16(words[i], scale) if dtype is Float16 else scaled_halves(words[i], scale, dtype)
        store_fragment(x.rP, smem.q_last[None, None, 0], cute.make_tiled_mma(mma_qk(Float16, SMEM)))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=NamedBarrier.QUERY, number_of_threads=32 * SCORE_WARPS)
        for stage in stages:
            arrive(bars.slot_empty + stage, self.config.base.lane_arrivals, VALUE_WARPS // SCORE_WARPS)

    def _most(self, most, block):
        words = cute.recast_tensor(block, Int32)
        for i in range(cute.size(words)):
            most[i % 2] = max_magnitude(most[i % 2], words[i])

    @cute.jit
    def _row_scale(self, most: Int32, rUnit, r: Constexpr[int]):
        """the power of two for row r of a quad; rUnit[r]: its inverse, NaN for a row that is not finite"""
        for offset in (1, 2):
            most = max_magnitude(most, cute.arch.shuffle_sync_bfly(most, offset=offset))
        dtype = TYPES[self.config.base.kv.dtype]
        scale, unit = power_of_two(most, dtype)
        if const_expr(dtype is Float16):  # (an f16 itself; rows below 2^-8 need no more)
            if scale > 2.0**15:
                scale, unit = Float32(2.0**15), unit * (scale * 2.0**-15)
        rUnit[r] = unit
        return scale

    @cute.jit
    def _set_scales(self, rScale, rCap, rUnit, softmax_scale: Float32):
        """rScale: of what the softmax gets; rCap: see soft_cap"""
        cap = self.config.base.options.softcap
        for r in cutlass.range_constexpr(2):
            to_score = rUnit[r] * softmax_scale
            rScale[r] = to_score * LOG2_E if const_expr(cap == 0.0) else Float32(cap * LOG2_E)
            if const_expr(cap > 0.0):
                rCap[r] = to_score * (2 * LOG2_E / cap)

    def _cap(self, x: ScoreTiles, rCap):
        if self.config.base.options.softcap:
            soft_cap(x.rS, rCap)

    @cute.jit
    def _pin_softmax(self, softmax: OnlineSoftmax, smem: Smem):
        """as in dense_decode.py: without it ptxas sinks half of the exp2 below the products of S2"""
        smem.anchor[thread_in_warpgroup() // 32] = softmax.row_sum[0] + softmax.row_sum[1]

    @cute.jit
    def _open_qk(self, x: ScoreTiles, bars: Barriers, tiles: Int32):
        """S2: the k-steps of q's column block 7, and the first of those in registers"""
        ss, pos = cute.make_mma_atom(mma_qk(Float16, SMEM)), position(tiles)
        ss.set(warpgroup.Field.ACCUMULATE, False)
        cute.arch.mbarrier_wait(bars.tile_full + pos.stage, pos.phase)
        warpgroup.fence()
        for k in cutlass.range_constexpr(STEPS):
            cute.gemm(ss, x.rS, x.tQ[None, None, k], x.tK[None, None, REGISTER_STEPS + k, pos.stage], x.rS)
            ss.set(warpgroup.Field.ACCUMULATE, True)
        self._register_steps(x, pos.stage, 0, OPEN_STEPS)

    @cute.jit
    def _close_qk(self, x: ScoreTiles, bars: Barriers, tiles: Int32):
        """S4, in two commit groups: the end of the first one is the cue for p k16"""
        ss, stage = cute.make_mma_atom(mma_qk(BFloat16, SMEM)), position(tiles).stage
        ss.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        self._register_steps(x, stage, OPEN_STEPS, REGISTER_STEPS - 1)
        warpgroup.commit_group()
        self._register_steps(x, stage, REGISTER_STEPS - 1, REGISTER_STEPS)
        cute.arch.mbarrier_wait(bars.rope_full, tiles & 1)
        warpgroup.fence()
        for k in cutlass.range_constexpr(STEPS):
            cute.gemm(ss, x.rS, x.tQRope[None, None, k], x.tRope[None, None, k], x.rS)
        warpgroup.commit_group()

    @cute.jit
    def _register_steps(self, x: ScoreTiles, stage: Int32, first: Constexpr[int], end: Constexpr[int]):
        rs = cute.make_mma_atom(mma_qk(Float16, RMEM))
        rs.set(warpgroup.Field.ACCUMULATE, True)
        for k in cutlass.range_constexpr(first, end):
            if const_expr(k % STEPS == 0 or k == first):
                stage = opaque(stage)  # else LLVM forms all descriptors up front: > 63 uniform registers, R2UR, spills
            cute.gemm(rs, x.rS, x.rQ[k // STEPS][None, None, k % STEPS], x.tK[None, None, k, stage], x.rS)

    @cute.jit
    def _await_qk(self, bars: Barriers, p_pending: Constexpr[bool]):
        if const_expr(p_pending):
            warpgroup.wait_group(1)
            arrive(bars.pv_go, self.config.base.lane_arrivals)
        warpgroup.wait_group(0)
        arrive(bars.rope_empty, self.config.base.lane_arrivals)

    @cute.jit
    def _store_p(self, rP, rRescale, smem: Smem, bars: Barriers, tiles: Int32):
        cute.arch.mbarrier_wait(bars.p_empty, tiles & 1 ^ 1)  # passes at once for the very first tile
        store_fragment(rP, smem.p, cute.make_tiled_mma(mma_qk(Float16, SMEM)))
        store_row_values(rRescale, smem.rescale)

    # ------------------------------------------------------------------ roles VALUE_LEFT (half 0) and VALUE_RIGHT (half 1)
    @cute.jit
    def value(self, half: Constexpr[int], args: Args, smem: Smem, bars: Barriers, work: Work, rows: RowTile):
        config, base, lanes = self.config, self.config.base, self.config.base.lane_arrivals
        w = cute.make_tiled_mma(mma_pv()).get_slice(0)
        # v = latent^T: the same memory read as (column, token)
        transposed = cute.make_ordered_layout((2 * PAIRS, TILE, TILES), order=(1, 0, 2))
        sV = cute.local_tile(cute.composition(smem.k, transposed), (256, TILE, TILES), (half, 0, 0))
        tV, tP = w.make_fragment_B(w.partition_B(sV)), w.make_fragment_A(w.partition_A(smem.p))
        rO = cute.make_rmem_tensor(w.partition_shape_C((TILE, 256)), Float32)
        warp_idx = uniform(cute.arch.warp_idx())
        ring, scales, k = smem.raw
        block = k.toint() + (warp_idx - SCORE_WARPS) * BLOCK_BYTES
        converter = Converter.make(warp_idx - SCORE_WARPS, ring, block, base.box_tokens, scales)
        loads = self._value_loads(half, args, smem, bars, work, rows)
        cursor = loads.start()
        if const_expr(half == 0):
            if warp_idx == FEED_WARP:
                cursor = loads.request(cursor)
        else:
            if warp_idx == REFILL_WARP:
                for stage in cutlass.range(config.stages, unroll=1):
                    cursor = loads.request(cursor, stage)
                for slot in cutlass.range(Q_SLOTS, unroll=1):
                    cursor = loads.wait_and_request(cursor, RingPos(slot, Int32(0)))
        uses, tiles = Int32(0), Int32(0)  # of raw slots; multiplied
        for it in cutlass.range(work.count, unroll=1):
            rO.fill(0.0)
            first = position(tiles)
            cute.arch.mbarrier_wait(bars.slot_full + first.stage, first.phase)  # the item's record has landed too
            item, item_rows = read_item(base, args.result, record_of(smem.item, it), rows)
            self._sync(half)  # no warp multiplies the item before any more
            ahead, uses = cutlass.min(item.first + TILES, item.end), uses + Q_SLOTS
            for tile in cutlass.range(item.first, ahead, unroll=1):
                pos = position(tiles + tile - item.first)
                cute.arch.mbarrier_wait(bars.slot_full + pos.stage, pos.phase)
                self._convert(converter, pos.stage, 0)
                self._convert(converter, pos.stage, 1)
                self._release(converter, bars, pos.stage, item.seqlen - tile * TILE)
                cursor = self._refill(half, loads, cursor, warp_idx, uses)
                uses += 1
            cursor = self._feed(half, loads, cursor, warp_idx, tiles)  # V2, of the item's second tile
            for tile in cutlass.range(ahead, item.end, unroll=1):
                pos = position(tiles + TILES)
                self._accumulate(rO, tP, tV[None, None, None, pos.stage], smem, bars, tiles)  # V1, of tile - 2
                cursor = self._feed(half, loads, cursor, warp_idx, tiles + 1)  # V2
                cute.arch.mbarrier_wait(bars.slot_full + pos.stage, pos.phase)  # V3
                warpgroup.wait_group(1)
                self._sync(half)
                self._convert(converter, pos.stage, 0)
                warpgroup.wait_group(0)
                arrive(bars.p_empty, lanes)  # V4
                self._sync(half)
                self._convert(converter, pos.stage, 1)
                self._release(converter, bars, pos.stage, item.seqlen - tile * TILE)
                cursor = self._refill(half, loads, cursor, warp_idx, uses)  # V5
                uses, tiles = uses + 1, tiles + 1
            for tile in cutlass.range(item.end - ahead + item.first, item.end, unroll=1):  # the last ones
                self._accumulate(rO, tP, tV[None, None, None, tiles & 1], smem, bars, tiles)
                if tile + 1 < item.end:
                    cursor = self._feed(half, loads, cursor, warp_idx, tiles + 1)
                warpgroup.wait_group(0)
                arrive(bars.p_empty, lanes)
                tiles += 1
            row = fragment_row(thread_in_warpgroup())
            inv_sum = (smem.inv_sum[row, it & 1], smem.inv_sum[row + 8, it & 1])
            store_item_o(base, half, rO, inv_sum, args.result, item, item_rows)
            for slot in cutlass.range(Q_SLOTS, unroll=1):  # the next item's q, which SCORE reads meanwhile
                if it + 1 < work.count:
                    cursor = self._refill(half, loads, cursor, warp_idx, uses + slot)

    def _value_loads(self, half, args, smem, bars, work, rows):
        """what the role's first warp requests: VALUE_LEFT's feeds rope and that of q, VALUE_RIGHT's refills the ring"""
        base, full = self.config.base, bars.slot_full
        if half == 0:
            rope = cache_load(base, args.rope, rows, smem.rope, bars.rope_full)
            q_rope = query_load(base, args.q_rope, rows, smem.q_rope_raw, bars.q_rope_full)
            return Feed(rope, q_rope, None, base.page, args.block_table, work, bars.rope_empty)
        scales = cache_load(base, args.scales, rows, smem.scales, full)
        tile = PairLoad(cache_load(base, args.latent, rows, smem.ring, full), scales)
        q = query_load(base, args.q, rows, smem.q, bars.q_full)
        return Refill(q, tile, base.page, args.block_table, work, smem.item, bars.slot_empty, Q_SLOTS)

    @cute.jit
    def _feed(self, half: Constexpr[int], loads, cursor, warp_idx: Int32, tiles: Int32):
        """warp 4: once q k^T has read the rope of tile number `tiles`, request the next"""
        if const_expr(half == 0):
            if warp_idx == FEED_WARP:
                cursor = loads.wait_and_request(cursor, tiles & 1)
        return cursor

    @cute.jit
    def _refill(self, half: Constexpr[int], loads, cursor, warp_idx: Int32, uses: Int32):
        """warp 8: once the slot is free, request its next content"""
        if const_expr(half == 1):
            if warp_idx == REFILL_WARP:
                cursor = loads.wait_and_request(cursor, position(uses))
        return cursor

    @cute.jit
    def _sync(self, half: Constexpr[int]):
        cute.arch.barrier(barrier_id=NamedBarrier.MULTIPLIED + half, number_of_threads=128)

    @cute.jit
    def _convert(self, converter: Converter, stage: Int32, part: Constexpr[int]):
        """32 tokens of the tile in raw slot `stage`, whose place among the converted tiles has the same number"""
        converter.run(stage, stage * TILE_BYTES + part * (UNIT_TOKENS * 128), part)

    @cute.jit
    def _release(self, converter: Converter, bars: Barriers, stage: Int32, valid: Int32):
        """the slot has been read, the tile is converted"""
        lanes = self.config.base.lane_arrivals
        cute.arch.sync_warp()
        arrive(bars.slot_empty + stage, lanes)
        if valid < TILE:
            converter.zero_rows((stage * TILE_BYTES, stage * TILE_BYTES + UNIT_TOKENS * 128), valid)
        publish(bars.tile_full + stage, lanes)

    @cute.jit
    def _accumulate(self, rO, tP, tV, smem: Smem, bars: Barriers, tiles: Int32):
        """V1"""
        row = fragment_row(thread_in_warpgroup())
        cute.arch.mbarrier_wait(bars.p_full, tiles & 1)
        rescale_rows(rO, smem.rescale[row], smem.rescale[row + 8])
        cute.arch.mbarrier_wait(bars.pv_go, tiles & 1)
        mma = cute.make_mma_atom(mma_pv())
        mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for k in cutlass.range_constexpr(TILE // 16):
            cute.gemm(mma, rO, tP[None, None, k], tV[None, None, k], rO)
            if const_expr(k % 2 == 1):
                warpgroup.commit_group()


# ---------------------------------------------------------------------- compile-time signature
@dataclass(frozen=True)
class FakeArgs:
    """symbolic tensors of ops.Fp8DecodeOp, as fp8_decode.py has them"""

    q: cute.Tensor
    q_rope: cute.Tensor | None
    cache: cute.Tensor

    @classmethod
    def of(cls, config: UpcastConfig, q, q_rope, cache):
        """q, q_rope, cache: of the base configuration"""
        from cutlass.cute.runtime import make_fake_tensor

        stride = (*(cute.sym_int64(divisibility=16) for _ in range(3)), 1)  # in bytes, what TMA needs
        shape = (*cache.shape[:3], config.kv.bytes_per_token)
        return cls(q, q_rope, make_fake_tensor(Uint8, shape, stride=stride, assumed_align=16))
