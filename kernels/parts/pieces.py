"""Fixed pieces: requests that are cut by their own length alone (batch invariance), whatever CTAs their pieces go to.

An item is then a run of pieces.  The softmax starts anew with each, and o of each is a result of its own, but nothing else
stops where two meet: the scores of the next tile are under way.  An item that is a whole request leaves no work to
kernels/combine.py: where its last piece ends, the others' o come back through the KV ring, as tiles of 64 rows x latent:
  w_i = exp(lse_i - max lse);   o = (sum_i w_i * o_i) / sum_i w_i, from the last piece back
Those are the sums of the combine, in its order and bit by bit, for it depends on the batch which of the two makes them.  So
a product that a sum follows is fused in both, and the last piece's own o is rounded to what a partial result holds.
"""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float16, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp

from .handover import store_row_values
from .ptx import pack_half
from .results import Outputs, store_item_lse, store_item_o
from .softmax import LN2, LOG2_E, M_INIT, piece_weight, sink_share
from .sync import RingPos, arrive
from .tiles import element, fragment_row, thread_in_warpgroup
from .work import num_gathered, unpack_pieces

GATHERED = 3  # named barrier of both VALUE warpgroups


@dataclass(frozen=True)
class Piece:
    """a piece of an item, and the lengths of those behind it: `long` of length + 1 tiles, then of length"""

    edge: Int32  # tile behind it; before all of the item's if it is the only one
    slot: Int32
    length: Int32
    long: Int32

    @classmethod
    def first_of(cls, item):
        length, long = unpack_pieces(cutlass.max(item.pieces, -item.pieces))
        return cls(item.first, item.slot - 1, length, long).next()

    def next(self):
        more = cutlass.min(self.long, 1)
        return Piece(self.edge + self.length + more, self.slot + 1, self.length, self.long - more)


@dataclass(frozen=True)
class FixedPieces:
    """what both roles do where pieces end; nothing, in a configuration that has none"""

    config: Constexpr
    result: Outputs
    sink: cute.Tensor | None
    inv_sum: cute.Tensor  # smem (row, item parity); the pieces of an item share one, they have two tiles or more
    gathered: cute.Tensor | None  # smem (row, 3): the fields of Sums
    ring: cute.Tensor  # smem (row, latent, slot), f16
    slot_full: cute.Pointer  # mbarrier [slot]
    slot_empty: cute.Pointer

    # ------------------------------------------------------------------ SCORE
    @cute.jit
    def end(self, softmax, it: Int32, item, rows, piece: Piece, tile: Int32) -> Piece:
        """VALUE gets a piece's normalisation with p of its last tile"""
        if const_expr(self.config.fixed_pieces):
            if tile + 1 == piece.edge:
                store_row_values(softmax.finalize(), self.inv_sum[None, it & 1])
                store_item_lse(self.config, softmax, self.result, replace(item, slot=piece.slot), rows)
                softmax.reset()
                piece = piece.next()
        return piece

    @cute.jit
    def gather_lse(self, softmax, item, rows, piece: Piece):
        """with p of the last tile of all"""
        if const_expr(self.config.fixed_pieces):
            if item.pieces < 0:
                sums = Sums.of(softmax, self.result.lse_split, self.sink, item, piece, rows)
                for i, rValues in enumerate((sums.most, sums.own, sums.factor)):
                    store_row_values(rValues, self.gathered[None, i])
                store_item_lse(self.config, sums, self.result, replace(item, slot=Int32(-1)), rows)

    @cute.jit
    def skip(self, item, pos: RingPos) -> RingPos:
        """the slots that only VALUE reads: unless SCORE sees each filled before it is left, two phases look like none"""
        if const_expr(self.config.fixed_pieces):
            for _ in cutlass.range(num_gathered(item.pieces, item.end - item.first), unroll=1):
                cute.arch.mbarrier_wait(self.slot_full + pos.stage, pos.phase)
                arrive(self.slot_empty + pos.stage, self.config.lane_arrivals)
                pos = pos.next(self.config.ring_slots)
        return pos

    # ------------------------------------------------------------------ VALUE
    @cute.jit
    def store(self, half: Constexpr[int], rO, it: Int32, item, rows, piece: Piece, tile: Int32) -> Piece:
        if const_expr(self.config.fixed_pieces):
            if (tile + 1 == piece.edge) & (tile + 1 < item.end):
                inv_sum = self._of_my_rows(self.inv_sum[None, it & 1])
                store_item_o(self.config, half, rO, inv_sum, self.result, replace(item, slot=piece.slot), rows)
                cute.arch.fence_proxy("async.global")  # TMA will read it
                rO.fill(0.0)
                piece = piece.next()
        return piece

    @cute.jit
    def gather(self, half: Constexpr[int], rO, mma, it: Int32, item, rows, piece: Piece, *, loads, cursor, pos, refills):
        """refills: this warp requests the ring's slots; returns its cursor, and where in the ring it is"""
        if const_expr(self.config.fixed_pieces):
            if item.pieces < 0:
                start_sum(rO, self._of_my_rows(self.inv_sum[None, it & 1]), self._of_my_rows(self.gathered[None, 1]))
                for back in cutlass.range(num_gathered(item.pieces, item.end - item.first), unroll=1):
                    cute.arch.mbarrier_wait(self.slot_full + pos.stage, pos.phase)
                    most = self._of_my_rows(self.gathered[None, 0])
                    weight = piece_weights(self.result.lse_split, most, piece.slot - 1 - back, rows)
                    columns = self.config.kv.latent // 2
                    sHalf = cute.local_tile(self.ring, (64, columns, self.config.ring_slots), (0, half, 0))
                    add_piece(rO, sHalf[None, None, pos.stage], weight, mma)
                    cute.arch.barrier(barrier_id=GATHERED, number_of_threads=256)
                    if const_expr(half == 1):  # for both, SCORE has the other arrivals
                        arrive(self.slot_empty + pos.stage, self.config.lane_arrivals)
                        if refills:
                            cursor = loads.wait_and_request(cursor, pos)
                    pos = pos.next(self.config.ring_slots)
        return cursor, pos

    @cute.jit
    def last(self, it: Int32, item, rows, piece: Piece, row: Int32):
        """slot (-1: final) and factors of what VALUE holds at an item's end"""
        slot, factors = piece.slot, (self.inv_sum[row, it & 1], self.inv_sum[row + 8, it & 1])
        if const_expr(self.config.fixed_pieces):
            if item.pieces < 0:
                slot, factors = Int32(-1), (self.gathered[row, 2], self.gathered[row + 8, 2])
        return slot, factors

    def _of_my_rows(self, sRows):
        row = fragment_row(thread_in_warpgroup())
        return sRows[row], sRows[row + 8]


# ---------------------------------------------------------------------- sums over pieces
@dataclass(frozen=True)
class Sums:
    """of a thread's two rows, in the threads that stored the other pieces' lse (tid % 4 == 0)"""

    most: cute.Tensor  # log2 of the largest weight of a piece
    own: cute.Tensor  # weight of the last piece in terms of it
    factor: cute.Tensor  # of the sum of all o
    lse: cute.Tensor  # to base 2

    @classmethod
    def of(cls, softmax, gLse, gSink, item, piece, rows):
        """gLse: (slot, query token, head); softmax: of the last piece"""
        sums = cls(*(cute.make_rmem_tensor(2, Float32) for _ in range(4)))
        sums._fill(softmax, gLse, gSink, item, piece, rows)
        return sums

    @cute.jit
    def _fill(self, softmax, gLse, gSink, item, piece, rows):
        for rValues, value in ((self.most, 0.0), (self.own, 0.0), (self.factor, 0.0), (self.lse, -Float32.inf)):
            rValues.fill(value)
        tid = thread_in_warpgroup()
        if tid % 4 == 0:
            for r in cutlass.range_constexpr(2):
                token, head, exists = rows.locate(fragment_row(tid) + 8 * r)
                if exists:
                    own, count = softmax.lse_log2(r) * LN2, piece.slot - item.slot
                    most = own
                    for back in cutlass.range(count, unroll=1):
                        most = cute.arch.fmax(most, gLse[piece.slot - 1 - back, token, head])
                    most = cute.arch.fmax(most * LOG2_E, M_INIT)
                    total = Float32(0.0) + piece_weight(own, most)
                    self.most[r], self.own[r] = most, total
                    for back in cutlass.range(count, unroll=1):
                        total = total + piece_weight(gLse[piece.slot - 1 - back, token, head], most)
                    if total > 0.0:
                        self.lse[r], self.factor[r] = most + cute.math.log2(total, fastmath=True), cute.arch.rcp_approx(total)
                    if const_expr(gSink is not None):
                        self.factor[r] = self.factor[r] * sink_share(self.lse[r], gSink[head])

    def lse_log2(self, r):
        return self.lse[r]


@cute.jit
def piece_weights(gLse, most, slot, rows):
    """of a thread's two rows: the weight of a piece in terms of 2^most"""
    weight = [Float32(0.0), Float32(0.0)]
    for r in cutlass.range_constexpr(2):
        token, head, exists = rows.locate(fragment_row(thread_in_warpgroup()) + 8 * r)
        if exists:
            weight[r] = piece_weight(gLse[slot, token, head], most[r])
    return tuple(weight)


@cute.jit
def start_sum(rO, inv_sum, weight):
    """my own o, normalised and rounded to f16, times its weight"""
    rPair = cute.make_rmem_tensor(2, Float16)
    word = cute.recast_tensor(rPair, Int32)
    for r in cutlass.range_constexpr(2):
        for block in cutlass.range_constexpr(cute.size(rO) // 32):
            for i in cutlass.range_constexpr(16 * block, 16 * block + 16, 2):
                word[0] = pack_half(*(rO[element(r, i + j)] * inv_sum[r] for j in range(2)))
                for j in cutlass.range_constexpr(2):
                    rO[element(r, i + j)] = cute.math.fma(weight[r], rPair[j].to(Float32), Float32(0.0))


@cute.jit
def add_piece(rO, sPiece, weight, mma):
    """rO, an accumulator of `mma`, += weight of the row * sPiece (row, column)"""
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), Float16)
    copy = cute.make_tiled_copy_C(atom, mma).get_slice(thread_in_warpgroup())
    tPiece = copy.partition_S(sPiece)  # ((8, 16 columns), 1, 1)
    for n in cutlass.range_constexpr(cute.size(rO) // 8):
        cute.arch.sync_warp()  # loads stay behind it: all of them ahead of the sums spill 100 bytes
        rPiece = cute.make_rmem_tensor(8, Float16)
        cute.copy(atom, tPiece[(None, n), 0, 0], rPiece)
        for i in cutlass.range_constexpr(8):
            rO[8 * n + i] = cute.math.fma(weight[i // 2 % 2], rPiece[i].to(Float32), rO[8 * n + i])
