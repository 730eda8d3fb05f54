"""Cover: the fewest entries of a row that together hold a share of its mass."""

from __future__ import annotations

import torch
from torch import Tensor


def cover(mass: Tensor, share: float, *, first: Tensor | None = None, least: int = 0) -> Tensor:
    """The largest entries of each row until their sum reaches a share of the row's sum. Nothing waits for the host.

    Args:
        mass: [.., n], not negative.
        share: 0 to 1; at 1 everything is taken, whatever was rounded.
        first: booleans that broadcast to mass: what is taken in any case, before the others; its mass counts.
        least: entries taken at least.

    Shapes:
        -> booleans [.., n]

    Example:
        >>> cover(torch.tensor([[0.1, 0.5, 0.2, 0.2]]), 0.6)
        tensor([[False,  True,  True, False]])
    """
    if share >= 1.0:
        return torch.ones_like(mass, dtype=torch.bool)
    ranks = mass if first is None else mass.masked_fill(first, float("inf"))
    order = ranks.argsort(-1, descending=True)
    sorted_mass = mass.gather(-1, order)
    before = sorted_mass.cumsum(-1) - sorted_mass
    taken = before < share * mass.sum(-1, keepdim=True)
    if least:
        taken[..., :least] = True
    found = torch.zeros_like(taken).scatter(-1, order, taken)
    return found if first is None else found | first
