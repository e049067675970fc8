"""vLLM's Triton decode kernel for MLA, which it takes where neither FlashMLA nor FA3 is there."""

import torch

from flashmla_cute.plan import num_sms

from ..problem import Problem
from ..roofline import LATENT
from . import import_from, need

VARIABLE, MODULE = "TRITON_MLA_PEER", "triton_decode_attention"
HEADS = 16  # of a CTA
TOKENS_PER_SPLIT, CTAS_PER_SM = 512, 2  # vLLM's rule


def find():
    import_from(VARIABLE, MODULE)


def prepare(problem: Problem) -> "TritonMLA":
    need(problem.row.h_q > problem.row.h_kv, "one query head for a kv head is another of its kernels")
    return TritonMLA(problem)


def num_splits(rows: int, num_heads: int, longest: int, sms: int) -> int:
    """vLLM's, a power of two by the longest request, but not more than give every SM two CTAs: beyond that they only cost"""
    power_of_two = lambda n: 1 << max(0, n - 1).bit_length()
    enough = -(-CTAS_PER_SM * sms // (rows * -(-num_heads // HEADS)))
    return min(power_of_two(max(1, longest // TOKENS_PER_SPLIT)), power_of_two(enough), CTAS_PER_SM * sms)


class TritonMLA:
    """Each query token is a row of its own, with its own length and its request's pages, as in vLLM."""

    schedule = launch_with_schedule = None

    def __init__(self, problem: Problem):
        self.decode, self.problem, row = import_from(VARIABLE, MODULE).decode_attention_fwd, problem, problem.row
        device, rows = problem.q.device, row.b * row.s_q
        seen = torch.arange(1 - row.s_q, 1, dtype=torch.int32, device=device) * row.causal
        self.lengths = (problem.cache_seqlens[:, None] + seen).clamp(min=0).flatten()
        self.table = problem.block_table.repeat_interleave(row.s_q, 0)
        self.splits = num_splits(rows, row.h_q, max(row.lengths), num_sms(device.index))
        empty = lambda *shape, dtype=torch.float32: torch.empty(rows, row.h_q, *shape, dtype=dtype, device=device)
        self.partials, self.lse = empty(self.splits, LATENT + 1), empty()
        self.out, self.one = empty(LATENT, dtype=problem.q.dtype), torch.ones((), device=device)

    def launch(self, pool: torch.Tensor):
        p = self.problem
        self.decode(
            p.q.flatten(0, 1),
            pool,
            pool[..., :LATENT],
            self.out,
            self.lse,
            self.table,
            self.lengths,
            self.partials,
            self.splits,
            p.softmax_scale,
            pool.shape[1],
            k_scale=self.one,
            v_scale=self.one,
            is_mla=True,
        )

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        b, s_q = self.problem.row.b, self.problem.row.s_q
        return self.out.unflatten(0, (b, s_q)), self.lse.unflatten(0, (b, s_q)).transpose(1, 2)
