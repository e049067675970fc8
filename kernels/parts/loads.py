"""TMA operands, whole-warp requests of tiles, and the way from tiles to cache pages."""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from ..config import TILE
from .ptx import lane_value
from .sync import arrive
from .tiles import BLOCK, row_boxes, swizzled

EVICT_FIRST = 0x12F0000000000000  # an L2 cache policy


@dataclass(frozen=True)
class TmaOperand:
    """A gmem tensor (rows .., 64, block, index ..) that is moved box by box, one instruction each.  A box is a tile, or where
    pages are small a part of its rows.  Its rows may be several modes: for q they are (head, token).  Columns past the
    tensor's (a rope of 32) arrive as zeros."""

    atom: cute.CopyAtom
    tensor: cute.Tensor  # coordinates

    @classmethod
    def make(cls, m, blocks, row_modes=(TILE,), width=BLOCK):
        """the box of an instruction is `blocks` column blocks, of `width` columns each, of rows `row_modes`"""
        box = (*row_modes, width, blocks)
        layout = cute.composition(swizzled(m.element_type, math.prod(row_modes), width, blocks), cute.make_layout(box))
        return cls(*cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), m, layout, box))


@dataclass(frozen=True)
class TmaLoad:
    """requests of gmem's tiles into the slots of smem"""

    atom: cute.CopyAtom
    src: cute.Tensor  # (box, number of the box in rows, part of the columns, index)
    dst: cute.Tensor  # (box, number of the box in rows, slot)
    full: cute.Pointer  # mbarrier [slot]
    num_bytes: Constexpr[int]
    hint: Constexpr[int | None]
    every_lane: Constexpr[bool]

    @classmethod
    def make(cls, atom, source, sDst, full, row_modes=(TILE,), hint=None, every_lane=False):
        """source: the operand's tensor moved to this CTA's rows, (rows .., width, block, index); sDst: (row, column, slot).  A
        source of more columns than a slot has several parts."""
        columns, slots = cute.size(sDst, mode=[1]), cute.size(sDst, mode=[2])
        width = min(BLOCK, columns)
        box, rows = (*row_modes, width, columns // width), math.prod(row_modes)
        sBoxes = cute.composition(row_boxes(sDst, rows, width), cute.make_layout((*box, TILE // rows, slots)))
        tDst, tSrc = cpasync.tma_partition(
            atom,
            0,
            cute.make_layout(1),
            cute.group_modes(cute.flat_divide(sBoxes, box), 0, len(box)),
            cute.group_modes(cute.flat_divide(source, box), 0, len(box)),
        )
        others = (0,) * (len(box) - 2)
        num_bytes = TILE * columns * sDst.element_type.width // 8
        src, dst = tSrc[(None, None, *others, None, None)], tDst[(None, *others, 0, 0, None, None)]
        return cls(atom, src, dst, full, num_bytes, hint, every_lane)

    @cute.jit
    def start(self, index: Int32, slot: Int32, part=0):
        """a tile that is one box; by a whole warp: cute.copy elects a lane itself"""
        self.expect(slot)
        self.copy(0, index, 0, slot, part)

    @cute.jit
    def start_tile(self, span: "PageSpan", tile: Int32, slot: Int32):
        """KV tile `tile` of a request, box by box from its pages"""
        self.expect(slot)
        boxes = cute.size(self.dst, mode=[1])
        for i in cutlass.range_constexpr(boxes):
            row, page = span.locate(tile, i, TILE // boxes)
            self.copy(row, page, i, slot)

    @cute.jit
    def prefetch_tile(self, span: "PageSpan", tile: Int32):
        """KV tile `tile` of a request -> L2; by a whole warp"""
        boxes = cute.size(self.dst, mode=[1])
        for i in cutlass.range_constexpr(boxes):
            row, page = span.locate(tile, i, TILE // boxes)
            with cute.arch.elect_one():
                cute.prefetch(self.atom, self.src[None, row, 0, page])

    @cute.jit
    def expect(self, slot: Int32, more_bytes: Constexpr[int] = 0):
        """more_bytes: what the copies of other loads add to the slot"""
        full = self.full + slot
        if const_expr(self.every_lane):
            cute.arch.mbarrier_arrive(full)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full, self.num_bytes + more_bytes)

    @cute.jit
    def copy(self, src_box: Int32, index: Int32, dst_box: Constexpr[int], slot: Int32, part=0):
        hint = None if const_expr(self.hint is None) else Int64(self.hint)
        src, dst = self.src[None, src_box, part, index], self.dst[None, dst_box, slot]
        cute.copy(self.atom, src, dst, tma_bar_ptr=self.full + slot, cache_policy=hint)


@dataclass(frozen=True)
class NoLoad:
    """signals a slot of no bytes"""

    full: cute.Pointer  # mbarrier [slot]
    every_lane: Constexpr[bool]

    def start_tile(self, span: "PageSpan", tile: Int32, slot: Int32):
        arrive(self.full + slot, self.every_lane)
        if self.every_lane:
            arrive(self.full + slot, False)


@dataclass(frozen=True)
class PairLoad:
    """two loads that fill a slot together, such as the latent and the rope columns of a tile"""

    first: TmaLoad
    second: TmaLoad

    @cute.jit
    def start(self, index: Int32, slot: Int32, part=0):
        self.first.expect(slot, self.second.num_bytes)
        self.first.copy(0, index, 0, slot, part)
        self.second.copy(0, index, 0, slot, part)

    @cute.jit
    def start_tile(self, span: "PageSpan", tile: Int32, slot: Int32):
        self.first.expect(slot, self.second.num_bytes)
        boxes = cute.size(self.first.dst, mode=[1])
        for i in cutlass.range(boxes, unroll=1):  # (unrolled for boxes of 8 tokens: 40 bytes of spills)
            row, page = span.locate(tile, i, TILE // boxes)
            self.first.copy(row, page, i, slot)
            self.second.copy(row, page, i, slot)


# ---------------------------------------------------------------------- q and cache
def query_operand(config, q, column, width, blocks, tile_blocks=None, step=None):
    """Columns of q from `column` on, `blocks` blocks `step` apart (default: width), each of `width` columns, as (head, query
    token, width, block, request), see rows.py; a load brings `tile_blocks` of them (default: all)."""
    if config.ragged:  # a single request; loads are told where in it another begins
        q = cute.make_tensor(q.iterator, cute.make_layout((1, *q.shape), stride=(q.stride[0], *q.stride)))
    b, s_q, h_q, _ = q.shape
    stride_b, stride_s, stride_h, _ = q.stride
    rows = (s_q * h_q, 1) if config.head_tile == 0 else (h_q, s_q)
    layout = cute.make_layout((*rows, width, blocks, b), stride=(stride_h, stride_s, 1, step or width, stride_b))
    tensor = cute.make_tensor(q.iterator + column, layout)
    return TmaOperand.make(tensor, tile_blocks or blocks, config.row_modes, step or width)


def cache_operand(config, cache, column, width, blocks, step=None):
    """the same columns of the cache, as (token, width, block, kv head, page)"""
    num_pages, page, h_kv, _ = cache.shape
    stride_page, stride_token, stride_h, _ = cache.stride
    shape, stride = (page, width, blocks, h_kv, num_pages), (stride_token, 1, step or width, stride_h, stride_page)
    tensor = cute.make_tensor(cache.iterator + column, cute.make_layout(shape, stride=stride))
    return TmaOperand.make(tensor, blocks, (config.box_tokens,), step or width)


def query_load(config, operand, rows, sDst, full):
    """this CTA's rows of q"""
    source = cute.domain_offset((rows.first_head, rows.token, 0, 0, 0), operand.tensor)
    if config.ragged:  # the index is how far along the token mode a request begins
        *modes, _ = source.shape
        shape, stride = (*modes, modes[rows.token_mode]), (*source.stride[:-1], source.stride[rows.token_mode])
        source = cute.make_tensor(source.iterator, cute.make_layout(shape, stride=stride))
    return TmaLoad.make(operand.atom, source, sDst, full, config.row_modes, every_lane=config.lane_arrivals)


def cache_load(config, operand, rows, sDst, full):
    """tiles of this CTA's kv head"""
    source, box = operand.tensor[None, None, None, rows.kv_head, None], (config.box_tokens,)
    return TmaLoad.make(operand.atom, source, sDst, full, box, hint=EVICT_FIRST, every_lane=config.lane_arrivals)


# ---------------------------------------------------------------------- pages
def tiles_per_load(page: int) -> int:
    """tiles whose pages fit into one table entry a lane, wherever the first one begins in its page"""
    offset = page - math.gcd(page, TILE)
    fits = [n for n in (1, 2, 4, 8, 16, 32) if (offset + n * TILE - 1) // page + 1 <= 32]
    return fits[-1]


@dataclass(frozen=True)
class PageSpan:
    """The pages of tiles base .. base + tiles_per_load - 1 of a request, one table entry a lane: a uniform load would be waited
    for on the spot.  Entries past the request's end are never read: tokens there come from its last page again, whatever they
    are: scores are masked and rows of v zeroed."""

    page: Constexpr[int]
    entries: Int32  # per lane
    base: Int32

    @classmethod
    def load(cls, page, block_table, batch, base, end, seqlen):
        """tiles base .. end - 1, or the first of them"""
        last = (end - 1) * TILE // page  # its first token exists; so do the others of its page, as far as TMA cares
        if page % TILE:
            last = (cutlass.min(end * TILE, seqlen) - 1) // page
        return cls(page, block_table[batch, cutlass.min(base * TILE // page + cute.arch.lane_idx(), last)], base)

    @classmethod
    def around(cls, page, entries, first, tile):
        """the span loaded last, where it is reloaded in tile `first` of an item and every tiles_per_load from there"""
        return cls(page, entries, tile - (tile - first) % tiles_per_load(page))

    def locate(self, tile, i, rows):
        """box i, of `rows` tokens, of tile `tile`: its number in its page, and the page"""
        if self.page == TILE:
            return 0, lane_value(self.entries, tile - self.base)
        if self.page % TILE == 0:
            tiles = self.page // TILE
            return tile % tiles, lane_value(self.entries, tile // tiles - self.base // tiles)
        token = tile * TILE + i * rows
        return token % self.page // rows, lane_value(self.entries, token // self.page - self.base * TILE // self.page)
