"""An e4m3 cache around its kernels, without a GPU: twins in plain Python compute what they would."""

import pytest
import torch

from flashmla_cute import DecodePlan, PagedKVCache, heuristics, mla_decode
from flashmla_cute.kernels.config import FP8_FORMATS, Fp8AppendConfig, Fp8Config, KVFormat, MLAConfig
from flashmla_cute.reference import dequantise, quantise, reference_decode

from . import twins

E4M3, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16
FLAT = FP8_FORMATS["float8_e4m3fn"]
LENGTHS = [130, 0, 70]


@pytest.fixture
def on_twins(monkeypatch):
    twins.install(monkeypatch)


def make_cache(scale=0.5, dtype=E4M3, h_kv=1, q_scale=None) -> PagedKVCache:
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(9, 64, h_kv, 576, generator=generator)
    pool = quantise(pool, scale) if dtype == E4M3 else pool.to(dtype)
    table = torch.tensor([[3, 1, 8], [-1, -1, -1], [0, 2, -1]], dtype=torch.int32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    scales = dict(scale=scale, q_scale=q_scale) if dtype == E4M3 else {}
    return PagedKVCache.from_tensors(pool, table, lengths, **scales)


def make_q(dtype=BF16, s_q=1, h_q=4) -> torch.Tensor:
    return torch.randn(3, s_q, h_q, 576, generator=torch.Generator().manual_seed(1)).to(dtype)


# ---------------------------------------------------------------------- results
@pytest.mark.parametrize("dtype", [BF16, FP16, E4M3], ids=str)
@pytest.mark.parametrize("q_scale", [None, 2.0, torch.tensor([2.0])], ids=str)
def test_decode(on_twins, dtype, q_scale):
    """(the scale of an e4m3 q does not touch another)"""
    cache, q = make_cache(q_scale=q_scale), make_q(dtype, s_q=2)
    plan = DecodePlan(cache, 4, 2)
    for _ in range(2):  # the second call is a remembered one
        out, lse = mla_decode(q, cache, plan)
        assert out.dtype == (BF16 if dtype == E4M3 else dtype)
        true_q = q.double() * (1.0 if q_scale is None or dtype != E4M3 else float(q_scale))
        wanted, wanted_lse = reference_decode(
            true_q, dequantise(cache.pool, cache.scale), cache.block_table, LENGTHS, 576**-0.5, True, 512
        )
        torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


def test_out_of_an_e4m3_q_may_be_float16(on_twins):
    cache = make_cache()
    out = torch.empty(3, 1, 4, 512, dtype=FP16)
    assert mla_decode(make_q(E4M3), cache, DecodePlan(cache, 4), out=out)[0] is out


def test_another_q_dtype_is_another_configuration(on_twins):
    cache = make_cache()
    plan = DecodePlan(cache, 4)
    assert [mla_decode(make_q(dtype), cache, plan)[0].dtype for dtype in (BF16, FP16, BF16, E4M3)] == [BF16, FP16, BF16, BF16]


@pytest.mark.parametrize("dtype", [BF16, FP16, E4M3], ids=str)
def test_append(on_twins, dtype):
    cache = PagedKVCache.allocate(5, 2, 128, dtype=E4M3, scale=0.25, device="cpu")
    cache.pool.view(torch.uint8).zero_()
    rows = torch.randn(70, 576)
    rows[3, :3] = torch.tensor([1e6, -1e6, float("nan")])
    rows = quantise(rows, 1.0) if dtype == E4M3 else rows.clamp(-6e4, 6e4).to(dtype)
    slots = cache.extend([64, 6])
    cache.append(rows[:, :512], rows[:, 512:], slots)
    wanted = (rows if dtype == E4M3 else quantise(rows, 0.25)).view(torch.uint8)
    assert torch.equal(cache.pool.view(torch.uint8).view(-1, 576)[slots], wanted)
    assert cache.pool.float().view(-1, 576)[slots[3], :2].abs().tolist() == [448.0, 448.0]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_convert_finds_the_scale_among_the_requests_tokens(on_twins, dtype):
    cache = make_cache(dtype=dtype)
    cache.pool[7] = 1e4  # a spare page
    cache.pool[8, 2:] = float("nan")  # past the end of request 0
    cache.pool[1, 5, 0, 9] = -37.0
    converted = cache.convert()
    assert converted.scale.item() == pytest.approx(37 / 448)
    assert converted.pool.dtype == E4M3 and converted.block_table is cache.block_table
    used = cache.pool[[3, 1, 0]]
    error = dequantise(converted.pool.view(9, 64, 1, 576), converted.scale)[[3, 1, 0]] - used.double()
    assert (
        error.abs() <= used.double().abs() / 16 + 37 / 448 * 2.0**-10
    ).all()  # e4m3's rounding: relative, or half a subnormal
    assert converted.pool[7].float().abs().max() == 448
    assert cache.convert(scale=2.0).scale.item() == 2.0


def test_largest_of_no_tokens_is_zero_and_converts(on_twins):
    cache = make_cache(dtype=BF16)
    cache.cache_seqlens.zero_()
    assert cache.largest().item() == 0.0
    assert torch.isfinite(cache.convert().scale).all()


# ---------------------------------------------------------------------- errors
def rejects(error, *words):
    return pytest.raises(error, match=r"[\s\S]*".join(word.replace("(", r"\(").replace(")", r"\)") for word in words))


@pytest.mark.parametrize(
    "scale, error, words",
    [
        (0.0, ValueError, ("scale is 0.0", "positive finite")),
        (float("inf"), ValueError, ("scale is inf", "positive finite")),
        ("one", TypeError, ("scale is a str", "a number or a tensor")),
        (torch.ones(2), ValueError, ("scale.shape is (2,)", "one element")),
        (torch.ones(1, dtype=torch.float64), ValueError, ("scale.dtype is torch.float64", "torch.float32")),
    ],
    ids=str,
)
def test_scale_rejects(scale, error, words):
    cache = make_cache()
    for name in ("scale", "q_scale"):
        with rejects(error, name, words[0].removeprefix("scale"), *words[1:]):
            PagedKVCache.from_tensors(cache.pool, cache.block_table, cache.cache_seqlens, **{name: scale})


def test_a_16_bit_cache_has_no_scale():
    cache = make_cache(dtype=BF16)
    with rejects(ValueError, "scale is 1.0", "None with a pool of torch.bfloat16"):
        PagedKVCache.from_tensors(cache.pool, cache.block_table, cache.cache_seqlens, scale=1.0)
    with rejects(ValueError, "dtype is torch.bfloat16", "float8_e4m3fn"):
        cache.convert(BF16)
    with rejects(ValueError, "cache.pool.dtype is torch.float8_e4m3fn", "bfloat16"):
        make_cache().convert()


def test_query_rejects(on_twins):
    cache = make_cache()
    plan = DecodePlan(cache, 4)
    with rejects(ValueError, "q.dtype is torch.float32", "bfloat16 or torch.float16 or torch.float8_e4m3fn"):
        mla_decode(make_q(torch.float32), cache, plan)
    with rejects(ValueError, "out.dtype is torch.float16", "torch.bfloat16"):
        mla_decode(make_q(), cache, plan, out=torch.empty(3, 1, 4, 512, dtype=FP16))
    with rejects(ValueError, "query_terms is 3", "1 or 2"):
        DecodePlan(cache, 4, query_terms=3)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(kv=KVFormat("float8_e5m2", itemsize=1)), ("kv", "e5m2", "float8_e4m3fn")),
        (dict(base=MLAConfig(kv=KVFormat("bfloat16", 256, 64))), ("base.kv", "256", "(512, 64)")),
        (dict(q_dtype="float32"), ("q_dtype", "float32", "float8_e4m3fn")),
        (dict(q_terms=3), ("q_terms", "3", "1, 2")),
        (dict(q_dtype="float8_e4m3fn"), ("q_terms", "2", "1 with q_dtype float8_e4m3fn")),
        (dict(stages=2), ("stages", "2", "3 or more")),
        (dict(open_steps=36), ("open_steps", "36", "1 .. 35")),
    ],
    ids=str,
)
def test_config_rejects(change, words):
    with rejects(ValueError, "Fp8Config", *words):
        Fp8Config(**change)


def test_append_config_rejects():
    with rejects(ValueError, "source is float32", "bfloat16, float16, float8_e4m3fn"):
        Fp8AppendConfig(source="float32")


def test_configuration_of_a_call():
    base = MLAConfig(causal=False, head_tile=16, split="float32")
    one = heuristics.fp8_config(base, FLAT, "float8_e4m3fn", 2)
    assert (one.q_terms, one.q_slots, one.base) == (1, 1, base)
    two = heuristics.fp8_config(base, FLAT, "float16", 2)
    assert (two.q_terms, two.q_slots) == (2, 2)
