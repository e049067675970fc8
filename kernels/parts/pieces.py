"""Fixed pieces: requests that are cut by their own length alone (batch invariance), whatever CTAs their pieces go to.

An item is then a run of pieces.  The softmax starts anew with each, and o of each is a result of its own, but nothing else
stops where two meet: the scores of the next tile are under way.  An item that is a whole request leaves no work to
kernels/combine.py: where a piece ends, it is joined with the sum of those before it (softmax.join_pieces), which waits in a
slot of the part's own.  Every thread reads what it has written, in its own order, and over and over at the same place, so
that the sum never leaves the L2: with a slot for every piece one cost a CTA 11 us, now 6 (b128 h128 s8192).

It depends on the batch whether a request's pieces meet here or in the combine, which joins them in the same order to the same
bits: a sum is rounded to f16 after every piece but the last, and so is a piece before it is joined.
"""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float16, Float32, Int32, const_expr

from .handover import store_row_values
from .ptx import pack_half
from .results import Outputs, store_item_lse, store_item_o
from .softmax import LN2, join_pieces, sink_share
from .tiles import element, fragment_row, thread_in_warpgroup
from .work import next_edge

SUM, SUM_SHARE, PIECE_SHARE, FACTOR = range(4)  # columns of FixedPieces.joined
IN_FLIGHT = 2  # vectors of a sum that a thread loads before it uses the first, 8 registers; with 4, 60 bytes of spills


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

    # ------------------------------------------------------------------ SCORE
    @cute.jit
    def end(self, softmax, it: Int32, item, rows, piece: Piece, tile: Int32) -> Piece:
        """a piece's normalisation and shares go to VALUE with p of its last tile"""
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
    def end_item(self, softmax, item, rows, piece: Piece):
        """likewise, with p of the item's last tile"""
        if const_expr(self.config.fixed_pieces):
            if item.pieces < 0:
                self._join(softmax, piece)
                self._store_factors(rows)

    @cute.jit
    def store_lse(self, softmax, item, rows, piece: Piece):
        """at an item's end, when VALUE has p"""
        if const_expr(self.config.fixed_pieces):
            if item.pieces < 0:
                sums = _Sums(self.joined, fragment_row(thread_in_warpgroup()))
                store_item_lse(self.config, sums, self.result, replace(item, slot=Int32(-1)), rows)
            else:
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
    def end_tile(self, half: Constexpr[int], rO, it: Int32, item, rows, piece: Piece, tile: Int32) -> Piece:
        if const_expr(self.config.fixed_pieces):
            if tile + 1 == piece.edge:
                of_rows, last = self._of_my_rows, tile + 1 == item.end
                inv_sum = of_rows(self.inv_sum[None, it & 1])
                if item.pieces < 0:
                    shares = of_rows(self.joined[None, SUM_SHARE]), of_rows(self.joined[None, PIECE_SHARE])
                    join_sum(
                        half, rO, inv_sum, shares, self.result.o_split[item.slot, None, None, None], rows, piece.joins, last
                    )
                elif ~last:
                    store_item_o(self.config, half, rO, inv_sum, self.result, replace(item, slot=piece.slot), rows)
                if ~last:
                    rO.fill(0.0)
                    piece = piece.next(item)
        return piece

    @cute.jit
    def last(self, it: Int32, item, piece: Piece):
        """slot (-1: final) and factors of what VALUE holds at an item's end"""
        slot, factors = piece.slot, self._of_my_rows(self.inv_sum[None, it & 1])
        if const_expr(self.config.fixed_pieces):
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
def join_sum(half: Constexpr[int], rO, inv_sum, shares, gSum, rows, joins: Boolean, last: Boolean):
    """rO = a piece, normalised and rounded to f16, and the sum of those before it, by their shares (of the sum, of the piece);
    but for the last piece also -> gSum (token, head, column), whose columns are in an order of their own."""
    tid, (sum_share, piece_share) = thread_in_warpgroup(), shares
    rPair = cute.make_rmem_tensor(2, Float16)
    word = cute.recast_tensor(rPair, Int32)
    for r in cutlass.range_constexpr(2):
        token, head, exists = rows.locate(fragment_row(tid) + 8 * r)
        for first in cutlass.range_constexpr(0, cute.size(rO) // 16, IN_FLIGHT):
            cute.arch.sync_warp()  # loads stay behind it
            rSum = cute.make_rmem_tensor((8, IN_FLIGHT), Float16)
            rSum.fill(0.0)
            gVectors = [
                cute.local_tile(gSum[token, head, None], (8,), (half * cute.size(rO) // 4 + (first + v) * 4 + tid % 4,))
                for v in range(IN_FLIGHT)
            ]
            if exists & joins:
                for v in cutlass.range_constexpr(IN_FLIGHT):
                    cute.autovec_copy(gVectors[v], rSum[None, v])
            for v in cutlass.range_constexpr(IN_FLIGHT):
                for j in cutlass.range_constexpr(0, 8, 2):
                    at = [element(r, 8 * (first + v) + j + k) for k in range(2)]
                    word[0] = pack_half(rO[at[0]] * inv_sum[r], rO[at[1]] * inv_sum[r])
                    for k in cutlass.range_constexpr(2):
                        of_sum = sum_share[r] * rSum[j + k, v].to(Float32)
                        rO[at[k]] = cute.math.fma(piece_share[r], rPair[k].to(Float32), of_sum)
            if exists & ~last:
                for v in cutlass.range_constexpr(IN_FLIGHT):
                    rNew = cute.make_rmem_tensor(8, Float16)
                    words = cute.recast_tensor(rNew, Int32)
                    for j in cutlass.range_constexpr(4):
                        i = 8 * (first + v) + 2 * j
                        words[j] = pack_half(rO[element(r, i)], rO[element(r, i + 1)])
                    cute.autovec_copy(rNew, gVectors[v])
