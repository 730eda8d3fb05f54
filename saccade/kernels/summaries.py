"""Summaries of key blocks that live in a method's memory: a step reads only the keys of blocks that became whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import Call

ROOM = 16  # blocks added beyond what is needed


def summaries(k: Tensor, block: int, call: Call, name: str, summarise: Callable[[Tensor], Tensor]) -> Tensor:
    """One row for each whole block of the stored keys, kept in `call.memory` from call to call.

    A block is summarised once, when its last slot is filled, so that a row never holds keys that come after a query
    in a later block, and a step costs at most a block's keys for each token. Blocks that hold anything from this
    call's first token on are made anew: tokens that stood there before were taken back. What was taken back and
    written over by calls that this method did not see is cut off by `saccade.methods.apply`, through "slots".

    Args:
        k: stored keys; the call is contiguous.
        block: slots in a block.
        call: whose memory keeps the rows, under the name, the block and the call's heads.
        name: the method's.
        summarise: keys [B,G,n*block,D] -> rows [B,G,n,W], each from its own block alone.

    Where the store's size stands still (`call.filled`) there is a row for each block of all the room. In every step
    the row of the newest token's block is written, on the device: it is right from the step on that fills the block,
    rows behind it mean nothing.

    Shapes:
        k [B,G,M,D] -> [B,G,M//block,W]; M >= block. With `call.filled` [B,G,ceil(M/block),W].

    Example:
        >>> import torch
        >>> k, memory = torch.arange(7.0).view(1, 1, 7, 1), {}
        >>> for M in (5, 7):
        ...     call = Call.of(k[:, :, M - 1 : M], k[:, :, :M], memory=memory)
        ...     sums = summaries(k[:, :, :M], 2, call, "sum", lambda x: x.unflatten(2, (-1, 2)).sum(3))
        >>> sums.flatten().tolist()
        [1.0, 5.0, 9.0]
    """
    if call.filled is not None:
        return _standing(k, block, call, name, summarise)
    held: dict[str, Any] = call.memory.setdefault(f"{name} {block} {call.heads}", {"slots": 0})
    kept, whole = min(held["slots"], call.offset) // block, call.shape.M // block
    rows: Tensor | None = held.get("rows")
    if whole > kept or rows is None:
        new = summarise(k[:, :, kept * block : whole * block].detach())
        if rows is None or rows.shape[2] < whole:
            old, rows = rows, new.new_empty(*new.shape[:2], whole + whole // 8 + ROOM, new.shape[3])
            if old is not None:
                rows[:, :, :kept] = old[:, :, :kept]
            held["rows"] = rows
        rows[:, :, kept:whole] = new
    held["slots"] = call.shape.M
    return rows[:, :, :whole]


def standing(k: Tensor, block: int, call: Call, name: str, summarise: Callable[[Tensor], Tensor]) -> Tensor:
    """The rows where a store's size stands still, with room for all blocks: [B,G,ceil(M/block) + ROOM,W].

    At the first of such steps the blocks are summarised that are whole by then; the newest one is left to the caller.
    """
    assert call.filled is not None
    M = call.shape.M
    held: dict[str, Any] = call.memory.setdefault(f"{name} {block} {call.heads}", {"slots": 0})
    if held["slots"] < M:
        kept, whole = min(held["slots"], call.filled.at) // block, call.filled.at // block
        # at least one, from which the shape is seen
        new = summarise(k[:, :, kept * block : max(whole, kept + 1) * block].detach())
        old, rows = held.get("rows"), new.new_zeros(*new.shape[:2], -(-M // block) + ROOM, new.shape[3])
        if old is not None:
            rows[:, :, :kept] = old[:, :, :kept]
        rows[:, :, kept : kept + new.shape[2]] = new
        held["rows"], held["slots"] = rows, M
    found: Tensor = held["rows"]
    return found


def _standing(k: Tensor, block: int, call: Call, name: str, summarise: Callable[[Tensor], Tensor]) -> Tensor:
    """The same with the row of the newest token's block written anew."""
    assert call.filled is not None
    rows, M = standing(k, block, call, name, summarise), call.shape.M
    # of which position, and so which slots, is the same in all layers
    key = f"newest block {block} {M}"
    if key not in call.step:
        own = (call.filled.length - 1) // block
        call.step[key] = own, (own * block + torch.arange(block, device=k.device)).clamp(max=M - 1)
    own, slots = call.step[key]
    rows.index_copy_(2, own, summarise(k.index_select(2, slots).detach()))
    return rows[:, :, : -(-M // block)]
