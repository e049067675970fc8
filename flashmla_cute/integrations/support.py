"""What the installed kernels decode.  All that a plugin advertises and its reasons for a refusal come from here."""

import torch

from .. import checks
from ..kernels.config import DIMS, MAX_PAGE, PAGE_STEP

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checks.DTYPES}  # of queries, and of caches like them
FP8_CACHES = {dtype: ((kv.latent, kv.rope),) for dtype, kv in checks.FP8_DTYPES.items()}
CACHES = {**dict.fromkeys(checks.DTYPES, DIMS), **FP8_CACHES}  # element type -> (latent, rope) columns of a token
PAGES = range(PAGE_STEP, MAX_PAGE + 1, PAGE_STEP)  # tokens


def why_not_dtypes(query, cache) -> str | None:
    """What the kernels lack for queries and a cache of these element types, in words; None if nothing."""
    if query not in DTYPES.values():
        return f"the queries' dtype is {query}; allowed: {_listed(DTYPES.values())}"
    if cache in (query, *FP8_CACHES):
        return None
    return f"the cache's dtype is {cache}; allowed: {_listed((query, *FP8_CACHES))}"


def why_not_widths(latent: int, rope: int, cache: torch.dtype) -> str | None:
    """the same of tokens of `latent` + `rope` columns in a cache of that element type"""
    if (latent, rope) in CACHES[cache]:
        return None
    allowed = ", ".join(map(str, CACHES[cache]))
    return f"(kv_lora_rank, qk_rope_head_dim) is ({latent}, {rope}); allowed in a cache of {cache}: {allowed}"


def why_not_page(page: int, name: str = "the page size") -> str | None:
    """the same of pages of `page` tokens"""
    if page in PAGES:
        return None
    return f"{name} is {page}; allowed: multiples of {PAGES.step} from {PAGES[0]} to {PAGES[-1]}"


def need(*reasons: str | None):
    """raises ValueError with the first of `reasons` that is one"""
    for reason in reasons:
        if reason is not None:
            raise ValueError(f"flashmla_cute: {reason}")


def _listed(values) -> str:
    return " or ".join(map(str, values))
