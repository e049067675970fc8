"""Properties over all axes together (tests/axes.py), shrunk by Hypothesis to the one line that fails.

Without a GPU the public API runs over the compiled functions' twins: schedule, split, merge, pages, strides and masks in plain
Python.  On a GPU the same problems, larger ones too, run through the kernels.
"""

import re

import pytest
import torch

from flashmla_cute.testing import Errors

from . import axes
from .axes import AXES, CASE, MEMORY, PLAN, Drawn
from .runtime import twins

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
KERNELS = 12  # that the GPU property compiles, at most; tests/fuzz.py has more


class Source:
    """random.Random's choice and randint, drawn by Hypothesis"""

    def __init__(self, draw):
        self.draw = draw

    def choice(self, values):
        return self.draw(st.sampled_from(values))

    def randint(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))


@st.composite
def problems(draw, **fixed):
    return Drawn.draw(Source(draw), **fixed)


@pytest.fixture(scope="module")
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        twins.install(patch)
        yield


def assert_right(drawn: Drawn, errors: Errors):
    assert errors.within(drawn.case.dtype), f"{errors}\n{drawn}"


@hypothesis.given(drawn=problems(tokens=130))
@hypothesis.settings(max_examples=25)
def test_any_problem_through_the_twins(on_the_cpu, drawn):
    assert_right(drawn, drawn.run("cpu"))


@st.composite
def problems_of_few_kernels(draw):
    return Drawn.draw(Source(draw), **Drawn.compiled(7, draw(st.integers(0, KERNELS - 1))))


@pytest.mark.gpu
@hypothesis.given(drawn=problems_of_few_kernels())
@hypothesis.settings(max_examples=300)
def test_any_problem_through_the_kernels(decode_kernels, drawn):
    assert_right(drawn, drawn.run())


def test_a_problem_prints_as_the_line_that_runs_it(on_the_cpu):
    """after `from tests.axes import *`"""
    for index in range(200):
        drawn = Drawn.of_seed(0, index, kernels=50)
        assert eval(str(drawn).removesuffix(".run()"), vars(axes)) == drawn and "\n" not in str(drawn)


def test_a_wrong_result_shrinks_to_a_line(on_the_cpu, monkeypatch):
    """or nothing above could fail: the twin of the merge forgets the last piece of three"""
    merge = twins.read_schedule

    def forgetful(items, parts, merges):
        merges[1:, 2] = merges[1:, 2].clamp(max=2)
        return merge(items, parts, merges)

    monkeypatch.setattr(twins, "read_schedule", forgetful)

    @hypothesis.given(drawn=problems(tokens=1000, h_kv=1, h_q=5, s_q=1, ragged=False))
    @hypothesis.settings(max_examples=200, database=None, report_multiple_bugs=False)
    def fails(drawn):
        assert_right(drawn, drawn.run("cpu"))

    with pytest.raises(AssertionError) as caught:
        fails()
    (line,) = re.findall(r"Drawn\(\{.*\}\)\.run\(\)", "\n".join(caught.value.__notes__))
    shrunk = eval(line.removesuffix(".run()"), vars(axes)).case
    assert shrunk.gain == 1.0 and shrunk.dtype == torch.bfloat16 and len(shrunk.lengths) == 1


def test_every_axis_goes_somewhere():
    assert set(AXES) - CASE - PLAN - set(MEMORY) == {"tokens", "ragged"}
