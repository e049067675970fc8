"""The budgets and import directions of the code base, enforced."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [folder for folder in ("kernels", "flashmla_cute", "tests", "perf", "examples") if (ROOT / folder).is_dir()]
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEXTS = [
    *(path for path in ROOT.iterdir() if path.is_file()),
    *(path for folder in (*FOLDERS, ".ci", "docs") for path in (ROOT / folder).rglob("*") if path.is_file()),
]
BINARY = {".pyc", ".png", ".o"}

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_CONST_EXPR = 700, 100, 8, 12
FIXED_ABI = {
    "flashmla_cute/ops.py": {
        "DecodeOp.__call__",
        "Fp8DecodeOp.__call__",
        "RaggedScheduleOp.__call__",
    },  # the arguments of one compiled call, flat
    "kernels/schedule.py": {"BuildSchedule.__call__"},
    "kernels/dense_decode.py": {"DenseDecode.__call__"},
    "flashmla_cute/compat.py": {"flash_mla_with_kvcache"},  # FlashMLA's signature
    "flashmla_cute/integrations/vllm.py": {  # vLLM's
        "FlashMLACuteBackend.supports_combination",
        "FlashMLACuteImpl.__init__",
    },
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """(qualified name, function) of every function, also nested ones"""
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{prefix}{node.name}."
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
        yield from functions(node, inner)


def num_parameters(function: ast.FunctionDef) -> int:
    """without self, cls and what is given by name only"""
    a = function.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, a.vararg, a.kwarg) if x is not None]
    return len([x for x in names if x not in ("self", "cls")])


def imports(path: Path) -> set[str]:
    """absolute names of all that a file imports, also inside functions"""
    package = list(path.relative_to(ROOT).parts[:-1])
    if package[:1] == ["kernels"]:  # (packaged under this name)
        package.insert(0, "flashmla_cute")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def within(imported: str, package: str) -> bool:
    return imported == package or imported.startswith(package + ".")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


# ---------------------------------------------------------------------- lint
@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    pytest.importorskip("ruff")
    run = subprocess.run([sys.executable, "-m", "ruff", *command, *FOLDERS], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


# ---------------------------------------------------------------------- budgets
@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_budgets(path):
    text, exempt = path.read_text(), FIXED_ABI.get(name(path), set())
    assert text.count("\n") <= MAX_FILE_LINES
    lengths = {f: node.end_lineno - node.lineno + 1 for f, node in functions(ast.parse(text))}
    assert {f: n for f, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}
    parameters = {f: num_parameters(node) for f, node in functions(ast.parse(text))}
    assert {f: n for f, n in parameters.items() if n > MAX_PARAMETERS and f not in exempt} == {}


def test_exemptions_are_needed():
    for path, exempt in FIXED_ABI.items():
        parameters = {f: num_parameters(node) for f, node in functions(parse(ROOT / path))}
        assert all(parameters[f] > MAX_PARAMETERS for f in exempt)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=name)
def test_specialisations(path):
    """more const_expr than this and two kernels hide in one file"""
    used = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "const_expr"]
    assert len(used) <= MAX_CONST_EXPR


# ---------------------------------------------------------------------- import directions
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
KERNEL_FILES = [path for path in KERNELS if path.stem not in ("__init__", "config")]
BASES = {ROOT / "kernels" / "fixed_schedule.py": ROOT / "kernels" / "schedule.py"}  # a subclass of its kernel
PARTS = sorted((ROOT / "kernels" / "parts").glob("*.py"))
RUNTIME = sorted(path for folder in ("", "integrations") for path in (ROOT / "flashmla_cute" / folder).glob("*.py"))


@pytest.mark.parametrize("path", [*KERNELS, *PARTS], ids=name)
def test_kernels_know_neither_torch_nor_the_runtime(path):
    ours = {x for x in imports(path) if within(x, "flashmla_cute") and not within(x, "flashmla_cute.kernels")}
    others = {x for x in imports(path) if within(x, "torch") or within(x, "kernels") or within(x, "numpy")}
    assert ours | others == set()


@pytest.mark.parametrize("path", PARTS, ids=name)
def test_parts_know_no_kernel(path):
    kernels = {x for x in imports(path) if within(x, "flashmla_cute.kernels")}
    allowed = ("flashmla_cute.kernels.parts", "flashmla_cute.kernels.config")
    assert {x for x in kernels if not any(within(x, package) for package in allowed)} == set()


@pytest.mark.parametrize("path", KERNEL_FILES, ids=name)
def test_kernel_files_do_not_know_each_other(path):
    others = [f"flashmla_cute.kernels.{x.stem}" for x in KERNEL_FILES if x not in (path, BASES.get(path))]
    assert {x for x in imports(path) if any(within(x, other) for other in others)} == set()


def test_config_knows_nothing():
    assert {x for x in imports(ROOT / "kernels" / "config.py") if within(x, "flashmla_cute")} == set()


@pytest.mark.parametrize("path", RUNTIME, ids=name)
def test_the_runtime_knows_neither_tests_nor_perf(path):
    assert {x for x in imports(path) if any(within(x, other) for other in ("tests", "perf", "kernels"))} == set()


def test_imports_are_found():
    """the rules above see what they judge"""
    found = imports(ROOT / "kernels" / "dense_decode.py")
    assert {"flashmla_cute.kernels.config.TILE", "flashmla_cute.kernels.parts.work.Work", "cutlass.cute"} <= found
    assert "flashmla_cute.kernels.config.TILE" in imports(ROOT / "kernels" / "parts" / "rows.py")
    assert "flashmla_cute.kernels.dense_decode" in imports(ROOT / "flashmla_cute" / "ops.py")
    assert "torch" in imports(ROOT / "flashmla_cute" / "decode.py")


# ---------------------------------------------------------------------- text
def test_inline_ptx_lives_in_one_file():
    uses = {
        name(path)
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id) in ("inline_ptx", "inline_asm")
    }
    assert uses == {"kernels/parts/ptx.py"}


def test_no_path_of_a_machine():
    pattern = re.compile(r"/(?:home|root|Users|work|mnt)/\w")
    found = {}
    for path in TEXTS:
        if path.suffix not in BINARY and "__pycache__" not in path.parts:
            lines = [line for line in path.read_text(errors="replace").splitlines() if pattern.search(line)]
            if lines:
                found[name(path)] = lines[:3]
    assert found == {}


def test_readme_has_two_commands_and_ci_runs_the_second():
    first_block = re.search(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    demo, test = first_block[1].splitlines()
    assert demo.startswith("pip install ") and demo.endswith(" && flashmla-cute demo")
    assert test.startswith("pip install ") and test.endswith(" && pytest")
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script.count(test) == 1 and script[-1] == test, "what .ci/run does before it is the environment of the command"
