"""Compiles decode kernels into the disk cache, in parallel processes, before the GPU tests that launch them."""

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

from flashmla_cute import compile, ops
from flashmla_cute.kernels.config import FORMATS, MLAConfig

# what mla_decode chooses, with the partials of a DecodePlan's default
DECODE = [
    MLAConfig(kv=kv, causal=causal, head_tile=head_tile)
    for kv, causal, head_tile in product(FORMATS.values(), (False, True), (0, 1, 2, 4, 8, 16, 32, 64))
]
WIDE_PARTIALS = [MLAConfig(kv=kv, causal=causal, split="float32") for kv, causal in product(FORMATS.values(), (False, True))]


def compile_one(config: MLAConfig):
    compile.get(ops.DecodeOp, config)


def compile_ahead(configs=(*DECODE, *WIDE_PARTIALS)):
    missing = [config for config in configs if not compile.is_cached(ops.DecodeOp, config)]
    if missing:
        workers = min(len(missing), os.cpu_count())
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:  # (cute.compile is not thread-safe)
            list(pool.map(compile_one, missing))
