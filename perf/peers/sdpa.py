"""torch's scaled_dot_product_attention over expanded heads: what one gets without a kernel for MLA.

It knows no pages and no lengths: the pages are gathered beforehand and not timed, and only equal lengths are run.
"""

import torch

from ..problem import Problem
from ..roofline import ITEMSIZE, LATENT, ROPE
from . import need

MAX_EXPANDED_BYTES = 10 << 30  # k and v for every head, which torch may write out


def find():
    """comes with torch"""


def prepare(problem: Problem) -> "SDPA":
    row = problem.row
    need(not row.is_fp8, "it has no e4m3 cache")
    need(row.h_kv == 1, f"{row.h_kv} kv heads: written for one")
    need(len(set(row.lengths)) == 1, "requests of different lengths: it has no length per request")
    expanded = row.h_q * row.tokens * (2 * LATENT + ROPE) * ITEMSIZE
    need(expanded <= MAX_EXPANDED_BYTES, f"expanding the heads may take {expanded / 2**30:.0f} GiB")
    return SDPA(problem)


class SDPA:
    schedule = launch_with_schedule = None

    def __init__(self, problem: Problem):
        self.problem, row = problem, problem.row
        s_k = row.lengths[0]
        # by pool, [b, 1, s_k, 576]; (an index of the table's shape gathers pages request by request)
        gather = lambda pool: pool[problem.block_table.long()].flatten(1, 2)[:, :s_k].transpose(1, 2)
        self.caches = {pool.data_ptr(): gather(pool) for pool in problem.pools}
        self.mask = None
        if row.causal:  # bottom-right aligned, which its is_causal is not
            ones = torch.ones(row.s_q, s_k, dtype=torch.bool, device=problem.q.device)
            self.mask = ones.tril(diagonal=s_k - row.s_q)
        self._result = None

    def launch(self, pool: torch.Tensor):
        p = self.problem
        k = self.caches[pool.data_ptr()].expand(-1, p.row.h_q, -1, -1)
        self._result = torch.nn.functional.scaled_dot_product_attention(
            p.q.transpose(1, 2), k, k[..., :LATENT], attn_mask=self.mask, scale=p.softmax_scale
        )

    def result(self) -> tuple[torch.Tensor, None]:
        return self._result.transpose(1, 2), None
