"""What the installed kernels decode.  All that a plugin advertises and its reasons for a refusal come from here."""

from inspect import signature

from .. import checks
from ..kernels.config import DIMS, MAX_PAGE, PAGE_STEP
from ..plan import DecodePlan

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checks.DTYPES}  # queries and cache are of one type
WIDTHS = DIMS  # (latent, rope) columns of a token
PAGES = range(PAGE_STEP, MAX_PAGE + 1, PAGE_STEP)  # tokens
RAGGED = "cu_seqlens_q" in signature(DecodePlan).parameters  # requests of one batch with different numbers of query tokens


def why_not_widths(latent: int, rope: int) -> str | None:
    """What the kernels lack for tokens of `latent` + `rope` columns, in words; None if nothing."""
    if (latent, rope) in WIDTHS:
        return None
    return f"(kv_lora_rank, qk_rope_head_dim) is ({latent}, {rope}); allowed: {', '.join(map(str, WIDTHS))}"


def why_not_dtypes(query, cache) -> str | None:
    """the same of the element types of absorbed queries and cache"""
    if query not in DTYPES.values():
        return f"the queries' dtype is {query}; allowed: {' or '.join(map(str, DTYPES.values()))}"
    return None if cache == query else f"the cache's dtype is {cache}; allowed: {query}, the queries'"


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
