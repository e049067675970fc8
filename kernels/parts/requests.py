"""What the two requesting warps of the decode kernel ask for next: `Refill` keeps the ring full, `Feed` rope and q tail.

Both walk the same items: q, tile first, .., tile end - 1, then the next item.  Global loads made here are used one call later.
The role owns the cursor: cursor = refill.wait_and_request(cursor, ..).
"""

from dataclasses import dataclass, fields

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from .loads import TmaLoad, load_pages
from .ptx import lane_value, uniform
from .sync import RingPos
from .work import RECORD, Work


@dataclass(frozen=True)
class Cursor:
    """what the refill warp requests next"""

    it: Int32  # item
    wants_q: Boolean  # its q slot, else tile `tile`
    batch: Int32
    first: Int32
    tile: Int32
    end: Int32
    record: Int32  # per lane: field lane % RECORD of the next record to start
    pages: Int32  # per lane: see load_pages, reloaded every 32 tiles


@dataclass(frozen=True)
class Refill:
    """ring slots: q of an item, then its tiles; the item's record rides along in smem"""

    q: TmaLoad
    latent: TmaLoad
    block_table: cute.Tensor
    work: Work
    sItem: cute.Tensor  # (RECORD, item parity)
    slot_empty: cute.Pointer

    def start(self):
        zero = Int32(0)
        return Cursor(zero, Boolean(True), zero, zero, zero, zero, self.work.head, zero)

    @cute.jit
    def request(self, c: Cursor, stage: Int32):
        it, wants_q, batch, first, tile, end, record, pages = (getattr(c, f.name) for f in fields(Cursor))
        lane = cute.arch.lane_idx()
        if it < self.work.count:
            if wants_q:
                if lane < RECORD:
                    self.sItem[lane, it & 1] = record
                cute.arch.sync_warp()
                batch, first, end = lane_value(record, 0), lane_value(record, 1), lane_value(record, 2)
                tile, wants_q = first, Boolean(False)
                self.q.start(batch, stage)
                pages = load_pages(self.block_table, batch, first, end)
                if it + 1 < self.work.count:
                    record = self.work.records[it + 1, lane % RECORD]
            else:
                self.latent.start(lane_value(pages, tile - first), stage)
                tile += 1
                if tile == end:
                    it, wants_q = it + 1, Boolean(True)
                elif (tile - first) % 32 == 0:
                    pages = load_pages(self.block_table, batch, tile, end)
        return Cursor(it, wants_q, batch, first, tile, end, record, pages)

    @cute.jit
    def wait_and_request(self, c: Cursor, pos: RingPos):
        cute.arch.mbarrier_wait(self.slot_empty + pos.stage, pos.phase)
        return self.request(c, pos.stage)


@dataclass(frozen=True)
class RopeCursor:
    """what the feed warp requests next"""

    it: Int32  # item
    batch: Int32
    first: Int32
    tile: Int32
    end: Int32
    record: Int32  # per lane: field lane % RECORD of the record of item it + 1
    pages: Int32  # per lane: see load_pages, reloaded every 32 tiles


@dataclass(frozen=True)
class Feed:
    """rope of each tile; with an item's first tile, its q tail"""

    rope: TmaLoad
    q_tail: TmaLoad
    block_table: cute.Tensor
    work: Work
    rope_empty: cute.Pointer

    def start(self):
        return self._open_item(Int32(0), self.work.head)

    @cute.jit
    def _open_item(self, it: Int32, record: Int32):
        """a cursor at the item's first tile; past the last item, one that requests nothing"""
        batch, first, end = (uniform(lane_value(record, i)) for i in range(3))
        after = self.work.records[cutlass.min(it + 1, self.work.count - 1), cute.arch.lane_idx() % RECORD]
        return RopeCursor(it, batch, first, first, end, after, load_pages(self.block_table, batch, first, end))

    @cute.jit
    def request(self, c: RopeCursor):
        it, batch, first, tile, end, record, pages = (getattr(c, f.name) for f in fields(RopeCursor))
        if it < self.work.count:
            if tile == first:
                self.q_tail.start(batch, 0)
            self.rope.start(lane_value(pages, (tile - first) % 32), 0)
            tile += 1
            if tile == end:
                opened = self._open_item(it + 1, record)
                it, batch, first, tile, end, record, pages = (getattr(opened, f.name) for f in fields(RopeCursor))
            elif (tile - first) % 32 == 0:
                pages = load_pages(self.block_table, batch, tile, end)
        return RopeCursor(it, batch, first, tile, end, record, pages)

    @cute.jit
    def wait_and_request(self, c: RopeCursor, parity: Int32):
        cute.arch.mbarrier_wait(self.rope_empty, parity)
        return self.request(c)
