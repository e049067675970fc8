"""Combine: merges the split pieces of a request, and writes out = 0, lse = -inf for requests without tokens.

  lse = log(sum_i exp(lse_i));   o = sum_i exp(lse_i - lse) * o_i            (o_i is normalised within its piece)

One CTA of 256 threads per (request to merge, query token, head): thread = 4 columns, the two halves of the CTA take every other
piece, 8 pieces of 16-byte loads in flight each.  A fixed grid walks the list that kernels/schedule.py wrote; a step without
splits costs an empty launch, overlapped with the decode kernel's tail.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.memory import SmemAllocator

from .config import MLAConfig
from .parts.tiles import element_type
from .parts.work import MERGE

GROUPS = 2  # of threads, each with every GROUPS-th piece
VECTOR = 4  # columns of a thread
IN_FLIGHT = 8  # pieces a thread loads before it uses the first
LOG2_E, LN2 = 1.4426950408889634, 0.6931471805599453


@dataclass(frozen=True)
class Args:
    """all that crosses to the device"""

    o_split: cute.Tensor  # (slot, query token, head, latent) f32
    lse_split: cute.Tensor  # (slot, query token, head) f32
    merges: cute.Tensor  # (1 + request, MERGE): number; then request, first slot, pieces
    o: cute.Tensor  # (request, query token, head, latent)
    lse: cute.Tensor  # (request, head, query token)


class Combine:
    def __init__(self, config: MLAConfig):
        self.config = config

    @cute.jit
    def __call__(self, o_split, lse_split, merges, o, lse, max_ctas: Int32, stream):
        b, s_q, h_q, latent = o.shape
        args = Args(o_split, lse_split, merges, o, lse)
        self.kernel(args).launch(
            grid=[cutlass.min(b * s_q * h_q, max_ctas), 1, 1],
            block=[GROUPS * self.config.kv.latent // VECTOR, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, args: Args):
        sOther = self._allocate()
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        _, s_q, h_q, _ = args.o.shape
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        rows = s_q * h_q
        for unit in cutlass.range(cta, args.merges[0, 0] * rows, num_ctas, unroll=1):
            merge, row = 1 + unit // rows, unit % rows
            self._merge_row(args, sOther, merge, row // h_q, row % h_q)

    def _allocate(self):
        threads = self.config.kv.latent // VECTOR

        @cute.struct
        class Storage:
            other: cute.struct.Align[cute.struct.MemRange[Float32, threads * VECTOR], 16]

        return SmemAllocator().allocate(Storage).other.get_tensor(cute.make_layout((VECTOR, threads)))

    @cute.jit
    def _merge_row(self, args: Args, sOther, merge: Int32, token: Int32, head: Int32):
        tid, _, _ = cute.arch.thread_idx()
        threads = self.config.kv.latent // VECTOR
        group, column = tid // threads, tid % threads
        request, first_slot, pieces = args.merges[merge, 0], args.merges[merge, 1], args.merges[merge, 2]
        scale, lse = self._row_lse(args, first_slot, pieces, token, head)
        rO = cute.make_rmem_tensor(VECTOR, Float32)
        rO.fill(0.0)
        for base in cutlass.range(group, pieces, GROUPS * IN_FLIGHT, unroll=1):
            rPiece = cute.make_rmem_tensor((VECTOR, IN_FLIGHT), Float32)
            rWeight = cute.make_rmem_tensor(IN_FLIGHT, Float32)
            rPiece.fill(0.0)
            rWeight.fill(-Float32.inf)
            for i in cutlass.range_constexpr(IN_FLIGHT):
                piece = base + GROUPS * i
                if piece < pieces:
                    slot = piece_slot(first_slot, piece)
                    rWeight[i] = args.lse_split[slot, token, head]
                    cute.autovec_copy(
                        cute.local_tile(args.o_split[slot, token, head, None], (VECTOR,), (column,)), rPiece[None, i]
                    )
            for i in cutlass.range_constexpr(IN_FLIGHT):
                weight = cute.math.exp2(rWeight[i] * LOG2_E - scale, fastmath=True)
                for j in cutlass.range_constexpr(VECTOR):
                    rO[j] = rO[j] + weight * rPiece[j, i]
        if group == 1:
            cute.autovec_copy(rO, sOther[None, column])
        cute.arch.sync_threads()
        if group == 0:
            rOther = cute.make_rmem_tensor(VECTOR, Float32)
            cute.autovec_copy(sOther[None, column], rOther)
            rOut = cute.make_rmem_tensor(VECTOR, element_type(self.config))
            rOut.store((rO.load() + rOther.load()).to(element_type(self.config)))
            cute.autovec_copy(rOut, cute.local_tile(args.o[request, token, head, None], (VECTOR,), (column,)))
            if column == 0:
                args.lse[request, head, token] = lse
        cute.arch.sync_threads()  # sOther has been read

    @cute.jit
    def _row_lse(self, args: Args, first_slot: Int32, pieces: Int32, token: Int32, head: Int32):
        """log2 of the row's whole weight, by which a piece's exp2 is scaled, and its natural log; every warp for itself"""
        lane = cute.arch.lane_idx()
        most = -Float32.inf
        for piece in cutlass.range(lane, pieces, 32, unroll=1):
            most = cute.arch.fmax(most, args.lse_split[piece_slot(first_slot, piece), token, head])
        most = cute.arch.warp_reduction_max(most)
        total = Float32(0.0)
        for piece in cutlass.range(lane, pieces, 32, unroll=1):
            weight = args.lse_split[piece_slot(first_slot, piece), token, head]
            if weight > -Float32.inf:
                total += cute.math.exp2((weight - most) * LOG2_E, fastmath=True)
        total = cute.arch.warp_reduction_sum(total)
        scale, lse = Float32(0.0), -Float32.inf  # no key at all: weights exp2(-inf) = 0
        if total > 0.0:
            scale = most * LOG2_E + cute.math.log2(total, fastmath=True)
            lse = scale * LN2
        return scale, lse


def piece_slot(first_slot, piece):
    """see kernels/schedule.py"""
    return first_slot + cutlass.max(2 * piece - 1, 0)


def fake_merges():
    """the list of requests to merge, as kernels/schedule.py writes it"""
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(Int32, (cute.sym_int(), MERGE), stride=(MERGE, 1), assumed_align=16)
