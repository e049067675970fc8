"""FlashMLA (DeepSeek, CUDA C++): dense decode for sm_90a, bf16 and fp16."""

import torch

from ..problem import Problem
from ..roofline import LATENT
from . import import_from, need

VARIABLE = "FLASHMLA_PEER"


def find():
    import_from(VARIABLE, "flash_mla")


def prepare(problem: Problem) -> "FlashMLA":
    row = problem.row
    need(not row.is_fp8, "its dense decode has no e4m3 cache")
    need(row.page == 64, f"pages of {row.page} tokens, it takes 64")
    need(row.h_q % row.h_kv == 0, f"{row.h_q} heads over {row.h_kv} kv heads")
    return FlashMLA(problem)


class FlashMLA:
    schedule = None  # its metadata kernel has no entry point of its own

    def __init__(self, problem: Problem):
        self.module, self.problem = import_from(VARIABLE, "flash_mla"), problem
        self.raw = import_from(VARIABLE, "flash_mla.cuda")
        self.meta, _ = self.module.get_mla_metadata()  # filled by the first launch, then only read
        self._result = None

    def launch(self, pool: torch.Tensor):
        p = self.problem
        self._result = self.module.flash_mla_with_kvcache(
            p.q,
            pool,
            p.block_table,
            p.cache_seqlens,
            LATENT,
            self.meta,
            None,
            softmax_scale=p.softmax_scale,
            causal=p.row.causal,
        )

    def launch_with_schedule(self, pool: torch.Tensor):
        """without metadata the operator makes it anew: the difference to `launch` is the metadata kernel"""
        p = self.problem
        self.raw.dense_decode_fwd(p.q, pool, LATENT, p.cache_seqlens, p.block_table, p.softmax_scale, p.row.causal, None, None)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._result
