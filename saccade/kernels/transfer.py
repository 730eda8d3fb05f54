"""Transfer: numbers that tell blocks of keys and values apart, and the way of blocks from host memory to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCRATCH = 1 << 19  # integers held at a time while sums are formed
MIX = 0x9E3779B1


def words(rows: Tensor) -> Tensor:
    """rows [n,m] as integers [n,w], the widest that fit; no copy where rows are contiguous and aligned.

    Example:
        >>> words(torch.zeros(2, 6)).shape, words(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype
        (torch.Size([2, 3]), torch.int16)
    """
    size = rows.shape[1] * rows.element_size()
    dtype = next(t for t in (torch.int64, torch.int32, torch.int16, torch.int8) if size % t.itemsize == 0)
    rows = rows.contiguous()
    if rows.storage_offset() * rows.element_size() % dtype.itemsize:
        # they begin within a word
        rows = rows.clone()
    return rows.view(dtype)


def weights(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Odd weights that differ from place to place: numbers that changed places give another sum.

    Example:
        >>> (weights(1000) % 2 == 1).all().item(), len(weights(1000).unique())
        (True, 1000)
    """
    return (torch.arange(count, device=device) * MIX & 0x7FFFFFFF) * 2 + 1


def sums(rows: Tensor, by: Tensor | None = None) -> Tensor:
    """One number for each of rows [n,...]: int64 [n], 0 for zeros.

    A changed bit, two numbers or rows that changed places, or other rows, give another number; it is no defence
    against one who wants to deceive.

    Args:
        rows: of any type.
        by: `weights` of as many words as a row has, to save making them.

    Example:
        >>> a = torch.randn(1, 4, 2)
        >>> bool(sums(a) == sums(a.flip(1)))
        False
    """
    ints = words(rows.flatten(1))
    by = weights(ints.shape[1], rows.device) if by is None or len(by) != ints.shape[1] else by
    parts = ints.split(max(1, SCRATCH // max(1, ints.shape[1])))
    out = [(part.long() * by).sum(1) for part in parts]
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.long, device=rows.device)


def marks(rows: Tensor, by: Tensor | None = None) -> Tensor:
    """As `sums`, folded to int32 [n]: for single tokens, of which there are many."""
    wide = sums(rows, by)
    return ((wide ^ (wide >> 32)) & 0xFFFFFFFF).sub_(1 << 31).int()


def kernel() -> Any:
    """The GPU's own way, or None where Triton is not installed."""
    try:
        from saccade.kernels import transfer_triton
    except ImportError:
        return None
    return transfer_triton
