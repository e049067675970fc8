"""The command `flashmla-cute`."""

import argparse
from collections.abc import Sequence

from rich.console import Console

from . import __version__, demo, doctor

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


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="flashmla-cute",
        description="MLA decode for NVIDIA Hopper, written in CUTLASS's CuTe Python DSL.",
        epilog="Compiled kernels are kept in $FLASHMLA_CUTE_CACHE, by default ~/.cache/flashmla_cute.",
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
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """runs the command line `argv`, without the program's name; returns the exit status"""
    arguments = vars(parser().parse_args(argv))
    if arguments.pop("command") == "doctor":
        return doctor.run(Console())
    return demo.run(demo.Options(**arguments), Console())
