"""Which query token and head each of a CTA's 64 rows is.

The rows of one (request, kv head) are ordered (query token, head).  Two tilings, chosen by `MLAConfig.head_tile`:
  0       rows are one axis of stride q.stride(head), cut every 64.  Needs one kv head and mergeable q strides.
  1..64   a tile is 64 / head_tile tokens x head_tile neighbouring heads of one kv head; any strides, any number of kv heads.
          Heads past the group's end are computed and dropped: head_tile is the power of two that holds the group, or 64.
"""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ..config import TILE


def num_row_tiles(head_tile, s_q, h_q, h_kv):
    """Row tiles of a request over all kv heads; plain integers or Int32."""
    group = h_q // h_kv
    if head_tile == 0:
        return (s_q * h_q + TILE - 1) // TILE
    token_tile = TILE // head_tile
    return h_kv * ((s_q + token_tile - 1) // token_tile) * ((group + head_tile - 1) // head_tile)


@dataclass(frozen=True)
class RowTile:
    head_tile: Constexpr[int]
    kv_head: Int32
    token: Int32  # first token of the tile; 0 in the flat tiling
    head: Int32  # first head of the tile within its group; first row of the tile in the flat tiling
    s_q: Int32
    group: Int32  # query heads of a kv head

    @classmethod
    def of(cls, head_tile, index, s_q, h_q, h_kv):
        """tile `index` of num_row_tiles(..)"""
        group = h_q // h_kv
        if const_expr(head_tile == 0):
            return cls(head_tile, Int32(0), Int32(0), index * TILE, s_q, group)
        token_tile = TILE // head_tile
        head_tiles, token_tiles = (group + head_tile - 1) // head_tile, (s_q + token_tile - 1) // token_tile
        rest = index // head_tiles
        head, token = index % head_tiles * head_tile, rest % token_tiles * token_tile
        return cls(head_tile, rest // token_tiles, token, head, s_q, group)

    @property
    def first_head(self):
        """head coordinate of the tile's box in q; the row coordinate in the flat tiling"""
        return self.kv_head * self.group + self.head

    @property
    def token_mode(self):
        """of q's coordinates: the one along which the next query token lies, `token_step` further"""
        return 0 if self.head_tile == 0 else 1

    @property
    def token_step(self):
        return self.group if self.head_tile == 0 else Int32(1)

    def token_of(self, row):
        if const_expr(self.head_tile == 0):
            return (self.head + row) // self.group
        return self.token + row // self.head_tile

    @cute.jit
    def locate(self, row):
        """row 0..63 of the tile -> (query token, query head, whether the row exists)"""
        token = self.token_of(row)
        if const_expr(self.head_tile == 0):
            head = self.head + row - token * self.group
        else:
            head = self.head + row % self.head_tile
        return token, self.kv_head * self.group + head, (token < self.s_q) & (head < self.group)
