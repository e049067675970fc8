"""Work items: a span of KV tiles of one request.  kernels/schedule.py writes them, every role walks the same sequence."""

from dataclasses import dataclass, fields

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, const_expr

from .ptx import lane_value, uniform
from .rows import RowTile

RECORD = 8  # int32 of an item: the fields of WorkItem; 0 in those that a kernel does not need
PART = 16  # int32 of a part: the record of its first item, then
BEGIN, COUNT = 8, 9  # where its items begin, and how many they are
TOKEN, NUM_QUERIES = 5, 6  # fields of ragged queries
PIECES = 7  # field of fixed pieces
PIECE_SHIFT = 5  # in it: of a piece's length, beside how many are a tile longer
MERGE = 4  # int32 of a request to merge: request (ragged: TOKEN), first slot, pieces (0: no tokens), 0 (ragged: NUM_QUERIES)
MERGE_GROUPS = 16  # of lanes that may share a row's pieces; batch-invariant: 1, for the order of a sum is in its bits


@dataclass(frozen=True)
class WorkItem:
    batch: Int32
    first: Int32  # tiles first .. end - 1
    end: Int32
    slot: Int32  # of the partial result of its first piece or, where pieces < 0, of all; -1: one piece, its result is final
    seqlen: Int32
    token: Int32  # ragged: the request's first query token in q
    num_queries: Int32
    pieces: Int32  # their lengths, as spans.pack_pieces has it; < 0: a whole request, they are joined; 0: it is a single one

    def owner(self, ragged):
        """whose rows in out and lse: the request, or ragged its first query token"""
        return self.token if ragged else self.batch

    @classmethod
    def read(cls, sRecord, ragged, fixed_pieces):
        present = [*range(TOKEN), *([TOKEN, NUM_QUERIES] if ragged else []), *([PIECES] if fixed_pieces else [])]
        return cls(*(uniform(sRecord[i]) if i in present else Int32(0) for i in range(len(fields(cls)))))


def unpack_pieces(packed):
    """length, and how many pieces are a tile longer"""
    return packed >> PIECE_SHIFT, packed & (1 << PIECE_SHIFT) - 1


def next_edge(pieces, first, edge):
    """where the piece ends that begins at tile `edge` of an item of such pieces, the first of them at tile `first`"""
    length, long = unpack_pieces(cutlass.max(pieces, -pieces))
    return edge + length + Int32(edge - first < long * (length + 1))


def record_slots(ring_slots: int) -> int:
    """How many items' records shared memory must hold.  Refill writes the record of item j when ring slot n(j) - ring_slots has
    been left; VALUE reads that of item i before it leaves slot n(i) + 1, and an item has two slots or more, q and a tile: the
    record of item j - d has been read if 2 d - ring_slots >= 1.  3, 6, 12 slots: 2, 4, 8 records (a power of two)."""
    return 1 << (ring_slots // 2).bit_length()


def record_of(sItem, it):
    """the record of item `it`, in the slot that it shares with others"""
    return sItem[None, it & (cute.size(sItem, mode=[1]) - 1)]


@dataclass(frozen=True)
class Work:
    """The items of this CTA: those of its part, without the requests that have too few queries for a row in its row tile.

    The record of a part begins with that of its first item: one load at the kernel's start, where every dependent load is
    0.4 us of batch 1's 12."""

    records: cute.Tensor  # gmem, (item of the part, RECORD)
    head: Int32  # per lane: field lane % PART of the part's record
    total: Int32  # items of the part
    count: Int32  # of this CTA
    rows: RowTile
    ragged: Constexpr[bool]
    first_pages: Int32 | None  # per lane: PageSpan.entries of item 0, if `known`
    known: Boolean | None

    @classmethod
    def of(cls, mItems, mParts, part, rows, ragged, guess=None, requests=False):
        """guess: parts/ahead.py; with it, a warp that `requests` tiles saves the latency of a load"""
        head, first_pages, known = mParts[part, cute.arch.lane_idx() % PART], None, None
        if guess is not None:
            first_pages, known = cls._first_pages(guess, requests), cute.arch.vote_all_sync(head == guess.record)
        begin, total = uniform(lane_value(head, BEGIN)), uniform(lane_value(head, COUNT))
        records = cute.domain_offset((begin, 0), mItems)
        count = cls._count(records, total, rows.token_of(0)) if ragged else total
        return cls(records, head, total, count, rows, ragged, first_pages, known)

    @staticmethod
    @cute.jit
    def _first_pages(guess, requests: Boolean) -> Int32:
        entries = Int32(0)
        if requests:  # (by all warps, of idle parts too: +1.4 us at b1 h16 s4096, two lines of the L2 become so hot)
            if guess.has_items:
                entries = guess.block_table[guess.entry()]
        return entries

    @staticmethod
    @cute.jit
    def _count(records: cute.Tensor, total: Int32, first_token: Int32) -> Int32:
        count = total
        if first_token > 0:  # (requests without queries have no items)
            count = Int32(0)
            for i in cutlass.range(cute.arch.lane_idx(), total, 32, unroll=1):
                if records[i, NUM_QUERIES] > first_token:
                    count += 1
            count = uniform(cute.arch.warp_redux_sync(count, "add"))
        return count

    @cute.jit
    def skip(self, it: Int32, record: Int32):
        """Item `it` of the part, or the first behind it that is this CTA's, and its record.  Those in between cost a load
        each, in a CTA that has less to do than that of row tile 0."""
        if const_expr(self.ragged):
            first = self.rows.token_of(0)
            while (it < self.total) & (first > 0) & (lane_value(record, NUM_QUERIES) <= first):
                it += 1
                record = self.records[cutlass.min(it, self.total - 1), cute.arch.lane_idx() % RECORD]
        return it, record

    def query_index(self, batch, record):
        """what the TMA loads of q are told"""
        return lane_value(record, TOKEN) * self.rows.token_step if self.ragged else batch
