"""FlashMLA-CuTe: MLA decode on NVIDIA Hopper, written in CUTLASS's CuTe Python DSL.

cache = PagedKVCache.from_tensors(pool, block_table, cache_seqlens)
plan = DecodePlan(cache, num_heads=128)          # once a step, for all layers
out, lse = mla_decode(q, cache, plan)
"""

from .decode import mla_decode
from .kernels.config import DecodeOptions
from .kv_cache import PagedKVCache
from .plan import DecodePlan

__all__ = ["DecodeOptions", "DecodePlan", "PagedKVCache", "mla_decode"]
__version__ = "0.1.0"
