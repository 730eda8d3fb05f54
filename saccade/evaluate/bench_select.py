"""The bench of selection alone: pooled blocks and vertical-slash, checked first, then timed beside plain PyTorch.

A selection that costs as much as the attention that it saves is worth nothing: every row says what share of dense
attention's time it takes, dense attention in the same process on the same tensors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saccade.core.call import Call
from saccade.core.errors import InputError, SaccadeError
from saccade.core.pattern import Pattern
from saccade.kernels.scores import pool, products
from saccade.kernels.select.vertical_slash import column_and_offset_mass, diagonal_blocks
from saccade.kernels.topk import largest, top_pooled
from saccade.methods.select.minference import NEAR, MInference

CHECKED = 4096  # tokens of the correctness check
BLOCKS = (64, 128)
COLUMNS, DIAGONALS, LAST, SLASH = 1000, 6096, 64, 64  # vertical-slash: sizes, queries looked at, block


def select_rows(
    length: int,
    density: float,
    dtype: torch.dtype,
    device: str,
    repeats: int = 20,
    heads: int = 32,
    kv_heads: int = 8,
    width: int = 128,
) -> list[dict[str, Any]]:
    """A row for each selection: ours, the same in plain PyTorch, and its share of dense causal attention's time.

    Args:
        length: tokens, queries as many as keys.
        density: share of the causal pairs that pooled blocks keep; vertical-slash has the sizes of its paper.
        dtype: of the tensors.
        device: "cpu" or "cuda".
        repeats: timings, of which the median counts; dense attention takes at most five.
        heads, kv_heads, width: of the tensors.

    Raises:
        InputError: a density outside (0, 1], or heads that cannot share the key heads.
        SaccadeError: a selection is wrong: nothing is timed then.

    Example:
        >>> rows = select_rows(256, 0.5, torch.float32, "cpu", repeats=1, heads=2, kv_heads=1, width=8)
        >>> [row["impl"] for row in rows]
        ['pooled-64', 'pooled-128', 'vertical-slash']
    """
    if not 0.0 < density <= 1.0:
        raise InputError(f"bench: density must be in (0, 1], got {density}")
    if heads % kv_heads:
        raise InputError(f"bench: {heads} heads cannot share {kv_heads} key heads; use a multiple")
    with torch.inference_mode():
        q, k = clustered(min(length, CHECKED), heads, kv_heads, width, dtype, device)
        for block in BLOCKS:
            check_pooled(q, k, block, density)
        check_vertical_slash(q, k)
        q, k = clustered(length, heads, kv_heads, width, dtype, device)
        call = Call.of(q, k)
        name, dense = _dense(q, k)
        dense_ms = _median(dense, device, min(repeats, 5))
        rows = []
        for block in BLOCKS:
            count = _count(density, length, block)
            ours, peer = _pooled(q, k, count, block, call)
            rows.append(_row(f"pooled-{block}", ours, peer, call, q, repeats))
        ours, peer = _vertical_slash(q, k, call)
        rows.append(_row("vertical-slash", ours, peer, call, q, repeats))
    for row in rows:
        row.update(share_of_dense=round(row["ms"] / dense_ms, 4), dense=name, dense_ms=round(dense_ms, 3))
    return rows


def clustered(
    length: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """q [1,H,N,D] and k [1,G,N,D] whose products stand out in runs of neighbouring offsets, and a little noise.

    Waves of few turns make a product that depends on the offset alone and varies slowly with it; six offsets for each
    head, the nearest among them, are where all waves meet.
    """
    rng = torch.Generator().manual_seed(seed)
    waves, share = width // 2, heads // kv_heads
    run = max(16, length // 128)
    speed = torch.rand(kv_heads, waves, generator=rng, dtype=torch.float64) * 2 * math.pi / run
    offsets = torch.rand(heads, 6, generator=rng, dtype=torch.float64) * length
    offsets[:, 0] = 0
    turn = torch.polar(torch.ones(()).double(), -speed.repeat_interleave(share, 0)[..., None] * offsets[:, None])
    turn = turn.sum(-1).to(device)
    at = torch.arange(length, dtype=torch.float64, device=device)
    noise = torch.Generator(device).manual_seed(seed)

    def drawn(waves: Tensor) -> Tensor:
        x = torch.cat((waves.real, waves.imag), -1).float()
        x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
        return (x + 0.1 * torch.randn(x.shape, generator=noise, device=device)).to(dtype)

    angles = (torch.polar(torch.ones((), device=device).double(), at[:, None] * s) for s in speed.to(device))
    keys = [(drawn(angle), angle) for angle in angles]
    # the logits of a run reach about 12 above the rest
    scale = 12.0 / waves * math.sqrt(width)
    q = torch.stack([drawn(keys[h // share][1] * turn[h] * scale) for h in range(heads)])
    return q[None], torch.stack([key for key, _ in keys])[None]


def check_pooled(q: Tensor, k: Tensor, block: int, density: float) -> None:
    """Raise SaccadeError unless means are as near to float64 as PyTorch's, and the blocks are the best by them."""
    call, count = Call.of(q, k), _count(density, k.shape[2], block)
    for x in (q, k):
        truth = torch.stack([rows.double().mean(2) for rows in x.split(block, 2)], 2)
        plain = torch.stack([rows.mean(2) for rows in x.split(block, 2)], 2)
        _no_worse("pool", [pool(x, block)], [plain], [truth])
    index = top_pooled(q, k, count, block, block, call).index.long()
    truth = products(pool(q, block).double(), pool(k, block).double())
    seen = torch.ones(truth.shape[2:], dtype=torch.bool, device=q.device).tril()
    table = torch.zeros((*truth.shape[:3], truth.shape[3] + 1), dtype=torch.bool, device=q.device)
    table = table.scatter_(3, torch.where(index < 0, truth.shape[3], index), True)[..., :-1]
    worst = truth.masked_fill(~table, math.inf).amin(-1)
    missed = truth.masked_fill(table | ~seen, -math.inf).amax(-1)
    rising = (index.diff(dim=-1) > 0) | (index[..., 1:] < 0)
    right = torch.equal(table.sum(-1), seen.sum(-1).clamp(max=count).expand(table.shape[:3]))
    if not (
        right and rising.all() and not (table & ~seen).any() and (missed - worst).max() <= 1e-5 * truth.abs().max()
    ):
        raise SaccadeError(f"bench: top_pooled in {q.dtype} with blocks of {block} is wrong: nothing was timed")


def check_vertical_slash(q: Tensor, k: Tensor) -> None:
    """Raise SaccadeError unless masses are as near to float64 as PyTorch's, and the lists follow from them."""
    call = Call.of(q, k)
    mass = column_and_offset_mass(q, k, call, LAST)
    truth = plain_mass(q.double(), k.double(), LAST)
    _no_worse("column_and_offset_mass", mass, plain_mass(q, k, LAST), truth)
    mass[1][..., :NEAR] = math.inf
    found = largest(mass[0], COLUMNS), largest(mass[1], DIAGONALS)
    for index, scores in zip(found, mass, strict=True):
        order = scores.sort(dim=2, descending=True, stable=True).indices[..., : index.shape[2]]
        if not torch.equal(index.long(), order.sort(dim=2).values):
            raise SaccadeError("bench: largest is wrong: nothing was timed")
    index, count = diagonal_blocks(found[1], call, SLASH).index.long(), -(-call.shape.N // SLASH)
    for line in {count // 2, count - 1}:
        # every pair of the line's rows and the offsets, one by one
        keys = torch.arange(line * SLASH, (line + 1) * SLASH, device=q.device)[:, None] - found[1][:, :, None]
        want, got = (torch.zeros((*found[1].shape[:2], count + 1), dtype=torch.bool, device=q.device) for _ in "ab")
        block = torch.where((keys >= 0) & (keys < count * SLASH), keys // SLASH, count).flatten(2)
        want.scatter_(2, block, True)
        got.scatter_(2, torch.where(index[:, :, line] < 0, count, index[:, :, line]), True)
        if not torch.equal(got[..., :count], want[..., :count]):
            raise SaccadeError("bench: diagonal_blocks is wrong: nothing was timed")


def plain_mass(q: Tensor, k: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Softmax mass of the last queries by key and by offset, as PyTorch's users write it."""
    B, H, N, D = q.shape
    G, M = k.shape[1], k.shape[2]
    L = min(last, N)
    scores = (q[:, :, -L:].reshape(B, G, -1, D) @ k.transpose(-1, -2)).view(B, H, L, M) / math.sqrt(D)
    future = torch.ones(L, M, dtype=torch.bool, device=q.device).triu(M - L + 1)
    probs = scores.masked_fill(future, -math.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    padded = torch.nn.functional.pad(probs, (L, 0)).contiguous()
    slanted = padded.as_strided((B, H, L, M), (H * L * (M + L), L * (M + L), M + L + 1, 1), 1)
    return probs.sum(2), slanted.sum(2).flip(-1)


def plain_pooled(q: Tensor, k: Tensor, count: int, block: int) -> Tensor:
    """Pooled scores and their top blocks, all at once, as PyTorch's users write it."""
    B, H, _, D = q.shape
    G = k.shape[1]
    mean_q, mean_k = (_blocks(t, block).mean(3) for t in (q, k))
    scores = (mean_q.view(B, G, -1, D) @ mean_k.transpose(-1, -2)).view(B, H, mean_q.shape[2], -1)
    future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    best = scores.masked_fill_(future, -math.inf).topk(min(count, scores.shape[3]), -1)
    return best.indices.masked_fill(best.values.isneginf(), scores.shape[3]).sort(-1).values


def plain_vertical_slash(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and the key blocks of every query block, as PyTorch's users write it; the host waits for the length."""
    B, H, N, _ = q.shape
    column, offset = plain_mass(q, k, LAST)
    columns = column.topk(min(COLUMNS, N), -1).indices
    offset[..., :NEAR] = math.inf
    offsets = offset.topk(min(DIAGONALS, N), -1).indices
    count = -(-N // SLASH)
    met = torch.zeros((B, H, count + 1), dtype=torch.bool, device=q.device)
    met.scatter_(2, offsets // SLASH, True).scatter_(2, (offsets + SLASH - 1) // SLASH, True)
    width = int(met.sum(-1).max())
    steps = torch.where(met, torch.arange(count + 1, device=q.device), count + 1).sort(-1).values[..., :width]
    return columns, (torch.arange(count, device=q.device)[:, None] - steps[:, :, None]).clamp_min(-1)


def _count(density: float, length: int, block: int) -> int:
    """Key blocks in a list, so that a share of all causal pairs is read: early rows have fewer to choose from."""
    return max(1, round((1 - math.sqrt(1 - density)) * -(-length // block)))


def _pooled(
    q: Tensor, k: Tensor, count: int, block: int, call: Call
) -> tuple[Callable[[], Pattern], Callable[[], object]]:
    return lambda: top_pooled(q, k, count, block, block, call), lambda: plain_pooled(q, k, count, block)


def _vertical_slash(q: Tensor, k: Tensor, call: Call) -> tuple[Callable[[], Pattern], Callable[[], object]]:
    method = MInference(columns=COLUMNS, diagonals=DIAGONALS, last=LAST, block=SLASH)
    return lambda: method.select(q, k, call), lambda: plain_vertical_slash(q, k)


def _row(
    impl: str, ours: Callable[[], Pattern], peer: Callable[[], object], call: Call, q: Tensor, repeats: int
) -> dict[str, Any]:
    # one head tells the density: counting all of them would take more memory than choosing did
    density = ours().heads((0,)).density(call.take((0,), (0,)))
    device = q.device.type
    ms, peer_ms = (_median(run, str(q.device), repeats) for run in (ours, peer))
    return {
        "impl": impl,
        "peer": "torch",
        "device": device,
        "dtype": str(q.dtype).removeprefix("torch."),
        "length": call.shape.N,
        "density": round(density, 4),
        "ms": round(ms, 3),
        "peer_ms": round(peer_ms, 3),
        "speedup": round(peer_ms / ms, 3),
    }


def _dense(q: Tensor, k: Tensor) -> tuple[str, Callable[[], object]]:
    """Dense causal attention and its name: cuDNN's where it serves, else what PyTorch takes."""

    def attend() -> Tensor:
        return scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    if q.device.type != "cuda" or q.dtype == torch.float32:
        return "sdpa", attend
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend()

    return "cudnn", cudnn


def _no_worse(name: str, ours: Any, plain: Any, truth: Any) -> None:
    error, allowed = (
        max((a.double() - b).abs().max().item() for a, b in zip(x, truth, strict=True)) for x in (ours, plain)
    )
    if not error <= 2 * allowed + 1e-6:
        raise SaccadeError(f"bench: {name} is off by {error:.2e}, plain PyTorch by {allowed:.2e}: nothing was timed")


def _blocks(x: Tensor, block: int) -> Tensor:
    """Rows in blocks [B,h,count,block,D]; the last is filled up with its own last row."""
    B, h, N, D = x.shape
    last = x[:, :, -1:].expand(-1, -1, -N % block, -1)
    return (torch.cat((x, last), 2) if N % block else x).view(B, h, -1, block, D)


def _median(run: Callable[[], object], device: str, repeats: int) -> float:
    """Milliseconds, after two runs that do not count."""
    times = []
    for _ in range(repeats + 2):
        if device.startswith("cuda"):
            stream = torch.cuda.current_stream(device)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            run()
            end.record(stream)
            torch.cuda.synchronize(device)
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
    return median(times[2:])
