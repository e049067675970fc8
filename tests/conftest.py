"""The `gpu` marker, warnings of our own packages as errors, and the record of the GPU cases that the session prints."""

import contextlib
from dataclasses import dataclass, field

import pytest
import torch

from flashmla_cute.testing import Case, Errors

with contextlib.suppress(ImportError):  # (the tests that use it skip themselves where it is not installed)
    import hypothesis

    hypothesis.settings.register_profile("ours", deadline=None)
    hypothesis.settings.load_profile("ours")

OUR_PACKAGES = ("flashmla_cute", "tests")


@dataclass
class Record:
    """what the GPU tier has compared with the reference so far"""

    cases: int = 0
    rel: dict[torch.dtype, float] = field(default_factory=dict)
    lse: float = 0.0

    def add(self, case: Case, errors: Errors):
        self.cases += 1
        self.rel[case.dtype] = max(self.rel.get(case.dtype, 0.0), errors.rel)
        self.lse = max(self.lse, errors.lse)

    def __str__(self):
        rel = ", ".join(f"worst rel {str(dtype).removeprefix('torch.')} {worst:.2e}" for dtype, worst in self.rel.items())
        return f"gpu cases: {self.cases}, {rel}, worst lse {self.lse:.2e}"


RECORD = pytest.StashKey[Record]()


def why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "GPU tier: no CUDA device here"
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) == (9, 0) else f"GPU tier: needs a Hopper GPU (9.0), this one is {major}.{minor}"


def pytest_configure(config):
    config.stash[RECORD] = Record()
    for package in OUR_PACKAGES:
        config.addinivalue_line("filterwarnings", rf"error::DeprecationWarning:{package}(\..*)?$")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        reason = why_no_gpu()
        if reason:
            pytest.skip(reason)  # (raised here, not a skip mark: all of them fold into one line of the summary)


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[RECORD].cases:
        terminalreporter.write_line(str(config.stash[RECORD]))


@pytest.fixture(scope="session")
def record(pytestconfig) -> Record:
    return pytestconfig.stash[RECORD]


@pytest.fixture
def compile_cache(tmp_path, monkeypatch):
    """an empty compile cache, on disk and in memory"""
    from flashmla_cute import compile

    monkeypatch.setenv(compile.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(compile, "_functions", {})
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def decode_kernels():
    """all decode kernels lie in the compile cache"""
    from .precompile import compile_ahead

    compile_ahead()
