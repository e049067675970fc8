"""Compiles decode kernels into the disk cache, in parallel processes, before the GPU tests that launch them."""

from itertools import product

from flashmla_cute import compile, ops
from flashmla_cute.kernels.config import FORMATS, MLAConfig

# what mla_decode chooses, with the partials of a DecodePlan's default
DECODE = [
    MLAConfig(kv=kv, causal=causal, head_tile=head_tile)
    for kv, causal, head_tile in product(FORMATS.values(), (False, True), (0, 1, 2, 4, 8, 16, 32, 64))
]
WIDE_PARTIALS = [MLAConfig(kv=kv, causal=causal, split="float32") for kv, causal in product(FORMATS.values(), (False, True))]


def compile_ahead(configs=(*DECODE, *WIDE_PARTIALS)):
    compile.get_many([(ops.DecodeOp, config) for config in configs])
