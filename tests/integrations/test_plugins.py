"""The entry points of the package."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_entry_points(group):
    text = (ROOT / "pyproject.toml").read_text()
    target = re.search(rf'^\[project.entry-points."{group}"\]\nflashmla_cute = "(.*)"$', text, re.MULTILINE)[1]
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_entry_points_import_no_engine():
    """every process of an engine loads them, early"""
    code = "import sys; import flashmla_cute.integrations.plugins; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {"vllm", "sglang", "flashmla_cute.integrations.steps"} & set(loaded)
