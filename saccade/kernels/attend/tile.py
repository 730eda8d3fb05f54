"""What all tiles share: the call on its way, softmax of a tile, and how a tile runs in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.core.call import Call
from saccade.core.pattern import Pattern
from saccade.kernels.merge import Out

PER_THREAD = 1 << 18  # scores in a tile for each CPU thread, so that it stays in the cache of its core
ON_GPU = 1 << 26  # there a tile must keep the whole device busy
NEG_INF = float("-inf")


@dataclass(frozen=True)
class Job:
    """One attention call on its way: q is scaled, bias is [B,H,M], `without` holds pairs that are counted elsewhere."""

    q: Tensor
    k: Tensor
    v: Tensor
    call: Call
    bias: Tensor | None = None
    lse: bool = True
    without: tuple[Pattern, ...] = ()


def softmax(scores: Tensor, v: Tensor, lse: bool, careful: bool = True) -> Out:
    """Softmax over the last axis times v; rows of -inf give 0 (careful). scores [.., n, L], v [.., L, Dv]."""
    if torch.is_grad_enabled() and scores.requires_grad:
        empty = scores.detach().amax(-1, keepdim=True).isneginf()
        weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        sums = torch.logsumexp(wide(scores.masked_fill(empty, 0.0)), -1, keepdim=True) if lse else None
        return Out(weights.to(v.dtype) @ v, None if sums is None else sums.masked_fill(empty, NEG_INF).squeeze(-1))
    weights = torch.softmax(scores, -1)
    # the largest weight is exp(largest score - lse), so two cheap maxima give the lse
    sums = wide(scores.amax(-1, keepdim=True)) - wide(weights.amax(-1, keepdim=True)).log() if lse else None
    if careful:
        empty = weights[..., :1].isnan()
        if bool(empty.any()):
            # only rows of -inf: a row that is NaN for another reason stays NaN
            empty = empty & scores.amax(-1, keepdim=True).isneginf()
            weights = weights.masked_fill(empty, 0.0)
            sums = None if sums is None else sums.masked_fill(empty, NEG_INF)
    return Out(weights.to(v.dtype) @ v, None if sums is None else sums.squeeze(-1))


def tile_size(device: torch.device) -> int:
    """Scores in a tile."""
    return PER_THREAD * torch.get_num_threads() if device.type == "cpu" else ON_GPU


def wide(t: Tensor) -> Tensor:
    """float32, or float64 if it was."""
    return t if t.dtype == torch.float64 else t.float()


def run(tile: Callable[..., Out], *tensors: Tensor | None) -> Out:
    """A tile; in training it is computed again in the backward pass instead of keeping its scores."""
    if training(*tensors):
        return checkpoint(tile, *tensors, use_reentrant=False)  # type: ignore[no-any-return]
    return tile(*tensors)


def training(*tensors: Tensor | None) -> bool:
    """Will a gradient be asked for?"""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
