"""What the kernel computes, in float64: the specification, and the oracle of every test."""

from itertools import pairwise

import torch

from .kernels.config import PLAIN, TILE, DecodeOptions
from .schedule import Schedule


def gather(pool: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """the first `length` tokens of a request, [length, kv heads, head dim] float64"""
    return pool[pages[: -(-length // pool.shape[1])].long()].flatten(0, 1)[:length].double()


def dequantise(pool: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """an e4m3 pool as the numbers it stands for, float64"""
    return pool.double() * scale.double()


def quantise(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x / scale in e4m3, rounded to nearest even; beyond +-448 it becomes that, NaN stays NaN: what the append kernel writes"""
    return (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def pack(latent: torch.Tensor, rope: torch.Tensor, scales: int) -> torch.Tensor:
    """[.., 512] and [.., 64], 16 bit -> [.., 656] bytes, as the append kernel writes them: e4m3, 4 float32 scales, bf16.  A
    scale is the largest finite magnitude among its 512 / `scales` columns / 448, at least 2^-126; one alone fills all four."""
    tiles = latent.float().unflatten(-1, (scales, -1))
    finite = torch.where(tiles.isfinite(), tiles.abs(), 0.0)
    most = finite.amax(-1)
    scale = (most / torch.full_like(most, 448.0)).clamp(min=2.0**-126)  # (by a number, torch multiplies with 1 / 448 on a GPU)
    numbers = quantise(tiles, scale[..., None]).flatten(-2)
    stored = (numbers, scale.repeat_interleave(4 // scales, -1), rope.bfloat16())
    return torch.cat([x.contiguous().view(torch.uint8) for x in stored], -1)


def unpack(pool: torch.Tensor) -> torch.Tensor:
    """[.., 656] bytes as the numbers they stand for, [.., 576] float64"""
    numbers, scale, rope = (x.contiguous() for x in pool.split((512, 16, 128), -1))
    tiles = numbers.view(torch.float8_e4m3fn).double().unflatten(-1, (4, -1))
    return torch.cat(
        [(tiles * scale.view(torch.float32).double()[..., None]).flatten(-2), rope.view(torch.bfloat16).double()], -1
    )


def scores(
    q: torch.Tensor, k: torch.Tensor, softmax_scale: float, causal: bool, options: DecodeOptions = PLAIN
) -> torch.Tensor:
    """q [s_q, h_q, d], k [tokens, h_kv, d] -> [h_kv, s_q, h_q / h_kv, tokens]; -inf where the query must not look"""
    s_q, h_q, d = q.shape
    tokens, h_kv, _ = k.shape
    rows = q.double().reshape(s_q, h_kv, h_q // h_kv, d)
    s = torch.einsum("sgnd,tgd->gsnt", rows, k) * softmax_scale
    if options.softcap:
        s = options.softcap * torch.tanh(s / options.softcap)
    token, limit = torch.arange(tokens, device=q.device), torch.full((s_q,), tokens, device=q.device)
    if causal:
        limit = tokens - s_q + 1 + torch.arange(s_q, device=q.device)
    unseen = token >= limit[:, None, None]
    if options.window:
        unseen = unseen | (token < limit[:, None, None] - options.window)
    return s.masked_fill(unseen, float("-inf"))


def softmax_times(s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """s [h_kv, s_q, n, tokens], v [tokens, h_kv, latent] -> o [s_q, h_q, latent], lse [h_q, s_q]; no key: 0 and -inf"""
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - torch.where(lse.isinf(), torch.zeros_like(lse), lse)[..., None])
    o = torch.einsum("gsnt,tgl->sgnl", p, v).flatten(1, 2)
    return o, lse.permute(0, 2, 1).flatten(0, 1)


def sink_share(lse: torch.Tensor, sink: torch.Tensor | None):
    """what a logit without a value leaves of each row's softmax; lse [h_q, s_q], sink [h_q] -> [s_q, h_q, 1]"""
    return 1.0 if sink is None else torch.sigmoid(lse - sink.double()[:, None]).nan_to_num(0.0).T[..., None]


def reference_decode(
    q: torch.Tensor,
    pool: torch.Tensor,
    block_table: torch.Tensor,
    lengths: list[int],
    softmax_scale: float,
    causal: bool,
    latent: int,
    *,
    options: DecodeOptions = PLAIN,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 attention.  q [b, s_q, h_q, d], pool [pages, page, h_kv, d] -> out [b, s_q, h_q, latent], lse [b, h_q, s_q],
    natural and without the sink [h_q] whatever the options say."""
    outs, lses = [], []
    for i, length in enumerate(lengths):
        k = gather(pool, block_table[i], length)
        o, lse = softmax_times(scores(q[i], k, softmax_scale, causal, options), k[..., :latent])
        outs.append(o * sink_share(lse, sink))
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def emulate_decode(
    q: torch.Tensor,
    pool: torch.Tensor,
    block_table: torch.Tensor,
    schedule: Schedule,
    softmax_scale: float,
    causal: bool,
    latent: int,
    *,
    options: DecodeOptions = PLAIN,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The split and the merge as the device does them, item by item of `schedule`, in float64, on any device: shows that the
    schedule covers every tile once and that splitting changes nothing but rounding."""
    ragged, nan = q.dim() == 3, float("nan")
    lse_shape = q.shape[:2] if ragged else (q.shape[0], q.shape[2], q.shape[1])
    out = torch.full((*q.shape[:-1], latent), nan, dtype=torch.float64, device=q.device)
    lse = torch.full(lse_shape, nan, dtype=torch.float64, device=q.device)
    pieces = {}

    def write(request, num_queries, o, l):
        if ragged:
            out[request : request + num_queries], lse[request : request + num_queries] = o, l if isinstance(l, float) else l.T
        else:
            out[request], lse[request] = o, l

    def merge(request, num_queries, mine):
        o, l = torch.stack([o for o, _ in mine]), torch.stack([l for _, l in mine])
        total = torch.logsumexp(l, 0)
        weight = torch.exp(l - torch.where(total.isinf(), torch.zeros_like(total), total))
        o = (weight.transpose(1, 2)[..., None] * o).sum(0)
        write(request, num_queries, o * sink_share(total, sink), total)

    for item in schedule.items:
        k = gather(pool, block_table[item.batch], item.seqlen)
        mine = q[item.token : item.token + item.num_queries] if ragged else q[item.batch]
        s, owner = scores(mine, k, softmax_scale, causal, options), item.token if ragged else item.batch
        spans = (slice(first * TILE, min(end * TILE, item.seqlen)) for first, end in pairwise(item.edges))
        mine = [softmax_times(s[..., span], k[span, :, :latent]) for span in spans]
        if item.slot < 0 or item.joins:
            merge(owner, item.num_queries, mine)
        else:
            pieces |= {item.slot + i: piece for i, piece in enumerate(mine)}
    for listed in schedule.merges:
        if listed.pieces:
            merge(listed.batch, listed.num_queries, [pieces.pop(slot) for slot in listed.slots()])
        else:
            write(listed.batch, listed.num_queries, 0.0, float("-inf"))
    assert not pieces, f"partial results that nothing merges: slots {sorted(pieces)}"
    return out, lse
