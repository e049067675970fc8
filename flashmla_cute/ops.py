"""The compiled entry points: what one call launches, and the symbolic arguments it is compiled from."""

import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.runtime import make_fake_stream

from .kernels import append, combine, dense_decode, fixed_schedule, fp8_decode, schedule, upcast_decode
from .kernels.config import Fp8AppendConfig, Fp8Config, MLAConfig, ScheduleConfig, UpcastConfig


def _stream():
    return make_fake_stream(use_tvm_ffi_env_stream=True)  # torch's current stream, asked for at each call


class DecodeOp:
    """attention of one layer: the decode kernel and the merge of its partials; one call, two launches"""

    name = "decode"

    def __init__(self, config: MLAConfig):
        self.config = config

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        cache: cute.Tensor,
        block_table: cute.Tensor,
        items: cute.Tensor,
        parts: cute.Tensor,
        merges: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        o_split: cute.Tensor,
        lse_split: cute.Tensor,
        softmax_scale: Float32,
        num_sms: Int32,
        q_rope: cute.Tensor | None,
        sink: cute.Tensor | None,
        stream,
    ):
        result = dense_decode.Outputs(out, lse, o_split, lse_split)
        attention = dense_decode.DenseDecode(self.config)
        attention(q, q_rope, cache, block_table, items, parts, result, sink, softmax_scale, stream)
        combine.Combine(self.config)(o_split, lse_split, merges, out, lse, sink, num_sms, stream)

    def fake_args(self):
        fake = dense_decode.FakeArgs.of(self.config)
        inputs = (fake.q, fake.cache, fake.block_table, fake.items, fake.parts, combine.fake_merges())
        result = (fake.result.o, fake.result.lse, fake.result.o_split, fake.result.lse_split)
        return (*inputs, *result, Float32(1), Int32(1), fake.q_rope, fake.sink, _stream())


class MergeOp:
    """partial results, of other GPUs for one -> a result; the merge of DecodeOp alone"""

    name = "merge"

    def __init__(self, config: MLAConfig):
        self.config = config

    @cute.jit
    def __call__(self, o_split, lse_split, merges, out, lse, num_sms: Int32, stream):
        combine.Combine(self.config)(o_split, lse_split, merges, out, lse, None, num_sms, stream)

    def fake_args(self):
        result = dense_decode.FakeArgs.of(self.config).result
        outputs = (combine.fake_merges(), result.o, result.lse)
        return (result.o_split, result.lse_split, *outputs, Int32(1), _stream())


class Fp8DecodeOp:
    """DecodeOp over an e4m3 cache: followed by its scale, and that of q where q is e4m3 too (otherwise any tensor; both, where
    tokens have scales of their own)"""

    name = "fp8_decode"

    def __init__(self, config: Fp8Config | UpcastConfig):
        self.config = config

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        cache: cute.Tensor,
        block_table: cute.Tensor,
        items: cute.Tensor,
        parts: cute.Tensor,
        merges: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        o_split: cute.Tensor,
        lse_split: cute.Tensor,
        softmax_scale: Float32,
        num_sms: Int32,
        q_rope: cute.Tensor | None,
        sink: cute.Tensor | None,
        kv_scale: cute.Tensor,
        q_scale: cute.Tensor,
        stream,
    ):
        result, queries, softmax = dense_decode.Outputs(out, lse, o_split, lse_split), (q, q_rope), (softmax_scale, sink)
        if const_expr(isinstance(self.config, UpcastConfig)):
            attention = upcast_decode.UpcastDecode(self.config)
            attention(queries, cache, block_table, (items, parts), result, softmax, stream)
        else:
            attention, scales = fp8_decode.Fp8Decode(self.config), fp8_decode.Scales(kv_scale, q_scale)
            attention(queries, cache, block_table, (items, parts), result, scales, softmax, stream)
        combine.Combine(self.config.base)(o_split, lse_split, merges, out, lse, sink, num_sms, stream)

    def fake_args(self):
        fake = dense_decode.FakeArgs.of(self.config.base)
        module = upcast_decode if isinstance(self.config, UpcastConfig) else fp8_decode
        own, scales = module.FakeArgs.of(self.config, fake.q, fake.q_rope, fake.cache), fp8_decode.fake_scales()
        inputs = (own.q, own.cache, fake.block_table, fake.items, fake.parts, combine.fake_merges())
        result = (fake.result.o, fake.result.lse, fake.result.o_split, fake.result.lse_split)
        return (*inputs, *result, Float32(1), Int32(1), own.q_rope, fake.sink, scales.kv, scales.q, _stream())


def _schedule_of(config: ScheduleConfig):
    return fixed_schedule.BuildFixedSchedule(config) if config.max_pieces else schedule.BuildSchedule(config)


class ScheduleOp:
    """lengths -> spans of work; once a step"""

    name = "schedule"

    def __init__(self, config: ScheduleConfig):
        self.config = config

    @cute.jit
    def __call__(self, cache_seqlens, items, parts, merges, row_tiles: Int32, max_tokens: Int32, reach: Int32, stream):
        _schedule_of(self.config)(cache_seqlens, items, parts, merges, row_tiles, max_tokens, reach, stream)

    def fake_args(self):
        return (*schedule.fake_args(self.config), Int32(1), Int32(1), Int32(1), _stream())


class RaggedScheduleOp:
    """the same for requests of different query counts"""

    name = "ragged_schedule"

    def __init__(self, config: ScheduleConfig):
        self.config = config

    @cute.jit
    def __call__(
        self, cache_seqlens, cu_seqlens_q, items, parts, merges, row_tiles: Int32, max_tokens: Int32, reach: Int32, stream
    ):
        build = _schedule_of(self.config)
        build(cache_seqlens, items, parts, merges, row_tiles, max_tokens, reach, stream, cu_seqlens_q)

    def fake_args(self):
        cache_seqlens, *outputs = schedule.fake_args(self.config)
        return (cache_seqlens, schedule.fake_cu_seqlens_q(), *outputs, Int32(1), Int32(1), Int32(1), _stream())


class AppendOp:
    """new tokens -> their slots of the cache"""

    name = "append"

    def __init__(self, config: MLAConfig):
        self.config = config

    @cute.jit
    def __call__(self, latent, rope, slots, cache, stream):
        append.Append(self.config)(latent, rope, slots, cache, None, stream)

    def fake_args(self):
        *rows, _scale = append.fake_args(self.config)
        return (*rows, _stream())


class Fp8AppendOp:
    """new tokens -> their slots of an e4m3 cache"""

    name = "fp8_append"

    def __init__(self, config: Fp8AppendConfig):
        self.config = config

    @cute.jit
    def __call__(self, latent, rope, slots, cache, scale, stream):
        append.Append(self.config)(latent, rope, slots, cache, scale, stream)

    def fake_args(self):
        return (*append.fake_args(self.config), _stream())
