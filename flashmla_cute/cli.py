"""The command `flashmla-cute`."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from . import __version__, compile, demo, doctor, export, memory, selection, store

DEMO = """\
Serve a batch of requests of very different lengths for some decode steps.
Tokens are appended to a paged cache, requests leave and enter, and every
step's output is compared with float64 attention over tokens that the demo
keeps for itself.

On a Hopper GPU it prints error, time, TFLOP/s and GB/s of each step, the
card's ceilings measured in the same run, and what padding every request to
the longest would have cost.

Without one its first line says that no kernel can run; it then compiles the
kernels for sm_90a, prints what they take of an SM, cuts the same batch for an
H100, and runs split and merge in float64 on the CPU, on a smaller batch.

exit status: 0 if every step agrees with float64, else 1"""

DOCTOR = """\
Say what of driver, GPU, torch, CuTe DSL, TVM-FFI and the cache of compiled
kernels is in order, and what to do about the rest.

exit status: 0 if a kernel can run on this machine; 1 if not, also where only
the GPU is missing"""

COMPILE = f"""\
Compile kernels into the cache ahead of use, in parallel processes: by default
the schedule, the cache writes and all presets of decode.  Needs no GPU.

{selection.HELP}

exit status: 0 if all are in the cache, 1 if one does not compile"""

EXPORT = f"""\
Write compiled kernels as files: object, shared library (with a C compiler),
cubin and its description, a C header, and manifest.json, by which
$FLASHMLA_CUTE_OBJECTS=DIR serves the objects to this package before it looks
into its cache.  Needs no GPU.

{selection.HELP}

exit status: 0 if all are written, else 1"""

CACHE = """\
list    what the cache holds; `stale` was compiled from other sources or by
        other versions, and is never loaded
verify  load every object and look its symbol up; reports damaged ones
clear   remove stale and damaged objects; --all: all of them

exit status: 1 if verify finds a damaged object, else 0"""
MEMORY = """\
Bytes a cached token takes with multi-head attention, grouped-query attention
with 8 kv heads, and MLA in bf16 and FP8, for DeepSeek-V3, Kimi-K2 and
DeepSeek-V2-Lite, from their published configurations.

exit status: 0; 1 if --measure finds no GPU"""
LEFTOVER_S = 3600  # a compile takes 10 s: what is unfinished after this was killed


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return value


def configurations(text: str) -> list:
    try:
        return selection.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="flashmla-cute",
        description="MLA decode for NVIDIA Hopper, written in CUTLASS's CuTe Python DSL.",
        epilog="Compiled kernels are kept in $FLASHMLA_CUTE_CACHE, by default ~/.cache/flashmla_cute, "
        "and looked up in the directories of $FLASHMLA_CUTE_OBJECTS first.",
    )
    top.add_argument("--version", action="version", version=f"flashmla-cute {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    add = lambda name, **texts: commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
    command, default = add("demo", help="decode a changing batch, check it and time it", description=DEMO), demo.Options()
    for name, meaning in (
        ("batch", "requests"),
        ("heads", "query heads; there is one kv head"),
        ("queries", "query tokens of a request and step; more than 1 with speculative decoding"),
        ("steps", "decode steps"),
        ("max-seqlen", "tokens of the longest prompt"),
    ):
        command.add_argument(f"--{name}", type=positive, metavar="N", help=f"{meaning} (default %(default)s)")
    command.add_argument("--dtype", choices=demo.DTYPES, help="of queries and cache (default %(default)s)")
    command.add_argument("--seed", type=int, metavar="N", help="of lengths and values (default %(default)s)")
    command.set_defaults(**vars(default))
    add("doctor", help="what of this machine is in order", description=DOCTOR)
    command = add("compile", help="compile kernels ahead of use", description=COMPILE)
    command.add_argument("configs", nargs="*", type=configurations, metavar="CONFIG", help="(default: see above)")
    command = add("export", help="compiled kernels as files, for C++, other drivers, or packages", description=EXPORT)
    command.add_argument("configs", nargs="+", type=configurations, metavar="CONFIG", help="see above")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write to")
    command = add("cache", help="what the cache of compiled kernels holds", description=CACHE)
    command.add_argument("action", choices=("list", "verify", "clear"))
    command.add_argument("--all", action="store_true", help="with clear: current objects too")
    command = add("memory", help="what a token takes in the cache, by model and format", description=MEMORY)
    command.add_argument("--measure", action="store_true", help="also allocate each cache on the GPU and see what it takes")
    return top


# ---------------------------------------------------------------------- compile, export
def compile_ahead(wanted: list, console: Console) -> int:
    start = time.monotonic()
    missing = [pair for pair in dict.fromkeys(wanted) if not compile.is_cached(*pair)]
    try:
        compile.get_many(wanted)
    except Exception as error:  # whatever the compiler raises is the finding
        console.print(f"{type(error).__name__}: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        return 1
    done = f"{len(wanted)} configurations: {len(missing)} compiled in {time.monotonic() - start:.1f} s"
    console.print(f"{done}, the others were there ({compile.cache_dir()})", soft_wrap=True, highlight=False)
    return 0


def export_to(wanted: list, folder: Path, console: Console) -> int:
    try:
        made = export.export(wanted, folder)
    except (OSError, RuntimeError, ValueError) as error:
        console.print(f"{type(error).__name__}: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        return 1
    for entry in made:
        names = ", ".join(file["name"] for file in entry["files"].values())
        console.print(f"{entry['symbol']}: {names}", soft_wrap=True, highlight=False)
    if not all("library" in entry["files"] for entry in made):
        console.print("No .so was written: there is no C compiler (cc, gcc, clang, or $CC).", style="yellow")
    console.print(f"Set {compile.OBJECTS_VARIABLE}={folder} to use them.", soft_wrap=True, highlight=False)
    return 0


# ---------------------------------------------------------------------- cache
def state(entry: store.Entry) -> str:
    if entry.record is None:
        return "damaged"
    return "current" if compile.is_current(entry.record) else "stale"


def age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def cache(action: str, everything: bool, console: Console) -> int:
    folder = compile.cache_dir()
    found = store.entries(folder)
    if action == "clear":
        return clear(folder, [entry for entry in found if everything or state(entry) != "current"], everything, console)
    damage = {entry.path: entry.damage() for entry in found} if action == "verify" else {}
    table = Table("op", "configuration", "KB", "age", "state", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for entry in found:
        what = "damaged" if damage.get(entry.path) else state(entry)
        table.add_row(entry.op, entry.config, f"{entry.size / 1e3:.0f}", age(entry.age_s), what)
    if found:
        console.print(table)
    console.print(f"{folder}: {len(found)} objects, {sum(e.size for e in found) / 1e6:.1f} MB", soft_wrap=True, highlight=False)
    damaged = {path: reason for path, reason in damage.items() if reason}
    for path, reason in damaged.items():
        console.print(f"{path.name}: {reason}", style="red", soft_wrap=True, markup=False, highlight=False)
    if action == "verify" and not damaged:
        console.print("Every object loads and has its symbol.")
    return 1 if damaged else 0


def clear(folder: Path, removed: list[store.Entry], everything: bool, console: Console) -> int:
    size = sum(entry.size for entry in removed)
    for entry in removed:
        store.remove(entry.path)
    store.remove_leftovers(folder, 0 if everything else LEFTOVER_S)
    console.print(f"{folder}: {len(removed)} objects removed, {size / 1e6:.1f} MB", soft_wrap=True, highlight=False)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """runs the command line `argv`, without the program's name; returns the exit status"""
    arguments, console = vars(parser().parse_args(argv)), Console()
    command = arguments.pop("command")
    wanted = [pair for pairs in arguments.get("configs", ()) for pair in pairs]
    if command == "doctor":
        return doctor.run(console)
    if command == "memory":
        return memory.run(console, arguments["measure"])
    if command == "compile":
        return compile_ahead(wanted or selection.default(), console)
    if command == "export":
        return export_to(wanted, arguments["out"], console)
    if command == "cache":
        return cache(arguments["action"], arguments["all"], console)
    return demo.run(demo.Options(**arguments), console)
