"""Rope: rotate keys and queries to positions and back, for methods that move them (context extension, chunk keys)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saccade.core.errors import InputError


class Places:
    """The positions that one forward's queries were rotated to, which a model may count otherwise than from slot 0.

    A text may start at another position than 0, and each row of a batch at its own, as long as a token is one further
    than the token before it. Nobody waits for the device to see that, unless a method asks where slot 0 is.

    Args:
        at: positions of the queries, [1|B,N].
        slot: of the first of them in the store.

    Example:
        >>> Places(torch.tensor([[1005, 1006]]), slot=5).start.tolist()
        [[[1000]]]
    """

    def __init__(self, at: Tensor, slot: int) -> None:
        self.at, self.slot = at, slot

    @cached_property
    def start(self) -> Tensor:
        """The position of slot 0, [1|B,1,1].

        Raises:
            InputError: positions that do not follow one another.
        """
        at = self.at
        if at.shape[1] > 1 and not bool((at.diff() == 1).all()):
            raise InputError(
                f"rope: a method looks at keys as they were before their rotation, for which each token's position "
                f"must be one more than that of the token before it; the {at.shape[1]} position_ids of this call from "
                f"{int(at[0, 0])} on are not; leave them out, or detach() the plan for such calls"
            )
        return (at[:, :1] - self.slot)[:, None]


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): pair i of a head turns by position * frequencies[i].

    A key that was stored at position p is brought to position s by `rope(rope(k, p, inverse=True), s)`. Channels
    beyond the rotated ones (partial rotary) pass through. Angles are float32 or wider whatever the tensor's dtype.
    A method knows slots; to move by a difference of slots is all the same, but `free` must know where slot 0 was.

    Args:
        frequencies: [R/2] radians per position, R <= D channels are rotated.
        interleaved: pairs are neighbours (x_2i, x_2i+1) instead of halves (x_i, x_i+R/2).
        places: the positions of the call's queries; None = their slots.

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
    places: Places | None = None

    def free(self, t: Tensor, slots: Tensor) -> Tensor:
        """Queries or keys as they were before they were rotated to their positions: t [B,h,n,D], slots [n].

        Raises:
            InputError: positions that do not follow one another.
        """
        at = slots if self.places is None else slots + self.places.start.to(slots.device)
        return self(t, at, inverse=True)

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
