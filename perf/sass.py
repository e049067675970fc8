"""What ptxas made of the decode op, without a GPU: registers, spills, shared memory, instructions, registers of each role.

python -m perf.sass                                     the configuration most callers get
python -m perf.sass causal=False head_tile=16 kv=float16

A kernel is launched with one register count and setmaxnreg moves registers between warpgroups, so `cuobjdump -res-usage` alone
says nothing about a role.  Roles are found in the control flow: what a setmaxnreg reaches, cut in two where a branch splits it
into parts that never meet again.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

TOOLS = ("cuobjdump", "nvdisasm")
DISJOINT = 0.2  # of a role's code on either side of a branch and not on the other: two roles
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    is_predicated: bool
    opcode: str  # with its modifiers
    operands: str

    @property
    def successors(self) -> list[int]:
        following = [self.address + 16]
        if self.opcode.startswith("BRA"):
            target = int(re.findall(r"0x([0-9a-f]+)", self.operands)[-1], 16)
            return [target, *following] if self.is_predicated or "," in self.operands else [target]
        return [] if self.opcode == "EXIT" and not self.is_predicated else following

    @property
    def highest_register(self) -> int:
        """-1: none.  The listing names the first register of a wide operand; how many follow is in the opcode."""
        named = [(int(number), wide) for number, wide in re.findall(r"\bR(\d+)(\.64)?", self.operands)]
        if not named:
            return -1
        highest = max(number + (1 if wide else 0) for number, wide in named)
        if product := re.match(r"HGMMA\.64x(\d+)x", self.opcode):
            return max(highest, named[0][0] + int(product[1]) // 2 - 1, *(number + 3 for number, _ in named[1:2]))
        data = named[-1][0] if self.opcode.startswith("ST") else named[0][0]
        more = 3 if re.search(r"\.128|\.M88\.4", self.opcode) else int(bool(re.search(r"\.64|\.WIDE|^CS2R$", self.opcode)))
        return max(highest, data + more)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.sass", description="registers, spills and instructions; needs no GPU")
    parser.add_argument("field", nargs="*", help="a field of MLAConfig, as name=value")
    assignments = parser.parse_args(argv).field
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(f"nvidia-cuda-{tool}" for tool in missing)
        print(f"perf.sass: {', '.join(missing)} not on PATH; in the CUDA toolkit, or: pip install {packages}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        config, cubin = _compile(assignments)
        path = Path(folder) / "decode.cubin"
        path.write_bytes(cubin)
        usage, listing = (_run("cuobjdump", option, path) for option in ("-res-usage", "-sass"))
    print(f"{config.name}, sm_90a")
    for symbol, text in _functions(listing).items():
        _print_kernel(symbol, text, usage)
    return 0


def _compile(assignments: list[str]):
    """-> the configuration, the cubin of its decode op"""
    from flashmla_cute import compile, ops, resources
    from flashmla_cute.kernels.config import FORMATS, MLAConfig

    defaults, values = MLAConfig(), {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in {field.name for field in fields(MLAConfig)}:
            raise SystemExit(f"perf.sass: no field {name}; there are {', '.join(field.name for field in fields(MLAConfig))}")
        kind = FORMATS.get if name == "kv" else type(getattr(defaults, name))
        values[name] = text == "True" if kind is bool else kind(text)
    config = MLAConfig(**values)
    return config, resources.embedded_cubin(resources.exported(compile.compile_object(ops.DecodeOp(config))))


def _run(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _functions(listing: str) -> dict[str, list[Instruction]]:
    found = {}
    for part in re.split(r"\tFunction : ", listing)[1:]:
        symbol, _, text = part.partition("\n")
        rows = INSTRUCTION.findall(text)
        found[symbol.strip()] = [Instruction(int(at, 16), bool(p), op, operands.strip()) for at, p, op, operands in rows]
    return found


def _print_kernel(symbol: str, code: list[Instruction], usage: str):
    name = re.search(r"([A-Z]\w*?)_object_at", symbol)
    registers, stack, shared = re.search(rf"{re.escape(symbol)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage).groups()
    print(f"\n{name[1] if name else symbol}: {registers} registers at launch, {stack} bytes of stack (spills)")
    print(f"  {shared} bytes of static shared memory (what the launch adds is not in a cubin), {len(code)} instructions")
    for role, budget, part in _roles(code):
        highest = max(instruction.highest_register for instruction in part)
        print(f"  {role:<34} up to R{highest:<4} {f'of {budget}' if budget else '':<7} {len(part):>6} instructions")
    mix = Counter(re.match(r"\w+", instruction.opcode)[0] for instruction in code if instruction.opcode != "NOP")
    items = "  ".join(f"{opcode}:{count}" for opcode, count in mix.most_common())
    print(textwrap.fill(items, 120, initial_indent="  ", subsequent_indent="  "))


def _roles(code: list[Instruction]) -> list[tuple[str, int | None, list[Instruction]]]:
    """(what it does, its setmaxnreg budget, its instructions) of each role; a kernel without setmaxnreg is one role"""
    at = {instruction.address: instruction for instruction in code}
    roots = [instruction for instruction in code if instruction.opcode.startswith("USETMAXREG")]
    if not roots:
        return [("all warps", None, code)]
    roles = []
    for root in roots:
        budget = int(re.findall(r"0x[0-9a-f]+", root.operands)[-1], 16)
        for part in _split(_reach(root.address, at), at):
            part = [at[address] for address in sorted(part)]
            products = sorted({m[0] for i in part if (m := re.match(r"HGMMA\.64x\d+", i.opcode))})
            loads = ["TMA loads"] if any(i.opcode.startswith("UTMALDG") for i in part) else []
            roles.append((", ".join(products + loads) or "no products", budget, part))
    return roles


def _reach(start: int, at: dict[int, Instruction]) -> set[int]:
    seen, todo = set(), [start]
    while todo:
        address = todo.pop()
        if address in at and address not in seen:
            seen.add(address)
            todo += at[address].successors
    return seen


def _split(whole: set[int], at: dict[int, Instruction]) -> list[set[int]]:
    """the two sides of the first branch that divides `whole`, or `whole` itself"""
    for address in sorted(whole):
        ways = at[address].successors
        if len(ways) == 2:
            left, right = (_reach(way, at) for way in ways)
            if min(len(left - right), len(right - left)) > DISJOINT * len(whole):
                return [left, right]
    return [whole]


if __name__ == "__main__":
    sys.exit(main())
