"""Argument errors, all without a GPU: the type of the exception, and that the message names argument, given and allowed."""

import random
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_cute import DecodePlan, PagedKVCache, checks, compile, decode, mla_decode, plan
from flashmla_cute.kernels.config import FORMATS, DecodeOptions, KVFormat, MLAConfig, ScheduleConfig


def rejects(error, name, given, allowed):
    """`error` whose message is: name .. given .. allowed, in this order"""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, (name, given, allowed))))


def pool(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape or (4, 64, 1, 576), dtype=dtype)


def table(*shape, dtype=torch.int32):
    return torch.zeros(shape or (2, 3), dtype=dtype)


def lengths(*shape, dtype=torch.int32):
    return torch.zeros(shape or (2,), dtype=dtype)


def fake(*shape, dtype=torch.bfloat16):
    with FakeTensorMode():
        return torch.zeros(shape, dtype=dtype)


# ---------------------------------------------------------------------- PagedKVCache
CACHE_ERRORS = {
    "pool no tensor": (TypeError, ([1, 2], table(), lengths()), "pool", "list", "torch.Tensor"),
    "table no tensor": (TypeError, (pool(), None, lengths()), "block_table", "NoneType", "torch.Tensor"),
    "lengths no tensor": (TypeError, (pool(), table(), (1, 2)), "cache_seqlens", "tuple", "torch.Tensor"),
    "pool fake": (TypeError, (fake(4, 64, 1, 576), table(), lengths()), "pool", "FakeTensor", "a real CUDA tensor"),
    "table meta": (TypeError, (pool(), table().to("meta"), lengths()), "block_table", "without memory", "a real CUDA tensor"),
    "pool grad": (TypeError, (pool().requires_grad_(), table(), lengths()), "pool", "requires grad", "pool.detach()"),
    "pool dtype": (ValueError, (pool(dtype=torch.float32), table(), lengths()), "pool.dtype", "float32", "bfloat16"),
    "pool axes": (ValueError, (pool(4, 64), table(), lengths()), "pool.shape", "(4, 64)", "(any, any, any, any)"),
    "pool page": (
        ValueError,
        (pool(4, 20, 1, 576), table(), lengths()),
        "pool.shape[1]",
        "20",
        "a multiple of 8 tokens up to 1024",
    ),
    "pool dims": (ValueError, (pool(4, 64, 1, 520), table(), lengths()), "pool.shape", "(4, 64, 1, 520)", "512 + 64"),
    "pool empty": (ValueError, (pool(0, 64, 1, 576), table(), lengths()), "pool.shape", "(0, 64, 1, 576)", "at least one page"),
    "pool no head": (ValueError, (pool(4, 64, 0, 576), table(), lengths()), "pool.shape", "(4, 64, 0, 576)", "one kv head"),
    "pool columns": (ValueError, (pool(4, 64, 1, 1152)[..., ::2], table(), lengths()), "pool.stride(-1)", "2", "1"),
    "pool stride": (
        ValueError,
        (pool(4 * 36868).as_strided((4, 64, 1, 576), (36868, 576, 576, 1)), table(), lengths()),
        "pool.stride(0)",
        "36868",
        "a positive multiple of 8",
    ),
    "pool expanded": (
        ValueError,
        (pool(1, 64, 1, 576).expand(4, -1, -1, -1), table(), lengths()),
        "pool.stride(0)",
        "0",
        "a positive multiple of 8",
    ),
    "table dtype": (ValueError, (pool(), table(dtype=torch.int64), lengths()), "block_table.dtype", "int64", "int32"),
    "table axes": (ValueError, (pool(), table(2), lengths()), "block_table.shape", "(2,)", "(any, any)"),
    "table empty": (ValueError, (pool(), table(2, 0), lengths()), "block_table.shape", "(2, 0)", "at least one page"),
    "table columns": (ValueError, (pool(), table(3, 2).t(), lengths()), "block_table.stride(1)", "2", "1"),
    "lengths dtype": (ValueError, (pool(), table(), lengths(dtype=torch.int64)), "cache_seqlens.dtype", "int64", "int32"),
    "lengths batch": (ValueError, (pool(), table(), lengths(3)), "cache_seqlens.shape", "(3,)", "(2)"),
    "lengths stride": (ValueError, (pool(), table(), lengths(4)[::2]), "cache_seqlens.stride()", "(2,)", "contiguous"),
}


@pytest.mark.parametrize("case", CACHE_ERRORS)
def test_cache_rejects(case):
    error, tensors, name, given, allowed = CACHE_ERRORS[case]
    with rejects(error, name, given, allowed):
        PagedKVCache.from_tensors(*tensors)


def test_cache_rejects_a_misaligned_pool():
    memory = torch.zeros(4 * 64 * 576 + 16, dtype=torch.bfloat16)
    first = -memory.data_ptr() % 16 // 2 + 4  # 8 bytes off
    with rejects(ValueError, "pool.data_ptr()", "0x", "a multiple of 16 bytes"):
        PagedKVCache(memory[first : first + 4 * 64 * 576].view(4, 64, 1, 576), table(), lengths())


def test_cache_accepts_what_engines_hold():
    """no head axis, padded blocks, a view into a larger pool; and nothing is copied"""
    layers = pool(4, 3, 64, 640)
    cache = PagedKVCache.from_tensors(layers[:, 1, :, :576], table(), lengths())
    assert cache.pool.shape == (4, 64, 1, 576) and cache.pool.data_ptr() == layers[:, 1].data_ptr()
    assert (cache.batch, cache.page, cache.num_kv_heads, cache.capacity) == (2, 64, 1, 192)
    with torch.no_grad():
        assert PagedKVCache(pool().requires_grad_(), table(), lengths()).format == FORMATS["bfloat16"]


@pytest.mark.parametrize(
    "change, name, given, allowed",
    [
        (dict(dtype=torch.float32), "dtype", "float32", "bfloat16"),
        (dict(num_pages=0), "num_pages", "0", "a positive integer"),
        (dict(batch=-1), "batch", "-1", "a positive integer"),
        (dict(max_seqlen=1.5), "max_seqlen", "1.5", "a positive integer"),
        (dict(num_kv_heads=0), "num_kv_heads", "0", "a positive integer"),
    ],
    ids=str,
)
def test_allocate_rejects(change, name, given, allowed):
    with rejects(ValueError, name, given, allowed):
        PagedKVCache.allocate(**{**dict(num_pages=4, batch=2, max_seqlen=100, device="cpu"), **change})


# ---------------------------------------------------------------------- configurations
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(head_tile=3), ("head_tile", "3", "0 or a power of 2 up to 64")),
        (dict(head_tile=128), ("head_tile", "128", "0 or a power of 2 up to 64")),
        (dict(page=20), ("page", "20", "multiples of 8 up to 1024")),
        (dict(page=2048), ("page", "2048", "multiples of 8 up to 1024")),
        (dict(split="float8"), ("split", "float8", "float32, float16, bfloat16")),
        (dict(kv=KVFormat("float32")), ("kv.dtype", "float32", "bfloat16, float16")),
        (dict(kv=KVFormat("bfloat16", latent=384)), ("kv", "latent=384", "(512, 64), (512, 0)")),
        (dict(kv=KVFormat("bfloat16", 512, 0), q_pair=True), ("q_pair", "True", "no rope columns")),
        (dict(options=DecodeOptions(window=-1)), ("options.window", "-1", "a number of tokens")),
        (dict(options=DecodeOptions(softcap=-1.0)), ("options.softcap", "-1.0", "a positive number")),
        (dict(options=DecodeOptions(out="float16")), ("options.out", "float16", "float32")),
    ],
    ids=str,
)
def test_config_rejects(change, words):
    with rejects(ValueError, *words):
        replace(MLAConfig(), **change)


@pytest.mark.parametrize("field", [field.name for field in fields(MLAConfig) if field.name.endswith("_registers")])
def test_config_rejects_more_registers_than_there_are(field):
    """with the sum in the message"""
    with pytest.raises(ValueError, match=r"MLAConfig: .*\b248\b.* = \d+ registers.*dead-lock"):
        replace(MLAConfig(), **{field: 248})


# ---------------------------------------------------------------------- the device
def test_a_cpu_tensor_is_no_cuda_tensor():
    cache = PagedKVCache(pool(), table(), lengths())
    with rejects(ValueError, "cache.pool.device", "cpu", "a CUDA device"):
        DecodePlan(cache, 128)
    with rejects(ValueError, "cache.pool.device", "cpu", "a CUDA device"):
        cache.append(torch.zeros(1, 512), torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64))


def test_another_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(checks, "_capability", lambda index: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    with rejects(RuntimeError, "q is on cuda:1", "B200 of compute capability 10.0", "a Hopper GPU (9.0"):
        checks.is_hopper("q", SimpleNamespace(device=torch.device("cuda:1")))


def test_a_hopper_gpu_is_accepted(monkeypatch):
    monkeypatch.setattr(checks, "_capability", lambda index: (9, 0))
    checks.is_hopper("q", SimpleNamespace(device=torch.device("cuda:0")))


# ---------------------------------------------------------------------- DecodePlan, mla_decode
@pytest.fixture
def launches(monkeypatch):
    """CPU tensors pass for those of a Hopper GPU of 132 SMs; what would be launched is listed instead"""
    listed = []
    monkeypatch.setattr(checks, "is_hopper", lambda name, tensor: None)
    monkeypatch.setattr(plan, "num_sms", lambda index: 132)
    monkeypatch.setattr(compile, "get", lambda op, config: lambda *arguments: listed.append((op.name, config)))
    return listed


@pytest.fixture
def problem(launches):
    """q, cache, plan of 2 requests, 3 query tokens, 8 heads; no launch but the plan's so far"""
    cache = PagedKVCache(pool(), table(), lengths())
    made = dict(q=torch.zeros(2, 3, 8, 576, dtype=torch.bfloat16), cache=cache, plan=DecodePlan(cache, 8, 3))
    assert [name for name, _ in launches] == ["schedule"]
    launches.clear()
    return made


@pytest.mark.parametrize(
    "arguments, name, given, allowed",
    [
        (dict(num_heads=0), "num_heads", "0", "a positive integer"),
        (dict(num_heads=8, num_queries=0), "num_queries", "0", "a positive integer"),
        (dict(num_heads=8.0), "num_heads", "8.0", "a positive integer"),
        (dict(num_heads=9), "num_heads", "9", "a multiple of the cache's 2 kv heads"),
        (dict(num_heads=8, config=ScheduleConfig(max_batch=1)), "cache.batch", "2", "up to 1"),
        (dict(num_heads=8, partials=torch.bfloat16), "partials", "bfloat16", "torch.float16 or torch.float32"),
    ],
    ids=str,
)
def test_plan_rejects(launches, arguments, name, given, allowed):
    with rejects(ValueError, name, given, allowed):
        DecodePlan(PagedKVCache(pool(4, 64, 2, 576), table(), lengths()), **arguments)
    assert launches == []


@pytest.mark.parametrize("runs", [0, 1])
@pytest.mark.parametrize("max_pieces, partials, joins", [(4, torch.float16, 1), (4, torch.float32, 0), (0, torch.float16, 0)])
def test_the_plan_decides_who_joins_pieces(launches, max_pieces, partials, joins, runs):
    """whatever the config says: the workspace and the decode kernel go with it"""
    config = ScheduleConfig(max_pieces=max_pieces, runs=runs)
    cache = PagedKVCache(pool(4, 64, 1, 576), table(), lengths())
    plan = DecodePlan(cache, 8, partials=partials, batch_invariant=max_pieces > 0, config=config)
    assert (plan.config.runs, plan.fixed_pieces) == (joins, bool(joins))


def test_plan_rejects_what_is_no_cache(launches):
    with rejects(TypeError, "cache", "Tensor", "a PagedKVCache"):
        DecodePlan(pool(), 8)


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def misaligned(*shape):
    memory = torch.zeros(torch.Size(shape).numel() + 16, dtype=torch.bfloat16)
    first = -memory.data_ptr() % 16 // 2 + 4
    return memory[first : first + torch.Size(shape).numel()].view(shape)


DECODE_ERRORS = {
    "q no tensor": (TypeError, dict(q=[1.0]), "q", "list", "torch.Tensor"),
    "q fake": (TypeError, dict(q=fake(2, 3, 8, 576)), "q", "FakeTensor", "a real CUDA tensor"),
    "q meta": (TypeError, dict(q=bf16(2, 3, 8, 576).to("meta")), "q", "without memory", "a real CUDA tensor"),
    "q grad": (TypeError, dict(q=bf16(2, 3, 8, 576).requires_grad_()), "q", "requires grad", "q.detach()"),
    "q dtype": (ValueError, dict(q=bf16(2, 3, 8, 576).half()), "q.dtype", "float16", "bfloat16"),
    "q batch": (ValueError, dict(q=bf16(3, 3, 8, 576)), "q.shape", "(3, 3, 8, 576)", "(2, 3, 8, 576)"),
    "q tokens": (ValueError, dict(q=bf16(2, 1, 8, 576)), "q.shape", "(2, 1, 8, 576)", "of the plan"),
    "q heads": (ValueError, dict(q=bf16(2, 3, 16, 576)), "q.shape", "(2, 3, 16, 576)", "(2, 3, 8, 576)"),
    "q dims": (ValueError, dict(q=bf16(2, 3, 8, 512)), "q.shape", "(2, 3, 8, 512)", "latent + rope"),
    "q axes": (ValueError, dict(q=bf16(2, 8, 576)), "q.shape", "(2, 8, 576)", "(2, 3, 8, 576)"),
    "q columns": (ValueError, dict(q=bf16(2, 3, 8, 1152)[..., ::2]), "q.stride(-1)", "2", "1"),
    "q stride": (ValueError, dict(q=bf16(2, 3, 8, 580)[..., :576]), "q.stride(2)", "580", "a positive multiple of 8"),
    "q expanded": (
        ValueError,
        dict(q=bf16(1, 3, 8, 576).expand(2, -1, -1, -1)),
        "q.stride(0)",
        "0",
        "a positive multiple of 8",
    ),
    "q misaligned": (ValueError, dict(q=misaligned(2, 3, 8, 576)), "q.data_ptr()", "0x", "a multiple of 16 bytes"),
    "cache": (TypeError, dict(cache=pool()), "cache", "Tensor", "a PagedKVCache"),
    "plan": (TypeError, dict(plan=None), "plan", "NoneType", "a DecodePlan"),
    "out no tensor": (TypeError, dict(out=0), "out", "int", "torch.Tensor"),
    "out dtype": (ValueError, dict(out=bf16(2, 3, 8, 512).float()), "out.dtype", "float32", "bfloat16"),
    "out shape": (ValueError, dict(out=bf16(2, 3, 8, 576)), "out.shape", "(2, 3, 8, 576)", "(2, 3, 8, 512)"),
    "out stride": (ValueError, dict(out=bf16(2, 3, 8, 516)[..., :512]), "out.stride(2)", "516", "multiple of 8"),
    "out expanded": (ValueError, dict(out=bf16(2, 1, 8, 512).expand(-1, 3, -1, -1)), "out.stride(1)", "0", "positive multiple"),
    "out misaligned": (ValueError, dict(out=misaligned(2, 3, 8, 512)), "out.data_ptr()", "0x", "a multiple of 16 bytes"),
    "lse no tensor": (TypeError, dict(lse="x"), "lse", "str", "torch.Tensor"),
    "lse dtype": (ValueError, dict(lse=bf16(2, 8, 3)), "lse.dtype", "bfloat16", "float32"),
    "lse shape": (ValueError, dict(lse=torch.zeros(2, 3, 8)), "lse.shape", "(2, 3, 8)", "(2, 8, 3)"),
    "lse expanded": (ValueError, dict(lse=torch.zeros(2, 1, 3).expand(-1, 8, -1)), "lse.stride(1)", "0", "positive"),
    "lse fake": (TypeError, dict(lse=fake(2, 8, 3, dtype=torch.float32)), "lse", "FakeTensor", "a real CUDA tensor"),
    "out fake": (TypeError, dict(out=fake(2, 3, 8, 512)), "out", "FakeTensor", "a real CUDA tensor"),
}


@pytest.mark.parametrize("case", DECODE_ERRORS)
def test_decode_rejects_before_any_launch(problem, launches, case):
    error, change, name, given, allowed = DECODE_ERRORS[case]
    poison = dict(out=bf16(2, 3, 8, 512).fill_(7), lse=torch.full((2, 8, 3), 7.0))
    with rejects(error, name, given, allowed):
        mla_decode(**{**problem, **poison, **change})
    assert launches == [] and all((tensor == 7).all() for tensor in poison.values())


SCALE_ERRORS = {
    "0": (ValueError, 0.0, "0.0"),
    "negative": (ValueError, -1.0, "-1.0"),
    "nan": (ValueError, float("nan"), "nan"),
    "inf": (ValueError, float("inf"), "inf"),
    "no number": (TypeError, [1.0], "list"),
}


@pytest.mark.parametrize("case", SCALE_ERRORS)
def test_decode_rejects_a_scale_that_is_not_positive(problem, launches, case):
    """-inf * 0 would make masked scores NaN, a negative scale +inf; also when a like call has been launched"""
    error, scale, given = SCALE_ERRORS[case]
    for _ in range(2):
        with rejects(error, "softmax_scale", given, "number"):
            mla_decode(**problem, softmax_scale=scale)
        assert launches == []
        mla_decode(**problem)
        launches.clear()


# ---------------------------------------------------------------------- calls like an earlier one
# of DECODE_ERRORS: what the compiled function refuses by itself (test_launch_checks.py); all else must not reach it
LEFT_TO_THE_FUNCTION = {
    *("q meta", "q dtype", "q batch", "q tokens", "q heads", "q dims", "q axes", "q misaligned"),
    *("out dtype", "out shape", "out misaligned", "lse dtype", "lse shape"),
}


@pytest.fixture
def refusing(problem, monkeypatch):
    """a problem whose next launches raise; the calls that get there are listed"""
    reached, ready = [], []

    def launch(*arguments):
        if ready:
            reached.append(arguments)
            raise RuntimeError("refused by the compiled function")

    monkeypatch.setattr(compile, "get", lambda op, config: launch)
    outputs = dict(out=bf16(2, 3, 8, 512).fill_(7), lse=torch.full((2, 8, 3), 7.0))
    mla_decode(**problem)
    mla_decode(**problem, **outputs)
    assert len(problem["plan"].launches) == 2
    ready.append(True)
    return {**problem, **outputs}, reached


@pytest.mark.parametrize("case", DECODE_ERRORS)
def test_decode_rejects_after_a_like_call(refusing, case):
    arguments, reached = refusing
    error, change, name, given, allowed = DECODE_ERRORS[case]
    with rejects(error, name, given, allowed):
        mla_decode(**{**arguments, **change})
    assert not reached or case in LEFT_TO_THE_FUNCTION


@pytest.mark.parametrize("name", ["q", "out", "lse", "pool"])
def test_decode_rejects_grad_after_a_like_call(refusing, name):
    """the tensors are the same, what they require is not"""
    arguments, reached = refusing
    (arguments["cache"].pool if name == "pool" else arguments[name]).requires_grad_()
    with rejects(TypeError, name, "requires grad", "detach()"):
        mla_decode(**arguments)
    assert reached == []
    with torch.no_grad(), pytest.raises(RuntimeError, match="refused by the compiled function"):
        mla_decode(**arguments)


def test_what_a_launch_raises_is_passed_on(refusing):
    arguments, reached = refusing
    with pytest.raises(RuntimeError, match="refused by the compiled function"):
        mla_decode(**arguments)
    assert len(reached) == 1


def test_a_like_call_is_launched_with_its_own_tensors(problem, monkeypatch):
    seen = []
    monkeypatch.setattr(compile, "get", lambda op, config: lambda *arguments: seen.append((config, arguments)))
    calls = []
    for causal in (True, False, True, False):
        q = torch.zeros(2, 3, 8, 576, dtype=torch.bfloat16)
        out, lse = mla_decode(q, problem["cache"], problem["plan"], causal=causal, softmax_scale=0.5 + causal)
        calls.append((causal, q, out, lse))
    for (causal, q, out, lse), (config, arguments) in zip(calls, seen, strict=True):
        assert config.causal == causal and arguments[-4:] == (0.5 + causal, 132, None, None)
        assert arguments[0] is q and arguments[6] is out and arguments[7] is lse
    assert len({id(arguments[6]) for _, arguments in seen}) == 4, "an output was given out twice"


def test_strides_choose_anew(problem, launches):
    padded = torch.zeros(2, 3, 12, 576, dtype=torch.bfloat16)[:, :, :8]
    for q in (problem["q"], padded, problem["q"], padded):
        mla_decode(**{**problem, "q": q})
    assert [config.head_tile for _, config in launches] == [0, 8, 0, 8] and len(problem["plan"].launches) == 2


def test_a_plan_keeps_no_cache_alive(problem, launches):
    seqlens, plan = problem["cache"].cache_seqlens, problem["plan"]
    pools = []
    for _ in range(3):
        cache = PagedKVCache(pool(), table(), seqlens)
        pools.append(weakref.ref(cache.pool))
        mla_decode(problem["q"], cache, plan)
        del cache
    assert [ref() for ref in pools] == [None] * 3 and len(plan.launches) == 3


def test_a_plan_remembers_only_so_many(problem, launches, monkeypatch):
    monkeypatch.setattr(decode, "MAX_REMEMBERED", 4)
    shared = pool(), table(), problem["cache"].cache_seqlens
    caches = [PagedKVCache(*shared) for _ in range(10)]
    for cache in (*caches, *caches):
        mla_decode(problem["q"], cache, problem["plan"])
        assert len(problem["plan"].launches) <= 4
    assert len(launches) == 20


def test_threads_share_a_plan(problem, monkeypatch):
    """(its workspace they could not share on a GPU: one stream; but what it remembers must not mix)"""
    monkeypatch.setattr(decode, "MAX_REMEMBERED", 3)
    monkeypatch.setattr(
        compile, "get", lambda op, config: lambda *arguments: arguments[7].fill_(config.head_tile + config.causal)
    )
    padded = torch.zeros(2, 3, 12, 576, dtype=torch.bfloat16)[:, :, :8]
    caches = [PagedKVCache(pool(), table(), problem["cache"].cache_seqlens) for _ in range(2)]
    wanted = {(q, causal): tile + causal for q, tile in ((0, 0), (1, 8)) for causal in (False, True)}
    start = threading.Barrier(8)

    def calls(seed):
        drawn = random.Random(seed)
        start.wait()
        for _ in range(300):
            which, causal = drawn.randrange(2), drawn.random() < 0.5
            q, cache = (problem["q"], padded)[which], drawn.choice(caches)
            _, lse = mla_decode(q, cache, problem["plan"], causal=causal)
            assert (lse == wanted[which, causal]).all()

    with ThreadPoolExecutor(8) as workers:
        list(workers.map(calls, range(8)))


def test_decode_rejects_the_plan_of_another_batch(problem, launches):
    other = PagedKVCache(pool(), table(), lengths())  # other lengths of the same shape
    with rejects(ValueError, "plan", "another cache_seqlens", "shares this cache's cache_seqlens"):
        mla_decode(**{**problem, "cache": other})
    assert launches == []


def test_decode_rejects_the_plan_of_another_cache(problem, launches):
    seqlens = problem["cache"].cache_seqlens
    with rejects(ValueError, "plan.num_kv_heads", "1", "2"):
        mla_decode(**{**problem, "cache": PagedKVCache(pool(4, 64, 2, 576), table(), seqlens)})
    with rejects(ValueError, "cache.block_table.shape", "(2, 2)", "192 tokens"):
        mla_decode(**{**problem, "cache": PagedKVCache(pool(), table(2, 2), seqlens)})
    assert launches == []


def test_decode_launches_once_what_it_accepts(problem, launches):
    out, lse = mla_decode(**problem)
    assert launches == [("decode", MLAConfig(kv=FORMATS["bfloat16"], causal=True, head_tile=0))]
    assert out.shape == (2, 3, 8, 512) and out.dtype == torch.bfloat16
    assert lse.shape == (2, 8, 3) and lse.dtype == torch.float32
    launches.clear()
    padded = torch.zeros(2, 3, 12, 576, dtype=torch.bfloat16)[:, :, :8]  # tokens and heads are no single axis
    mla_decode(padded, problem["cache"], problem["plan"], causal=False)
    assert launches == [("decode", MLAConfig(kv=FORMATS["bfloat16"], causal=False, head_tile=8))]


def test_an_empty_batch_launches_nothing(launches):
    cache = PagedKVCache(pool(), table(0, 3), lengths(0))
    out, lse = mla_decode(torch.zeros(0, 1, 8, 576, dtype=torch.bfloat16), cache, DecodePlan(cache, 8))
    assert launches == [] and out.shape == (0, 1, 8, 512) and lse.shape == (0, 8, 1)


# ---------------------------------------------------------------------- append
APPEND_ERRORS = {
    "latent no tensor": (TypeError, dict(latent=3), "latent", "int", "torch.Tensor"),
    "latent dtype": (ValueError, dict(latent=torch.zeros(5, 512)), "latent.dtype", "float32", "bfloat16"),
    "latent tokens": (ValueError, dict(latent=bf16(4, 512)), "latent.shape", "(4, 1, 512)", "(5, 1, 512)"),
    "rope columns": (ValueError, dict(rope=bf16(5, 32)), "rope.shape", "(5, 1, 32)", "(5, 1, 64)"),
    "rope stride": (ValueError, dict(rope=bf16(5, 68)[:, :64]), "rope.stride(0)", "68", "a positive multiple of 8"),
    "slots dtype": (ValueError, dict(slots=torch.zeros(5, dtype=torch.int32)), "slots.dtype", "int32", "int64"),
    "slots axes": (ValueError, dict(slots=torch.zeros(5, 1, dtype=torch.int64)), "slots.shape", "(5, 1)", "(any)"),
    "slots stride": (ValueError, dict(slots=torch.zeros(10, dtype=torch.int64)[::2]), "slots.stride()", "(2,)", "contiguous"),
}


@pytest.mark.parametrize("case", APPEND_ERRORS)
def test_append_rejects(launches, case):
    error, change, name, given, allowed = APPEND_ERRORS[case]
    good = dict(latent=bf16(5, 512), rope=bf16(5, 64), slots=torch.zeros(5, dtype=torch.int64))
    cache = PagedKVCache(pool(), table(), lengths())
    with rejects(error, name, given, allowed):
        cache.append(**{**good, **change})
    assert launches == []
    cache.append(**good)
    assert [name for name, _ in launches] == ["append"]
