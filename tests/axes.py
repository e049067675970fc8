"""Random decode problems that vary in everything at once, for tests/fuzz.py and tests/test_properties.py.

An axis is a line of AXES: a name, and how its value is drawn from a source, given the values above it.  A source has `choice`
and `randint`: random.Random is one, Hypothesis's draw behind the same two names (test_properties.py) another.  A name that is a
field of testing.Case or an argument of DecodePlan goes there by itself; MEMORY says what the others do.
"""

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from flashmla_cute import DecodePlan
from flashmla_cute.testing import Case, Errors, Problem

from .problems import POOL_STRIDES, Q_STRIDES, same_bits, with_pool

DTYPES = (torch.bfloat16, torch.float16)
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
    "pool_strides": lambda source, drawn: source.choice(("contiguous", "contiguous", *POOL_STRIDES)),
}

# name -> (problem, value) -> the same problem otherwise laid out
MEMORY: dict[str, Callable[[Problem, str], Problem]] = {
    "q_strides": lambda problem, how: replace(problem, q=Q_STRIDES[how][0](problem.q)),
    "pool_strides": lambda problem, how: with_pool(problem, POOL_STRIDES.get(how, lambda pool: pool)(problem.cache.pool)),
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
    def of_seed(cls, seed: int, index: int) -> "Drawn":
        """problem `index` of a run"""
        return cls.draw(random.Random(f"{seed} {index}"))

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

    def problem(self, device: str = "cuda") -> Problem:
        problem = Problem.make(self.case, device)
        for name, move in MEMORY.items():
            problem = move(problem, self.values[name])
        return problem

    def run(self, device: str = "cuda") -> Errors:
        """our kernel against float64; a batch-invariant plan also against the bits of one request alone"""
        problem, case = self.problem(device), self.case
        plan = self._plan(problem)
        out, lse = problem.run(plan)
        errors = problem.errors(out, lse)
        if self.values["batch_invariant"]:
            i = case.seed % len(case.lengths)
            one = self._one_request(problem, i)
            if not same_bits(one.run(self._plan(one)), (out[i : i + 1], lse[i : i + 1])):
                return errors.worse_of(Errors(0.0, 0.0, f"request {i} alone has other bits"))
        return errors

    def _plan(self, problem: Problem) -> DecodePlan:
        plan = DecodePlan(problem.cache, problem.case.h_q, problem.case.s_q, **self.plan_options)
        plan.o_split.fill_(float("nan"))
        plan.lse_split.fill_(float("nan"))
        return plan

    def _one_request(self, problem: Problem, i: int) -> Problem:
        cache, one = problem.cache, slice(i, i + 1)
        alone = type(cache).from_tensors(cache.pool, cache.block_table[one], cache.cache_seqlens[one])
        case = replace(problem.case, lengths=problem.case.lengths[one])
        out, lse = (torch.full_like(tensor[one], float("nan")) for tensor in (problem.out, problem.lse))
        return Problem(case, problem.q[one], alone, out, lse)
