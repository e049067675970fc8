"""Where the tests of the plugins run: on the GPU, or on the CPU with the kernels' twins; under an engine, or under its fake."""

import importlib
import os
import sys

import pytest

from ..runtime import twins
from . import fakes

# a directory to import an engine from, where it is not installed
SITES = {"vllm": "FLASHMLA_CUTE_VLLM", "sglang": "FLASHMLA_CUTE_SGLANG"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    if request.param == "cpu":
        twins.install(monkeypatch)
    return request.param


def why_not_released(engine: str) -> str | None:
    """why the released engine cannot be tested here"""
    site = os.environ.get(SITES[engine])
    for folder in (site or "").split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.append(folder)
    try:
        importlib.import_module(fakes.MODULES[engine][0])
    except Exception as error:
        if site:
            raise  # it was asked for
        return f"{engine} cannot be imported here ({error}); {SITES[engine]} names a directory that has it"
    return None


def pytest_runtest_setup(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for engine in SITES:
        reason = why_not_released(engine) if parameters.get(engine) == "released" else None
        if reason:
            pytest.skip(reason)  # (raised here, not in the fixture: all of them fold into one line of the summary)


def load(engine: str, kind: str, monkeypatch):
    """our plugin, imported anew under the released engine or under its fake"""
    if kind == "fake":
        fakes.install(engine, monkeypatch)
    name = f"flashmla_cute.integrations.{engine}"
    sys.modules.pop(name, None)
    monkeypatch.setitem(sys.modules, name, importlib.import_module(name))  # (gone again after the test)
    return sys.modules[name]


@pytest.fixture(params=["fake", "released"])
def vllm(request, monkeypatch):
    return load("vllm", request.param, monkeypatch)


@pytest.fixture(params=["fake", "released"])
def sglang(request, monkeypatch):
    return load("sglang", request.param, monkeypatch)
