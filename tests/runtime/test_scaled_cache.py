"""Caches whose tokens have scales of their own, without a GPU: their bytes, and twins in plain Python for their kernels."""

import struct

import pytest
import torch

from flashmla_cute import DecodePlan, PagedKVCache, heuristics, mla_decode
from flashmla_cute.kernels.config import FORMATS, SCALED_FORMATS, Fp8AppendConfig, KVFormat, MLAConfig, UpcastConfig
from flashmla_cute.reference import pack, quantise, reference_decode, unpack

from . import twins
from .test_fp8 import make_cache, make_q, rejects

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
LENGTHS = [130, 0, 70]
every_count = pytest.mark.parametrize("scales", SCALED_FORMATS)


@pytest.fixture
def on_twins(monkeypatch):
    twins.install(monkeypatch)


def rows(count: int, *shape: int, dtype=BF16) -> torch.Tensor:
    values = torch.randn(count, *shape, 576, generator=torch.Generator().manual_seed(0))
    return (values * torch.logspace(-3, 3, count).view(-1, *[1] * (len(shape) + 1))).to(dtype)


def scaled_cache(scales=4, h_kv=1, pool=None) -> PagedKVCache:
    """test_fp8's cache in 656 bytes a token"""
    cache = make_cache(dtype=BF16, h_kv=h_kv)
    pool = pack(cache.pool[..., :512], cache.pool[..., 512:], scales) if pool is None else pool
    return PagedKVCache.from_tensors(pool, cache.block_table, cache.cache_seqlens, scales=scales)


# ---------------------------------------------------------------------- bytes
def test_format():
    four, one = SCALED_FORMATS[4], SCALED_FORMATS[1]
    assert (four.bytes_per_token, four.rope_byte, four.head_dim) == (656, 528, 576) == (one.bytes_per_token, 528, 576)
    assert [kv.bytes_per_token for kv in (KVFormat("bfloat16"), KVFormat("float8_e4m3fn", itemsize=1))] == [1152, 576]


def test_a_token_byte_by_byte():
    """vLLM's fp8_ds_mla: 512 e4m3, four little-endian float32, 64 bfloat16"""
    latent, rope = torch.zeros(512), torch.arange(64.0)
    latent[0], latent[1], latent[128], latent[300] = 448.0, 1.0, -896.0, 0.5
    token = bytes(pack(latent, rope, 4).tolist())
    assert len(token) == 656
    assert token[0] == 0x7E and token[1] == 0x38 and token[128] == 0xFE and token[300] == 0x7E  # 448, 1, -448, 448
    assert struct.unpack("<4f", token[512:528]) == (1.0, 2.0, pytest.approx(0.5 / 448), 2.0**-126)
    assert struct.unpack("<64H", token[528:]) == tuple(v.view(torch.int16).item() for v in rope.bfloat16())
    one = bytes(pack(latent, rope, 1).tolist())
    assert struct.unpack("<4f", one[512:528]) == (2.0,) * 4 and one[0] == 0x76 and one[528:] == token[528:]


@every_count
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_what_bytes_stand_for(scales, dtype):
    """rounding is that of e4m3, relative to the scale's columns; rope is what bf16 keeps"""
    values = rows(50, 2, dtype=dtype).clamp(-6e4, 6e4)
    found = unpack(pack(values[..., :512], values[..., 512:], scales))
    latent = values[..., :512].double()
    width = 512 // scales
    step = latent.unflatten(-1, (-1, width)).abs().amax(-1, keepdim=True).expand(-1, -1, -1, width).flatten(-2) / 448 * 2.0**-10
    assert ((found[..., :512] - latent).abs() <= latent.abs() / 16 + step * 1.001).all()
    assert torch.equal(found[..., 512:], values[..., 512:].bfloat16().double())


@every_count
def test_numbers_that_are_not_finite(scales):
    """infinities become the largest finite number of their scale, NaN stays, and neither chooses a scale"""
    latent, rope = torch.ones(512), torch.zeros(64)
    latent[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rope[:2] = torch.tensor([float("inf"), float("nan")])
    found = unpack(pack(latent, rope, scales))
    assert (
        found[:2].tolist() == pytest.approx([1.0, -1.0])
        and found[2].isnan()
        and found[3:512].tolist() == pytest.approx([1.0] * 509)
    )
    assert found[512].isinf() and found[513].isnan()
    nothing = unpack(pack(torch.zeros(512), rope, scales))
    assert (nothing[:512] == 0).all()
    only = unpack(pack(torch.full((512,), float("inf")), rope, scales))
    assert torch.equal(only[:512], torch.full((512,), 448 * 2.0**-126, dtype=torch.float64))


# ---------------------------------------------------------------------- results
@every_count
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("h_kv", [1, 2])
def test_decode(on_twins, scales, dtype, h_kv):
    cache, q = scaled_cache(scales, h_kv), make_q(dtype, s_q=2)
    plan = DecodePlan(cache, 4, 2)
    for _ in range(2):  # the second call is a remembered one
        out, lse = mla_decode(q, cache, plan)
        assert out.dtype == dtype
        wanted, wanted_lse = reference_decode(q, unpack(cache.pool), cache.block_table, LENGTHS, 576**-0.5, True, 512)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


def test_a_foreign_pool_is_held_as_it_is():
    """as vLLM keeps it, without an axis of kv heads"""
    pool = torch.randint(0, 256, (9, 64, 656), dtype=torch.uint8)
    cache = make_cache(dtype=BF16)
    held = PagedKVCache.from_tensors(pool, cache.block_table, cache.cache_seqlens)
    assert held.pool.data_ptr() == pool.data_ptr() and held.pool.shape == (9, 64, 1, 656)
    assert held.format == SCALED_FORMATS[4] and held.dtype == E4M3 and held.query_dtypes == (BF16, FP16)


@every_count
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_append(on_twins, scales, dtype):
    cache = PagedKVCache.allocate(5, 2, 128, dtype=E4M3, scales=scales, device="cpu")
    assert cache.pool.shape == (5, 64, 1, 656)
    cache.pool.fill_(0xAA)
    values, slots = rows(70, dtype=dtype), cache.extend([64, 6])
    cache.append(values[:, :512], values[:, 512:], slots)
    flat = cache.pool.view(-1, 656)
    assert torch.equal(flat[slots], pack(values[:, :512], values[:, 512:], scales))
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[slots] = False
    assert (flat[untouched] == 0xAA).all()


@every_count
def test_convert(on_twins, scales):
    cache = make_cache(dtype=BF16, h_kv=2)
    converted = cache.convert(scales=scales)
    assert converted.format == SCALED_FORMATS[scales] and converted.block_table is cache.block_table
    assert torch.equal(converted.pool, pack(cache.pool[..., :512], cache.pool[..., 512:], scales))


def test_finer_scales_keep_more_where_channels_differ():
    values = torch.randn(200, 576, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:, 3] *= 2.0**18  # (e4m3 itself spans 2^18)
    error = lambda found: ((found - values)[:, 128:512].norm() / values[:, 128:512].norm()).item()
    four, one = (error(unpack(pack(values[:, :512], values[:, 512:], scales))) for scales in (4, 1))
    flat = error(quantise(values, values.abs().max().item() / 448).double() * values.abs().max().item() / 448)
    assert four < 0.04 < 0.3 < one and flat > 0.3


# ---------------------------------------------------------------------- configurations
def test_configuration_of_a_call():
    base = MLAConfig(kv=FORMATS["float16"], causal=False, head_tile=16, split="float32")
    config = heuristics.fp8_config(base, SCALED_FORMATS[4], "float16", 2)
    assert config == UpcastConfig(base=base) and "float16" in config.name and "float32" in config.name


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(kv=KVFormat("float8_e4m3fn", itemsize=1)), ("kv is", "scales=0", "allowed", "scales=4")),
        (dict(base=MLAConfig(kv=KVFormat("bfloat16", 256, 64))), ("base.kv", "256", "(512, 64)")),
        (dict(stages=3), ("stages is 3", "allowed: 2")),
    ],
    ids=str,
)
def test_config_rejects(change, words):
    with rejects(ValueError, "UpcastConfig", *words):
        UpcastConfig(**change)


def test_append_config_rejects():
    with rejects(ValueError, "source is float8_e4m3fn", "bfloat16, float16"):
        Fp8AppendConfig(kv=SCALED_FORMATS[4], source="float8_e4m3fn")


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(scales=2), ("scales is 2", "4 or 1")),
        (dict(scales=4), ("scales is 4", "0 with dtype torch.bfloat16")),
        (dict(scales=4, dtype=E4M3, latent=256), ("(latent, rope) is (256, 64)", "(512, 64) with scales")),
        (dict(scales=4, dtype=E4M3, scale=1.0), ("scale is 1.0", "None with a pool of torch.uint8")),
        (dict(dtype=torch.uint8), ("dtype is torch.uint8", "torch.bfloat16 or torch.float16 or torch.float8_e4m3fn")),
    ],
    ids=str,
)
def test_allocate_rejects(arguments, words):
    with rejects(ValueError, *words):
        PagedKVCache.allocate(2, 1, 64, device="cpu", **arguments)


@pytest.mark.parametrize(
    "pool, arguments, words",
    [
        (
            torch.zeros(9, 64, 1, 576, dtype=torch.uint8),
            {},
            ("pool.shape is (9, 64, 1, 576)", "656 bytes", "512 e4m3, 4 float32"),
        ),
        (None, dict(scales=3), ("scales is 3", "0, None, 4 or 1")),
        (None, dict(latent=256), ("latent is 256", "512 in a pool of bytes")),
        (None, dict(q_scale=2.0), ("q_scale is 2.0", "None with a pool of torch.uint8")),
        (torch.zeros(9, 64, 1, 576, dtype=BF16), dict(scales=4), ("scales is 4", "None with a pool of torch.bfloat16")),
        (torch.zeros(9, 64, 1, 664, dtype=torch.uint8)[..., :656], {}, ("pool.stride(", "a positive multiple of 16")),
    ],
    ids=str,
)
def test_from_tensors_rejects(pool, arguments, words):
    cache = make_cache(dtype=BF16)
    pool = torch.zeros(9, 64, 1, 656, dtype=torch.uint8) if pool is None else pool
    with rejects(ValueError, *words):
        PagedKVCache.from_tensors(pool, cache.block_table, cache.cache_seqlens, **arguments)


def test_calls_reject(on_twins):
    cache = scaled_cache()
    plan = DecodePlan(cache, 4)
    with rejects(ValueError, "q.dtype is torch.float8_e4m3fn", "torch.bfloat16 or torch.float16"):
        mla_decode(make_q(E4M3), cache, plan)
    with rejects(ValueError, "query_terms is 1", "2 over a cache whose tokens have scales"):
        DecodePlan(cache, 4, query_terms=1)
    with rejects(ValueError, "latent.dtype is torch.float8_e4m3fn", "torch.bfloat16 or torch.float16"):
        values = quantise(rows(3), 1.0)
        cache.append(values[:, :512], values[:, 512:], torch.arange(3))
    with rejects(ValueError, "cache.pool.dtype is torch.uint8", "bfloat16"):
        cache.convert()
    with rejects(ValueError, "scale is 2.0", "None with scales"):
        make_cache(dtype=BF16).convert(scale=2.0, scales=4)
    with rejects(ValueError, "plan.format", "scales=4", "scales=1"):
        other = scaled_cache(1)
        other.cache_seqlens = cache.cache_seqlens
        mla_decode(make_q(), other, plan)
