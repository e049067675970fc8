"""Every preset compiles for sm_90a, without a GPU, within the budgets; and configurations that break a budget are caught.

Spills, ignored setmaxnreg and serialised WGMMAs leave the results right: only these gates see them.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from flashmla_cute import heuristics, ops, resources
from flashmla_cute.kernels.config import (
    BATCH_INVARIANT,
    FORMATS,
    FP8_FORMATS,
    LAUNCH_REGISTERS,
    PRESETS,
    SCALED_FORMATS,
    SMEM_LIMIT,
    DecodeOptions,
    Fp8AppendConfig,
    Fp8Config,
    KVFormat,
    MLAConfig,
    ScheduleConfig,
    UpcastConfig,
)

RAGGED = MLAConfig(ragged=True), MLAConfig(ragged=True, head_tile=16), MLAConfig(ragged=True, causal=False, head_tile=64)
SHAPES = (  # every (latent, rope), a page of each kind of box, every option
    MLAConfig(page=8, sink=True, options=DecodeOptions(lse_log2=True)),
    MLAConfig(kv=KVFormat("bfloat16", 512, 0), page=96, options=DecodeOptions(softcap=30.0)),
    MLAConfig(kv=KVFormat("float16", 256, 64), page=128, q_pair=True, options=DecodeOptions(out="float32")),
    MLAConfig(kv=KVFormat("bfloat16", 256, 32), page=32, causal=False, options=DecodeOptions(window=100)),
    MLAConfig(kv=KVFormat("bfloat16", 128, 32), head_tile=16, page=1024, options=DecodeOptions(lse_by_token=True)),
)
PIECES = (
    MLAConfig(causal=False, fixed_pieces=True),
    MLAConfig(fixed_pieces=True, ragged=True, head_tile=16, sink=True),
    MLAConfig(kv=KVFormat("float16", 128, 32), fixed_pieces=True, page=32, q_pair=True, options=DecodeOptions(out="float32")),
    MLAConfig(fixed_pieces=True, lane_arrivals=True),
)
OTHERS = MLAConfig(split="float32"), MLAConfig(split="bfloat16"), MLAConfig(lane_arrivals=True), *RAGGED, *SHAPES, *PIECES
FLAT = FP8_FORMATS["float8_e4m3fn"]


def fp8(q_dtype: str = "bfloat16", q_terms: int = 2, **base):
    base = MLAConfig(**{"kv": FORMATS[q_dtype] if q_dtype in FORMATS else FORMATS["bfloat16"], **base})
    return ops.Fp8DecodeOp(heuristics.fp8_config(base, FLAT, q_dtype, q_terms))


FP8_DECODE = [
    fp8(),
    fp8(causal=False),
    fp8("float16"),
    fp8(q_terms=1),
    fp8("float8_e4m3fn"),
    fp8(head_tile=16, q_pair=True, sink=True),
    fp8(page=16, options=DecodeOptions(window=512, softcap=30.0)),
    fp8("float8_e4m3fn", page=16, head_tile=64),
    fp8(options=DecodeOptions(out="float32"), split="float32"),
    fp8(ragged=True),
    fp8(lane_arrivals=True),
]
UPCAST_DECODE = [
    ops.Fp8DecodeOp(UpcastConfig(base=MLAConfig(**base)))
    for base in (
        dict(),
        dict(causal=False),
        dict(kv=FORMATS["float16"]),
        dict(head_tile=16, q_pair=True, sink=True),
        dict(page=16, options=DecodeOptions(window=512, softcap=30.0)),
        dict(page=1024, head_tile=64, causal=False),
        dict(options=DecodeOptions(out="float32"), split="float32"),
        dict(ragged=True),
        dict(lane_arrivals=True),
    )
]
FP8_APPEND = [
    *(ops.Fp8AppendOp(Fp8AppendConfig(source=source)) for source in (*FORMATS, FLAT.dtype)),
    *(ops.Fp8AppendOp(Fp8AppendConfig(kv=kv, source=source)) for kv in SCALED_FORMATS.values() for source in FORMATS),
]
DECODE = [*(ops.DecodeOp(config) for config in (*PRESETS, *OTHERS)), *FP8_DECODE, *UPCAST_DECODE]
ATTENTION = {MLAConfig: "DenseDecode", Fp8Config: "Fp8Decode", UpcastConfig: "UpcastDecode"}  # the kernel beside Combine
SCHEDULE = [op(config) for op in (ops.ScheduleOp, ops.RaggedScheduleOp) for config in (ScheduleConfig(), BATCH_INVARIANT)]
MERGE = [ops.MergeOp(MLAConfig(kv=kv, causal=False, split=kv.dtype)) for kv in FORMATS.values()]
APPEND = [*(ops.AppendOp(MLAConfig(kv=kv, causal=False)) for kv in FORMATS.values()), *FP8_APPEND]
STARVED = ops.DecodeOp(replace(PRESETS[0], value_registers=152))
TOO_MUCH_MEMORY = [ops.DecodeOp(replace(PRESETS[0], stages=4)), ops.Fp8DecodeOp(Fp8Config(stages=6))]


def label(op):
    return f"{op.name}-{op.config.name}"


@pytest.fixture(scope="session")
def gate():
    """op -> what its compile says; every op once, two at a time, each in its own process"""
    with ThreadPoolExecutor(max_workers=2) as pool:
        started = {
            op: pool.submit(resources.gate, op) for op in (*DECODE, *SCHEDULE, *MERGE, *APPEND, STARVED, *TOO_MUCH_MEMORY)
        }
        yield lambda op: started[op].result()
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------- budgets
@pytest.mark.parametrize("op", [*DECODE, *SCHEDULE, *MERGE, *APPEND], ids=label)
def test_fits(gate, op):
    result = gate(op)
    assert result.spill_bytes == 0
    assert [kernel for kernel in result.kernels.values() if kernel.frame] == []
    assert result.advisories == ()
    assert result.smem <= SMEM_LIMIT


@pytest.mark.parametrize("op", DECODE, ids=label)
def test_decode_launches_with_the_registers_that_setmaxnreg_moves(gate, op):
    kernels, attention = gate(op).kernels, ATTENTION[type(op.config)]
    assert set(kernels) == {attention, "Combine"}
    if attention == "Fp8Decode":  # its roles keep those of the launch
        assert kernels[attention].registers <= LAUNCH_REGISTERS
    else:
        assert kernels[attention].registers == LAUNCH_REGISTERS
    assert kernels[attention].smem > SMEM_LIMIT // 2, "the register budgets assume one CTA an SM"


@pytest.mark.parametrize("op", SCHEDULE, ids=label)
def test_schedule_fits_its_thousand_threads(gate, op):
    kernels = gate(op).kernels
    (name,) = kernels
    assert name == ("BuildFixedSchedule" if op.config.max_pieces else "BuildSchedule")
    assert kernels[name].registers * op.config.num_threads <= 65536
    assert kernels[name].smem > 8 * op.config.max_batch, "prefix sums lie in shared memory"


# ---------------------------------------------------------------------- every gate can trip
def test_ignored_setmaxnreg_is_seen(gate):
    assert any("setmaxnreg" in text and "ignored" in text for text in gate(STARVED).advisories)


def test_serialised_wgmma_is_seen(gate):
    assert any("wgmma" in text and "serialized" in text for text in gate(STARVED).advisories)


def test_spills_are_seen(gate):
    assert gate(STARVED).spill_bytes > 0
    assert gate(STARVED).kernels["DenseDecode"].frame > 0


@pytest.mark.parametrize("op", TOO_MUCH_MEMORY, ids=label)
def test_too_much_shared_memory_does_not_compile(gate, op):
    with pytest.raises(RuntimeError, match=rf"\d+ bytes of shared memory, (.*; )?{SMEM_LIMIT} allowed"):
        gate(op)
