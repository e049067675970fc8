"""What the two requesting warps of the decode kernel ask for next: `Refill` keeps the ring full, `Feed` rope and q tail.

Both walk the same items: q, tile first, .., tile end - 1, then the next item.  Global loads made here are used one call later:
page ids are held one a lane and reloaded every tiles_per_load(page) tiles, 32 with pages of 64 tokens.
The role owns the cursor: cursor = refill.wait_and_request(cursor, ..).
"""

from dataclasses import dataclass, fields

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, const_expr

from .loads import NoLoad, PageSpan, PairLoad, TmaLoad, tiles_per_load
from .ptx import lane_value, uniform
from .sync import RingPos
from .work import RECORD, Work, WorkItem, record_of

BATCH, FIRST, END, SEQLEN = ([f.name for f in fields(WorkItem)].index(name) for name in ("batch", "first", "end", "seqlen"))


@dataclass(frozen=True)
class Cursor:
    """what the refill warp requests next"""

    it: Int32  # item of the part
    skipped: Int32  # items before it that are not this CTA's
    q_part: Int32  # of its q, then, past the last, tile `tile`
    batch: Int32
    first: Int32
    tile: Int32
    end: Int32
    seqlen: Int32
    record: Int32  # per lane: field lane % RECORD of the next record to start
    pages: Int32  # per lane: PageSpan.entries


@cute.jit
def _pages_of(requests, it: Int32, pages, batch: Int32, first: Int32, end: Int32, seqlen: Int32):
    """PageSpan.entries of item `it`'s first tiles; `pages` are those of item 0, if the work's guess was right"""
    work = requests.work
    if const_expr(work.first_pages is None):
        pages = PageSpan.load(requests.page, requests.block_table, batch, first, end, seqlen).entries
    elif (it > 0) | (not work.known):
        pages = PageSpan.load(requests.page, requests.block_table, batch, first, end, seqlen).entries
    return pages


@dataclass(frozen=True)
class Refill:
    """ring slots: q of an item in one or more parts, then its tiles; its record rides along in smem"""

    q: TmaLoad | PairLoad
    latent: TmaLoad | PairLoad
    page: Constexpr[int]
    block_table: cute.Tensor
    work: Work
    sItem: cute.Tensor  # (RECORD, record slot)
    slot_empty: cute.Pointer
    q_parts: Constexpr[int] = 1

    def start(self):
        zero, pages = Int32(0), self.work.first_pages
        return Cursor(zero, zero, zero, zero, zero, zero, zero, zero, self.work.head, zero if pages is None else pages)

    @cute.jit
    def request(self, c: Cursor, stage: Int32):
        it, skipped, q_part, batch, first, tile, end, seqlen, record, pages = (getattr(c, f.name) for f in fields(Cursor))
        lane, single = cute.arch.lane_idx(), self.q_parts == 1
        opens = q_part == 0
        if opens:
            skipped -= it
            it, record = self.work.skip(it, record)
            skipped += it
        if it < self.work.total:
            if q_part < self.q_parts:
                opens = Boolean(True) if const_expr(single) else q_part == 0
                if opens:
                    if lane < RECORD:
                        record_of(self.sItem, it - skipped)[lane] = record
                    cute.arch.sync_warp()
                    batch, first, end, seqlen = (lane_value(record, i) for i in (BATCH, FIRST, END, SEQLEN))
                self.q.start(self.work.query_index(batch, record), stage, 0 if const_expr(single) else q_part)
                tile, q_part = first, q_part + 1
                closes = Boolean(True) if const_expr(single) else q_part == self.q_parts
                if closes:  # (before the request, these loads make ptxas spill 120 bytes)
                    pages = _pages_of(self, it, pages, batch, first, end, seqlen)
                    if it + 1 < self.work.total:
                        record = self.work.records[it + 1, lane % RECORD]
            else:
                self.latent.start_tile(PageSpan.around(self.page, pages, first, tile), tile, stage)
                tile += 1
                if tile == end:
                    it, q_part = it + 1, Int32(0)
                elif (tile - first) % tiles_per_load(self.page) == 0:
                    pages = PageSpan.load(self.page, self.block_table, batch, tile, end, seqlen).entries
        return Cursor(it, skipped, q_part, batch, first, tile, end, seqlen, record, pages)

    @cute.jit
    def wait_and_request(self, c: Cursor, pos: RingPos):
        cute.arch.mbarrier_wait(self.slot_empty + pos.stage, pos.phase)
        return self.request(c, pos.stage)


@dataclass(frozen=True)
class RopeCursor:
    """what the feed warp requests next"""

    it: Int32  # item of the part
    batch: Int32
    query: Int32  # what the loads of q are told
    first: Int32
    tile: Int32
    end: Int32
    seqlen: Int32
    record: Int32  # per lane: field lane % RECORD of the record of item it + 1
    pages: Int32  # per lane: PageSpan.entries


@dataclass(frozen=True)
class Feed:
    """rope of each tile; with an item's first tile, the columns of its q that do not fit into registers"""

    rope: TmaLoad | NoLoad  # without rope SCORE must not run ahead either: `rope_empty` has two phases
    q_last: TmaLoad
    q_rope: TmaLoad | None
    page: Constexpr[int]
    block_table: cute.Tensor
    work: Work
    rope_empty: cute.Pointer

    def start(self):
        return self._open_item(Int32(0), self.work.head)

    @cute.jit
    def _open_item(self, it: Int32, record: Int32):
        """a cursor at the item's first tile; past the last item, one that requests nothing"""
        it, record = self.work.skip(it, record)
        batch, first, end, seqlen = (uniform(lane_value(record, i)) for i in (BATCH, FIRST, END, SEQLEN))
        query = self.work.query_index(batch, record)
        after = self.work.records[cutlass.min(it + 1, self.work.total - 1), cute.arch.lane_idx() % RECORD]
        pages = _pages_of(self, it, self.work.first_pages, batch, first, end, seqlen)
        return RopeCursor(it, batch, query, first, first, end, seqlen, after, pages)

    @cute.jit
    def request(self, c: RopeCursor):
        it, batch, query, first, tile, end, seqlen, record, pages = (getattr(c, f.name) for f in fields(RopeCursor))
        if it < self.work.total:
            if tile == first:
                self.q_last.start(query, 0)
                if const_expr(self.q_rope is not None):
                    self.q_rope.start(query, 0)
            self.rope.start_tile(PageSpan.around(self.page, pages, first, tile), tile, 0)
            tile += 1
            if tile == end:
                opened = self._open_item(it + 1, record)
                it, batch, query, first, tile, end, seqlen, record, pages = (
                    getattr(opened, f.name) for f in fields(RopeCursor)
                )
            elif (tile - first) % tiles_per_load(self.page) == 0:
                pages = PageSpan.load(self.page, self.block_table, batch, tile, end, seqlen).entries
        return RopeCursor(it, batch, query, first, tile, end, seqlen, record, pages)

    @cute.jit
    def wait_and_request(self, c: RopeCursor, parity: Int32):
        cute.arch.mbarrier_wait(self.rope_empty, parity)
        return self.request(c)
