"""FlashAttention-3 (Dao-AILab, CUDA C++): paged decode with `qv`, the default for MLA on Hopper in vLLM and SGLang."""

import torch

from ..problem import Problem
from ..roofline import LATENT, ROPE
from . import import_from, need

VARIABLE = "FA3_PEER"
NUM_SPLITS = 0  # its own heuristic


def find():
    import_from(VARIABLE, "flash_attn_interface")


def prepare(problem: Problem) -> "FA3":
    need(problem.row.dtype == "bfloat16", f"{problem.row.dtype}: only bfloat16 is built, see the README")
    return FA3(problem)


class FA3:
    launch_with_schedule = None

    def __init__(self, problem: Problem):
        self.module, self.problem = import_from(VARIABLE, "flash_attn_interface"), problem
        self.q_rope, self.q_latent = problem.q[..., LATENT:], problem.q[..., :LATENT]
        self.metadata, self._result = self.schedule(), None

    def schedule(self) -> torch.Tensor:
        p, page = self.problem, self.problem.pools[0].shape[1]
        return self.module.get_scheduler_metadata(
            p.row.b,
            p.row.s_q,
            p.block_table.shape[1] * page,
            p.row.h_q,
            p.row.h_kv,
            ROPE,
            p.cache_seqlens,
            p.q.dtype,
            headdim_v=LATENT,
            page_size=page,
            causal=p.row.causal,
            num_splits=NUM_SPLITS,
        )

    def launch(self, pool: torch.Tensor):
        p = self.problem
        out, lse, *_ = self.module.flash_attn_with_kvcache(
            q=self.q_rope,
            k_cache=pool[..., LATENT:],
            v_cache=pool[..., :LATENT],
            qv=self.q_latent,
            page_table=p.block_table,
            cache_seqlens=p.cache_seqlens,
            softmax_scale=p.softmax_scale,
            causal=p.row.causal,
            num_splits=NUM_SPLITS,
            scheduler_metadata=self.metadata,
            return_softmax_lse=True,
        )
        self._result = out, lse

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._result
