"""compute-sanitizer over the smallest case of each kernel: no access out of bounds, no misused barrier, no race."""

import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from flashmla_cute import compile, ops
from flashmla_cute.kernels.config import MLAConfig, ScheduleConfig

from . import precompile, sanitizer_case

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
SECONDS = 400
# racecheck does not follow stores + sync_warp + ONE elected arrival: it gets the configuration in which every lane arrives
TOOLS = {
    "memcheck": (["--report-api-errors", "no"], [], r"ERROR SUMMARY: 0 errors"),
    "synccheck": ([], [], r"ERROR SUMMARY: 0 errors"),
    "racecheck": ([], ["--lanes"], r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)"),
}


@pytest.fixture(scope="module")
def sanitizer():
    found = shutil.which("compute-sanitizer")
    if not found:
        pytest.skip("compute-sanitizer is not on PATH")
    precompile.compile_ahead(
        [MLAConfig(causal=causal, lane_arrivals=lanes) for causal, lanes in product((False, True), repeat=2)]
    )
    compile.get(ops.ScheduleOp, ScheduleConfig())  # (all of it outside the tool, where compiling takes minutes)
    compile.get(ops.AppendOp, MLAConfig(causal=False))
    return found


@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer(sanitizer, tool):
    options, arguments, clean = TOOLS[tool]
    run = subprocess.run(
        [sanitizer, "--tool", tool, *options, sys.executable, sanitizer_case.__file__, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert run.returncode == 0 and sanitizer_case.DONE in run.stdout, run.stdout[-4000:]
    assert re.search(clean, run.stdout), run.stdout[-4000:]
