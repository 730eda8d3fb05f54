"""Serve one attention call of one layer: over our store, over a store in steps of fixed shape, or over bare tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.cache.fixed import Fixed
from saccade.cache.store import call_for
from saccade.core.call import Call
from saccade.core.clock import Clock, lap
from saccade.core.rope import Places, Rope
from saccade.hf.cache import StoreLayer
from saccade.methods.apply import Roles, Seen, apply, overheard, phase_of


@dataclass(frozen=True)
class Request:
    """One attention call of one layer: what transformers hands over, and what a session knows of the layer.

    Attributes:
        q: queries [B,H,N,D].
        k, v: the new tokens (our cache) or all of them (any other), [B,G,M,D] and [B,G,M,Dv].
        valid: which of all tokens are real [B,M]; None = no padding.
        x: the layer's input [B,N,width], or None.
        roles: the layer's methods, given how many tokens there are.
        fields: what every `Call` of the layer is told.
        steps: what the layers of one forward share, by the first of the rows that are read together.
        watch: given every `Seen`, or None.
        clock: told where the time goes, or None.
        positions: the model's position_ids [1|B,N], padding included, or None where they are not known.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    x: Tensor | None
    roles: Callable[[int], Roles]
    fields: dict[str, Any]
    steps: dict[int, dict[str, Any]]
    watch: Callable[[Seen], None] | None = None
    clock: Clock | None = None
    positions: Tensor | None = None

    def rope(self, rows: slice, real: Any, slot: int, step: dict[str, Any]) -> Rope | None:
        """How the layer rotates, and the positions of some rows' queries, the first of which has the slot `slot`."""
        rope, at = self.fields["rope"], self.positions
        # some models count in three dimensions
        if rope is None or at is None or at.ndim != 2:
            return rope
        if "places" not in step:
            at = at[rows] if at.shape[0] > 1 else at
            # the same in all layers, so that whoever asks waits once
            step["places"] = Places(at[:, real], slot)
        return replace(rope, places=step["places"])


def from_store(request: Request, own: StoreLayer) -> Tensor:
    """Over our cache, which takes the new tokens in: rows of equal length together, each policy's heads apart."""
    q, x, clock = request.q, request.x, request.clock
    B, H, N, _ = q.shape
    phase = phase_of(N, own.store.total)
    valid = None if request.valid is None else request.valid[:, -N:]
    whole = valid is None or bool(valid.all())
    if clock is not None:
        # taking tokens in settles too, but tells nobody what that cost
        own.store.settle(clock)
    store = own.take(request.k, request.v, valid)
    store.scale = request.fields["scale"]
    lap(clock, "copy")
    roles = request.roles(max(store.seen))
    methods = roles.prefill if phase == "prefill" else roles.decode
    share = H // request.k.shape[1]
    # parts are written into it; there is none where one call answers for all rows and heads
    out: Tensor | None = None
    asked = []
    for rows in store.row_sets():
        real = slice(None) if whole or valid is None else valid[rows.start]
        mine = q[rows][:, :, real]
        asked.append(mine)
        if mine.shape[2] == 0:
            continue
        step = request.steps.setdefault(rows.start, {})
        fields = dict(
            request.fields,
            x=None if x is None else x[rows][:, real],
            rope=request.rope(rows, real, store.seen[rows.start] - mine.shape[2], step),
            step=step,
            memory=store.memory_of(rows),
        )
        for view in store.views(rows):
            heads = tuple(h * share + i for h in view.heads for i in range(share))
            all_heads = len(heads) == H
            q_part = mine if all_heads else mine[:, list(heads)]
            call = call_for(q_part, view, store.seen[rows.start], heads, **fields)
            o = apply(q_part, view.k, view.v, call, methods, view.policy, request.watch, view.bias, clock, phase)
            if phase == "prefill":
                overheard(q_part, view.k, call, roles.decode)
                lap(clock, "select")
            if all_heads and whole and rows.stop - rows.start == B:
                out = o
            else:
                out = _zeros(request) if out is None else out
                where = torch.arange(N, device=q.device)[real]
                out[rows][:, torch.tensor(heads, device=q.device)[:, None], where] = o
                lap(clock, "attend")
    store.asked(asked, phase == "prefill", clock)
    return _zeros(request) if out is None else out


def from_fixed(request: Request, fixed: Fixed) -> Tensor:
    """One token in a captured step: nothing here may wait for the device or look at its numbers."""
    q, clock = request.q, request.clock
    fixed.append(request.k, request.v)
    lap(clock, "copy")
    fixed.asked = q
    share = q.shape[1] // request.k.shape[1]
    methods = request.roles(fixed.seen).decode
    fields = dict(request.fields, x=request.x, step=request.steps.setdefault(0, {}), memory=fixed.memory)
    packed, outs = q.unflatten(1, (-1, share)), []
    for stretch, ids in zip(fixed.stretches, fixed.ids, strict=True):
        heads = tuple(h * share + i for h in stretch.heads for i in range(share))
        mine = q if len(fixed.ids) == 1 else packed.index_select(1, ids).flatten(1, 2)
        where = dict(q_pos=fixed.q_pos, k_pos=stretch.pos, filled=fixed.filled(stretch))
        call = Call.of(mine, stretch.k, heads=heads, **where, **fields)
        o = apply(mine, stretch.k, stretch.v, call, methods, stretch.policy, request.watch, stretch.bias, clock)
        outs.append(o.unflatten(1, (-1, share)))
    if len(outs) == 1:
        return outs[0].flatten(1, 2)
    return torch.cat(outs, 1).index_select(1, fixed.order).flatten(1, 2)


def from_tensors(request: Request, length: int, memory: dict[Any, Any]) -> Tensor:
    """Over all tokens, from a cache that is not ours or from none: rows with padding go one by one, without it.

    Args:
        request: its k and v may have room behind the tokens, as a static cache has.
        length: tokens that are held.
        memory: the methods' memory of this layer, by row where rows go one by one.
    """
    q, k, v, x, clock = request.q, request.k[:, :, :length], request.v[:, :, :length], request.x, request.clock
    B, _, N, _ = q.shape
    phase, roles = phase_of(N, length - N), request.roles(length)
    methods = roles.prefill if phase == "prefill" else roles.decode

    def answer(
        rows: slice, real: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None, memory: dict[Any, Any]
    ) -> Tensor:
        step = request.steps.setdefault(rows.start, {})
        fields = dict(request.fields, rope=request.rope(rows, real, k.shape[2] - q.shape[2], step))
        call = Call.of(q, k, x=x, step=step, memory=memory, **fields)
        if phase == "prefill":
            overheard(q, k, call, roles.decode)
            lap(clock, "select")
        return apply(q, k, v, call, methods, watch=request.watch, clock=clock)

    valid = None if request.valid is None else request.valid[:, :length]
    # rows that began with padding go on one by one, also when it is gone: each has its own memory
    if (valid is None or bool(valid.all())) and not any(isinstance(key, int) for key in memory):
        return answer(slice(0, B), slice(None), q, k, v, x, memory)
    out = _zeros(request)
    valid = torch.ones(B, length, dtype=torch.bool, device=q.device) if valid is None else valid
    for row in range(B):
        keys, real = valid[row], valid[row, length - N :]
        if bool(real.any()):
            one = slice(row, row + 1)
            part = [t[one][:, :, keys] for t in (k, v)]
            lap(clock, "copy")
            here = None if x is None else x[one][:, real]
            out[one][:, :, real] = answer(one, real, q[one][:, :, real], *part, here, memory.setdefault(row, {}))
    return out


def _zeros(request: Request) -> Tensor:
    """An answer [B,H,N,Dv] that is 0 wherever nobody writes: at padding."""
    return request.q.new_zeros((*request.q.shape[:3], request.v.shape[3]))
