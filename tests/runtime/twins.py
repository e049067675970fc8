"""The compiled functions in plain Python on CPU tensors, with their arguments: so that all around them runs without a GPU.

What they compute comes from the arguments alone, in float64: the schedule's records, pages, strides and the mask all count.
"""

import math
from dataclasses import astuple, fields

import torch

from flashmla_cute import checks, compile, ops, plan
from flashmla_cute.kernels.parts.work import BEGIN, COUNT, RECORD
from flashmla_cute.reference import dequantise, emulate_decode, pack, quantise, unpack
from flashmla_cute.schedule import Item, Merge, Schedule, build_schedule

NUM_SMS = 6  # of the card that there is not: few, so that small batches are split


def get(op: type, config):
    """instead of compile.get"""
    make = {
        ops.DecodeOp: _decode,
        ops.Fp8DecodeOp: _fp8_decode,
        ops.ScheduleOp: _schedule,
        ops.RaggedScheduleOp: _ragged_schedule,
        ops.AppendOp: _append,
        ops.MergeOp: _merge,
        ops.Fp8AppendOp: _fp8_append,
    }[op]
    return make(config)


def install(monkeypatch):
    """CPU tensors pass for those of a Hopper GPU"""
    monkeypatch.setattr(checks, "is_hopper", lambda name, tensor: None)
    monkeypatch.setattr(plan, "num_sms", lambda index: NUM_SMS)
    monkeypatch.setattr(compile, "get", get)


def _schedule(config):
    ragged = _ragged_schedule(config)
    return lambda cache_seqlens, *others: ragged(cache_seqlens, None, *others)


def _ragged_schedule(config):
    def launch(cache_seqlens, cu_seqlens_q, items, parts, merges, row_tiles, max_tokens, reach):
        begins = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
        made = build_schedule(cache_seqlens.tolist(), row_tiles, parts.shape[0], config, max_tokens, reach, begins)
        for tensor in (items, parts, merges):
            tensor.zero_()
        for i, item in enumerate(made.items):
            items[i, : len(fields(Item))] = torch.tensor(astuple(item))
        for p, begin in enumerate(made.part_begin[:-1]):
            count = made.part_begin[p + 1] - begin
            if count:
                parts[p, :RECORD] = items[begin]
            parts[p, BEGIN], parts[p, COUNT] = begin, count
        merges[0, 0] = len(made.merges)
        for i, merge in enumerate(made.merges):
            merges[1 + i] = torch.tensor(astuple(merge))

    return launch


def read_schedule(items: torch.Tensor, parts: torch.Tensor, merges: torch.Tensor) -> Schedule:
    begins = [*parts[:, BEGIN].tolist(), int(parts[-1, BEGIN] + parts[-1, COUNT])]
    listed = tuple(Item(*record[: len(fields(Item))]) for record in items[: begins[-1]].tolist())
    merged = tuple(Merge(*row) for row in merges[1 : 1 + int(merges[0, 0])].tolist())
    return Schedule(listed, tuple(begins), merged, int((parts[:, COUNT] > 0).sum()))


def _decode(config):
    def launch(q, pool, block_table, items, parts, merges, *outputs):
        out, lse, o_split, lse_split, softmax_scale, _, q_rope, sink = outputs
        made, options, latent = read_schedule(items, parts, merges), config.options, config.kv.latent
        q = q if q_rope is None else torch.cat([q, q_rope], -1)
        assert (q_rope is not None, sink is not None) == (config.q_pair, config.sink)
        given = dict(options=options, sink=sink)
        result_o, result_lse = emulate_decode(q, pool, block_table, made, softmax_scale, config.causal, latent, **given)
        if options.lse_by_token and result_lse.dim() == 3:
            result_lse = result_lse.transpose(1, 2).flatten(0, 1)
        out.copy_(result_o)
        lse.copy_(result_lse / math.log(2) if options.lse_log2 else result_lse)
        o_split.zero_()  # (written on the GPU too, with what nobody may rely on)
        lse_split.zero_()

    return launch


def _merge(_config):
    def launch(o_split, lse_split, merges, out, lse, _num_sms):
        for request, first, pieces, _ in merges[1 : 1 + int(merges[0, 0])].tolist():
            mine = slice(first, first + pieces)
            lses = lse_split[mine].double()
            total = lses.logsumexp(0)
            weights = torch.where(total.isinf(), 0.0, (lses - total).exp())
            out[request] = (weights[..., None] * o_split[mine].double()).sum(0)
            lse[request] = total.T

    return launch


def _fp8_decode(config):
    decode = _decode(config.base)

    def launch(q, pool, *others):
        *others, kv_scale, q_scale = others
        if config.kv.scales:
            assert str(q.dtype) == f"torch.{config.base.kv.dtype}" and str(others[4].dtype) == f"torch.{config.base.out}"
            return decode(q, unpack(pool), *others)
        assert str(q.dtype) == f"torch.{config.q_dtype}" and str(others[4].dtype) == f"torch.{config.base.out}"
        q64 = q.double() * (q_scale.double() if q.dtype == pool.dtype else 1.0)
        decode(q64, dequantise(pool, kv_scale), *others)

    return launch


def _fp8_append(config):
    append = _append(config)

    def launch(latent, rope, slots, pool, scale):
        assert str(latent.dtype) == f"torch.{config.source}"
        if config.kv.scales:
            for token, slot in enumerate(slots.tolist()):
                if 0 <= slot < pool.shape[0] * pool.shape[1]:
                    pool[slot // pool.shape[1], slot % pool.shape[1]] = pack(latent[token], rope[token], config.kv.scales)
            return
        is_quantised = latent.dtype == pool.dtype
        rows = [x if is_quantised else quantise(x, scale) for x in (latent, rope)]
        append(*(x.view(torch.uint8) for x in rows), slots, pool.view(torch.uint8))

    return launch


def _append(config):
    def launch(latent, rope, slots, pool):
        for token, slot in enumerate(slots.tolist()):
            if 0 <= slot < pool.shape[0] * pool.shape[1]:
                columns = torch.cat([latent[token], rope[token]], -1) if config.kv.rope else latent[token]
                pool[slot // pool.shape[1], slot % pool.shape[1]] = columns

    return launch
