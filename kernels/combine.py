"""Combine: merges the split pieces of a request, and writes out = 0, lse = -inf for requests without tokens.

  lse = log(sum_i exp(lse_i));   o = sum_i exp(lse_i - lse) * o_i            (o_i is normalised within its piece)
The last piece comes first: its CTA may have all of them and add them up itself, to the same bits (parts/gather.py).

A unit of work is 32 vectors of at most 16 bytes of one (request to merge, query token, head): one vector a lane, 4 pieces in
flight.  A unit gets 1, 2, 4 or 8 warps of a CTA, as many as the grid has to spare: a few long rows cut into many pieces
(batch 1) and thousands of rows of two pieces (a large batch) both fill the card; a batch-invariant schedule allows but one.
A fixed grid walks the list that kernels/schedule.py wrote; a step without splits costs an empty launch, overlapped with the
decode kernel's tail.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.memory import SmemAllocator

from .config import MLAConfig
from .parts.softmax import LOG2_E, M_INIT, piece_weight, sink_share
from .parts.store import store_lse
from .parts.tiles import out_type, split_type
from .parts.work import MERGE, MERGE_WARPS

WARPS = MERGE_WARPS  # of a CTA
VECTOR_BYTES = 16  # of a lane, at most
IN_FLIGHT = 4  # pieces a lane loads before it uses the first
CTAS_PER_SM = 4  # all resident at once: the grid is at most this many for each SM


@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    o_split: cute.Tensor  # (slot, query token, head, latent) config.split
    lse_split: cute.Tensor  # (slot, query token, head) f32
    merges: cute.Tensor  # (1 + request, MERGE): number, most warps of a unit; then as parts/work.py has it
    o: cute.Tensor  # (request, query token, head, latent); ragged: (token, head, latent)
    lse: cute.Tensor  # (request, head, query token), or (token, head), always if ragged
    sink: cute.Tensor | None  # (head,) f32


@dataclass(frozen=True)
class Unit:
    exists: cutlass.Boolean
    request: Int32  # ragged: its first query token
    first_slot: Int32
    pieces: Int32
    token: Int32
    head: Int32
    chunk: Int32  # of 32 vectors of columns


class Combine:
    def __init__(self, config: MLAConfig):
        self.config = config

    @property
    def vector(self) -> int:
        """columns of a lane"""
        return min(VECTOR_BYTES * 8 // split_type(self.config).width, self.config.kv.latent // 64)

    @property
    def chunks(self) -> int:
        """units of a row"""
        return self.config.kv.latent // (32 * self.vector)

    @cute.jit
    def __call__(self, o_split, lse_split, merges, o, lse, sink, num_sms: Int32, stream):
        _, s_q, h_q, _ = o_split.shape
        units = (merges.shape[0] - 1) * s_q * h_q * self.chunks
        self.kernel(Args(o_split, lse_split, merges, o, lse, sink)).launch(
            grid=[cutlass.max(cutlass.min(units, CTAS_PER_SM * num_sms), 1), 1, 1],
            block=[32 * WARPS, 1, 1],
            min_blocks_per_mp=CTAS_PER_SM,
            preferred_smem_carveout=100,  # as the decode kernel has it; without it, the DSL asks a driver at compile time
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, args: Args):
        sPart = self._allocate()
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        _, s_q, h_q, _ = args.o_split.shape
        # The list was complete before the decode kernel let this one start: all that does not need its results goes first.
        units = args.merges[0, 0] * s_q * h_q * self.chunks
        share, most = Int32(1), args.merges[0, 1]  # warps of a unit
        while (share < most) & (units * share * 2 <= num_ctas * WARPS):
            share *= 2
        warp = cute.arch.warp_idx()
        per_cta = WARPS // share
        unit = self._locate(args, cta * per_cta + warp // share, units)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        for base in cutlass.range(cta * per_cta, units, num_ctas * per_cta, unroll=1):
            self._merge(args, sPart, unit, warp % share, share, most == 1)
            unit = self._locate(args, base + num_ctas * per_cta + warp // share, units)

    def _allocate(self):
        @cute.struct
        class Storage:
            part: cute.struct.Align[cute.struct.MemRange[Float32, WARPS * 32 * self.vector], 16]

        return SmemAllocator().allocate(Storage).part.get_tensor(cute.make_layout((self.vector, 32, WARPS)))

    @cute.jit
    def _locate(self, args: Args, index: Int32, units: Int32) -> Unit:
        _, s_q, h_q, _ = args.o_split.shape
        chunks = self.chunks
        row, exists = index // chunks, index < units
        merge = 1 + row // (s_q * h_q) if exists else 1
        token, head = row // h_q % s_q, row % h_q
        if const_expr(self.config.ragged):
            num_queries = cutlass.min(args.merges[merge, 3], args.o.shape[0] - args.merges[merge, 0])
            exists = exists & (token < num_queries)
        pieces = args.merges[merge, 2] if exists else 0
        return Unit(exists, args.merges[merge, 0], args.merges[merge, 1], pieces, token, head, index % chunks)

    @cute.jit
    def _merge(self, args: Args, sPart, unit: Unit, rank: Int32, share: Int32, fixed: Boolean):
        """My pieces are rank, rank + share, ..; the warp of rank 0 adds up its neighbours and stores.  fixed: the pieces are,
        and with them the order of every sum."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        column = unit.chunk * 32 + lane  # in vectors
        rO = cute.make_rmem_tensor(self.vector, Float32)
        rO.fill(0.0)
        rPiece, rWeight = self._load(args, unit, column, rank, share)  # in flight while the weights are summed
        scale, lse = self._row_lse(args, unit, fixed)
        self._add(rO, rPiece, rWeight, scale)
        for base in cutlass.range(rank + share * IN_FLIGHT, unit.pieces, share * IN_FLIGHT, unroll=1):
            rPiece, rWeight = self._load(args, unit, column, base, share)
            self._add(rO, rPiece, rWeight, scale)
        if share > 1:  # the same in all threads of the grid
            cute.autovec_copy(rO, sPart[None, lane, warp])
            cute.arch.sync_threads()
            if rank == 0:
                for other in cutlass.range(1, share, unroll=1):
                    rOther = cute.make_rmem_tensor(self.vector, Float32)
                    cute.autovec_copy(sPart[None, lane, warp + other], rOther)
                    for j in cutlass.range_constexpr(self.vector):
                        rO[j] = rO[j] + rOther[j]
            cute.arch.sync_threads()  # sPart has been read
        if unit.exists & (rank == 0):
            if const_expr(self.config.sink):
                left = sink_share(lse, args.sink[unit.head])
                for j in cutlass.range_constexpr(self.vector):
                    rO[j] = rO[j] * left
            rOut = cute.make_rmem_tensor(self.vector, out_type(self.config))
            rOut.store(rO.load().to(out_type(self.config)))
            if const_expr(self.config.ragged):
                gOut = args.o[unit.request + unit.token, unit.head, None]
            else:
                gOut = args.o[unit.request, unit.token, unit.head, None]
            cute.autovec_copy(rOut, cute.local_tile(gOut, (self.vector,), (column,)))
            if (lane == 0) & (unit.chunk == 0):
                store_lse(self.config, args.lse, unit.request, args.o_split.shape[1], unit.token, unit.head, lse)

    @cute.jit
    def _load(self, args: Args, unit: Unit, column: Int32, base: Int32, share: Int32):
        """IN_FLIGHT pieces from `base` on, with their lse; weight 0 past the last"""
        rPiece = cute.make_rmem_tensor((self.vector, IN_FLIGHT), split_type(self.config))
        rWeight = cute.make_rmem_tensor(IN_FLIGHT, Float32)
        rPiece.fill(0.0)
        rWeight.fill(-Float32.inf)
        for i in cutlass.range_constexpr(IN_FLIGHT):
            piece = base + share * i
            if piece < unit.pieces:
                slot = unit.first_slot + (piece if piece > 0 else unit.pieces) - 1  # the last one first
                gPiece = args.o_split[slot, unit.token, unit.head, None]
                cute.autovec_copy(cute.local_tile(gPiece, (self.vector,), (column,)), rPiece[None, i])
                rWeight[i] = args.lse_split[slot, unit.token, unit.head]
        return rPiece, rWeight

    @cute.jit
    def _add(self, rO, rPiece, rWeight, scale: Float32):
        for i in cutlass.range_constexpr(IN_FLIGHT):
            weight = piece_weight(rWeight[i], scale)
            for j in cutlass.range_constexpr(self.vector):
                rO[j] = cute.math.fma(weight, rPiece[j, i].to(Float32), rO[j])

    @cute.jit
    def _row_lse(self, args: Args, unit: Unit, fixed: Boolean):
        """log2 of the row's whole weight: what a piece's exp2 is scaled by (0 without keys) and lse; every warp for itself"""
        most, total = Float32(0.0), Float32(0.0)
        if fixed:
            most, total = self._sum_in_order(args, unit)
        else:
            most, total = self._sum(args, unit)
        scale, lse = Float32(0.0), -Float32.inf  # no key at all: weights exp2(-inf) = 0
        if total > 0.0:
            scale = most + cute.math.log2(total, fastmath=True)
            lse = scale
        return scale, lse

    @cute.jit
    def _sum(self, args: Args, unit: Unit):
        """log2 of the largest weight of a piece, and all in terms of it"""
        most, total = Float32(M_INIT), Float32(0.0)
        for piece in cutlass.range(cute.arch.lane_idx(), unit.pieces, 32, unroll=1):
            weight = args.lse_split[unit.first_slot + piece, unit.token, unit.head] * LOG2_E
            above = cute.arch.fmax(most, weight)
            total = total * cute.math.exp2(most - above, fastmath=True) + cute.math.exp2(weight - above, fastmath=True)
            most = above
        above = cute.arch.warp_reduction_max(most)
        return above, cute.arch.warp_reduction_sum(total * cute.math.exp2(most - above, fastmath=True))

    @cute.jit
    def _sum_in_order(self, args: Args, unit: Unit):
        """the same as gathered_lse in parts/gather.py adds up; a piece a lane"""
        lane, lse, total = cute.arch.lane_idx(), -Float32.inf, Float32(0.0)
        if lane < unit.pieces:
            lse = args.lse_split[unit.first_slot + lane, unit.token, unit.head]
        most = cute.arch.fmax(cute.arch.warp_reduction_max(lse), M_INIT) * LOG2_E
        share = piece_weight(lse, most)
        for piece in cutlass.range(unit.pieces, unroll=1):
            total = total + cute.arch.shuffle_sync(share, piece)
        return most, total


def fake_merges():
    """the list of requests to merge, as kernels/schedule.py writes it"""
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(Int32, (cute.sym_int(), MERGE), stride=(MERGE, 1), assumed_align=16)
