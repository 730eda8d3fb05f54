"""Call: one attention call, typed. What a method may know besides q, k and v."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core.errors import InputError
from saccade.core.rope import Rope


class Shape(NamedTuple):
    """The sizes of one call: batch rows, query heads, kv heads, queries, stored keys."""

    B: int
    H: int
    G: int
    N: int
    M: int


class Filled(NamedTuple):
    """How full a store is whose size stands still, in a step that may be captured: slot = position, up to `length`.

    Args:
        length: tokens stored, those of this call included: int64 [1] on the device. The call's M is all the room, and
            what lies between holds nothing yet.
        least: no step's `length` is smaller, from the start of these steps to their end.
        at: position of this call's token as the host counts it. A captured step is replayed at other positions, so
            it may decide only what a method's "turn" says of the position (see `saccade.cache.fixed`).
    """

    length: Tensor
    least: int
    at: int


@dataclass(frozen=True)
class Call:
    """Everything about one attention call that is not q, k or v.

    Positions are None in the common case: slot j of the key store holds token j, and the N queries are the last N of
    the M keys. They are given when the store has holes (an evicting cache) or rows are padded; position -1 marks a
    slot or a query that is not real, and such a query's output is 0.

    Args:
        shape: sizes of this call (`Call.of` reads them from q and k).
        layer: index of the layer in the model, from 0.
        heads: global ids of the query heads in this call; left out = all of them, in order.
        scale: factor on q·k, None = 1/sqrt(D).
        causal: a query sees keys at its own position and before.
        q_pos: [1|B, N] integer positions of the queries, or None.
        k_pos: [1|B, 1|G, M] integer positions of the stored keys, or None.
        x: the layer's input [B, N, C], or None outside a model.
        rope: how this layer's queries and keys were rotated to their positions, or None where that is not known.
        memory: this layer's state from call to call; lives as long as the cache. Tensors in it are batch-first.
        step: state shared by all layers of one forward; a new dict in each forward.
        rng: generator for methods that draw; None = torch's default.
        filled: how full a store is whose size stands still (positions are given, too); None = M tokens are stored.

    Example:
        >>> q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 5, 8)
        >>> Call.of(q, k).positions()[0]
        tensor([[3, 4]])
    """

    shape: Shape
    layer: int = 0
    heads: tuple[int, ...] = ()
    scale: float | None = None
    causal: bool = True
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    x: Tensor | None = None
    rope: Rope | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    rng: torch.Generator | None = None
    filled: Filled | None = None

    def __post_init__(self) -> None:
        if not self.heads:
            object.__setattr__(self, "heads", tuple(range(self.shape.H)))

    @classmethod
    def of(cls, q: Tensor, k: Tensor, **fields: Any) -> Call:
        """The call that attends q [B,H,N,D] to k [B,G,M,D]; other fields by name."""
        if q.ndim != 4 or k.ndim != 4:
            raise InputError(f"Call: q and k must be [batch, heads, length, width], got {_s(q)} and {_s(k)}")
        return cls(Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]), **fields)

    @property
    def contiguous(self) -> bool:
        """True when slot = position and nothing is padded, so that a range of slots is a range of positions."""
        return self.q_pos is None and self.k_pos is None

    @property
    def offset(self) -> int:
        """Position of the first query in a contiguous call."""
        return self.shape.M - self.shape.N

    def positions(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Positions of queries [1|B, N] and keys [1|B, 1|G, M] as tensors, whatever was given."""
        q_pos, k_pos = self.q_pos, self.k_pos
        if k_pos is None:
            k_pos = torch.arange(self.shape.M, device=device)[None, None]
        if q_pos is None:
            q_pos = torch.arange(self.offset, self.shape.M, device=device)[None]
        return q_pos, k_pos

    def softmax_scale(self, width: int) -> float:
        """The factor on q·k for heads of this width."""
        return 1.0 / math.sqrt(width) if self.scale is None else self.scale

    def sees(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """May a query at q_pos see a key at k_pos (tensors that broadcast)? Causality and realness, nothing else."""
        real = (k_pos >= 0) & (q_pos >= 0)
        return real & (k_pos <= q_pos) if self.causal else real

    def take(self, heads: tuple[int, ...], kv_heads: tuple[int, ...] | None = None, *, kv: int | None = None) -> Call:
        """The same call for some of its query heads (local ids); kv_heads are the kv heads that stay (local ids)."""
        ids = tuple(self.heads[h] for h in heads)
        k_pos = self.k_pos
        if k_pos is not None and kv_heads is not None and k_pos.shape[1] > 1:
            k_pos = k_pos[:, list(kv_heads)]
        G = kv if kv is not None else (self.shape.G if kv_heads is None else len(kv_heads))
        return replace(self, heads=ids, k_pos=k_pos, shape=self.shape._replace(H=len(heads), G=G))

    def check(self, q: Tensor, k: Tensor, v: Tensor, *, name: str = "attend") -> None:
        """Raise InputError unless q, k, v and this call fit together."""
        if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
            raise InputError(f"{name}: q, k, v must be [batch, heads, length, width], got {_s(q)}, {_s(k)}, {_s(v)}")
        if q.dtype != k.dtype or k.dtype != v.dtype:
            raise InputError(f"{name}: q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast one")
        if not q.dtype.is_floating_point:
            raise InputError(f"{name}: q, k, v must be floating point, got {q.dtype}")
        if q.device != k.device or k.device != v.device:
            raise InputError(f"{name}: q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
        if q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0]:
            raise InputError(f"{name}: batch sizes differ: q {_s(q)}, k {_s(k)}, v {_s(v)}")
        if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
            raise InputError(f"{name}: k and v must have the same heads and length, got {_s(k)} and {_s(v)}")
        if q.shape[3] != k.shape[3]:
            raise InputError(f"{name}: q and k must have the same width, got {_s(q)} and {_s(k)}")
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise InputError(f"{name}: {q.shape[1]} query heads cannot share {k.shape[1]} key heads; use a multiple")
        if 0 in q.shape or 0 in k.shape or 0 in v.shape:
            raise InputError(f"{name}: empty sequence or axis: q {_s(q)}, k {_s(k)}, v {_s(v)}")
        want = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
        if self.shape != want:
            raise InputError(f"{name}: the call is for {self.shape}, the tensors are {want}; use Call.of(q, k)")
        if self.q_pos is None and want.N > want.M:
            raise InputError(f"{name}: {want.N} queries but {want.M} keys; give call.q_pos and call.k_pos")
        if (self.q_pos is None) != (self.k_pos is None):
            raise InputError(f"{name}: give both q_pos and k_pos, or neither")
        if self.q_pos is not None and self.k_pos is not None:
            B, _, G, N, M = want
            if self.q_pos.shape not in {(1, N), (B, N)}:
                raise InputError(f"{name}: q_pos must be [1|{B}, {N}], got {_s(self.q_pos)}")
            if self.k_pos.ndim != 3 or self.k_pos.shape[2] != M or self.k_pos.shape[0] not in {1, B}:
                raise InputError(f"{name}: k_pos must be [1|{B}, 1|{G}, {M}], got {_s(self.k_pos)}")
            if self.k_pos.shape[1] not in {1, G}:
                raise InputError(f"{name}: k_pos must be [1|{B}, 1|{G}, {M}], got {_s(self.k_pos)}")


def kv_heads(heads: Sequence[int], share: int) -> tuple[int, ...]:
    """The key heads of some query heads: whole groups stay packed, else each query head takes its own.

    Example:
        >>> kv_heads((2, 3), share=2), kv_heads((0, 3), share=2)
        ((1,), (0, 1))
    """
    groups = tuple(dict.fromkeys(h // share for h in heads))
    if list(heads) == [g * share + i for g in groups for i in range(share)]:
        return groups
    return tuple(h // share for h in heads)


def _s(t: Tensor) -> list[int]:
    return list(t.shape)
