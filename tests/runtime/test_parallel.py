"""Decode on several GPUs: the arithmetic of who has what, the whole path over gloo with the kernels' twins, NCCL on GPUs."""

import os
import socket
import traceback
from itertools import product

import pytest
import torch
import torch.distributed as dist

from flashmla_cute import DecodePlan, PagedKVCache, compile, mla_decode, ops, parallel
from flashmla_cute.kernels.config import TILE, Fp8Config, MLAConfig, ScheduleConfig
from flashmla_cute.parallel import ContextParallel, Contiguous, DataParallel, Interleaved, Ranks, TensorParallel
from flashmla_cute.reference import reference_decode
from flashmla_cute.testing import TOLERANCE

from . import twins

SCALE = 576**-0.5


# ---------------------------------------------------------------------- who has what
def owner(sharding, request: int, token: int) -> int:
    """rank of a token, by the words of the docstrings"""
    if isinstance(sharding, Interleaved):
        return token // sharding.stripe % sharding.size
    begins = sharding.begins[request].tolist()
    return max(rank for rank, begin in enumerate(begins) if begin <= token and begin < [*begins, 1 << 30][rank + 1])


def shardings(size: int, lengths: list[int]) -> list:
    cuts = torch.Generator().manual_seed(size)
    rows = [sorted(torch.randint(0, n + 2, (size - 1,), generator=cuts).tolist()) for n in lengths]
    ragged = torch.tensor([[0, *row] for row in rows], dtype=torch.int32)
    all_on_the_last, all_on_the_first = torch.zeros_like(ragged), torch.full_like(ragged, 1 << 20)
    all_on_the_first[:, 0] = 0
    contiguous = [Contiguous(begins) for begins in (ragged, all_on_the_last, all_on_the_first)]
    return [*(Interleaved(size, stripe) for stripe in (1, 3, 64, 100)), *contiguous]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_counts_are_those_of_the_owners(size):
    tokens = torch.arange(420).expand(3, -1)
    for sharding in shardings(size, [400, 7, 0]):
        for rank in range(size):
            got = sharding.count(tokens, rank)
            for request in range(3):
                mine = [owner(sharding, request, token) == rank for token in range(420)]
                assert got[request].tolist() == [sum(mine[:n]) for n in range(420)], (sharding, rank, request)


def test_shares_cover_all_heads_in_order():
    for count, size in product((1, 7, 8, 96, 128), (1, 2, 3, 8)):
        shares = [parallel.share_of(count, size, rank) for rank in range(size)]
        assert [head for share in shares for head in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_requests_are_assigned_once_and_evenly():
    lengths = torch.randint(0, 5000, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for size in (1, 2, 7):
        ranks = parallel.assign(lengths, size)
        assert sorted(request for mine in ranks for request in mine) == list(range(200))
        loads = [sum(lengths[i] for i in mine) for mine in ranks]
        assert max(loads) - min(loads) <= max(lengths)
    assert sorted(map(len, parallel.assign([0] * 6, 3))) == [2, 2, 2]


@pytest.mark.parametrize("arguments, words", [((0,), "size is 0"), ((2, 0), "stripe is 0")])
def test_interleaving_checks_itself(arguments, words):
    with pytest.raises(ValueError, match=words):
        Interleaved(*arguments)


# ---------------------------------------------------------------------- a problem, and a rank's part of it
class Whole:
    """requests with all their tokens in one place, the same on every rank"""

    def __init__(self, lengths: list[int], num_heads: int, num_queries: int, device: str, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(len(lengths) + num_heads)
        randn = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
        self.lengths, self.device, self.dtype = lengths, device, dtype
        self.tokens = [randn(n, 576) for n in lengths]
        self.q = randn(len(lengths), num_queries, num_heads, 576).to(device, torch.bfloat16)

    def cache(self, tokens: list[torch.Tensor]) -> PagedKVCache:
        """tokens[i] of request i, in shuffled pages; NaN elsewhere, and page ids that do not exist behind the last"""
        counts = [-(-len(own) // TILE) for own in tokens]
        order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(1)).int()
        pool = torch.full((sum(counts) + 1, TILE, 576), float("nan"))
        table, at = torch.full((len(tokens), max(counts) + 1), 1 << 29, dtype=torch.int32), 0
        for row, (own, count) in enumerate(zip(tokens, counts)):
            pages = order[at : at + count]
            padded = torch.full((count * TILE, 576), float("nan"))
            padded[: len(own)] = own
            pool[pages.long()] = padded.view(count, TILE, 576)
            table[row, :count], at = pages, at + count
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return PagedKVCache.from_tensors(pool.to(self.device, self.dtype), table.to(self.device), lengths.to(self.device))

    def shard(self, sharding, rank: int) -> PagedKVCache:
        mine = lambda i, n: [token for token in range(n) if owner(sharding, i, token) == rank]
        return self.cache([own[mine(i, len(own))] for i, own in enumerate(self.tokens)])

    def expected(self, causal: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        cache = self.cache(self.tokens)
        return reference_decode(self.q, cache.pool, cache.block_table, self.lengths, SCALE, causal, 512)

    def check(self, out: torch.Tensor, lse: torch.Tensor, causal: bool = True, heads: slice = slice(None)):
        rel, absolute = TOLERANCE[out.dtype][0], TOLERANCE[self.dtype][1]
        expected, expected_lse = self.expected(causal)
        expected, expected_lse = expected[:, :, heads], expected_lse[:, heads]
        assert out.shape == expected.shape and lse.shape == expected_lse.shape
        for i in range(len(self.lengths)):
            assert (out[i].double() - expected[i]).norm() <= rel * expected[i].norm(), (i, self.lengths[i])
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=absolute)


# ---------------------------------------------------------------------- what each of several processes does
def context_parallel(rank: int, size: int, device: str):
    lengths = [0, 1, 2, 63, 64, 65, 130, 257, 500]
    for num_queries, heads, scatter in ((1, 5, False), (1, 5, True), (2, 4, False), (3, 6, True), (5, 3, False)):
        whole = Whole(lengths, heads, num_queries, device)
        for sharding in shardings(size, lengths):
            if isinstance(sharding, Contiguous):
                sharding = Contiguous(sharding.begins.to(device))
            cp = ContextParallel(whole.shard(sharding, rank), sharding, heads, num_queries, scatter_heads=scatter)
            share = cp.shares[rank]
            out, lse = cp.decode(whole.q, cp.cache(whole.shard(sharding, rank).pool))
            whole.check(out, lse, heads=slice(share.start, share.stop))


def context_parallel_without_mask(rank: int, size: int, device: str):
    """and with q in two parts"""
    whole, sharding = Whole([5, 200, 0], 4, 3, device), Interleaved(size, 2)
    cache = whole.shard(sharding, rank)
    cp = ContextParallel(cache, sharding, 4, 3, causal=False)
    q = whole.q[..., :512].contiguous(), whole.q[..., 512:].contiguous()
    whole.check(*cp.decode(q, cp.cache(cache.pool), softmax_scale=SCALE), causal=False)


def context_parallel_fp8(rank: int, size: int, device: str):
    whole, sharding = Whole([5, 200, 0], 4, 2, device, torch.float8_e4m3fn), Interleaved(size, 2)
    cache = whole.shard(sharding, rank)
    cp = ContextParallel(cache, sharding, 4, 2)
    whole.check(*cp.decode(whole.q, cp.cache(cache.pool)))


def context_parallel_grows(rank: int, size: int, device: str):
    """tokens are appended by their slots, and `update` sees lengths and pages change"""
    whole, sharding = Whole([70, 3, 131], 4, 2, device), Interleaved(size, 3)
    table = torch.arange(9, dtype=torch.int32, device=device).view(3, 3)
    pool = torch.full((9, TILE, 1, 576), float("nan"), dtype=torch.bfloat16, device=device)
    seqlens = torch.zeros(3, dtype=torch.int32, device=device)
    cp = ContextParallel(PagedKVCache.from_tensors(pool, table, seqlens), sharding, 4, 2)
    layer, lengths = cp.cache(pool), whole.lengths
    for step in ([60, 1, 100], [61, 3, 101], lengths):
        before, after = seqlens.tolist(), step
        new = max(b - a for a, b in zip(before, after))
        rows = [[a + i if a + i < b else -1 for i in range(new)] for a, b in zip(before, after)]
        slots = cp.slots(torch.tensor(rows, device=device))
        mine = [token >= 0 and owner(sharding, i, token) == rank for i, row in enumerate(rows) for token in row]
        assert [slot >= 0 for slot in slots.tolist()] == mine
        rows = torch.stack([whole.tokens[i][token] for i, row in enumerate(rows) for token in row]).to(device)
        layer.append(rows[:, :512], rows[:, 512:], slots)
        seqlens.copy_(torch.tensor(after))
        cp.update()
        now = Whole(after, 4, 2, device)
        now.q, now.tokens = whole.q, [own[:n] for own, n in zip(whole.tokens, after)]
        now.check(*cp.decode(whole.q, layer))


def context_parallel_in_a_graph(rank: int, size: int, device: str):
    """decode and exchange are captured; replays follow the lengths that `update` saw last"""
    if device == "cpu":
        return
    whole, sharding = Whole([70, 3, 131], 4, 2, device), Interleaved(size, 3)
    cache = whole.shard(sharding, rank)
    cp = ContextParallel(cache, sharding, 4, 2)
    layer = cp.cache(cache.pool)
    cp.decode(whole.q, layer)  # loads, and connects the ranks
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # (NCCL's watchdog thread asks for events meanwhile)
        out, lse = cp.decode(whole.q, layer)
    for lengths in (whole.lengths, [65, 2, 64], [1, 0, 131]):
        cp.seqlens.copy_(torch.tensor(lengths))
        cp.update()
        out.fill_(float("nan"))
        graph.replay()
        now = Whole(lengths, 4, 2, device)
        now.q, now.tokens = whole.q, [own[:n] for own, n in zip(whole.tokens, lengths)]
        now.check(out, lse)


def tensor_parallel(rank: int, size: int, device: str):
    whole = Whole([100, 0, 257], 7, 2, device)
    cache = whole.cache(whole.tokens)
    tp = TensorParallel(7, torch.device(device))
    mine = whole.q[:, :, tp.heads]
    out, lse = mla_decode(mine, cache, DecodePlan(cache, mine.shape[2], 2))
    whole.check(out, lse, heads=tp.heads)
    whole.check(tp.gather(out), whole.expected()[1])
    with pytest.raises(ValueError, match=r"out.shape\[2\] is 9"):
        tp.gather(out.new_empty(3, 2, 9, 512))


def data_parallel(rank: int, size: int, device: str):
    whole = Whole([100, 0, 257, 64, 300], 4, 2, device)
    dp = DataParallel(whole.lengths, torch.device(device))
    part = Whole([whole.lengths[i] for i in dp.requests], 4, 2, device)
    part.tokens = [whole.tokens[i] for i in dp.requests]
    cache = part.cache(part.tokens)
    out, _ = mla_decode(whole.q[dp.requests], cache, DecodePlan(cache, 4, 2))
    whole.check(dp.gather(out), whole.expected()[1])
    few = DataParallel([9], torch.device(device))  # ranks without a request take part
    assert few.gather(torch.full((len(few.requests), 3), 1.0, device=device)).tolist() == [[1.0] * 3]


def groups(rank: int, size: int, device: str):
    """a group that is not all ranks, whose ranks have other numbers there"""
    last = dist.new_group([size - 1])
    members = dist.new_group(list(range(1, size)))
    if rank == 0:
        with pytest.raises(ValueError, match="group is one without this process"):
            Ranks(members, torch.device(device))
        return
    ranks = Ranks(members, torch.device(device))
    assert (ranks.rank, ranks.size) == (rank - 1, size - 1)
    got = ranks.all_gather(torch.full((rank,), rank, device=device), range(1, size), 0)
    assert [tensor.tolist() for tensor in got] == [[r] * r for r in range(1, size)]
    if rank == size - 1:
        assert Ranks(last, torch.device(device)).size == 1
    with pytest.raises(ValueError, match=f"sharding.size is {size + 3}; allowed: {size}"):
        whole = Whole([5], 4, 1, device)
        ContextParallel(whole.cache(whole.tokens), Interleaved(size + 3), 4)


CASES = (
    context_parallel,
    context_parallel_without_mask,
    context_parallel_fp8,
    context_parallel_grows,
    context_parallel_in_a_graph,
    tensor_parallel,
    data_parallel,
    groups,
)


KERNELS = (  # that they launch on two GPUs
    (ops.DecodeOp, MLAConfig(causal=False)),
    (ops.DecodeOp, MLAConfig(causal=False, q_pair=True)),
    (ops.DecodeOp, MLAConfig(causal=True)),
    (ops.DecodeOp, MLAConfig(causal=True, head_tile=4)),
    (ops.Fp8DecodeOp, Fp8Config(base=MLAConfig(causal=False))),
    (ops.MergeOp, MLAConfig(causal=False, split="bfloat16")),
    (ops.ScheduleOp, ScheduleConfig()),
    (ops.AppendOp, MLAConfig(causal=False)),
)


# ---------------------------------------------------------------------- processes
def process(rank: int, size: int, port: int, device: str, cases, errors):
    patch, asked = pytest.MonkeyPatch(), set()
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
        torch.set_num_threads(1)
        if device == "cpu":
            twins.install(patch)
            patch.setattr(twins, "NUM_SMS", 3)
            patch.setattr(compile, "get", lambda *pair: asked.add(pair) or twins.get(*pair))
            dist.init_process_group("gloo")
        else:
            torch.cuda.set_device(rank)
            device = f"cuda:{rank}"
            dist.init_process_group("nccl", device_id=torch.device(device))
        for case in cases:
            case(rank, size, device)
            dist.barrier()
        dist.destroy_process_group()
        assert size != 2 or asked <= {*KERNELS}, f"not compiled ahead on GPUs: {asked - {*KERNELS}}"
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)  # (the others may be waiting for this one: they are ended below)


def run(cases, size: int, device: str, seconds: float = 240):
    """`cases` in `size` processes; fails with what the first failing one raised"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    processes = [context.Process(target=process, args=(r, size, port, device, cases, errors)) for r in range(size)]
    for one in processes:
        one.start()
    try:
        for one in processes:
            one.join(seconds)
            if one.exitcode != 0:
                pytest.fail(errors.get() if not errors.empty() else f"a process ended with {one.exitcode} (None: not at all)")
    finally:
        for one in processes:
            one.kill()
            one.join()


@pytest.mark.parametrize("size", [2, 3])
def test_over_gloo(size):
    run(CASES, size, "cpu")


@pytest.mark.gpu
def test_over_nccl():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, there is {torch.cuda.device_count()}")
    compile.get_many(KERNELS)  # (ahead, so that no process waits for another's compiler)
    run([case for case in CASES if case is not groups], 2, "cuda")


# ---------------------------------------------------------------------- errors
def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"no process group: call torch.distributed.init_process_group\('nccl'\)"):
        Ranks(None, torch.device("cpu"))


def test_without_distributed(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"no torch\.distributed"):
        Ranks(None, torch.device("cpu"))


@pytest.fixture
def one_rank():
    """a gloo group of this process alone"""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_cuda_tensors_need_nccl(one_rank, monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(RuntimeError, match="no NCCL"):
        Ranks(None, torch.device("cuda"))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    with pytest.raises(RuntimeError, match="backend is gloo; allowed: nccl"):
        Ranks(None, torch.device("cuda"))


def test_every_rank_needs_a_gpu(one_rank, monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match="4 ranks on this host need a GPU each, it has 3"):
        Ranks(None, torch.device("cuda"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")

    def duplicate(*_, **__):
        raise dist.DistBackendError("Duplicate GPU detected")

    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(dist, "all_reduce", duplicate)
    with pytest.raises(RuntimeError, match=r"each on a GPU of its own \(3 here\): Duplicate GPU detected"):
        Ranks(None, torch.device("cuda"))


def test_heads_must_suffice(one_rank):
    with pytest.raises(ValueError, match="num_heads is 0; allowed: at least 1"):
        TensorParallel(0, torch.device("cpu"))
