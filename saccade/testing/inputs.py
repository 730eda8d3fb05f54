"""Inputs of the contract: small instances of every method, made-up sequences, and a stack of layers to feed them to."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.cache.store import Store, call_for
from saccade.core.pattern import Pattern
from saccade.core.rope import Rope
from saccade.core.table import find
from saccade.methods.apply import Seen, apply, overheard, phase_of
from saccade.methods.base import Attention, CachePolicy, Layer, Method

LAYERS = 4  # enough for a method that picks in two layers and reads in those after them
WIDTH = 32  # channels of the instances that are layers
STEP = 12  # tokens of a decoding call: fewer than 17, more than one

# every method under hyperparameters so small that it leaves things out at 200 tokens, and so odd that edges show
_INSTANCES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "oracle": ("oracle", {"budget": 48, "block_q": 16, "block_k": 16}),
    "oracle-share": ("oracle", {"budget": 0.2, "block_q": 32, "block_k": 8}),
    "above": (
        "above",
        {"inner": {"method": "pooled", "args": {"budget": 48, "block_q": 16, "block_k": 16}}, "length": 90},
    ),
    "random": ("random", {"budget": 48, "block_q": 16, "block_k": 16, "seed": 3}),
    "random-wide": ("random", {"budget": 0.3, "block_q": 8, "block_k": 32}),
    "pooled": ("pooled", {"budget": 48, "block_q": 16, "block_k": 16}),
    "pooled-share": ("pooled", {"budget": 0.3, "block_q": 32, "block_k": 8}),
    "streaming": ("streaming", {"sink": 3, "recent": 9}),
    "streaming-no_sink": ("streaming", {"sink": 0, "recent": 17}),
    "trishape": ("trishape", {"sink": 3, "recent": 9, "last": 20}),
    "minference": ("minference", {"columns": 40, "diagonals": 110, "last": 16, "block": 16}),
    "hyper": ("hyper", {"block": 7, "samples": 5, "bits": 3, "exact_below": 24, "seed": 2}),
    "hyper-blocks_only": ("hyper", {"block": 16, "samples": 0, "bits": 5, "exact_below": 40}),
    "s2": ("s2", {"block": 12, "local": 2, "stride": 3}),
    "s2-shared": ("s2", {"block": 8, "local": 3, "stride": 4, "step": 2, "share": 2}),
    "xattention": ("xattention", {"threshold": 0.6, "stride": 4, "block": 12, "most": 0.5}),
    "flexprefill": ("flexprefill", {"gamma": 0.5, "tau": 0.25, "least": 20, "block": 12, "most": 0.5}),
    "hip": (
        "hip",
        {"budget": 60, "sink": 3, "window": 10, "block_q": 16, "block_k": 4, "stride": 3, "refresh": 3, "first": 1},
    ),
    "infinitehip": (
        "infinitehip",
        {
            **{"budget": 62, "sink": 6, "window": 10, "chunks": [16, 8, 4], "keep": [96, 64], "strides": [4, 2, 1]},
            **{"refresh": [6, 3, 2], "block_q": 16, "first": 1},
        },
    ),
    "hipextend": (
        "hipextend",
        {
            **{
                "trained": 90,
                "keys": 80,
                "sink": 6,
                "window": 10,
                "chunks": [16, 4],
                "keep": [64],
                "strides": [4, 2],
            },
            **{"refresh": [6, 3], "block_q": 16, "indexed": 1},
        },
    ),
    "longheads": ("longheads", {"keys": 40, "chunk": 8, "begin": 24, "block_q": 12}),
    "tidal": ("tidal", {"budget": 24, "first": 0, "correct": 2}),
    "tidal-free": ("tidal", {"budget": 24, "first": 1, "correct": 9, "keep_newest": False}),
    "quest": ("quest", {"budget": 42, "block_k": 7, "first": 1}),
    "quest-together": ("quest", {"budget": 24, "block_k": 16, "first": 0, "together": True}),
    "recycled": ("recycled", {"budget": 24, "stride": 3, "kernel": 3, "together": False}),
    "recycled-trigger": ("recycled", {"budget": 17, "stride": 2, "threshold": 0.9}),
    "actqkv": ("actqkv", {"budget": 84, "window": 16, "block_k": 8, "sink": 5, "near": 9, "together": False}),
    "actqkv-together": ("actqkv", {"budget": 84, "window": 16, "block_k": 8, "sink": 5, "near": 9, "adapt": 0.5}),
    "retrieval": ("retrieval", {"budget": 45, "sink": 3, "near": 12, "queue": 200, "learn": 60, "wait": True}),
    "retrieval-flat": ("retrieval", {"budget": 30, "sink": 0, "near": 9, "kind": "flat"}),
    "fetch": ("fetch", {"blocks": 2}),
    "offload": ("offload", {"sink": 3, "recent": 11, "block": 7, "cache": 40_000}),
    "offload-no_sink": ("offload", {"sink": 0, "recent": 17, "block": 16, "cache": 1 << 20}),
    "duo": ("duo", {"sink": 4, "recent": 13}),
    "duo-no_sink": ("duo", {"sink": 0, "recent": 24}),
    "h2o": ("h2o", {"heavy": 9, "recent": 7}),
    "snapkv": ("snapkv", {"capacity": 40, "window": 6, "kernel": 3, "slack": 5}),
    "razor": ("razor", {"sink": 3, "least": 11, "ratio": 20, "slack": 4}),
    "razor-no_mean": ("razor", {"sink": 0, "least": 19, "ratio": 30, "slack": 0, "compensate": False}),
    "moa": ("moa", {"span": 33, "sink": 5, "least": 20, "block": 8}),
    "routing": ("routing", {"width": WIDTH, "heads": 4, "clusters": 4, "window": 16, "recent": 8}),
    "routing-only": ("routing", {"width": WIDTH, "heads": 2, "clusters": 3, "window": 40, "local_heads": 0}),
    "hard": ("hard", {"budget": 21}),
    "hard-signs": ("hard", {"budget": 9, "candidates": 40}),
    "seer": ("seer", {"weights": lambda: _gate_file(), "budget": 60}),
    "seer-no_tail": ("seer", {"weights": lambda: _gate_file(), "budget": 0.2, "tail": 0}),
    "lightning": ("lightning", {"width": WIDTH, "heads": 4, "layer": 1, "layers": 3}),
    "lightning-three": ("lightning", {"width": WIDTH, "heads": 3, "head_dim": 8}),
}


def instances() -> dict[str, Method]:
    """Every method of the table, small, by a name that starts with the method's own.

    Example:
        >>> instances()["streaming"]
        Streaming(sink=3, recent=9)
    """
    return {name: _build(method, args) for name, (method, args) in _INSTANCES.items()}


def _build(name: str, args: dict[str, Any]) -> Method:
    cls = find(name)
    args = {key: value() if callable(value) else value for key, value in args.items()}
    if not issubclass(cls, Layer):
        return cls(**args)  # type: ignore[no-any-return]
    # a layer draws weights: always the same, and nobody else's draws are disturbed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(**args).double().eval()


@cache
def _gate_file() -> str:
    """A gate of random weights for a stack of LAYERS layers with up to 8 heads of width 16; blocks of 12."""
    from saccade.methods.gates import save_gate

    folder = tempfile.mkdtemp(prefix="saccade-gate-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng = torch.Generator().manual_seed(0)
    path = os.path.join(folder, "gate.safetensors")
    save_gate(path, [torch.randn((8, 48, 16), generator=rng) for _ in range(LAYERS)], block=12)
    return path


def rope_for(width: int) -> Rope:
    """The rotation that made-up keys are taken to have.

    Example:
        >>> rope_for(8).frequencies.shape
        torch.Size([4])
    """
    return Rope(100.0 ** -torch.linspace(0, 1, width // 2, dtype=torch.float64))


class Stream(NamedTuple):
    """A made-up sequence, as each layer of a stack sees it.

    Shapes: q [L,B,H,N,D], k [L,B,G,N,D], v [L,B,G,N,Dv], x [B,N,C].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor

    @property
    def length(self) -> int:
        """Tokens."""
        return self.q.shape[3]

    def part(self, a: int, b: int) -> Stream:
        """Tokens a to b."""
        return Stream(*(t[..., a:b, :] for t in self))

    def row(self, rows: Sequence[int]) -> Stream:
        """Some rows of the batch."""
        at = list(rows)
        return Stream(*(t[:, at] for t in self[:3]), self.x[at])

    def changed(self, start: int, *names: str) -> Stream:
        """The same, but tokens from `start` on are others, in the tensors named."""
        new = {}
        for name in names:
            t = getattr(self, name).clone()
            t[..., start:, :] = -1.5 * t[..., start:, :].flip(-1) + 0.5
            new[name] = t
        return self._replace(**new)

    def repeated(self) -> Stream:
        """Key heads repeated until every query head has its own."""
        share = self.q.shape[2] // self.k.shape[2]
        return self._replace(k=self.k.repeat_interleave(share, 2), v=self.v.repeat_interleave(share, 2))


def stream(
    N: int = 200,
    B: int = 1,
    H: int = 4,
    G: int = 2,
    D: int = 16,
    Dv: int | None = None,
    layers: int = LAYERS,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Stream:
    """Random tensors; keys and queries share a slow drift, so that attention is neither flat nor all on one key.

    Example:
        >>> stream(5, G=1).k.shape
        torch.Size([4, 1, 1, 5, 16])
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    q, k = draw(layers, B, H, N, D), draw(layers, B, G, N, D)
    drift = draw(layers, B, 1, 1, D) * torch.linspace(-1, 1, N, dtype=dtype)[:, None]
    return Stream(q + drift, k + drift, draw(layers, B, G, N, D if Dv is None else Dv), draw(B, N, WIDTH))


class Look(NamedTuple):
    """One attention call of a Feed: what was asked and where it looked, what came out, and in which phase."""

    seen: Seen
    o: Tensor
    phase: str

    @property
    def pattern(self) -> Pattern:
        """Where it looked; only for methods that say so."""
        assert self.seen.pattern is not None
        return self.seen.pattern


class Feed:
    """A method at work on a stack of layers that is fed in pieces: what `attach` does with a model, without one.

    Attention methods answer in their own phases and leave the rest dense; a cache policy evicts; a Layer carries its
    state.

    Args:
        method: the method.
        kv_heads: key heads of the stack.
        heads: the heads that have the method (query heads; key heads for a policy), None = all.
        layers: layers of the stack (a Layer is one of its own).
        rng: given to every call.

    Example:
        >>> sequence = stream(20)
        >>> feed = Feed(instances()["streaming"])
        >>> feed(sequence.part(0, 18)).shape, feed(sequence.part(18, 20)).shape
        (torch.Size([1, 4, 4, 18, 16]), torch.Size([1, 4, 4, 2, 16]))
    """

    def __init__(
        self,
        method: Method,
        kv_heads: int = 2,
        heads: tuple[int, ...] | None = None,
        layers: int = LAYERS,
        rng: torch.Generator | None = None,
    ) -> None:
        self.method, self.heads, self.rng = method, heads, rng
        policies = [(range(kv_heads) if heads is None else heads, method)] if isinstance(method, CachePolicy) else []
        self.stores = [Store(policies, kv_heads) for _ in range(layers)]
        self.looks: list[Look] = []
        self.state: Any = None

    def __call__(self, piece: Stream, valid: Tensor | None = None) -> Tensor:
        """Outputs of the next tokens: [B,L,H,n,Dv], of a Layer [B,n,C]. valid [B,n] is False where a row is padded."""
        if isinstance(self.method, Layer):
            y, self.state, _ = self.method(piece.x, self.state)
            return y
        steps: dict[int, dict[str, Any]] = {}
        return torch.stack([self._layer(at, piece, valid, steps) for at in range(len(self.stores))], 1)

    def crop(self, count: int) -> None:
        """Forget the last tokens."""
        for store in self.stores:
            store.crop(count)

    def select(self, rows: Sequence[int]) -> None:
        """These rows of the batch become the batch."""
        for store in self.stores:
            store.select(torch.tensor(list(rows)))

    def _layer(self, at: int, piece: Stream, valid: Tensor | None, steps: dict[int, dict[str, Any]]) -> Tensor:
        store, q, k, v = self.stores[at], piece.q[at], piece.k[at], piece.v[at]
        phase = phase_of(q.shape[2], store.total)
        methods = [(self.heads, self.method)] if isinstance(self.method, Attention) else []
        later = methods if phase == "prefill" and "decode" in self.method.phases else []
        methods = methods if phase in self.method.phases else []
        store.append(k, v, valid)
        out, asked, share = q.new_zeros((*q.shape[:3], v.shape[3])), [], q.shape[1] // k.shape[1]
        for rows in store.row_sets():
            real = torch.ones(q.shape[2], dtype=torch.bool) if valid is None else valid[rows.start]
            asked.append(q[rows] if valid is None else q[rows][:, :, real])
            if not real.any():
                continue
            rope = rope_for(q.shape[3])
            fields = dict(
                layer=at, rope=rope, step=steps.setdefault(rows.start, {}), memory=store.memory_of(rows), rng=self.rng
            )
            for view in store.views(rows):
                heads = [h * share + i for h in view.heads for i in range(share)]
                mine = asked[-1] if len(heads) == q.shape[1] else asked[-1][:, heads]
                call = call_for(mine, view, store.seen[rows.start], tuple(heads), x=piece.x[rows][:, real], **fields)
                found: list[Seen] = []
                given = (methods, view.policy, found.append, view.bias, None, phase)
                o = apply(mine, view.k, view.v, call, *given)
                overheard(mine, view.k, call, later)
                # the store writes over its keys and positions
                k_pos = None if call.k_pos is None else call.k_pos.clone()
                bias = None if view.bias is None else view.bias.clone()
                kept = dict(call=replace(call, k_pos=k_pos), k=view.k.clone(), v=view.v.clone(), bias=bias)
                self.looks += [Look(replace(seen, **kept), o, phase) for seen in found]
                for i, h in enumerate(heads):
                    out[rows, h, real.nonzero().flatten()] = o[:, i]
        store.asked(asked, now=phase == "prefill")
        return out


def usual_pieces(method: Method, N: int) -> list[int]:
    """How a sequence of N tokens is cut so that the method works in all its phases.

    Example:
        >>> usual_pieces(instances()["minference"], 200), usual_pieces(instances()["tidal"], 200)
        ([200], [188, 12])
    """
    if N == 1 or not {"decode", "cache"} & set(method.phases):
        return [N]
    last = min(STEP, N // 2)
    return [N - last, last]


def run(
    method: Method,
    sequence: Stream,
    pieces: Sequence[int] | None = None,
    valid: Tensor | None = None,
    heads: tuple[int, ...] | None = None,
    rng: torch.Generator | None = None,
    watch: Callable[[Look], None] | None = None,
) -> Tensor:
    """Outputs of a whole sequence, fed in pieces (default: `usual_pieces`); tokens are the last axis but one.

    Example:
        >>> run(instances()["dense"], stream(30)).shape
        torch.Size([1, 4, 4, 30, 16])
    """
    pieces = usual_pieces(method, sequence.length) if pieces is None else pieces
    feed = Feed(method, sequence.k.shape[2], heads, len(sequence.q), rng)
    outs = []
    for a, b in pairwise((0, *accumulate(pieces))):
        outs.append(feed(sequence.part(a, b), None if valid is None else valid[:, a:b]))
    for look in feed.looks if watch is not None else []:
        watch(look)  # type: ignore[misc]
    return torch.cat(outs, -2)


def looks(method: Method, sequence: Stream, pieces: Sequence[int] | None = None) -> list[Look]:
    """Every attention call of a run.

    Example:
        >>> looks(instances()["streaming"], stream(30))[0].pattern
        Window(sink=3, recent=9)
    """
    found: list[Look] = []
    run(method, sequence, pieces, watch=found.append)
    return found
