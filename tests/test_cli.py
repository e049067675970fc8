"""The command `flashmla-cute`, where no kernel can run."""

import re
from importlib import import_module

import pytest

from flashmla_cute import __version__, reference

pytest.importorskip("rich")  # (a GPU machine may have the kernels' dependencies only)
cli, demo, doctor = (import_module(f"flashmla_cute.{module}") for module in ("cli", "demo", "doctor"))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "obstacle", lambda: "there is no GPU in this test")
    monkeypatch.setenv("COLUMNS", "200")


def run(capsys, *arguments):
    """(exit status, lines of stdout)"""
    status = cli.main(arguments)
    return status, capsys.readouterr().out.splitlines()


def test_demo_says_first_that_no_kernel_can_run(no_gpu, capsys):
    status, lines = run(capsys, *"demo --batch 7 --heads 16 --queries 2 --steps 3 --max-seqlen 900".split())
    assert status == 0
    assert lines[0] == "No kernel can run here: there is no GPU in this test."
    text = "\n".join(lines)
    for kernel in ("DenseDecode", "Combine", "BuildSchedule", "Append"):
        assert re.search(rf"{kernel} +\d+ +0 +\d+", text), f"registers, spilled bytes and shared memory of {kernel}"
    steps = re.findall(r"^ +(\d) +(\d+) +(\d+) +(\S+) +(\S+) +\d+ +\d+ *$", text, re.MULTILINE)
    assert [step for step, *_ in steps] == ["0", "1", "2"]
    assert all(float(rel) < 1e-10 and float(lse) < 1e-10 for *_, rel, lse in steps)
    assert "every step agrees with float64" in text


def test_demo_fails_when_the_emulation_disagrees(no_gpu, capsys, monkeypatch):
    def wrong(*arguments):
        out, lse = reference.emulate_decode(*arguments)
        return out * (1 + 1e-6), lse

    monkeypatch.setattr(demo, "report_resources", lambda *arguments: None)  # (not needed, and slow)
    monkeypatch.setattr(demo, "emulate_decode", wrong)
    status, lines = run(capsys, *"demo --batch 3 --heads 4 --steps 1 --max-seqlen 300".split())
    assert status == 1 and "NOT in agreement with float64" in "\n".join(lines)


def test_doctor_says_what_is_in_order_and_what_to_do(no_gpu, capsys):
    status, lines = run(capsys, "doctor")
    assert status == 1 and re.fullmatch(r"No kernel can run on this machine: \d problems?\.", lines[-1])
    subjects = {line.split(maxsplit=1)[1] for line in lines if re.match("ok|warning|problem", line)}
    for subject in ("Python", "driver", "GPU", "torch", "DSL flavour", "cache", "compiler"):
        assert any(text.startswith(subject) for text in subjects), subject
    assert "problem GPU" in " ".join(" ".join(lines).split())
    assert any("the append kernel compiles for sm_90a" in text for text in subjects)


@pytest.mark.parametrize(
    "version, pin, holds",
    [
        ("4.8.1", ">=4.8.0,<4.9", True),
        ("4.9.0", ">=4.8.0,<4.9", False),
        ("4.7.9", ">=4.8.0,<4.9", False),
        ("0.1.15", ">=0.1.11,!=0.1.15,<0.2", False),
        ("0.1.15.post2", ">=0.1.11,!=0.1.15,<0.2", True),
        ("2.11.0+cu130", ">=2.6", True),
        ("2.10", ">=2.6", True),
    ],
)
def test_doctor_compares_versions_with_pins(version, pin, holds):
    assert doctor.satisfies(version, pin) is holds


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["demo", "--batch", "0"], "0 is not a positive integer"),
        (["demo", "--heads", "many"], "invalid positive value: 'many'"),
        (["demo", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        ([], "required: command"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"flashmla-cute {__version__}\n"
