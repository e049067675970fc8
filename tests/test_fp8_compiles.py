"""The kernels of e4m3 caches compile for sm_90a, without a GPU, within the budgets of tests/test_compiles.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from flashmla_cute import heuristics, ops, resources
from flashmla_cute.kernels.config import (
    FORMATS,
    FP8_FORMATS,
    LAUNCH_REGISTERS,
    SMEM_LIMIT,
    DecodeOptions,
    Fp8AppendConfig,
    Fp8Config,
    MLAConfig,
)

FLAT = FP8_FORMATS["float8_e4m3fn"]


def decode(q_dtype: str = "bfloat16", q_terms: int = 2, **base):
    base = MLAConfig(**{"kv": FORMATS[q_dtype] if q_dtype in FORMATS else FORMATS["bfloat16"], **base})
    return ops.Fp8DecodeOp(heuristics.fp8_config(base, FLAT, q_dtype, q_terms))


DECODE = [
    decode(),
    decode(causal=False),
    decode("float16"),
    decode(q_terms=1),
    decode("float8_e4m3fn"),
    decode(head_tile=16, q_pair=True, sink=True),
    decode(page=16, options=DecodeOptions(window=512, softcap=30.0)),
    decode("float8_e4m3fn", page=16, head_tile=64),
    decode(options=DecodeOptions(out="float32"), split="float32"),
    decode(ragged=True),
    decode(lane_arrivals=True),
]
APPEND = [ops.Fp8AppendOp(Fp8AppendConfig(source=source)) for source in (*FORMATS, FLAT.dtype)]


def label(op):
    return f"{op.name}-{op.config.name}"


@pytest.fixture(scope="session")
def gate():
    """op -> what its compile says; every op once, two at a time, each in its own process"""
    with ThreadPoolExecutor(max_workers=2) as pool:
        started = {op: pool.submit(resources.gate, op) for op in (*DECODE, *APPEND)}
        yield lambda op: started[op].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("op", [*DECODE, *APPEND], ids=label)
def test_fits(gate, op):
    result = gate(op)
    assert result.spill_bytes == 0
    assert [kernel for kernel in result.kernels.values() if kernel.frame] == []
    assert result.advisories == ()
    assert result.smem <= SMEM_LIMIT


@pytest.mark.parametrize("op", DECODE, ids=label)
def test_decode_launches_with_the_registers_that_setmaxnreg_moves(gate, op):
    kernels = gate(op).kernels
    assert set(kernels) == {"Fp8Decode", "Combine"}
    assert kernels["Fp8Decode"].registers == LAUNCH_REGISTERS
    assert kernels["Fp8Decode"].smem > SMEM_LIMIT // 2, "the register budgets assume one CTA an SM"


def test_too_much_shared_memory_does_not_compile():
    with pytest.raises(RuntimeError, match=rf"\d+ bytes of shared memory, {SMEM_LIMIT} allowed"):
        resources.gate(ops.Fp8DecodeOp(Fp8Config(v_units=3)))
