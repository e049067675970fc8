"""What a cache format costs in accuracy: attention over the rounded cache against attention over the unrounded one, in float64.

python -m perf.fp8_errors                a table, and perf/results/<date>-none-fp8-errors.json; needs no GPU

Only the rounding of the cache counts here, and with it that of q where one e4m3 term holds it: what a kernel adds is held to
the tolerances of the tests.  The formats are those that PagedKVCache writes, to the bit: flat e4m3 with one scale, or a scale
for each token or for each 128 of its latent columns beside rope columns in bf16 (656 bytes).
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from flashmla_cute.kernels.config import FORMATS as WIDE
from flashmla_cute.kernels.config import FP8_FORMATS, SCALED_FORMATS
from flashmla_cute.reference import pack, quantise, scores, softmax_times, unpack

RESULTS = Path(__file__).parent / "results"
LATENT, ROPE, HEADS = 512, 64, 16
E4M3_MAX = 448.0


# ---------------------------------------------------------------------- data
def latents(kind: str, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """[tokens, 512], of root mean square 1 as a model's normalisation leaves them"""
    x = torch.randn(tokens, LATENT, generator=generator, dtype=torch.float64)
    if kind == "heavy-tailed":  # Student's t with 3 degrees of freedom
        x = x / (torch.randn(3, tokens, LATENT, generator=generator, dtype=torch.float64).square().mean(0)).sqrt()
    elif kind == "outlier channels":
        x[:, torch.randperm(LATENT, generator=generator)[:4]] *= 50
    return x / x.square().mean(1, keepdim=True).sqrt()


KINDS = ("gaussian", "heavy-tailed", "outlier channels")


# ---------------------------------------------------------------------- formats: rows [tokens, 576] -> what they stand for
def rounded(x: torch.Tensor, scale) -> torch.Tensor:
    return quantise(x, scale).double() * scale


def bfloat16(rows: torch.Tensor) -> torch.Tensor:
    return rows.bfloat16().double()


def flat(rows: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    return rounded(rows, rows.abs().max().item() / E4M3_MAX if scale is None else scale)


def scaled(rows: torch.Tensor, scales: int) -> torch.Tensor:
    return unpack(pack(rows[:, :LATENT], rows[:, LATENT:], scales))


FLAT = FP8_FORMATS["float8_e4m3fn"].bytes_per_token
FORMATS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {  # name -> (bytes a token, rounding)
    "bf16": (WIDE["bfloat16"].bytes_per_token, bfloat16),
    "e4m3, scale 1": (FLAT, lambda rows: flat(rows, 1.0)),
    "e4m3, scale largest / 448": (FLAT, flat),
    "e4m3 latent with a scale a token, bf16 rope": (SCALED_FORMATS[1].bytes_per_token, lambda rows: scaled(rows, 1)),
    "e4m3 latent with 4 scales a token, bf16 rope": (SCALED_FORMATS[4].bytes_per_token, lambda rows: scaled(rows, 4)),
}


def one_term(q: torch.Tensor) -> torch.Tensor:
    """as DecodePlan(query_terms=1) has the kernel do it: e4m3 with a power of two for each row"""
    scale = 2.0 ** (torch.floor(torch.log2(q.abs().amax(-1, keepdim=True))) - 7)
    return rounded(q, scale)


# ---------------------------------------------------------------------- errors
def measure(kind: str, spread: float, tokens: int, seed: int) -> list[dict]:
    """spread: standard deviation of the scores"""
    generator = torch.Generator().manual_seed(seed)
    rope = torch.randn(tokens, ROPE, generator=generator, dtype=torch.float64)
    rows = torch.cat([latents(kind, tokens, generator), rope], 1)
    q = torch.randn(1, HEADS, LATENT + ROPE, generator=generator, dtype=torch.float64).bfloat16().double()
    scale = spread / scores(q, rows[:, None], 1.0, False).std().item()
    attend = lambda query, cache: softmax_times(scores(query, cache[:, None], scale, False), cache[:, None, :LATENT])
    wanted, wanted_lse = attend(q, rows)
    found = []
    for name, (size, rounding) in FORMATS.items():
        for terms, query in ((2, q), (1, one_term(q))):
            if terms == 1 and size != FLAT:  # (q is exact over the others)
                continue
            out, lse = attend(query, rounding(rows))
            found.append(
                {
                    "latents": kind,
                    "score_spread": spread,
                    "format": name,
                    "bytes_per_token": size,
                    "query_terms": terms,
                    "rel_out": ((out - wanted).norm() / wanted.norm()).item(),
                    "max_lse": (lse - wanted_lse).abs().max().item(),
                }
            )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.fp8_errors", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default: perf/results")
    options = parser.parse_args(argv)
    rows = [row for kind in KINDS for spread in (1.0, 4.0) for row in measure(kind, spread, options.tokens, options.seed)]
    path = options.out / f"{datetime.date.today()}-none-fp8-errors.json"
    path.write_text(json.dumps({"tokens": options.tokens, "heads": HEADS, "seed": options.seed, "rows": rows}, indent=1) + "\n")
    print(f"{'latents':<18}{'spread':>7}  {'format':<46}{'terms':>6}{'out, rel':>10}{'lse, max':>10}")
    for row in rows:
        numbers = f"{row['query_terms']:>6}{row['rel_out']:>10.1e}{row['max_lse']:>10.1e}"
        print(f"{row['latents']:<18}{row['score_spread']:>7g}  {row['format']:<46}{numbers}")
    print(f"stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
