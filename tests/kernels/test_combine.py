"""The merge of split partials against float64, from poisoned slots into poisoned outputs."""

from dataclasses import dataclass

import pytest
import torch

from flashmla_cute import compile
from flashmla_cute.kernels.config import FORMATS, MLAConfig
from flashmla_cute.kernels.parts.work import MERGE_GROUPS
from flashmla_cute.ops import MergeOp
from flashmla_cute.testing import TOLERANCE

from ..problems import bits

pytestmark = pytest.mark.gpu

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass
class Pieces:
    """partials of requests of which request i has pieces[i]; slots that belong to nobody hold NaN"""

    o: torch.Tensor  # [slot, query token, head, 512]
    lse: torch.Tensor  # [slot, query token, head]
    merges: torch.Tensor
    slots: dict[int, list[int]]  # of the requests listed in merges

    @classmethod
    def make(cls, pieces: dict[int, int], s_q: int, h_q: int, seed: int = 0, partials=torch.float16) -> "Pieces":
        generator = torch.Generator("cuda").manual_seed(seed)
        slots, first = {}, 4  # as kernels/schedule.py hands them out: one after the other
        for request, count in pieces.items():
            slots[request] = [first + i for i in range(count)]
            first += count + 1
        o = torch.full((first + 2, s_q, h_q, 512), float("nan"), dtype=partials, device="cuda")
        lse = torch.full((first + 2, s_q, h_q), float("nan"), device="cuda")
        for slot in (slot for mine in slots.values() for slot in mine):
            o[slot] = torch.randn(s_q, h_q, 512, generator=generator, device="cuda")
            lse[slot] = torch.randn(s_q, h_q, generator=generator, device="cuda") * 4
        rows = [
            [len(pieces), MERGE_GROUPS, 0, 0],
            *([request, min(mine, default=0), len(mine), 0] for request, mine in slots.items()),
        ]
        return cls(o, lse, torch.tensor(rows, dtype=torch.int32, device="cuda"), slots)

    def wanted(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in float64"""
        mine = self.slots[request]
        if not mine:
            empty = torch.zeros(self.o.shape[1:], dtype=torch.float64, device="cuda")
            return empty, torch.full_like(empty[..., 0], -torch.inf)
        lse, o = self.lse[mine].double(), self.o[mine].double()
        total = lse.logsumexp(0)
        weight = torch.where(total.isinf(), 0.0, (lse - total).exp())
        return (weight[..., None] * o).sum(0), total


def config_of(dtype: torch.dtype, pieces: Pieces) -> MLAConfig:
    return MLAConfig(kv=FORMATS[DTYPES[dtype]], split=str(pieces.o.dtype).removeprefix("torch."))


def run(pieces: Pieces, batch: int, dtype: torch.dtype, num_sms: int = 132) -> tuple[torch.Tensor, torch.Tensor]:
    _, s_q, h_q, _ = pieces.o.shape
    out = torch.full((batch, s_q, h_q, 512), float("nan"), dtype=dtype, device="cuda")
    lse = torch.full((batch, h_q, s_q), float("nan"), device="cuda")
    compile.get(MergeOp, config_of(dtype, pieces))(pieces.o, pieces.lse, pieces.merges, out, lse, num_sms)
    return out, lse


def check(pieces: Pieces, batch: int, dtype: torch.dtype, num_sms: int = 132):
    out, lse = run(pieces, batch, dtype, num_sms)
    rel, absolute = TOLERANCE[dtype]
    for request in range(batch):
        if request not in pieces.slots:
            assert out[request].isnan().all() and lse[request].isnan().all(), f"request {request} is not to be merged"
            continue
        wanted, wanted_lse = pieces.wanted(request)
        assert (out[request].double() - wanted).norm() <= rel * wanted.norm(), f"request {request}"
        torch.testing.assert_close(lse[request].double(), wanted_lse.T, rtol=0, atol=absolute)  # (-inf equals -inf)


@pytest.mark.parametrize("partials", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s_q, h_q", [(1, 1), (1, 16), (2, 128), (3, 5)])
def test_merges(dtype, partials, s_q, h_q):
    for pieces in ({0: 2}, {0: 3, 2: 0, 3: 9, 4: 33}, {1: 132}, {i: 2 for i in range(0, 60, 2)}, {0: 0, 1: 0}):
        check(Pieces.make(pieces, s_q, h_q, partials=partials), max(pieces) + 2, dtype)


def test_nothing_to_merge():
    check(Pieces.make({}, 2, 16), 3, torch.bfloat16)


@pytest.mark.parametrize("count", [*range(2, 20), 63, 64, 65, 131])
def test_every_number_of_pieces(count):
    check(Pieces.make({0: count, 1: count}, 1, 4, seed=count), 2, torch.bfloat16)


@pytest.mark.parametrize("num_sms", [1, 2, 7, 78, 132, 1000])
def test_any_grid(num_sms):
    check(Pieces.make({0: 2, 1: 40, 2: 0, 3: 7}, 2, 24), 4, torch.bfloat16, num_sms)


def test_pieces_that_saw_no_key():
    """their lse is -inf and their o means nothing: weight 0; rows of which no piece saw a key: 0 and -inf"""
    pieces = Pieces.make({0: 4, 1: 3}, 2, 8)
    first, *_, last = pieces.slots[0]
    pieces.lse[first] = pieces.lse[last, 1, 3:] = -torch.inf
    pieces.o[first] = 0.0
    for slot in pieces.slots[1]:
        pieces.lse[slot, 0] = -torch.inf
        pieces.o[slot, 0] = 0.0
    check(pieces, 2, torch.bfloat16)
    out, lse = run(pieces, 2, torch.bfloat16)
    assert (out[1, 0] == 0).all() and (lse[1, :, 0] == -torch.inf).all()


@pytest.mark.parametrize("shift", [-3e4, -100.0, 100.0, 3e4])
def test_large_lse(shift):
    """weights are of differences: no overflow, and one piece may outweigh all others"""
    pieces = Pieces.make({0: 5, 1: 2}, 1, 16)
    pieces.lse += shift
    pieces.lse[pieces.slots[0][2], 0, :8] += 500
    out, lse = run(pieces, 2, torch.bfloat16)
    for request in (0, 1):
        wanted, wanted_lse = pieces.wanted(request)
        assert (out[request].double() - wanted).norm() <= (4e-3 + abs(shift) * 2**-22) * wanted.norm()
        torch.testing.assert_close(lse[request].double(), wanted_lse.T, rtol=2**-22, atol=1e-5)
    torch.testing.assert_close(out[0, 0, :8].float(), pieces.o[pieces.slots[0][2], 0, :8].float(), rtol=2**-7, atol=1e-6)


def test_repeat_runs_are_bit_identical():
    pieces = Pieces.make({0: 2, 1: 40, 2: 7}, 2, 24)
    first = run(pieces, 3, torch.bfloat16)
    for _ in range(10):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, run(pieces, 3, torch.bfloat16)))


def test_strided_outputs():
    pieces = Pieces.make({0: 3, 1: 0}, 2, 8)
    plain = run(pieces, 2, torch.bfloat16)
    memory = torch.full((2, 8, 2, 640), 7.0, dtype=torch.bfloat16, device="cuda")
    out, lse = memory.transpose(1, 2)[..., :512], torch.full((2, 2, 8), float("nan"), device="cuda").transpose(1, 2)
    compile.get(MergeOp, config_of(torch.bfloat16, pieces))(pieces.o, pieces.lse, pieces.merges, out, lse, 132)
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
    assert (memory[..., 512:] == 7).all()
