"""Random decode problems that vary in everything at once, for tests/fuzz.py and tests/test_properties.py.

An axis is a line of AXES: a name, and how its value is drawn from a source, given the values above it.  A source has `choice`
and `randint`: random.Random is one, Hypothesis's draw behind the same two names (test_properties.py) another.  A name that is a
field of testing.Case or an argument of DecodePlan goes there by itself; MEMORY says what the others do.  COMPILED are those
that choose a kernel: a run of the fuzzer has a limited number of values of them together, for each is a compile.
"""

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from flashmla_cute import DecodeOptions, DecodePlan
from flashmla_cute.kernels.config import DIMS
from flashmla_cute.testing import Case, Errors, Problem

from .problems import POOL_STRIDES, Q_STRIDES, same_bits, some_requests, with_pool
from .ragged import RaggedProblem, with_q

DTYPES = (torch.bfloat16, torch.float16)
OPTIONS = (
    *[DecodeOptions()] * 4,
    DecodeOptions(window=1),
    DecodeOptions(window=200, lse_log2=True),
    DecodeOptions(softcap=3.0),
    DecodeOptions(out="float32", lse_by_token=True),
)
MOST_COMPARED = 4  # requests; float64 of a hundred takes a second where several processes share the GPU
MOST_ROWS = 2048  # query tokens x heads of a request
EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193)


def draw_group(source, drawn) -> int:
    """query heads of a kv head: what models have, or anything"""
    return source.choice((1, 5, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, source.randint(1, 128)))


def draw_lengths(source, drawn) -> tuple[int, ...]:
    """A few requests, seldom many, of about `tokens` in all: page edges, short ones, one long one."""
    batch = source.choice((1, 2, 3, 4, source.randint(1, 8), source.randint(1, 8), source.randint(9, 150)))
    most = max(1, drawn["tokens"] // batch)
    kinds = (lambda: source.choice(EDGES), lambda: source.randint(0, 130), lambda: source.randint(1, most))
    lengths = [min(source.choice(kinds)(), most) for _ in range(batch)]
    if source.randint(0, 3) == 0:
        lengths[source.randint(0, batch - 1)] = drawn["tokens"]
    return tuple(lengths)


def draw_counts(source, drawn) -> tuple[int, ...] | None:
    """query tokens of each request, at most s_q; None: s_q each"""
    if not drawn["ragged"]:
        return None
    return tuple(source.choice((0, 1, drawn["s_q"], source.randint(0, drawn["s_q"]))) for _ in drawn["lengths"])


# name -> how it is drawn; later ones may use `drawn`, the values of those above
AXES: dict[str, Callable] = {
    "tokens": lambda source, drawn: source.choice((200, 1000, 1000, 5000, 5000, 30_000)),
    "lengths": draw_lengths,
    "h_kv": lambda source, drawn: source.choice((1, 1, 1, 1, 2, 3, 8)),
    "h_q": lambda source, drawn: drawn["h_kv"] * max(1, draw_group(source, drawn) // drawn["h_kv"]),
    "s_q": lambda source, drawn: min(source.choice((1, 1, 1, 2, 3, 4, source.randint(1, 70))), MOST_ROWS // drawn["h_q"]),
    "causal": lambda source, drawn: source.choice((True, True, False)),
    "dtype": lambda source, drawn: source.choice(DTYPES),
    "gain": lambda source, drawn: source.choice((1.0, 1.0, 1.0, 0.0, 0.1, 5.0, 100.0)),
    "seed": lambda source, drawn: source.randint(0, 2**31 - 1),
    "partials": lambda source, drawn: source.choice((torch.float16, torch.float16, torch.float16, torch.float32)),
    "batch_invariant": lambda source, drawn: source.choice((False, False, True)),
    "q_strides": lambda source, drawn: source.choice(("contiguous", *Q_STRIDES)),
    "ragged": lambda source, drawn: source.choice((False, False, True)),
    "counts": draw_counts,
    "page": lambda source, drawn: source.choice((64, 64, 64, 8, 16, 24, 32, 40, 96, 128, 256, 1000, 1024)),
    "latent": lambda source, drawn: source.choice((512, 512, 512, 256, 128)),
    "rope": lambda source, drawn: source.choice([rope for latent, rope in DIMS if latent == drawn["latent"]]),
    "pair": lambda source, drawn: drawn["rope"] > 0 and source.choice((False, False, True)),
    "sink": lambda source, drawn: source.choice((False, False, True)),
    "options": lambda source, drawn: source.choice(OPTIONS),
    "pool_strides": lambda source, drawn: source.choice(("contiguous", "contiguous", *POOL_STRIDES)),
}

# name -> (problem, value) -> the same problem otherwise laid out
MEMORY: dict[str, Callable[[Problem, str], Problem]] = {
    "counts": lambda problem, counts: RaggedProblem.make(problem, counts) if counts else problem,
    "q_strides": lambda problem, how: with_q(problem, Q_STRIDES[how][0]),
    "pool_strides": lambda problem, how: with_pool(problem, POOL_STRIDES.get(how, lambda pool: pool)(problem.cache.pool)),
}
COMPILED = {
    *("h_kv", "h_q", "s_q", "causal", "dtype", "partials", "batch_invariant", "q_strides", "ragged"),
    *("page", "latent", "rope", "pair", "sink", "options"),
}
CASE = {field.name for field in fields(Case)}
PLAN = set(inspect.signature(DecodePlan).parameters)


@dataclass(frozen=True)
class Drawn:
    """One problem: a value of each axis.  Prints as the line that runs it again."""

    values: dict

    @classmethod
    def draw(cls, source, **fixed) -> "Drawn":
        """fixed: axes that are not drawn"""
        values: dict = {}
        for name, axis in AXES.items():
            values[name] = fixed[name] if name in fixed else axis(source, values)
        return cls(values)

    @classmethod
    def of_seed(cls, seed: int, index: int, kernels: int, **fixed) -> "Drawn":
        """problem `index` of a run with `kernels` values of what is COMPILED"""
        return cls.draw(random.Random(f"{seed} {index}"), **cls.compiled(seed, index % kernels), **fixed)

    @classmethod
    def compiled(cls, seed: int, kernel: int) -> dict:
        """values of what is COMPILED"""
        values = cls.draw(random.Random(f"{seed} kernel {kernel}")).values
        return {name: values[name] for name in COMPILED}

    def __str__(self):
        return f"Drawn({self.values}).run()"

    def _repr_pretty_(self, printer, cycle):
        """how Hypothesis prints it"""
        printer.text(str(self))

    @property
    def case(self) -> Case:
        return Case(**{name: value for name, value in self.values.items() if name in CASE})

    @property
    def plan_options(self) -> dict:
        return {name: value for name, value in self.values.items() if name in PLAN and name not in CASE}

    def problem(self, device: str = "cuda") -> Problem | RaggedProblem:
        problem = Problem.make(self.case, device)
        for name, move in MEMORY.items():
            problem = move(problem, self.values[name])
        return problem

    def run(self, device: str = "cuda") -> Errors:
        """our kernel against float64, in a large batch at some requests (the others must be numbers); a batch-invariant plan
        also against the bits of one request alone"""
        problem, lengths = self.problem(device), self.case.lengths
        out, lse = problem.run(self._plan(problem))
        compared = some_requests(lengths, MOST_COMPARED - 4, self.case.seed) if len(lengths) > MOST_COMPARED else None
        errors = problem.errors(out, lse, compared)
        tokens = sum(problem.counts) if isinstance(problem, RaggedProblem) else None  # (rows of no request stay as they are)
        if not out[:tokens].isfinite().all() or lse[:tokens].isnan().any():
            errors = errors.worse_of(Errors(0.0, 0.0, "not finite"))
        if self.values["batch_invariant"]:
            i = self.case.seed % len(self.case.lengths)
            one, rows, lse_rows = self._one_request(problem, i)
            if not same_bits(one.run(self._plan(one)), (out[rows], lse[lse_rows])):
                return errors.worse_of(Errors(0.0, 0.0, f"request {i} alone has other bits"))
        return errors

    def launch(self, device: str = "cuda"):
        """compares nothing"""
        problem = self.problem(device)
        problem.run(self._plan(problem))

    def _plan(self, problem: Problem | RaggedProblem) -> DecodePlan:
        case, options = problem.case, self.plan_options
        if isinstance(problem, RaggedProblem):
            return problem.plan(case.s_q, **options)
        plan = DecodePlan(problem.cache, case.h_q, case.s_q, options=case.options, **options)
        plan.o_split.fill_(float("nan"))
        plan.lse_split.fill_(float("nan"))
        return plan

    def _one_request(self, problem: Problem | RaggedProblem, i: int) -> tuple[Problem | RaggedProblem, slice, slice]:
        """request i alone, and its rows in out and in lse of all"""
        cache, one = problem.cache, slice(i, i + 1)
        rows = problem.rows(i) if isinstance(problem, RaggedProblem) else one
        alone = type(cache).from_tensors(cache.pool, cache.block_table[one], cache.cache_seqlens[one])
        by_token = problem.case.options.lse_by_token and not isinstance(problem, RaggedProblem)
        lse_rows = slice(i * problem.case.s_q, (i + 1) * problem.case.s_q) if by_token else rows
        out, lse = torch.full_like(problem.out[rows], float("nan")), torch.full_like(problem.lse[lse_rows], float("nan"))
        moved = replace(problem, q=problem.q[rows], cache=alone, out=out, lse=lse)
        if isinstance(problem, RaggedProblem):
            begins = torch.tensor([0, problem.counts[i]], dtype=torch.int32, device=out.device)
            return replace(moved, counts=problem.counts[one], cu_seqlens_q=begins), rows, rows
        return replace(moved, case=replace(problem.case, lengths=problem.case.lengths[one])), rows, lse_rows
