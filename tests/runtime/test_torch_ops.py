"""torch.ops.flashmla_cute: opcheck, and mla_decode, DecodePlan.update and PagedKVCache.append inside torch.compile.

Without a GPU the compiled functions are replaced by their twins, and the operators' own implementations are registered for the
CPU as well; with one it is the real thing, under inductor.
"""

import contextlib
from dataclasses import astuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_cute import DecodePlan, PagedKVCache, mla_decode, torch_ops
from flashmla_cute.testing import Case, Problem

from ..problems import same_bits
from . import twins

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OPERATORS = ("decode", "schedule", "append")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """ "cpu": the twins, through the dispatcher; "cuda": the kernels"""
    torch._dynamo.reset()
    if request.param == "cuda":
        yield "cuda"
        return
    twins.install(monkeypatch)
    with torch.library._scoped_library("flashmla_cute", "IMPL") as library:
        for name in OPERATORS:
            library.impl(name, getattr(torch_ops, name), "CPU")
        yield "cpu"


def traced(function, device: str):
    """all of it in one graph, for any shapes"""
    return torch.compile(function, fullgraph=True, dynamic=True, backend="inductor" if device == "cuda" else "aot_eager")


def make(device: str, *lengths: int, **options) -> Problem:
    return Problem.make(Case(lengths or (70, 0, 700), **{"h_q": 16, **options}), device)


def operands(problem: Problem) -> tuple:
    plan, cache = problem.plan(), problem.cache
    given = (problem.q, cache.pool, cache.block_table, plan.items, plan.parts, plan.merges)
    for tensor in (problem.out, problem.lse, plan.o_split, plan.lse_split):
        tensor.zero_()  # (opcheck compares them)
    given += (problem.out, problem.lse, plan.o_split, plan.lse_split, plan.softmax_scale, plan.num_sms)
    return (*given, None, None, True, plan.fixed_pieces, *astuple(plan.options))


# ---------------------------------------------------------------------- operators
def finite(problem: Problem) -> Problem:
    """without the NaN of unused slots, which opcheck's comparisons would stumble over"""
    problem.cache.pool.nan_to_num_(0)
    return problem


@pytest.mark.parametrize("options", [dict(), dict(h_q=8, h_kv=2, s_q=2), dict(dtype=torch.float16, s_q=3)], ids=str)
def test_opcheck_decode(device, options):
    arguments = operands(finite(make(device, **options)))
    torch.library.opcheck(torch.ops.flashmla_cute.decode.default, arguments, test_utils=CHECKS)


def test_opcheck_schedule(device):
    plan = make(device).plan()
    for tensor in (plan.items, plan.parts, plan.merges):
        tensor.zero_()
    arguments = (plan.cache_seqlens, plan.items, plan.parts, plan.merges, plan.row_tiles, 768, 768, plan.constants)
    torch.library.opcheck(torch.ops.flashmla_cute.schedule.default, arguments, test_utils=CHECKS)


def test_opcheck_append(device):
    pool = torch.zeros(4, 64, 1, 576, dtype=torch.bfloat16, device=device)
    latent, rope = torch.randn(5, 1, 576, device=device).bfloat16().split((512, 64), -1)
    slots = torch.tensor([3, 255, -1, 64, 1000], device=device)
    torch.library.opcheck(torch.ops.flashmla_cute.append.default, (latent, rope, slots, pool, 512), test_utils=CHECKS)


def test_schemas_name_what_is_written():
    written = {
        name: {a.name for a in getattr(torch.ops.flashmla_cute, name).default._schema.arguments if a.alias_info is not None}
        for name in OPERATORS
    }
    assert written == {
        "decode": {"out", "lse", "o_split", "lse_split"},
        "schedule": {"items", "parts", "merges"},
        "append": {"pool"},
    }


def test_an_operator_computes_what_the_function_does(device):
    problem = make(device, 70, 0, 700, s_q=2)
    plain = problem.run()
    out, lse = torch.full_like(problem.out, float("nan")), torch.full_like(problem.lse, float("nan"))
    arguments = list(operands(problem))
    arguments[6:8] = out, lse
    torch.ops.flashmla_cute.decode(*arguments)
    assert same_bits((out, lse), problem.run()) and plain[0] is problem.out


def test_an_operator_refuses_other_devices():
    """(there is no implementation for the CPU but that of these tests)"""
    problem = Problem.make(Case((70,), h_q=16), "cpu")
    tensor = torch.zeros(1, 8, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"flashmla_cute::schedule.*CPU"):
        torch.ops.flashmla_cute.schedule(problem.cache.cache_seqlens, tensor, tensor, tensor, 1, 64, 64, [3, 24, 16384, 1024])


# ---------------------------------------------------------------------- torch.compile
def test_traced_for_any_batch(device):
    """one graph, whatever the batch; new outputs"""
    graphs = []

    def layer(q, cache, plan):
        out, lse = mla_decode(q * 2, cache, plan)
        return out + 1, lse

    function = traced(layer, device)
    for lengths in ((70, 0, 700), (5, 64), (1, 2, 3, 400), (900, 30, 5, 0, 7)):
        problem = make(device, *lengths)
        plan = problem.plan()
        with counted(graphs):
            out, lse = function(problem.q, problem.cache, plan)
        eager = mla_decode(problem.q * 2, problem.cache, plan)
        assert same_bits((out, lse), (eager[0] + 1, eager[1])), lengths
    assert len(graphs) <= 2, f"{len(graphs)} compilations"


@contextlib.contextmanager
def counted(graphs: list):
    """notes the graphs that torch.compile makes meanwhile"""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield
    graphs += range(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)


@pytest.mark.parametrize("options", [dict(s_q=2), dict(h_q=8, h_kv=2, s_q=2, causal=False), dict(dtype=torch.float16)], ids=str)
def test_traced_into_given_outputs(device, options):
    problem = make(device, **options)
    plan, scale, causal = problem.plan(), problem.case.softmax_scale, problem.case.causal
    eager = [tensor.clone() for tensor in problem.run(plan)]
    for tensor in (problem.out, problem.lse):
        tensor.fill_(float("nan"))

    def layer(q, cache, out, lse):
        mla_decode(q, cache, plan, softmax_scale=scale, causal=causal, out=out, lse=lse)

    traced(layer, device)(problem.q, problem.cache, problem.out, problem.lse)
    assert same_bits(eager, (problem.out, problem.lse))


def test_traced_strides(device):
    """the operator sees the strides that were checked: a layer of a larger pool, heads in the middle of a projection"""
    problem = make(device, s_q=2)
    cache = problem.cache
    larger = torch.full((cache.pool.shape[0], 3, 64, 640), float("nan"), dtype=torch.bfloat16, device=device)
    larger[:, 1, :, :576] = cache.pool[:, :, 0]
    projected = torch.randn(3, 2, 3 * 16, 576, device=device).bfloat16()
    projected[:, :, 16:32] = problem.q
    layer = PagedKVCache.from_tensors(larger[:, 1, :, :576], cache.block_table, cache.cache_seqlens)
    plan = problem.plan()
    wanted = mla_decode(projected.chunk(3, 2)[1], layer, plan)
    got = traced(lambda x, cache: mla_decode(x.chunk(3, 2)[1], cache, plan), device)(projected, layer)
    assert same_bits(wanted, got)


def test_a_traced_step(device):
    """append, plan and two layers in one graph, as a model has them"""
    problem = make(device, 70, 0, 700)
    plan, seqlens = problem.plan(), problem.cache.cache_seqlens
    layers = [problem.cache, PagedKVCache.from_tensors(problem.cache.pool.clone(), problem.cache.block_table, seqlens)]
    new = torch.randn(2, 576, device=device).bfloat16()
    slots = torch.stack([problem.cache.block_table[0, 1] * 64 + 6, problem.cache.block_table[2, 10] * 64 + 60]).long()
    longer = seqlens + torch.tensor([1, 0, 1], dtype=torch.int32, device=device)

    def step(q, new, slots):
        plan.update()
        for cache in layers:
            cache.append(new[:, :512], new[:, 512:], slots)
            out, lse = mla_decode(q, cache, plan)
            q = torch.cat([out, q[..., 512:]], -1)
        return out, lse

    pools = [cache.pool.clone() for cache in layers]
    seqlens.copy_(longer)
    wanted = [tensor.clone() for tensor in step(problem.q, new, slots)]
    written = [cache.pool.clone() for cache in layers]
    for cache, pool in zip(layers, pools):
        cache.pool.copy_(pool)
    for tensor in (plan.items, plan.parts, plan.merges):
        tensor.zero_()
    assert same_bits(wanted, traced(step, device)(problem.q, new, slots))
    assert same_bits(written, [cache.pool for cache in layers])
    copied = torch._dynamo.utils.counters["inductor"]["possibly_missed_reinplacing_bytes"]
    assert copied == 0, f"{copied} bytes are copied around operators that write in place"


def test_a_cache_made_while_tracing(device):
    problem = make(device)
    plan, seqlens = problem.plan(), problem.cache.cache_seqlens
    wanted = [tensor.clone() for tensor in problem.run(plan)]

    def layer(q, pool, table, seqlens):
        return mla_decode(q, PagedKVCache.from_tensors(pool, table, seqlens), plan)

    got = traced(layer, device)(problem.q, problem.cache.pool, problem.cache.block_table, seqlens)
    assert same_bits(wanted, got)


TRACED_ERRORS = {
    "shape": (lambda p: dict(q=p.q[:, :, :8]), "q.shape is"),
    "dtype": (lambda p: dict(q=p.q.half()), "q.dtype is torch.float16"),
    "strides": (lambda p: dict(q=p.q.transpose(2, 3).contiguous().transpose(2, 3)), "q.stride(-1) is 16"),
    "plan": (lambda p: dict(plan=Problem.make(p.case, p.q.device.type).plan()), "plan is made for another cache_seqlens"),
    "out": (lambda p: dict(out=p.out[:1]), "out.shape is"),
    "scale": (lambda p: dict(softmax_scale=-1.0), "softmax_scale is -1.0"),
}


@pytest.mark.parametrize("case", TRACED_ERRORS)
def test_errors_while_tracing(device, case):
    """checked when traced; without fullgraph the call falls back to eager and raises what it always does"""
    change, message = TRACED_ERRORS[case]
    problem = make(device)
    arguments = {**dict(q=problem.q, cache=problem.cache, plan=problem.plan(), out=problem.out), **change(problem)}
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        traced(mla_decode, device)(**arguments)
    torch._dynamo.reset()
    with pytest.raises(ValueError) as caught:
        torch.compile(mla_decode, dynamic=True, backend="eager")(**arguments)
    assert message in str(caught.value), str(caught.value)
    assert problem.out.isnan().all() and problem.lse.isnan().all()


def test_fake_tensors_outside_of_tracing_are_refused(device):
    problem = make(device)
    plan = problem.plan()
    problem.run(plan)  # (remembered)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(problem.q)
    for change in (dict(q=fake), dict(q=problem.q.to("meta"))):
        with pytest.raises(TypeError, match=r"q is a \w+ without memory"):
            mla_decode(**{**dict(q=problem.q, cache=problem.cache, plan=plan), **change})


def test_eager_calls_do_not_go_through_the_dispatcher(device):
    problem = make(device)
    plan, seen = problem.plan(), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        mla_decode(problem.q, problem.cache, plan)
        if device == "cuda":
            plan.update()
    assert not [name for name in seen if "flashmla_cute" in name], seen


def test_export(device):
    """torch.export, too, keeps the operator whole"""
    problem = make(device)
    plan = DecodePlan(problem.cache, 16)

    class Layer(torch.nn.Module):
        def forward(self, q):
            return mla_decode(q, problem.cache, plan)

    program = torch.export.export(Layer(), (problem.q,), strict=True)
    assert "flashmla_cute.decode" in str(program.graph)
