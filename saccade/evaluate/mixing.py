"""Mixing: which input tokens an output token of a layer depends on, by gradients; for layers that have no pattern."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from saccade.core.errors import PlanError
from saccade.core.table import find

WIDTH, HEADS = 64, 4


def untrained(name: str, args: dict[str, Any], seed: int = 0) -> Any:
    """A layer of the table with random weights, 64 channels and 4 heads unless `args` says otherwise.

    Raises:
        PlanError: an argument that the layer does not take, or refuses.
    """
    cls = find(name)
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    for key in args:
        if key not in known:
            raise PlanError(f"{name}: unknown argument {key!r}; it takes {', '.join(known)}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(**{"width": WIDTH, "heads": HEADS, **args}).eval()
    except (TypeError, ValueError) as error:
        raise PlanError(f"{name}: {error}") from error


def mixing(layer: Any, length: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    """How much each output row depends on each input row: [length, length], each row's largest entry is 1.

    Args:
        layer: a module x [1,N,C] -> Output.
        length: N; one backward pass is made per row.
        width: C.
        seed: of the random input and directions.
    """
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, width, generator=rng).requires_grad_()
    y = layer(x).y
    # a random direction per row: the gradient's size stands for the size of that row's Jacobian
    toward = torch.randn(y.shape, generator=rng)
    rows = []
    for i in range(length):
        (slope,) = torch.autograd.grad((y[0, i] * toward[0, i]).sum(), x, retain_graph=True)
        rows.append(slope[0].norm(dim=-1))
    found = torch.stack(rows)
    return found / found.amax(-1, keepdim=True).clamp_min(1e-30)
