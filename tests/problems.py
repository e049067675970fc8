"""GPU problems in unusual memory: the same numbers behind other strides, in larger pools, over shared pages."""

import random
from dataclasses import replace

import torch

from flashmla_cute import DecodePlan, PagedKVCache
from flashmla_cute.testing import Case, Errors, Problem

POISON = 7.0  # around strided outputs, where NaN could not be compared


def varied_lengths(batch: int, mean: int, at_least: int, seed: int, with_zeros: bool = False) -> tuple[int, ...]:
    """FlashMLA's distribution: normal, its deviation half its mean"""
    drawn = random.Random(seed)
    lengths = [max(int(drawn.normalvariate(mean, mean / 2)), at_least) for _ in range(batch)]
    return tuple(0 if with_zeros and drawn.random() < 0.5 else length for length in lengths)


def some_requests(lengths: tuple[int, ...], count: int, seed: int) -> list[int]:
    """the first, the last, the shortest, the longest, and others: which to compare where float64 for all would take too long"""
    edges = {0, len(lengths) - 1, lengths.index(min(lengths)), lengths.index(max(lengths))}
    others = random.Random(seed).sample(range(len(lengths)), min(count, len(lengths)))
    return sorted(edges | set(others))


def check(problem: Problem, record, requests: list[int] | None = None, plan: DecodePlan | None = None) -> Errors:
    """Runs our kernel and compares `requests` (all by default) with float64; the others must at least be numbers."""
    out, lse = problem.run(plan)
    errors = problem.errors(out, lse, requests)
    record.add(problem.case, errors)
    assert errors.within(problem.case.dtype), f"{errors}\n{problem.case}\nrequests {requests or 'all'}"
    assert out.isfinite().all() and not lse.isnan().any(), f"not finite outside of requests {requests}\n{problem.case}"
    return errors


def clone(outputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs[0].clone(), outputs[1].clone()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(some, others))


# ---------------------------------------------------------------------- strides
def embed(tensor: torch.Tensor, shape: tuple[int, ...], view, fill: float = float("nan")) -> torch.Tensor:
    """`tensor` as view(a larger tensor of `shape`), which holds `fill` elsewhere"""
    inside = view(torch.full(shape, fill, dtype=tensor.dtype, device=tensor.device))
    assert inside.shape == tensor.shape
    inside.copy_(tensor)
    return inside


def storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """all that lies in the memory of which `tensor` is a view"""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


# name -> q [b, s, h, d] with other strides, and whether token and head are still one axis
Q_STRIDES = {
    "contiguous": (lambda q: q.clone(), True),
    "every other request": (lambda q: embed(q, (2 * q.shape[0], *q.shape[1:]), lambda x: x[::2]), True),
    "every other token": (lambda q: embed(q, (q.shape[0], 2 * q.shape[1], *q.shape[2:]), lambda x: x[:, ::2]), False),
    "every other head": (lambda q: embed(q, (*q.shape[:2], 2 * q.shape[2], q.shape[3]), lambda x: x[:, :, ::2]), True),
    "padded heads": (lambda q: embed(q, (*q.shape[:2], q.shape[2] + 8, q.shape[3]), lambda x: x[:, :, :-8]), False),
    "heads of a later rank": (
        lambda q: embed(q, (*q.shape[:2], 3 * q.shape[2], q.shape[3]), lambda x: x.chunk(3, 2)[1]),
        False,
    ),
    "padded columns": (lambda q: embed(q, (*q.shape[:3], q.shape[3] + 64), lambda x: x[..., :-64]), True),
    "columns of a later part": (lambda q: embed(q, (*q.shape[:3], 2 * q.shape[3]), lambda x: x.chunk(2, -1)[1]), True),
    "token before request": (lambda q: embed(q, (q.shape[1], q.shape[0], *q.shape[2:]), lambda x: x.transpose(0, 1)), False),
    "head before token": (
        lambda q: embed(q, (q.shape[0], q.shape[2], q.shape[1], q.shape[3]), lambda x: x.transpose(1, 2)),
        False,
    ),
}


# name -> pool [pages, page, h_kv, d] with other strides
POOL_STRIDES = {
    "padded pages": lambda pool: _padded_pages(pool, 64),
    "pages padded by a vector": lambda pool: _padded_pages(pool, 8),
    "padded columns": lambda pool: embed(pool, (*pool.shape[:3], pool.shape[3] + 64), lambda x: x[..., :-64]),
    "padded heads": lambda pool: embed(pool, (*pool.shape[:2], pool.shape[2] + 1, pool.shape[3]), lambda x: x[:, :, 1:]),
    "head before token": lambda pool: embed(
        pool, (pool.shape[0], pool.shape[2], pool.shape[1], pool.shape[3]), lambda x: x.transpose(1, 2)
    ),
    "a layer of a larger pool": lambda pool: embed(pool, (pool.shape[0], 3, *pool.shape[1:]), lambda x: x[:, 1]),
    "in the middle of a larger pool": lambda pool: embed(pool, (pool.shape[0] + 9, *pool.shape[1:]), lambda x: x[5:-4]),
}


def _padded_pages(pool: torch.Tensor, padding: int) -> torch.Tensor:
    pages, page = pool.shape[0], pool[0].numel()
    strides = (page + padding, *pool.stride()[1:])
    return embed(pool, (pages * (page + padding),), lambda x: x.as_strided(pool.shape, strides))


def with_pool(problem: Problem, pool: torch.Tensor, table: torch.Tensor | None = None) -> Problem:
    cache = problem.cache
    moved = PagedKVCache.from_tensors(pool, cache.block_table if table is None else table, cache.cache_seqlens)
    return replace(problem, cache=moved, out=poisoned(problem.out), lse=poisoned(problem.lse))


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan"))


# ---------------------------------------------------------------------- pages
def moved_pages(problem: Problem, num_pages: int, first: int) -> Problem:
    """the pages at `first` of a larger pool of NaN"""
    pool, table, count = problem.cache.pool, problem.cache.block_table, problem.cache.pool.shape[0]
    larger = torch.full((num_pages, *pool.shape[1:]), float("nan"), dtype=pool.dtype, device=pool.device)
    larger[first : first + count] = pool
    return with_pool(problem, larger, torch.where((table >= 0) & (table < count), table + first, table))


def shared_prefix(problem: Problem, pages: int) -> Problem:
    """all requests begin with the first `pages` pages of request 0"""
    table = problem.cache.block_table.clone()
    table[:, :pages] = table[0, :pages]
    return with_pool(problem, problem.cache.pool, table)


def plan_of_parts(problem: Problem, parts: int) -> DecodePlan:
    """a plan for at most `parts` spans; one part splits nothing"""
    plan = problem.plan()
    plan.parts = plan.parts[:parts]
    plan.update()
    return plan


def num_split(plan: DecodePlan) -> int:
    """requests that are merged from more than one piece"""
    return int((plan.merges[1 : 1 + plan.merges[0, 0], 2] > 1).sum())


def small_cases(dtype: torch.dtype) -> list[Case]:
    """one of each kind, for tests of what is around the kernel"""
    return [
        Case((70, 0, 5000), h_q=16, dtype=dtype),
        Case((1, 700), h_q=128, s_q=2, dtype=dtype),
        Case((3000,), h_q=8, h_kv=2, s_q=3, causal=False, dtype=dtype),
    ]
