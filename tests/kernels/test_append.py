"""The append kernel: the right bytes in the right slots, and no other byte."""

import pytest
import torch

from flashmla_cute import PagedKVCache
from flashmla_cute.kernels.config import TILE

from ..problems import POOL_STRIDES, bits, storage_of

pytestmark = pytest.mark.gpu

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def make_cache(num_pages: int, h_kv: int, dtype: torch.dtype, strides: str | None = None) -> PagedKVCache:
    """a pool of random bytes, NaN among them"""
    random = torch.randint(-(2**15), 2**15, (num_pages, TILE, h_kv, 576), dtype=torch.int16, device="cuda").view(dtype)
    pool = POOL_STRIDES[strides](random) if strides else random
    table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    return PagedKVCache.from_tensors(pool, table, torch.zeros(1, dtype=torch.int32, device="cuda"))


def tokens(n: int, h_kv: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(n, h_kv, width, device="cuda").to(dtype) for width in (512, 64))


def check(cache: PagedKVCache, latent: torch.Tensor, rope: torch.Tensor, slots: torch.Tensor):
    """appends, and compares the whole pool with what plain indexing writes"""
    num_pages, page, h_kv, _ = cache.pool.shape
    wanted = cache.pool.clone(memory_format=torch.contiguous_format)
    inside = (slots >= 0) & (slots < num_pages * page)
    rows = torch.cat([latent.reshape(len(slots), h_kv, 512), rope.reshape(len(slots), h_kv, 64)], -1)
    wanted.view(-1, h_kv, 576)[slots[inside]] = rows[inside]
    around = storage_of(cache.pool).clone()
    view_of_copy = around.as_strided(cache.pool.shape, cache.pool.stride(), cache.pool.storage_offset())
    cache.append(latent, rope, slots)
    assert torch.equal(bits(cache.pool), bits(wanted))
    view_of_copy.copy_(wanted)
    assert torch.equal(bits(around), bits(storage_of(cache.pool))), "written outside of the pool's view"


@every_dtype
@pytest.mark.parametrize("h_kv", [1, 2, 3, 8])
def test_appends(dtype, h_kv):
    for n in (1, 2, 7, 8, 9, 300):
        cache = make_cache(6, h_kv, dtype)
        slots = torch.randperm(6 * TILE, device="cuda")[:n]
        check(cache, *tokens(n, h_kv, dtype), slots)


@every_dtype
def test_page_edges(dtype):
    slots = torch.tensor([0, 63, 64, 127, 128, 4 * TILE - 1, 3 * TILE], device="cuda")
    check(make_cache(4, 1, dtype), *tokens(len(slots), 1, dtype), slots)


@every_dtype
def test_slots_outside_write_nothing(dtype):
    outside = [-1, -64, -(2**31), -(2**40), -(2**63), 4 * TILE, 4 * TILE + 1, 2**31, 2**32, 2**32 + 5, 2**40, 2**63 - 1]
    slots = torch.tensor([*outside, 17, *outside, 4 * TILE - 1], device="cuda")
    check(make_cache(4, 2, dtype), *tokens(len(slots), 2, dtype), slots)


@every_dtype
def test_tokens_without_a_head_axis(dtype):
    latent, rope = tokens(9, 1, dtype)
    check(make_cache(2, 1, dtype), latent[:, 0], rope[:, 0], torch.randperm(2 * TILE, device="cuda")[:9])


@every_dtype
@pytest.mark.parametrize("h_kv", [1, 3])
def test_strided_tokens(dtype, h_kv):
    slots = torch.randperm(4 * TILE, device="cuda")[:50]
    fused = torch.randn(50, h_kv, 576, device="cuda").to(dtype)  # latent and rope as one projection leaves them
    check(make_cache(4, h_kv, dtype), fused[..., :512], fused[..., 512:], slots)
    wide = torch.randn(100, h_kv + 1, 640, device="cuda").to(dtype)
    check(make_cache(4, h_kv, dtype), wide[::2, 1:, :512], wide[1::2, :-1, 576:], slots)


@every_dtype
@pytest.mark.parametrize("strides", POOL_STRIDES)
def test_strided_pool(dtype, strides):
    for h_kv in (1, 2):
        cache = make_cache(5, h_kv, dtype, strides)
        check(cache, *tokens(60, h_kv, dtype), torch.randperm(5 * TILE, device="cuda")[:60])


def test_slots_beyond_2_31_elements():
    num_pages = 58_400
    pool = torch.zeros(num_pages, TILE, 1, 576, dtype=torch.bfloat16, device="cuda")
    table, lengths = torch.zeros(1, 1, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    latent, rope = tokens(3, 1, torch.bfloat16)
    slots = torch.tensor([num_pages * TILE - 1, 2**31 // 576 + 1, 5], device="cuda")
    PagedKVCache.from_tensors(pool, table, lengths).append(latent, rope, slots)
    assert torch.equal(pool.view(-1, 1, 576)[slots], torch.cat([latent, rope], -1))
    assert pool.count_nonzero() == 3 * 576 - (latent == 0).sum() - (rope == 0).sum()


def test_no_tokens():
    cache = make_cache(1, 1, torch.bfloat16)
    check(cache, *tokens(0, 1, torch.bfloat16), torch.zeros(0, dtype=torch.int64, device="cuda"))


def test_extend_and_append_serve_a_batch():
    """what was appended step by step is what the block table then names"""
    cache = PagedKVCache.allocate(20, 3, 400)
    kept = [torch.zeros(0, 576, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    for step, counts in enumerate(([100, 0, 64], [1, 1, 1], [0, 63, 0], [150, 2, 63])):
        if step == 3:
            cache.release(2)
            kept[2] = kept[2][:0]
        rows = torch.randn(sum(counts), 576, device="cuda").bfloat16()
        cache.append(rows[:, :512], rows[:, 512:], cache.extend(counts))
        kept = [torch.cat(pair) for pair in zip(kept, rows.split(counts))]
        for request, mine in enumerate(kept):
            pages = cache.block_table[request, : -(-len(mine) // TILE)].long()
            assert torch.equal(cache.pool[pages].view(-1, 576)[: len(mine)], mine)
            assert cache.cache_seqlens[request] == len(mine)
