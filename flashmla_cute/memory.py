"""`flashmla-cute memory`: what a cached token takes, by attention and format, computed and measured on allocated caches."""

from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .kernels.config import TILE
from .kv_cache import PagedKVCache

MEASURED_BYTES = 1 << 32  # of one layer: the allocator rounds by up to 2 MB, which is then nothing


@dataclass(frozen=True)
class Model:
    """sizes from the model's published configuration (config.json on Hugging Face)"""

    name: str
    layers: int  # num_hidden_layers
    heads: int  # num_attention_heads
    head_dim: int = 128  # qk_nope_head_dim and v_head_dim
    latent: int = 512  # kv_lora_rank
    rope: int = 64  # qk_rope_head_dim


MODELS = (Model("DeepSeek-V3", 61, 128), Model("Kimi-K2", 61, 64), Model("DeepSeek-V2-Lite", 27, 16))


@dataclass(frozen=True)
class Format:
    """how a layer keeps a token: arrays of so many elements"""

    name: str
    arrays: tuple[tuple[int, torch.dtype], ...]

    @property
    def bytes_per_token(self) -> int:
        return sum(elements * dtype.itemsize for elements, dtype in self.arrays)


def formats(model: Model) -> list[Format]:
    """MHA and GQA-8 keep a key and a value of head_dim for every kv head, as a model of the same width without MLA would; MLA
    keeps one latent and one rotated key for all heads."""
    bf16, fp8, latent, rope = torch.bfloat16, torch.float8_e4m3fn, model.latent, model.rope
    return [
        Format("MHA bf16", ((model.heads * model.head_dim, bf16),) * 2),
        Format("GQA-8 bf16", ((8 * model.head_dim, bf16),) * 2),
        Format("MLA bf16", ((latent + rope, bf16),)),
        # e4m3 latent with a scale for each 128 columns, rope in bf16; and all of it e4m3 with a scale for the tensor
        Format("MLA FP8 656 B", ((latent, fp8), (latent // 128, torch.float32), (rope, bf16))),
        Format("MLA FP8 576 B", ((latent + rope, fp8),)),
    ]


def measure(form: Format, size: int = MEASURED_BYTES, device: str = "cuda") -> float:
    """bytes a token by which torch.cuda.memory_allocated grows when a layer's cache of `size` bytes is allocated, with the
    block table and the length of one request"""
    pages = size // form.bytes_per_token // TILE
    tokens = pages * TILE
    torch.cuda.empty_cache()  # (a block kept for reuse would count as a whole)
    before = torch.cuda.memory_allocated(device)
    if len(form.arrays) == 1:  # latent and rope in one array: PagedKVCache's
        held = PagedKVCache.allocate(pages, 1, tokens, dtype=form.arrays[0][1], device=device)
    else:  # bytes: the fields of a token lie side by side
        pool = torch.empty(pages, TILE, form.bytes_per_token, dtype=torch.uint8, device=device)
        held = pool, torch.empty(pages + 1, dtype=torch.int32, device=device)
    grown = torch.cuda.memory_allocated(device) - before
    del held
    return grown / tokens


def table(measured: bool, device: str = "cuda") -> Table:
    """bytes of a token in one layer; KB in all layers"""
    columns = ("bytes/layer", *(["measured"] if measured else []), "KB/token", "of MHA", "of GQA-8", "tokens in 40 GB")
    shown = Table("model", "cache", *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for model in MODELS:
        rows = formats(model)
        mha, gqa = (form.bytes_per_token for form in rows[:2])
        for i, form in enumerate(rows):
            size, whole = form.bytes_per_token, form.bytes_per_token * model.layers
            numbers = [f"{measure(form, device=device):.1f}"] if measured else []
            numbers += [f"{whole / 1e3:.1f}", f"{size / mha:.1%}", f"{size / gqa:.1%}", f"{40e6 / whole:.0f} k"]
            shown.add_row("" if i else model.name, form.name, str(size), *numbers)
    return shown


def run(console: Console, measured: bool) -> int:
    """prints the table; returns the exit status"""
    if measured and not torch.cuda.is_available():
        console.print("--measure needs a CUDA device: none here", style="red")
        return 1
    console.print(table(measured))
    return 0
