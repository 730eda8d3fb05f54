"""The bench of attention alone on a CPU: random causal blocks at a measured density, checked, then timed against SDPA.

The query heads of a key head share its lists, as in selection that is made for grouped heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saccade.core.call import Call
from saccade.core.errors import InputError, SaccadeError
from saccade.core.pattern import Blocks, Full
from saccade.kernels.attend import attend
from saccade.kernels.topk import top_blocks

CHECKED = 1024  # tokens of the correctness check


@dataclass(frozen=True)
class Case:
    """What is timed.

    Args:
        length: tokens, queries as many as keys.
        density: share of the causal pairs to read; what comes out is measured.
        heads, kv_heads, width: of the tensors.
        block: rows and slots of a block.
        dtype: of the tensors.
        device: "cpu" or "cuda".
        lists: lists of key blocks: one for each key head (None), or as many as there are query heads.
    """

    length: int
    density: float
    heads: int = 4
    kv_heads: int = 2
    width: int = 64
    block: int = 128
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    lists: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise InputError(f"bench: density must be in (0, 1], got {self.density}")
        if self.heads % self.kv_heads:
            raise InputError(f"bench: {self.heads} heads cannot share {self.kv_heads} key heads; use a multiple")


def tensors(case: Case, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [1,H,N,D], k and v [1,G,N,D]."""
    rng = torch.Generator(case.device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(1, heads, length, case.width, generator=rng, device=case.device).to(case.dtype)

    return draw(case.heads), draw(case.kv_heads), draw(case.kv_heads)


def random_blocks(case: Case, length: int, seed: int = 0) -> tuple[Blocks, float]:
    """Random causal key blocks for each list, each row's own always among them, and the density measured."""
    count = -(-length // case.block)
    rng = torch.Generator(case.device).manual_seed(seed)
    lists = case.kv_heads if case.lists is None else case.lists
    scores = torch.rand(1, lists, count, count, generator=rng, device=case.device)
    scores.diagonal(dim1=2, dim2=3).fill_(float("inf"))
    call = _call(case, length)

    def made(number: int) -> tuple[Blocks, float]:
        blocks = top_blocks(scores, number, case.block, case.block, call)
        return blocks, blocks.density(call)

    low, high = 1, count
    # more blocks never make it sparser
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if made(middle)[1] >= case.density else (middle + 1, high)
    blocks, density = made(low)
    # one block more or less in every row is a coarse step: what is too much is dropped by lot, but no row's own block
    lot = torch.rand(blocks.index.shape, generator=rng, device=case.device) < 1 - case.density / density
    own = torch.arange(count, device=case.device)[:, None] == blocks.index
    index = torch.where((blocks.index < 0) | (lot & ~own), count, blocks.index).sort(-1).values
    blocks = Blocks(torch.where(index == count, -1, index).int(), case.block, case.block)
    return blocks, blocks.density(call)


def check(case: Case, impl: str = "tiled") -> tuple[float, float]:
    """Error of the implementation and of plain PyTorch in the same dtype, both against float64.

    Raises:
        SaccadeError: the first is more than twice the second: nothing is timed then.
    """
    length = min(CHECKED, case.length)
    q, k, v = tensors(case, length)
    pattern, _ = random_blocks(case, length)
    call = _call(case, length)
    truth = attend(q.double(), k.double(), v.double(), pattern, call, impl="reference").o
    ours = attend(q, k, v, pattern, call, impl=impl).o
    share = case.heads // case.kv_heads
    wide_k, wide_v = (t.repeat_interleave(share, 1) for t in (k, v))
    scores = (q @ wide_k.transpose(-1, -2)) * call.softmax_scale(case.width)
    plain = scores.masked_fill(~pattern.mask(call), float("-inf")).softmax(-1) @ wide_v
    error, allowed = ((o.double() - truth).abs().max().item() for o in (ours, plain))
    if not error <= 2 * allowed + 1e-7:
        raise SaccadeError(
            f"bench: {impl} in {case.dtype} is off by {error:.2e}, plain PyTorch by {allowed:.2e}: nothing was timed"
        )
    return error, allowed


def measure(
    case: Case, repeat: int = 5, impl: str = "tiled", done: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """One row: the implementation against SDPA on the same tensors, taking turns, medians.

    Args:
        case: what to time.
        repeat: turns.
        impl: of `attend`.
        done: called with a few words after each turn.
    """
    say = done or (lambda text: None)
    name = str(case.dtype).removeprefix("torch.")
    check(case, impl)
    say(f"{name}: correct")
    q, k, v = tensors(case, case.length)
    pattern, density = random_blocks(case, case.length)
    call = _call(case, case.length)

    def mine() -> None:
        attend(q, k, v, pattern, call, lse=False, impl=impl)

    def peer() -> None:
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    ours, theirs = [], []
    with torch.inference_mode():
        _timed(mine, case.device)
        for turn in range(repeat):
            theirs.append(_timed(peer, case.device))
            ours.append(_timed(mine, case.device))
            say(f"{name}: {turn + 1} of {repeat}, {ours[-1] * 1e3:.0f} ms against {theirs[-1] * 1e3:.0f} ms")
    ms, peer_ms = median(ours) * 1e3, median(theirs) * 1e3
    # two products, a multiplication and an addition each
    flop = 4 * case.width
    return {
        "impl": impl,
        "peer": "sdpa",
        "device": case.device,
        "dtype": name,
        "length": case.length,
        "density": round(density, 4),
        "ms": round(ms, 3),
        "peer_ms": round(peer_ms, 3),
        "speedup": round(peer_ms / ms, 3),
        "gflops": round(flop * pattern.pairs(call) / ms / 1e6, 1),
        "peer_gflops": round(flop * Full().pairs(call) / peer_ms / 1e6, 1),
    }


def _call(case: Case, length: int) -> Call:
    empty = torch.empty(1, 1, 1, 1)
    return Call.of(empty.expand(1, case.heads, length, 1), empty.expand(1, case.kv_heads, length, 1))


def _timed(run: Callable[[], None], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
