"""vLLM's fork of FlashMLA (CUDA C++): dense decode of an e4m3 cache with an e4m3 q, for sm_90a."""

import torch

from ..problem import Problem
from ..roofline import LATENT
from . import import_from, need

VARIABLE, MODULE = "FLASHMLA_FP8_PEER", "_flashmla_extension_C"


def find():
    import_from(VARIABLE, MODULE)  # registers its operators in torch.ops


def prepare(problem: Problem) -> "FlashMLAFp8":
    row = problem.row
    need(row.dtype == "float8_e4m3fn", f"a cache of {row.dtype}, it takes float8_e4m3fn with one scale")
    need(row.page == 64, f"pages of {row.page} tokens, it takes 64")
    need(row.h_q % row.h_kv == 0, f"{row.h_q} heads over {row.h_kv} kv heads")
    return FlashMLAFp8(problem.with_e4m3_q())


class FlashMLAFp8:
    launch_with_schedule = None
    # it rounds the softmax weights to e4m3 before they meet the values: 2.6 % of a weight, so of out at most
    tolerance = 3e-2, 5e-3
    note = "q in e4m3, quantised before the timing; checked with a tolerance of its own, out 3e-2, lse 5e-3"

    def __init__(self, problem: Problem):
        self.problem, self.ops = problem, getattr(torch.ops, MODULE)
        self.descale_q, self.descale_k = (
            torch.tensor([scale], dtype=torch.float32, device=problem.q.device) for scale in (problem.q_scale, problem.kv_scale)
        )
        self.schedule()
        self._result = None

    def schedule(self):
        row = self.problem.row
        rows = row.s_q * row.h_q // row.h_kv
        self.meta, self.splits = self.ops.get_mla_decoding_metadata_dense_fp8(self.problem.cache_seqlens, rows, row.h_kv)

    def launch(self, pool: torch.Tensor):
        p = self.problem
        self._result = self.ops.fwd_kvcache_mla_fp8(
            p.q,
            pool,
            LATENT,
            p.cache_seqlens,
            p.block_table,
            p.softmax_scale,
            p.row.causal,
            self.meta,
            self.splits,
            self.descale_q,
            self.descale_k,
        )

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(self._result)
