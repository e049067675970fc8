"""An item's results: its rows' o and lse -> gmem, final or partial."""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, const_expr

from .softmax import LN2, sink_share
from .store import store_lse, store_rows, store_wide
from .tiles import fragment_row, thread_in_warpgroup
from .transposed import store_columns
from .work import WorkItem


@dataclass(frozen=True)
class Outputs:
    o: cute.Tensor  # (request, query token, head, latent); ragged: (token, head, latent)
    lse: cute.Tensor  # (request, head, query token), or (token, head), always if ragged
    o_split: cute.Tensor  # (slot, query token, head, latent) config.split
    lse_split: cute.Tensor  # (slot, query token, head)


def read_item(config, result: Outputs, sRecord, rows):
    """the item, and its rows: no more query tokens than q and the row tiles have"""
    item = WorkItem.read(sRecord, config.ragged, config.fixed_pieces)
    if config.ragged:
        rows = replace(rows, s_q=cutlass.min(item.num_queries, rows.s_q, result.o.shape[0] - item.token))
    return item, rows


@cute.jit
def join_sink(config: Constexpr, inv_sum, softmax, gSink, item, rows):
    """(partial results are left without it: the combine adds it once)"""
    if const_expr(config.sink):
        if item.slot < 0:
            for r in cutlass.range_constexpr(2):
                _, head, exists = rows.locate(fragment_row(thread_in_warpgroup()) + 8 * r)
                if exists:
                    inv_sum[r] = inv_sum[r] * sink_share(softmax.lse_log2(r), gSink[head])


@cute.jit
def store_item_lse(config: Constexpr, softmax, result: Outputs, item, rows):
    tid = thread_in_warpgroup()
    if tid % 4 == 0:
        for r in cutlass.range_constexpr(2):
            token, head, exists = rows.locate(fragment_row(tid) + 8 * r)
            if exists:
                v = softmax.lse_log2(r)
                if item.slot < 0:
                    store_lse(config, result.lse, item.owner(config.ragged), rows.s_q, token, head, v)
                else:
                    result.lse_split[item.slot, token, head] = v * LN2


@cute.jit
def store_item_o(config: Constexpr, half: Constexpr[int], rO, inv_sum, result: Outputs, item, rows):
    """a VALUE warpgroup's half of the columns"""
    if item.slot < 0:
        gO = _final_o(config, result, item)
        if const_expr(config.out == "float32"):
            store_wide(half, rO, inv_sum, gO, rows)
        else:
            store_rows(half, rO, inv_sum, gO, rows, False)
    elif const_expr(config.split == "float32"):
        store_wide(half, rO, inv_sum, result.o_split[item.slot, None, None, None], rows)
    else:
        store_rows(half, rO, inv_sum, result.o_split[item.slot, None, None, None], rows, True)


def _final_o(config, result: Outputs, item):
    """(token, head, column) of the item's request"""
    if config.ragged:
        return cute.domain_offset((item.token, 0, 0), result.o)
    return result.o[item.batch, None, None, None]


@cute.jit
def store_item_columns(config: Constexpr, first, rO: tuple, sInv, result: Outputs, item, rows):
    """a VALUE warp's columns `first` .. of o^T (parts/transposed.py)"""
    if item.slot < 0:
        store_columns(first, rO, sInv, _final_o(config, result, item), rows, False)
    else:
        store_columns(first, rO, sInv, result.o_split[item.slot, None, None, None], rows, config.split != "float32")
