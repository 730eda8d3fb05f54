"""Merge partial attention results over disjoint key sets by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Out(NamedTuple):
    """A result of attention: o [B,H,N,Dv], and lse [B,H,N], the natural log of the softmax denominator, or None."""

    o: Tensor
    lse: Tensor | None = None


def merge(outs: Sequence[Out]) -> Out:
    """Softmax over a union of disjoint key sets from the results on each.

    Each result weighs exp(lse_i - lse), lse = log sum exp(lse_i). A row that saw no key (lse -inf) weighs nothing; a
    row that saw none anywhere stays 0. FlashAttention's split over keys, RetrievalAttention, HyperAttention and ring
    attention all end in this.

    Args:
        outs: results with o [B,H,N,Dv] and lse [B,H,N].

    Raises:
        ValueError: no result, or one without its lse.

    Example:
        >>> a, b = Out(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)), Out(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1))
        >>> merge([a, b]).o
        tensor([[[[0.5000, 0.5000]]]])
    """
    if not outs:
        raise ValueError("merge: give at least one result")
    if len(outs) == 1:
        return outs[0]
    parts = [out.lse for out in outs if out.lse is not None]
    if len(parts) != len(outs):
        raise ValueError("merge: every result needs its lse; call attend(..., lse=True)")
    lses = torch.stack(parts)
    # rows without keys are kept out of logsumexp, whose gradient there is NaN
    empty = lses.isneginf().all(0)
    lse = torch.logsumexp(lses.masked_fill(empty, 0.0), 0)
    weights = torch.exp(lses - lse)
    dtype = outs[0].o.dtype
    o = outs[0].o.to(lse.dtype) * weights[0, ..., None]
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        o = torch.addcmul(o, out.o.to(lse.dtype), weight[..., None])
    return Out(o.to(dtype), lse.masked_fill(empty, float("-inf")))
