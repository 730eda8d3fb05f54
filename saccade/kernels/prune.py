"""prune: the best of some ranges of keys, each judged by a descent that looks at few of its keys (InfiniteHiP's stage).

A range is halved again and again. Of two halves the one whose middle key answers best goes on; the best answer on the
way is the range's score. A range of c keys is judged by 2 log2(c) of them, wherever in it they lie.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from saccade.core.errors import InputError

TILE = 1 << 22  # gathered numbers held at a time


class Place(Protocol):
    """Moves gathered keys to the positions at which a stage compares them: see `prune`."""

    def __call__(self, keys: Tensor, slots: Tensor, right: bool) -> Tensor:
        """keys [B,H,n*C,D], their slots [B,H,n,C], whether they speak for right halves -> keys [B,H,n*C,D]."""
        ...


def prune(
    rows: Tensor, k: Tensor, low: Tensor, size: int, stop: Tensor, kept: int, place: Place | None = None
) -> Tensor:
    """The `kept` best of the ranges [low, low + size), ascending, -1 where there are fewer.

    A range's score is the largest q·k of any row with any key that its descent meets. Where no more ranges are given
    than may be kept, nothing is looked at.

    Args:
        rows: rows of each query block that judge, [B,H,n,R,D].
        k: keys [B,G,M,D].
        low: first slots of the ranges, ascending, -1 where there is none: [1|B,1|H,1|n,C].
        size: slots in a range.
        stop: slots of each query block's candidates end here, [n]; ranges are cut off there.
        kept: ranges to keep.
        place: moves the keys that are looked at; None = they stand where they stand.

    Shapes:
        -> int64 [B,H,n,kept], first slots

    Raises:
        InputError: a size or a number to keep below 1.

    Example:
        >>> k = torch.tensor([0.0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 3]).view(1, 1, 12, 1)
        >>> low, stop = torch.tensor([0, 4, 8]).view(1, 1, 1, 3), torch.tensor([12])
        >>> prune(torch.ones(1, 1, 1, 1, 1), k, low, 4, stop, 2).tolist()
        [[[[0, 8]]]]
    """
    if size < 1 or kept < 1:
        raise InputError(f"prune: ranges of {size} slots, {kept} of them to keep: both must be >= 1")
    B, H, n, R, D = rows.shape
    C = low.shape[3]
    low = low.expand(B, H, n, C)
    step = max(1, TILE // (B * H * C * max(D, R)))
    ends = [(a, min(a + step, n)) for a in range(0, n, step)]
    parts = [_prune(rows[:, :, a:b], k, low[:, :, a:b], size, stop[a:b], kept, place) for a, b in ends]
    return torch.cat(parts, 2)


def _prune(rows: Tensor, k: Tensor, low: Tensor, size: int, stop: Tensor, kept: int, place: Place | None) -> Tensor:
    none = torch.iinfo(low.dtype).max
    real = (low >= 0) & (low < stop[:, None])
    if low.shape[3] > kept:
        score = _descend(rows, k, low.clamp_min(0), torch.minimum(low + size, stop[:, None]), size, place)
        best = score.masked_fill(~real, float("-inf")).topk(kept, dim=3, sorted=False).indices
        low, real = low.gather(3, best), real.gather(3, best)
    low = torch.where(real, low, none).sort(3).values
    low = low.masked_fill(low == none, -1)
    return torch.nn.functional.pad(low, (0, kept - low.shape[3]), value=-1)


def _descend(rows: Tensor, k: Tensor, low: Tensor, high: Tensor, size: int, place: Place | None) -> Tensor:
    """The best answer on each range's way down: low, high [B,H,n,C] -> [B,H,n,C]."""
    score = rows.new_full(low.shape, float("-inf"))
    for level in range(levels(size)):
        middle = (low + high) // 2
        # a half without a key loses; a single key is not looked at again, as `place` might put it elsewhere this time
        ended = high - low <= (1 if level else 0)
        left = _answer(rows, k, (low + middle) // 2, place, False).masked_fill((middle <= low) | ended, float("-inf"))
        right = _answer(rows, k, (middle + high) // 2, place, True).masked_fill(ended, float("-inf"))
        score = torch.maximum(score, torch.maximum(left, right))
        low, high = torch.where(right > left, middle, low), torch.where(right > left, high, middle)
    return score


def _answer(rows: Tensor, k: Tensor, slots: Tensor, place: Place | None, right: bool) -> Tensor:
    """The largest q·k of any judging row with the key in each slot: slots [B,H,n,C] -> [B,H,n,C]."""
    B, H, n, C = slots.shape
    slots = slots.clamp(0, k.shape[2] - 1)
    near = k.gather(2, slots.reshape(B, k.shape[1], -1, 1).expand(-1, -1, -1, k.shape[3])).view(B, H, n * C, -1)
    if place is not None:
        near = place(near, slots, right)
    return (rows @ near.view(B, H, n, C, -1).transpose(-1, -2)).amax(3)


def levels(size: int) -> int:
    """Halvings until a range of so many keys is a single key; a single key is looked at once.

    Example:
        >>> levels(1), levels(8), levels(9)
        (1, 3, 4)
    """
    return max(1, (size - 1).bit_length())
