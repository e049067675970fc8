"""A model's numbers: what a cached token takes, and examples/deepseek_v3_decode.py beside the eager model.

python -m perf.model                                    40 s; result in perf/results

Bytes a token are computed and measured on allocated caches (flashmla_cute/memory.py).  The example decodes in bf16 and fp16
with its own defaults; that tokens and logits agree with the eager model is part of the result.  Its tokens/s compare two ways
to serve, continuous batching in a CUDA graph and transformers' generate on padded batches, not two kernels.
Exit code 2: no Hopper GPU or no transformers, nothing was measured.  1: a run does not agree.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from flashmla_cute import memory

from . import card, report

RESULTS, EXAMPLE = Path(__file__).parent / "results", card.ROOT / "examples" / "deepseek_v3_decode.py"
DTYPES = ("bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.model", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights and requests; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default: perf/results")
    options = parser.parse_args(argv)
    example, reason = load(EXAMPLE), card.why_unusable()
    if reason is None and example.DeepseekV3Config is None:
        reason = "needs Hugging Face transformers: pip install 'flashmla-cute[examples]'"
    if reason:
        print(f"perf.model: {reason}", file=sys.stderr)
        return 2
    result = {**card.identity(), "clocks": {}, "memory": bytes_per_token(), "example": []}
    path = report.new_path(options.out, f"{result['date']}-{card.slug(result['device'])}-model")
    for dtype in DTYPES:
        arguments = example.parse(["--dtype", dtype, "--seed", str(options.seed)])
        result["example"].append(example.serve(arguments, example.Kernels))
        example.report(result["example"][-1])
        report.write(path, result)
    result["clocks"]["after"] = card.clocks_now()
    report.write(path, result)
    print(f"stored in {path}")
    return 0 if all(run["agrees"] for run in result["example"]) else 1


def load(path: Path):
    """a file of examples/ as a module"""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # (its dataclasses look themselves up)
    spec.loader.exec_module(module)
    return module


def bytes_per_token(device: str = "cuda") -> list[dict]:
    """of one layer, by model and format"""
    rows = []
    for model in memory.MODELS:
        for form in memory.formats(model):
            measured = memory.measure(form, device=device)
            rows.append({"model": model.name, "cache": form.name, "computed": form.bytes_per_token, "measured": measured})
    return rows


if __name__ == "__main__":
    sys.exit(main())
