"""Rope: rotate keys and queries to positions and back, for methods that move them (context extension, chunk keys)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.errors import InputError


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): pair i of a head turns by position * frequencies[i].

    A key that was stored at position p is brought to position s by `rope(rope(k, p, inverse=True), s)`. Channels
    beyond the rotated ones (partial rotary) pass through. Angles are float32 or wider whatever the tensor's dtype.

    Args:
        frequencies: [R/2] radians per position, R <= D channels are rotated.
        interleaved: pairs are neighbours (x_2i, x_2i+1) instead of halves (x_i, x_i+R/2).

    Shapes:
        t [B,h,n,D], positions [n] or anything that broadcasts to [B,h,n] -> [B,h,n,D]

    Example:
        >>> rope, t = Rope(torch.tensor([1.0])), torch.tensor([[[[1.0, 0.0]]]])
        >>> rope(t, torch.tensor([2])).flatten().tolist() == [torch.tensor(2.0).cos(), torch.tensor(2.0).sin()]
        True
        >>> torch.allclose(rope(rope(t, torch.tensor([7])), torch.tensor([7]), inverse=True), t, atol=1e-6)
        True
    """

    frequencies: Tensor
    interleaved: bool = False

    def __call__(self, t: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
        rotated = 2 * self.frequencies.shape[0]
        if t.ndim != 4 or t.shape[3] < rotated:
            raise InputError(f"rope: needs [B, h, n, D >= {rotated}], got {list(t.shape)}")
        wide = torch.float64 if t.dtype == torch.float64 else torch.float32
        angle = positions[..., None].to(t.device, wide) * self.frequencies.to(t.device, wide)
        cos, sin = angle.cos(), -angle.sin() if inverse else angle.sin()
        x, rest = t[..., :rotated], t[..., rotated:]
        if self.interleaved:
            first, second = x.unflatten(3, (-1, 2)).unbind(4)
        else:
            first, second = x.chunk(2, dim=3)
        turned = (first * cos - second * sin, second * cos + first * sin)
        y = torch.stack(turned, 4).flatten(3) if self.interleaved else torch.cat(turned, 3)
        return torch.cat((y.to(t.dtype), rest), 3) if rest.shape[3] else y.to(t.dtype)
