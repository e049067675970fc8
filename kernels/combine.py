"""Combine: merges the split pieces of a request, and writes out = 0, lse = -inf for requests without tokens.

  lse = log(sum_i exp(lse_i));   o = sum_i exp(lse_i - lse) * o_i            (o_i is normalised within its piece)

A unit of work is a warp's: some columns of one (request to merge, query token, head), a vector of at most 16 bytes a lane.
Its lanes form 1, 2, 4, 8 or 16 groups, as many as the grid has warps to spare: group g takes every groups'th piece from its
g-th on, with a running maximum as in the decode kernel's softmax, and shuffles add the groups up.  So a few long rows cut into
many pieces (batch 1) and thousands of rows of two pieces (a large batch) both fill the card.  A batch-invariant schedule allows
one group, which joins the pieces one by one as the decode kernel does where it has them all (parts/pieces.py).
A fixed grid walks the list that kernels/schedule.py wrote; a step without splits costs an empty launch.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float16, Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from .config import MLAConfig
from .parts.ptx import opaque, pack_half, uniform
from .parts.softmax import LOG2_E, M_INIT, join_pieces, piece_weight, sink_share
from .parts.store import store_lse
from .parts.tiles import out_type, split_type
from .parts.work import MERGE, MERGE_GROUPS

WARPS = 8  # of a CTA
VECTOR_BYTES = 16  # of a lane, at most
IN_FLIGHT = 4  # pieces a lane loads before it uses the first; 8: -0.1..+1.3 us at batch 1, +4 at b32 h128 s8192
SPREAD = 16  # warps for each SM up to which rows are spread over groups of lanes; 8: +1.4 us at b4 h128 s8192
CTAS_PER_SM = 4  # all resident at once: the grid is at most this many for each SM


@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    o_split: cute.Tensor  # (slot, query token, head, latent) config.split
    lse_split: cute.Tensor  # (slot, query token, head) f32
    merges: cute.Tensor  # (1 + request, MERGE): number, most groups of a warp; then as parts/work.py has it
    o: cute.Tensor  # (request, query token, head, latent); ragged: (token, head, latent)
    lse: cute.Tensor  # (request, head, query token), or (token, head), always if ragged
    sink: cute.Tensor | None  # (head,) f32


@dataclass(frozen=True)
class Groups:
    """how the lanes of every warp share its pieces"""

    log_number: Int32
    number: Int32
    mine: Int32
    log_lanes: Int32  # of a group
    lane: Int32  # in it
    o_step: Int64  # bytes from one of a lane's pieces to the next
    lse_step: Int64

    @classmethod
    def of(cls, args: Args, log_number: Int32):
        lane, log_lanes, width = cute.arch.lane_idx(), 5 - log_number, args.o_split.element_type.width // 8
        strides = Int64(args.o_split.stride[0]) * width << log_number, Int64(args.lse_split.stride[0]) * 4 << log_number
        return cls(log_number, 1 << log_number, lane >> log_lanes, log_lanes, lane & (1 << log_lanes) - 1, *strides)


@dataclass(frozen=True)
class Unit:
    exists: cutlass.Boolean
    request: Int32  # ragged: its first query token
    token: Int32
    head: Int32
    vector: Int32  # of the row
    pieces: Int32
    o: Int64  # address of this lane's vector in the group's first piece,
    lse: Int64  # and of its lse


class Combine:
    def __init__(self, config: MLAConfig):
        self.config = config

    @property
    def vector(self) -> int:
        """columns of a lane"""
        return min(VECTOR_BYTES * 8 // split_type(self.config).width, self.config.kv.latent // 64)

    @property
    def chunks(self) -> int:
        """units of a row with one group"""
        return self.config.kv.latent // (32 * self.vector)

    @cute.jit
    def __call__(self, o_split, lse_split, merges, o, lse, sink, num_sms: Int32, stream):
        _, s_q, h_q, _ = o_split.shape
        units = (merges.shape[0] - 1) * s_q * h_q * self.chunks
        warps = cutlass.max(units, cutlass.min(units * MERGE_GROUPS, SPREAD * num_sms))
        warps = cutlass.min(warps, CTAS_PER_SM * WARPS * num_sms)
        self.kernel(Args(o_split, lse_split, merges, o, lse, sink)).launch(
            grid=[cutlass.max((warps + WARPS - 1) // WARPS, 1), 1, 1],
            block=[32 * WARPS, 1, 1],
            min_blocks_per_mp=CTAS_PER_SM,
            preferred_smem_carveout=100,  # as the decode kernel has it; without it, the DSL asks a driver at compile time
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, args: Args):
        anchor = self._allocate()
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        _, s_q, h_q, _ = args.o_split.shape
        # The list was complete before the decode kernel let this one start: all that does not need its results goes first.
        units, most, log_groups = args.merges[0, 0] * s_q * h_q * self.chunks, args.merges[0, 1], Int32(0)
        while ((2 << log_groups) <= most) & (units * 2 <= num_ctas * WARPS):
            log_groups += 1
            units *= 2
        groups, index = Groups.of(args, log_groups), cta * WARPS + uniform(cute.arch.warp_idx())
        unit = self._locate(args, groups, index, units)
        # (a store that needs them, else ptxas sinks 150 instructions of addresses below the wait)
        anchor[tid] = unit.o ^ unit.lse ^ groups.o_step ^ groups.lse_step
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        while index < units:
            self._merge(args, groups, unit, self._fixed(most))
            index += num_ctas * WARPS
            if index < units:
                unit = self._locate(args, groups, index, units)

    def _fixed(self, most: Int32) -> Boolean:
        """whether pieces are joined one by one; those that GPUs exchange in bfloat16 are not"""
        return Boolean(False) if self.config.split == "bfloat16" else most == 1

    def _allocate(self):
        """(thread,), never read"""

        @cute.struct
        class Storage:
            anchor: cute.struct.MemRange[Int64, 32 * WARPS]

        return SmemAllocator().allocate(Storage).anchor.get_tensor(cute.make_layout(32 * WARPS))

    @cute.jit
    def _locate(self, args: Args, groups: Groups, index: Int32, units: Int32) -> Unit:
        _, s_q, h_q, _ = args.o_split.shape
        log_chunks, exists = groups.log_number + self.chunks.bit_length() - 1, index < units
        row, chunk = index >> log_chunks, index & (1 << log_chunks) - 1
        merge = row // (s_q * h_q)
        row -= merge * (s_q * h_q)
        token = row // h_q
        head = row - token * h_q
        merge = 1 + merge if exists else 1
        if const_expr(self.config.ragged):
            num_queries = cutlass.min(args.merges[merge, 3], args.o.shape[0] - args.merges[merge, 0])
            exists = exists & (token < num_queries)
        pieces = args.merges[merge, 2] if exists else 0
        slot = args.merges[merge, 1] + cutlass.max(cutlass.min(groups.mine, pieces - 1), 0)
        vector = (chunk << groups.log_lanes) + groups.lane
        o = args.o_split.iterator + cute.crd2idx((slot, token, head, vector * self.vector), args.o_split.layout)
        lse = args.lse_split.iterator + cute.crd2idx((slot, token, head), args.lse_split.layout)
        return Unit(exists, args.merges[merge, 0], token, head, vector, pieces, o.toint(), lse.toint())

    @cute.jit
    def _merge(self, args: Args, groups: Groups, unit: Unit, fixed: Boolean):
        """fixed: one by one"""
        rO = cute.make_rmem_tensor(self.vector, Float32)
        zero = Float32(opaque(Int32(0)))  # else LLVM peels the first round, for twice the code and 5 registers
        rO.fill(zero)
        most, total = M_INIT + zero, zero
        piece, o, lse, end = groups.mine, unit.o, unit.lse, unit.pieces + groups.mine
        if fixed:
            most = -Float32.inf
        while piece < end:  # (the same in all lanes)
            first = piece
            rPiece, rWeight, piece, o, lse = self._load(groups, piece, unit.pieces, o, lse)
            if fixed:
                most = self._join(rO, rPiece, rWeight, most, unit.pieces - first)
            else:
                most, total = self._add(rO, rPiece, rWeight, most, total)
        if fixed:
            total = Float32(1.0) if most > -Float32.inf else zero
        else:
            most, total = self._add_groups(groups, rO, most, total)
        if unit.exists & (groups.mine == 0):
            self._store(args, unit, rO, most, total)

    @cute.jit
    def _add_groups(self, groups: Groups, rO, most: Float32, total: Float32):
        above = most
        for i in cutlass.range(groups.log_number, unroll=1):
            above = cute.arch.fmax(above, cute.arch.shuffle_sync_bfly(above, offset=16 >> i))
        scale = cute.math.exp2(most - above, fastmath=True)
        total *= scale
        for j in cutlass.range_constexpr(self.vector):
            rO[j] = rO[j] * scale
        for i in cutlass.range(groups.log_number, unroll=1):
            total += cute.arch.shuffle_sync_bfly(total, offset=16 >> i)
            for j in cutlass.range_constexpr(self.vector):
                rO[j] = rO[j] + cute.arch.shuffle_sync_bfly(rO[j], offset=16 >> i)
        return above, total

    @cute.jit
    def _store(self, args: Args, unit: Unit, rO, most: Float32, total: Float32):
        lse, share = -Float32.inf, Float32(0.0)  # no key at all
        if total > 0.0:
            lse, share = most + cute.math.log2(total, fastmath=True), cute.arch.rcp_approx(total)
        if const_expr(self.config.sink):
            share = share * sink_share(lse, args.sink[unit.head])
        rOut = cute.make_rmem_tensor(self.vector, out_type(self.config))
        for j in cutlass.range_constexpr(self.vector):
            rOut[j] = (rO[j] * share).to(out_type(self.config))
        if const_expr(self.config.ragged):
            gOut = args.o[unit.request + unit.token, unit.head, None]
        else:
            gOut = args.o[unit.request, unit.token, unit.head, None]
        cute.autovec_copy(rOut, cute.local_tile(gOut, (self.vector,), (unit.vector,)))
        if unit.vector == 0:
            store_lse(self.config, args.lse, unit.request, args.o_split.shape[1], unit.token, unit.head, lse)

    @cute.jit
    def _load(self, groups: Groups, piece: Int32, pieces: Int32, o: Int64, lse: Int64):
        """IN_FLIGHT pieces of the group from `piece` on, with their lse; weight 0 past the last.  Then the next ones' place."""
        kind, width = split_type(self.config), self.vector * split_type(self.config).width // 8
        rPiece, rWeight = cute.make_rmem_tensor((self.vector, IN_FLIGHT), kind), cute.make_rmem_tensor(IN_FLIGHT, Float32)
        rPiece.fill(0.0)
        rWeight.fill(-Float32.inf)
        for i in cutlass.range_constexpr(IN_FLIGHT):
            if piece < pieces:
                rWeight[i] = _at(Float32, lse, 4, 1)[0]
                cute.autovec_copy(_at(kind, o, width, self.vector), rPiece[None, i])
            piece, o, lse = piece + groups.number, o + groups.o_step, lse + groups.lse_step
        return rPiece, rWeight, piece, o, lse

    @cute.jit
    def _add(self, rO, rPiece, rWeight, most: Float32, total: Float32):
        """pieces, with the natural log of their weights, to a sum relative to 2^most"""
        above = most
        for i in cutlass.range_constexpr(IN_FLIGHT):
            above = cute.arch.fmax(above, rWeight[i] * LOG2_E)
        rescale = cute.math.exp2(most - above, fastmath=True)
        total = total * rescale
        for j in cutlass.range_constexpr(self.vector):
            rO[j] = rO[j] * rescale
        for i in cutlass.range_constexpr(IN_FLIGHT):
            weight = piece_weight(rWeight[i], above)
            total = total + weight
            for j in cutlass.range_constexpr(self.vector):
                rO[j] = cute.math.fma(weight, rPiece[j, i].to(Float32), rO[j])
        return above, total

    @cute.jit
    def _join(self, rO, rPiece, rWeight, log_sum: Float32, pieces: Int32):
        """`pieces` and those to come, with the natural log of their weights, to a sum whose weight has the log2 `log_sum`"""
        for i in cutlass.range_constexpr(IN_FLIGHT):
            if i < pieces:
                log_sum, sum_share, piece_share = join_pieces(log_sum, rWeight[i])
                for j in cutlass.range_constexpr(self.vector):
                    rO[j] = cute.math.fma(piece_share, rPiece[j, i].to(Float32), sum_share * rO[j])
                if const_expr(self.config.split == "float16"):
                    if i + 1 < pieces:
                        _round_to_half(rO)
        return log_sum


@cute.jit
def _round_to_half(rO):
    rPair = cute.make_rmem_tensor(2, Float16)
    word = cute.recast_tensor(rPair, Int32)
    for j in cutlass.range_constexpr(0, cute.size(rO), 2):
        word[0] = pack_half(rO[j], rO[j + 1])
        rO[j], rO[j + 1] = rPair[0].to(Float32), rPair[1].to(Float32)


def _at(dtype, address: Int64, align, n):
    """n elements of gmem"""
    return cute.make_tensor(cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align), cute.make_layout(n))


def fake_merges():
    """the list of requests to merge, as kernels/schedule.py writes it"""
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(Int32, (cute.sym_int(), MERGE), stride=(MERGE, 1), assumed_align=16)
