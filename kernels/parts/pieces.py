"""Fixed pieces: requests that are cut by their own length alone (batch invariance), whatever CTAs their pieces go to.

An item is then a run of pieces.  The softmax starts anew with each, and o of each is a result of its own, but nothing else
stops where two meet: the scores of the next tile are under way.  An item that is a whole request leaves no work to
kernels/combine.py: from its second piece on, each ends with the sum so far, which comes back as a tile of the KV ring, is
joined with the piece (softmax.join_pieces) and stored for the next one.  Its slot is the part's own, written again and again:
64 KB that stay in the L2, where every piece in a slot of its own was written to DRAM and read back.

It depends on the batch whether a request's pieces meet here or in the combine, which joins them in the same order to the same
bits: a sum is rounded to f16 after every piece but the last, and so is a piece before it is joined.
"""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float16, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp

from .handover import store_row_values
from .ptx import opaque, pack_half
from .results import Outputs, store_item_lse, store_item_o
from .softmax import LN2, join_pieces, sink_share
from .sync import RingPos, arrive
from .tiles import element, fragment_row, thread_in_warpgroup
from .work import next_edge, unpack_pieces

JOINED = 3  # named barrier of both VALUE warpgroups
NORMALISED = 1.0, 1.0
SUM, SUM_SHARE, PIECE_SHARE, FACTOR = range(4)  # columns of FixedPieces.joined


@dataclass(frozen=True)
class Piece:
    """a piece of an item"""

    edge: Int32  # tile behind it; before all of the item's if it is the only one
    slot: Int32
    joins: Boolean  # at its end, with the pieces before it

    @classmethod
    def first_of(cls, item):
        return cls(next_edge(item.pieces, item.first, item.first), item.slot, Boolean(False))

    def next(self, item):
        edge = next_edge(item.pieces, item.first, self.edge)
        return Piece(edge, self.slot + Int32(item.pieces > 0), item.pieces < 0)


@dataclass(frozen=True)
class FixedPieces:
    """what both roles do where pieces end; nothing, in a configuration that has none"""

    config: Constexpr
    result: Outputs
    sink: cute.Tensor | None
    inv_sum: cute.Tensor  # smem (row, item parity); the pieces of an item share one, they have two tiles or more
    joined: cute.Tensor | None  # smem (row, 4): log2 of the sum's weight, shares in the new one, factor of out
    ring: cute.Tensor  # smem (row, latent, slot), f16
    slot_full: cute.Pointer  # mbarrier [slot]
    slot_empty: cute.Pointer

    # ------------------------------------------------------------------ SCORE
    @cute.jit
    def num_runs(self, item) -> Int32:
        """An item's tiles in runs that end where pieces are joined.  The next tile lies behind the sum, and may be on its way
        still: p of a run's last tile does not wait for its scores."""
        runs = Int32(1)
        if const_expr(self.config.fixed_pieces):
            if item.pieces < 0:
                length, long = unpack_pieces(-item.pieces)
                runs = (item.end - item.first - long) // length - 1
        return runs

    @cute.jit
    def end_of_run(self, item, piece: Piece) -> Int32:
        end = item.end
        if const_expr(self.config.fixed_pieces):
            if item.pieces < 0:
                end = piece.edge if piece.joins else next_edge(item.pieces, item.first, piece.edge)
        return end

    @cute.jit
    def next_run(self, item, piece: Piece, pos: RingPos):
        """Behind a sum, which only VALUE reads: unless SCORE sees its slot filled before it is left, two phases look like none."""
        if const_expr(self.config.fixed_pieces):
            if item.pieces < 0:
                cute.arch.mbarrier_wait(self.slot_full + pos.stage, pos.phase)
                arrive(self.slot_empty + pos.stage, self.config.lane_arrivals)
                piece, pos = piece.next(item), pos.next(self.config.ring_slots)
        return piece, pos

    @cute.jit
    def end(self, softmax, it: Int32, item, rows, piece: Piece, tile: Int32) -> Piece:
        """inside a run; a piece's normalisation goes to VALUE with p of its last tile"""
        if const_expr(self.config.fixed_pieces):
            if tile + 1 == piece.edge:
                store_row_values(softmax.finalize(), self.inv_sum[None, it & 1])
                if item.pieces < 0:
                    self._join(softmax, piece)
                else:
                    store_item_lse(self.config, softmax, self.result, replace(item, slot=piece.slot), rows)
                softmax.reset()
                piece = piece.next(item)
        return piece

    @cute.jit
    def join_run(self, softmax, item, rows, piece: Piece):
        """the shares of a run's last piece and of the sum, likewise; of an item's last, the factor of out, too"""
        if const_expr(self.config.fixed_pieces):
            if item.pieces < 0:
                self._join(softmax, piece)
                if piece.edge == item.end:
                    self._store_factors(rows)

    @cute.jit
    def store_lse(self, softmax, item, rows, piece: Piece):
        """when VALUE has p of an item's last tile"""
        if const_expr(self.config.fixed_pieces):
            if (item.pieces < 0) & (piece.edge == item.end):
                sums = _Sums(self.joined, fragment_row(thread_in_warpgroup()))
                store_item_lse(self.config, sums, self.result, replace(item, slot=Int32(-1)), rows)
            elif item.pieces >= 0:
                store_item_lse(self.config, softmax, self.result, replace(item, slot=piece.slot), rows)
        else:
            store_item_lse(self.config, softmax, self.result, item, rows)

    @cute.jit
    def _join(self, softmax, piece: Piece):
        tid = thread_in_warpgroup()
        if tid % 4 == 0:
            for r in cutlass.range_constexpr(2):
                sRow = self.joined[fragment_row(tid) + 8 * r, None]
                log_sum = -Float32.inf
                if piece.joins:
                    log_sum = sRow[SUM]
                # (through LN2, as the combine reads it)
                sRow[SUM], sRow[SUM_SHARE], sRow[PIECE_SHARE] = join_pieces(log_sum, softmax.lse_log2(r) * LN2)

    @cute.jit
    def _store_factors(self, rows):
        tid = thread_in_warpgroup()
        if tid % 4 == 0:
            for r in cutlass.range_constexpr(2):
                sRow, factor = self.joined[fragment_row(tid) + 8 * r, None], Float32(1.0)
                if const_expr(self.sink is not None):
                    _, head, exists = rows.locate(fragment_row(tid) + 8 * r)
                    if exists:
                        factor = sink_share(sRow[SUM], self.sink[head])
                sRow[FACTOR] = factor

    # ------------------------------------------------------------------ VALUE
    @cute.jit
    def end_tile(
        self, half: Constexpr[int], rO, mma, it: Int32, item, rows, piece: Piece, tile: Int32, *, loads, refills, cursor, pos
    ):
        """refills: this warp requests the ring's slots; returns the next piece, its cursor, and where in the ring it is"""
        if const_expr(self.config.fixed_pieces):
            if tile + 1 == piece.edge:
                normalise(rO, self._of_my_rows(self.inv_sum[None, it & 1]))
                if piece.joins:
                    cute.arch.mbarrier_wait(self.slot_full + pos.stage, pos.phase)
                    sSum = cute.local_tile(self.ring, (64, self.config.kv.latent // 2, self.config.ring_slots), (0, half, 0))
                    shares = (self._of_my_rows(self.joined[None, i]) for i in (SUM_SHARE, PIECE_SHARE))
                    join_sum(rO, sSum[None, None, pos.stage], *shares, mma)
                    if const_expr(half == 0):
                        cute.arch.barrier_arrive(barrier_id=JOINED, number_of_threads=256)
                    else:  # for both, SCORE has the other arrivals
                        cute.arch.barrier(barrier_id=JOINED, number_of_threads=256)
                        arrive(self.slot_empty + pos.stage, self.config.lane_arrivals)
                        if refills:
                            cursor = loads.wait_and_request(cursor, pos)
                    pos = pos.next(self.config.ring_slots)
                if tile + 1 < item.end:
                    store_item_o(self.config, half, rO, NORMALISED, self.result, replace(item, slot=piece.slot), rows)
                    rO.fill(0.0)
                    piece = piece.next(item)
        return piece, cursor, pos

    @cute.jit
    def show(self, item):
        """What was stored, to TMA, which reads the sum.  In the shadow of p v: the stores of a piece are long done by then."""
        if const_expr(self.config.fixed_pieces):
            if item.pieces < 0:
                cute.arch.fence_proxy("async.global")

    @cute.jit
    def last(self, it: Int32, item, piece: Piece):
        """slot (-1: final) and factors of what VALUE holds at an item's end"""
        slot, factors = piece.slot, self._of_my_rows(self.inv_sum[None, it & 1])
        if const_expr(self.config.fixed_pieces):
            if item.pieces != 0:
                factors = Float32(1.0), Float32(1.0)
            if item.pieces < 0:
                slot, factors = Int32(-1), self._of_my_rows(self.joined[None, FACTOR])
        return slot, factors

    def _of_my_rows(self, sRows):
        row = fragment_row(thread_in_warpgroup())
        return sRows[row], sRows[row + 8]


@dataclass(frozen=True)
class _Sums:
    """of a quad's two rows"""

    joined: cute.Tensor
    row: Int32

    def lse_log2(self, r):
        return self.joined[self.row + 8 * r, SUM]


@cute.jit
def normalise(rO, inv_sum):
    """a piece, and round it to f16; in place, else o is kept in two forms, for the store and the join: 150 bytes of spills"""
    rPair = cute.make_rmem_tensor(2, Float16)
    word = cute.recast_tensor(rPair, Int32)
    for r in cutlass.range_constexpr(2):
        for block in cutlass.range_constexpr(cute.size(rO) // 32):
            for i in cutlass.range_constexpr(16 * block, 16 * block + 16, 2):
                first, second = element(r, i), element(r, i + 1)
                word[0] = pack_half(rO[first] * inv_sum[r], rO[second] * inv_sum[r])
                rO[first], rO[second] = rPair[0].to(Float32), rPair[1].to(Float32)


@cute.jit
def join_sum(rO, sSum, sum_share, piece_share, mma):
    """rO, an accumulator of `mma`, = the piece that it is and sSum (row, column), by their shares"""
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), Float16)
    copy = cute.make_tiled_copy_C(atom, mma).get_slice(thread_in_warpgroup())
    tSum = copy.partition_S(sSum)  # ((8, 16 columns), 1, 1)
    for n in cutlass.range_constexpr(cute.size(rO) // 8):
        cute.arch.sync_warp()  # loads stay behind it: all of them ahead of the sums spill 100 bytes
        rSum = cute.make_rmem_tensor(8, Float16)
        cute.copy(atom, tSum[(None, n), 0, 0], rSum)
        for i in cutlass.range_constexpr(8):
            of_sum = sum_share[i // 2 % 2] * rSum[i].to(Float32)
            rO[8 * n + i] = cute.math.fma(piece_share[i // 2 % 2], rO[8 * n + i], of_sum)
