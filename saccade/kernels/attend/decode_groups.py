"""Attention of a few queries over several groups of a key store in one launch, whatever each head's length.

DuoAttention's retrieval heads hold 131072 tokens, its streaming heads 320. A store's groups are tensors of their own,
so the kernel is given addresses. Lengths are read on the device: a captured CUDA graph stays right while a store grows
in place within its room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call, Shape
from saccade.core.errors import InputError
from saccade.core.pattern import Full, Pattern, Window
from saccade.kernels.attend.decode_units import EVERYTHING, Form, Launch, cut_mixed
from saccade.kernels.attend.triton_decode import Given, run, tile_for
from saccade.kernels.merge import Out


@dataclass(frozen=True)
class Layout:
    """Where the keys of each kv head lie, and what its heads see: see `layout`."""

    launch: Launch
    k_at: Tensor
    v_at: Tensor
    pos_at: Tensor
    share: int
    queries: int
    kept: tuple[Tensor, ...]  # the tensors whose addresses are used


def layout(
    groups: Sequence[tuple[Sequence[int], Tensor, Tensor, Tensor | None, Pattern]], share: int, queries: int = 1
) -> Layout:
    """Several groups of a key store, made ready for `decode_groups`.

    Copies a few tables to the device, so it belongs outside a captured graph: make it again when a group's tensors are
    replaced (the store had no room left), or its policy changes. While tokens are appended in place it stays valid.

    Args:
        groups: for each group its kv heads, its tensors with all their room (as `cache.group.Group` holds them), int32
            positions [B,g,room] or None where slot = position, and what its query heads see: Full or Window of ints.
        share: query heads per kv head.
        queries: queries per call, 1 to 16.

    Shapes:
        k [B,g,room,D], v [B,g,room,Dv]; the room may differ from group to group.

    Raises:
        InputError: heads named twice or not at all, or tensors that do not go together.
    """
    heads = [h for ids, *_ in groups for h in ids]
    if sorted(heads) != list(range(len(heads))):
        raise InputError(f"layout: every kv head must be in one group, got {heads}")
    _, k0, v0, _, _ = groups[0]
    B, G, device = k0.shape[0], len(heads), k0.device
    at = torch.zeros(3, B, G, dtype=torch.int64)
    sizes: list[tuple[int, int]] = [(0, 0)] * (G * share)
    bound = [0] * G
    for ids, k, v, pos, pattern in groups:
        room = k.shape[2]
        if pos is not None and (pos.dtype != torch.int32 or pos.shape != (B, len(ids), room) or pos.stride(2) != 1):
            raise InputError(
                f"layout: positions must be int32 {[B, len(ids), room]}, got {pos.dtype} {list(pos.shape)}"
            )
        for t, like in ((k, k0), (v, v0)):
            fits = t.shape == (B, len(ids), room, like.shape[3]) and t.dtype == k0.dtype and t.device == device
            aligned = t.data_ptr() % 16 == 0 and all(t.stride(a) * t.element_size() % 16 == 0 for a in (0, 1))
            if not fits or t.stride(3) != 1 or t.stride(2) != t.shape[3] or not aligned:
                raise InputError(
                    f"layout: group {list(ids)} holds {t.dtype} {list(t.shape)} with strides {t.stride()}; all groups "
                    f"need the batch, width and dtype of the first ({k0.dtype}, {B} rows), slots side by side, and "
                    "heads that start at multiples of 16 bytes"
                )
        for i, h in enumerate(ids):
            for b in range(B):
                at[0, b, h], at[1, b, h] = k[b, i].data_ptr(), v[b, i].data_ptr()
                at[2, b, h] = 0 if pos is None else pos[b, i].data_ptr()
            if not isinstance(pattern, (Full, Window)) or isinstance(getattr(pattern, "sink", 0), Tensor):
                raise InputError(f"layout: heads see Full or a Window of ints here, got {pattern}")
            size = (0, EVERYTHING) if isinstance(pattern, Full) else (int(pattern.sink), int(pattern.recent))
            sizes[h * share : (h + 1) * share] = [size] * share
            bound[h] = room if pos is not None else min(room, sum(size) + queries)
    shape = Shape(B, G * share, G, queries, max(bound))
    form = Form(tuple(a for a, _ in sizes), tuple(b for _, b in sizes), ())
    reach = [bound[h // share] for h in range(G * share)]
    launch = cut_mixed(form, shape, device, tile_for(k0, v0.shape[3], share * queries), reach)
    at = at.to(device)
    kept = tuple(t for _, k, v, pos, _ in groups for t in (k, v, pos) if t is not None)
    return Layout(launch, at[0], at[1], at[2], share, queries, kept)


def decode_groups(q: Tensor, where: Layout, lengths: Tensor, *, scale: float | None = None, lse: bool = True) -> Out:
    """Attention of a few queries over all groups of a key store, whatever each head's length, in one launch.

    The queries are the newest of the tokens seen. Lengths are read on the device, so a captured graph goes on being
    right while the store grows in place: add one to every number in `lengths` with each token.

    Args:
        q: queries, of the keys' dtype.
        where: from `layout`.
        lengths: int32 [(G + 1) * B]: slots that each row holds for each kv head ([B,G], flattened), then tokens that
            each row has seen [B], the queries among them.
        scale: factor on q·k, None = 1/sqrt(D).
        lse: also return the log-sum-exp.

    Shapes:
        q [B,H,N,D] -> Out(o [B,H,N,Dv], lse [B,H,N] or None)

    Raises:
        InputError: q or lengths do not fit the layout.

    Example:
        With a store of one row, eight kv heads in two groups, 32 query heads::

            where = layout([(g.heads, g.k, g.v, g.pos, pattern_of(g)) for g in store.groups], share=4)
            lengths = torch.tensor([131072] * 4 + [320] * 4 + [131072], dtype=torch.int32, device="cuda")
            out = decode_groups(q, where, lengths)
    """
    B, G = where.k_at.shape
    H = G * where.share
    if q.ndim != 4 or q.shape[:3] != (B, H, where.queries) or q.dtype != where.kept[0].dtype or q.stride(3) != 1:
        raise InputError(
            f"decode_groups: q must be {where.kept[0].dtype} [{B}, {H}, {where.queries}, D] with channels side by "
            f"side, got {q.dtype} {list(q.shape)}"
        )
    if q.shape[3] != where.kept[0].shape[3]:
        raise InputError(f"decode_groups: q has width {q.shape[3]}, the keys {where.kept[0].shape[3]}")
    if lengths.dtype != torch.int32 or lengths.shape != (B * G + B,) or lengths.device != q.device:
        raise InputError(
            f"decode_groups: lengths must be int32 [{B * G + B}], got {lengths.dtype} {list(lengths.shape)}"
        )
    D, Dv = q.shape[3], where.kept[1].shape[3]
    given = Given(
        where.k_at, where.v_at, q, where.pos_at, lengths.contiguous(), (0, 0, D), (0, 0, Dv), (0, 0, 0), 0, False, True
    )
    call = Call(Shape(B, H, G, where.queries, 1), scale=scale)
    return run(where.launch, q, given, None, call, Dv, lse)
