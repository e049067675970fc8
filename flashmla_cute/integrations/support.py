"""What the installed kernels decode.  All that a plugin advertises and its reasons for a refusal come from here."""

from inspect import signature

from .. import checks
from ..decode import mla_decode
from ..kernels.config import MLAConfig
from ..plan import DecodePlan

FORMATS = {dtype: kv for dtype, kv in checks.DTYPES.items() if kv.itemsize == 2}  # queries and cache of one 16-bit type
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FORMATS}
WIDTHS = tuple(dict.fromkeys((kv.latent, kv.rope) for kv in FORMATS.values()))
MAX_PAGE = 1024


def _takes_page(page: int) -> bool:
    try:
        MLAConfig(page=page)
    except ValueError:
        return False
    return True


PAGES = tuple(page for page in range(8, MAX_PAGE + 1, 8) if _takes_page(page))
QUERY_PAIRS = "tuple" in str(signature(mla_decode).parameters["q"].annotation)  # (latent, rope) as two tensors
BATCH_INVARIANT = "batch_invariant" in signature(DecodePlan).parameters


def why_not_widths(latent: int, rope: int) -> str | None:
    """What the kernels lack for tokens of `latent` + `rope` columns, in words; None if nothing."""
    if (latent, rope) in WIDTHS:
        return None
    return f"(kv_lora_rank, qk_rope_head_dim) is ({latent}, {rope}); allowed: {_listed(WIDTHS)}"


def why_not_dtypes(query, cache) -> str | None:
    """the same of the element types of absorbed queries and cache"""
    if query not in FORMATS:
        return f"the queries' dtype is {query}; allowed: {_listed(FORMATS)}"
    return None if cache == query else f"the cache's dtype is {cache}; allowed: {query}, the queries'"


def why_not_page(page: int) -> str | None:
    """the same of a page of `page` tokens"""
    return None if page in PAGES else f"the page size is {page}; allowed: {_listed(PAGES)}"


def why_not_batch_invariant() -> str | None:
    return None if BATCH_INVARIANT else "batch invariance was asked for; the installed DecodePlan does not offer it"


def need(*reasons: str | None):
    """raises ValueError with the first of `reasons` that is one"""
    for reason in reasons:
        if reason is not None:
            raise ValueError(f"flashmla_cute: {reason}")


def _listed(values) -> str:
    return ", ".join(map(str, values))
