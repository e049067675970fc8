"""What a token takes in the cache: known numbers, and what torch allocates for it."""

import pytest
import torch

from flashmla_cute import memory
from flashmla_cute.cli import main
from flashmla_cute.kernels.config import FORMATS

# bytes a token and layer; MLA's are the same for all three models
EXPECTED = {"DeepSeek-V3": 65536, "Kimi-K2": 32768, "DeepSeek-V2-Lite": 8192}
MLA = [FORMATS["bfloat16"].bytes_per_token, 656, 576]


@pytest.mark.parametrize("model", memory.MODELS, ids=lambda model: model.name)
def test_bytes_per_token(model):
    assert [form.bytes_per_token for form in memory.formats(model)] == [EXPECTED[model.name], 4096, *MLA]


def test_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["memory"]) == 0
    out = capsys.readouterr().out
    assert "DeepSeek-V3" in out and "65536" in out and "1152" in out and "measured" not in out


def test_measuring_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["memory", "--measure"]) == 1
    assert capsys.readouterr().out.strip() == "--measure needs a CUDA device: none here"


@pytest.mark.gpu
def test_allocated_caches_take_what_is_computed():
    for form in memory.formats(memory.MODELS[0]):
        computed = form.bytes_per_token + 4 / 64  # and the block table
        assert computed <= memory.measure(form) <= 1.001 * computed, form.name


@pytest.mark.gpu
def test_command_measures(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["memory", "--measure"]) == 0
    assert "measured" in capsys.readouterr().out
