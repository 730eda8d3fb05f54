"""Attention inside gathered groups: what clustering methods need, where a query may be in no group or in many."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Groups, per_head


def attend_groups(q: Tensor, k: Tensor, v: Tensor, groups: Groups, call: Call | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention inside each group, then the mean over the groups of a query.

    Queries of group c attend the keys of group c, as far as positions allow: causality compares the gathered absolute
    positions, so the indices may come in any order. A group in which a query sees no key says nothing about it and is
    left out of the mean; a query in no group gets 0. Not a softmax over the union of the groups, hence no lse.
    Gradients flow to q, k and v.

    Args:
        q: queries.
        k: keys.
        v: values; their width may differ from the keys'.
        groups: rows and slots of each group, distinct within a group; -1 = empty.
        call: positions, scale, causality; None = causal, the queries are the last N of the M keys.

    Shapes:
        q [B,H,N,D], k [B,G,M,D], v [B,G,M,Dv], groups.q_index [B,H,C,W], groups.k_index [B,H,C,W2]
        -> (o [B,H,N,Dv], count [B,H,N] of the groups in each mean)

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or an index outside of the rows or slots (looked at on
            a CPU only).

    Example:
        >>> q = torch.randn(1, 1, 4, 8)
        >>> index = torch.tensor([[[[0, 1], [1, 3]]]])
        >>> attend_groups(q, q, q, Groups(index, index))[1]
        tensor([[[1, 2, 0, 1]]])
    """
    call = Call.of(q, k) if call is None else call
    call.check(q, k, v, name="attend_groups")
    q_index, k_index = groups.q_index.long(), groups.k_index.long()
    _check(q_index, k_index, call)
    B, H, _, N, _ = call.shape
    kv_head = torch.arange(H, device=q.device) // (H // call.shape.G)
    q_head = torch.arange(H, device=q.device)

    q_pos, k_pos = call.positions(q.device)
    q_at = _gather(q_pos[:, None].expand(B, 1, -1), q_index, q_head * 0).masked_fill(q_index < 0, -1)
    k_pos = per_head(k_pos, call).expand(B, H, -1)
    k_at = _gather(k_pos, k_index, q_head).masked_fill(k_index < 0, -1)
    seen = call.sees(q_at[..., :, None], k_at[..., None, :])

    near_q = _gather(q, q_index, q_head) * call.softmax_scale(q.shape[3])
    scores = near_q @ _gather(k, k_index, kv_head).transpose(-1, -2)
    some = seen.any(-1)
    # a row that sees nothing would be 0 / 0; it attends evenly here and is dropped below
    scores = scores.masked_fill(~(seen | ~some[..., None]), float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    o = (weights @ _gather(v, k_index, kv_head)) * some[..., None]

    row = (torch.arange(B * H, device=q.device).view(B, H, 1, 1) * N + q_index.clamp_min(0)).flatten()
    count = some.new_zeros(B * H * N, dtype=torch.long).index_add(0, row, some.flatten().long()).view(B, H, N)
    total = o.new_zeros(B * H * N, v.shape[3]).index_add(0, row, o.flatten(0, 3)).view(B, H, N, -1)
    return total / count.clamp_min(1)[..., None].to(o.dtype), count


def _gather(t: Tensor, index: Tensor, head: Tensor) -> Tensor:
    """Rows of t [B,h,M,...] at index [B,H,C,W], for head i of H from head[i] of h; an empty index gives row 0."""
    B, h, M = t.shape[:3]
    start = (torch.arange(B, device=t.device)[:, None] * h + head)[:, :, None, None] * M
    flat = (start + index.clamp_min(0)).flatten()
    return t.reshape(B * h * M, *t.shape[3:]).index_select(0, flat).view(*index.shape, *t.shape[3:])


def _check(q_index: Tensor, k_index: Tensor, call: Call) -> None:
    """Raise InputError unless the groups fit the call."""
    B, H, _, N, M = call.shape
    if q_index.ndim != 4 or k_index.ndim != 4 or q_index.shape[:3] != k_index.shape[:3]:
        raise InputError(
            f"attend_groups: indices must be [B, H, groups, members] and share all but the last axis, "
            f"got {list(q_index.shape)} and {list(k_index.shape)}"
        )
    if q_index.shape[:2] != (B, H):
        raise InputError(f"attend_groups: indices must start with [{B}, {H}], got {list(q_index.shape)}")
    if 0 in q_index.shape or 0 in k_index.shape:
        raise InputError(f"attend_groups: empty groups: {list(q_index.shape)} and {list(k_index.shape)}")
    for name, index, size in (("q_index", q_index, N), ("k_index", k_index, M)):
        if index.device.type == "cpu" and not (index.min() >= -1 and index.max() < size):
            raise InputError(
                f"attend_groups: {name} must be in [-1, {size}), got {index.min().item()} to {index.max().item()}"
            )
