"""Handing out pages, on the CPU: slots, block table, lengths, and that an impossible request changes nothing."""

import pytest
import torch

from flashmla_cute import PagedKVCache
from flashmla_cute.kernels.config import TILE


def allocate(num_pages=8, batch=3, max_seqlen=256, **options):
    return PagedKVCache.allocate(num_pages, batch, max_seqlen, device="cpu", **options)


def state(cache):
    return cache.block_table.tolist(), cache.cache_seqlens.tolist()


def slots_by_table(cache, request, tokens):
    return [cache.block_table[request, token // TILE].item() * TILE + token % TILE for token in tokens]


def test_allocate():
    cache = allocate(num_pages=5, batch=2, max_seqlen=130, num_kv_heads=3, dtype=torch.float16)
    assert cache.pool.shape == (5, TILE, 3, 576) and cache.pool.dtype == torch.float16
    assert cache.block_table.tolist() == [[-1] * 3] * 2 and cache.capacity == 192
    assert cache.cache_seqlens.tolist() == [0, 0]


def test_extend_names_the_slots_of_the_new_tokens():
    cache = allocate()
    first = cache.extend([70, 0, 1])
    assert first.dtype == torch.int64 and cache.cache_seqlens.tolist() == [70, 0, 1]
    assert first.tolist() == slots_by_table(cache, 0, range(70)) + slots_by_table(cache, 2, range(1))
    second = cache.extend([1, 64, 63])
    assert cache.cache_seqlens.tolist() == [71, 64, 64]
    assert second.tolist() == [
        *slots_by_table(cache, 0, range(70, 71)),
        *slots_by_table(cache, 1, range(64)),
        *slots_by_table(cache, 2, range(1, 64)),
    ]
    assert len({*first.tolist(), *second.tolist()}) == 199, "two tokens in one slot"


def test_a_page_is_taken_only_when_a_token_needs_it():
    cache = allocate()
    cache.extend([64, 0, 0])
    assert (cache.block_table[0] >= 0).tolist() == [True, False, False, False]
    cache.extend([1, 0, 0])
    assert (cache.block_table[0] >= 0).tolist() == [True, True, False, False]
    assert cache.extend([0, 0, 0]).shape == (0,)


def test_pages_belong_to_one_request_each():
    cache = allocate()
    cache.extend([200, 129, 64])
    pages = [page for page in cache.block_table.flatten().tolist() if page >= 0]
    assert sorted(pages) == list(range(8))


def test_extend_writes_the_tensors_in_place():
    cache = allocate()
    table, lengths = cache.block_table, cache.cache_seqlens
    cache.extend([65, 1, 0])
    assert cache.block_table is table and cache.cache_seqlens is lengths


@pytest.mark.parametrize(
    "counts, words",
    [
        ([193, 129, 129], ("counts", "takes 10 pages", "up to 8 free pages")),
        ([257, 0, 0], ("counts", "257 long", "up to 256")),
        ([1, 1], ("len(counts)", "2", "3, one for each request")),
        ([1, -1, 0], ("counts", "-1", "integers >= 0")),
        ([1, 0.5, 0], ("counts", "0.5", "integers >= 0")),
    ],
    ids=str,
)
def test_an_impossible_request_changes_nothing(counts, words):
    cache = allocate()
    before = state(cache)
    with pytest.raises(ValueError) as caught:
        cache.extend(counts)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert state(cache) == before
    assert cache.extend([256, 192, 64]).shape == (512,), "all 8 pages are still there"


def test_running_out_later_changes_nothing_either():
    cache = allocate(num_pages=3)
    cache.extend([64, 64, 0])
    before = state(cache)
    with pytest.raises(ValueError, match=r"takes 2 pages.*up to 1 free pages"):
        cache.extend([1, 1, 0])
    assert state(cache) == before
    cache.extend([1, 0, 0])
    assert cache.cache_seqlens.tolist() == [65, 64, 0]


def test_release_gives_the_pages_back():
    cache = allocate(num_pages=4)
    cache.extend([128, 64, 0])
    pages = set(cache.block_table[0, :2].tolist())
    cache.release(0)
    assert cache.block_table[0].tolist() == [-1] * 4 and cache.cache_seqlens.tolist() == [0, 64, 0]
    cache.extend([0, 0, 192])
    assert pages < set(cache.block_table[2, :3].tolist())
    with pytest.raises(ValueError, match="up to 0 free pages"):
        cache.extend([1, 0, 0])
    cache.release(1)
    assert cache.extend([10, 0, 0]).tolist() == slots_by_table(cache, 0, range(10))


@pytest.mark.parametrize("index", [-1, 3])
def test_release_rejects_what_is_no_request(index):
    with pytest.raises(ValueError, match=rf"request is {index}; allowed: 0 \.\. 2"):
        allocate().release(index)


def test_a_callers_pages_are_not_handed_out():
    pool, table, lengths = allocate().pool, torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    cache = PagedKVCache.from_tensors(pool, table, lengths)
    with pytest.raises(ValueError, match=r"extend needs a cache made by PagedKVCache\.allocate"):
        cache.extend([1, 1])
    with pytest.raises(ValueError, match=r"release needs a cache made by PagedKVCache\.allocate"):
        cache.release(0)
