"""RetrievalAttention: the ends of the context are read, and of all between what a vector index finds for the query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.cache.far import Far, everything, far_of, seen_by
from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Full, Pattern, Tokens, Union, Window
from saccade.kernels.attend import attend
from saccade.kernels.merge import Out, merge
from saccade.kernels.search import Indices, check_kind
from saccade.methods.apply import phase_of
from saccade.methods.base import Selector, check_ints

PIECE = 1 << 14  # far keys that an exact search holds at a time
NONE = float("-inf")
NEED = ("graph", "faiss-nsg")  # kinds that are drawn by queries
LEARN = (*NEED, "lists")  # kinds that learn from them
QUEUES = (*NEED, "faiss-hnsw")  # kinds with a queue
PROBES = ("lists", "faiss-ivf")  # kinds with clusters


@dataclass(frozen=True)
class RetrievalAttention(Selector):
    """Decoding by vector search over the keys (Liu et al. 2024, arXiv 2409.10516; the official repository,
    github.com/microsoft/RetrievalAttention, holds its successor).

    A query reads the first `sink` and the newest `near` tokens, and the keys between them that have the largest
    products with it, by an index over the keys of its key head. Beside `offload` (phase "cache", same heads) those
    keys lie in host memory and only what is found comes near; the two results are merged by log-sum-exp. Alone, it
    indexes the keys of the store. The index is built in a thread from the first step on, "graph" and "lists" from what
    the prompt asked. For tokens that are newer than it the search is exact; until it is there it is exact in the store,
    and far keys are all read, which costs less than to search them all.

    Args:
        budget: keys that a query reads, sink and near included. Beside `offload` the store's are read instead of
            those two, so that it may be `offload`'s slack more.
        sink: tokens from the start that are always read.
        near: newest tokens that are always read.
        kind: of the index: "graph" (learns from queries), "lists" (small clusters: the one that is built for a million
            keys in seconds), "flat" (exact), or faiss's "faiss-flat", "faiss-ivf",
            "faiss-hnsw", "faiss-nsg".
        queue: keys that a graph's search keeps in sight; more find more and scan more.
        probes: clusters whose keys a query scans, for "lists" and "faiss-ivf"; None = as the index has it.
        learn: queries of a prompt that are kept for the graph, for each head.
        refresh: tokens beyond the index at which it is built anew.
        wait: the first step waits for the index, so that each run gives the same numbers.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Full, or the union of a Window and Tokens [B,H,N,budget - sink - near]

    Raises:
        InputError: arguments that cannot be; an unknown kind (names the nearest).
        UnsupportedError: faiss is not installed; a store with holes that `offload` did not make.

    Departs from the paper: keys and values that are found are attended on the device of the queries; each query head
    searches by itself in the index of its key head. A prompt is read densely, by whatever the plan names for it.

    Example:
        >>> k = torch.zeros(1, 1, 9, 2)
        >>> k[0, 0, 3] = 1.0
        >>> method = RetrievalAttention(budget=4, sink=1, near=2, kind="flat")
        >>> q = torch.ones(1, 1, 1, 2)
        >>> method.select(q, k, Call.of(q, k)).parts[1].index.tolist()
        [[[[3]]]]
    """

    phases = ("decode",)
    reads_far = True
    unbroken = True
    paper = "RetrievalAttention, 2024, arXiv 2409.10516"

    budget: int = 740
    sink: int = 128
    near: int = 512
    kind: str = "graph"
    queue: int = 128
    probes: int | None = None
    learn: int = 2048
    refresh: int = 4096
    wait: bool = False

    def __post_init__(self) -> None:
        check_ints(self, budget=1, sink=0, near=1, queue=1, learn=1, refresh=1)
        if self.probes is not None:
            check_ints(self, probes=1)
            if self.kind not in PROBES:
                raise InputError(
                    f"RetrievalAttention: kind {self.kind!r} has no clusters to probe; leave probes out, or take "
                    f"one of {', '.join(PROBES)}"
                )
        if self.budget <= self.sink + self.near:
            raise InputError(
                f"RetrievalAttention: a budget of {self.budget} leaves nothing to retrieve beside sink {self.sink} and "
                f"near {self.near}; raise it"
            )
        check_kind(self.kind)

    def prompt(self, q: Tensor, k: Tensor, call: Call) -> None:
        """Keep some of the prompt's queries, evenly spaced, in host memory, where the index is built."""
        if self.kind not in LEARN:
            return
        held = self._held(call)
        old = held.get("queries")
        mine = q.detach()[:, :, _even(q.shape[2], self.learn)].to("cpu")
        both = mine if old is None else torch.cat((old.to(mine), mine), 2)
        held["queries"] = both[:, :, _even(both.shape[2], self.learn)]

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        M = call.shape.M
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "RetrievalAttention: needs causal attention and a store without holes or padding, or `offload`"
            )
        if self.budget >= M:
            self._note(call, 0.0)
            return Full()
        held = self._held(call)
        for name in ("index", "next"):
            # tokens under an index may have been taken back; where they were, others stand now
            if held.get(name) is not None and self.sink + held[name].covers > held["slots"]:
                held[name] = None
        end = call.offset - self.near  # below this, no query of the call has a token in its window
        made = self._index(held, end - self.sink, lambda n: k[:, :, self.sink : self.sink + n], len(k))
        held["slots"] = M
        last = torch.arange(call.offset, M, device=q.device) - self.near
        ids, scanned = self._search(q, made, call, last, k)
        self._note(call, scanned)
        return Union((Window(self.sink, self.near), Tokens(ids)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Out:
        far = far_of(call)
        if far is None:
            return super().attend(q, k, v, call)
        close = attend(q, k, v, None, call)
        count = self.budget - self.sink - self.near
        if phase_of(call.shape.N, call.shape.M) == "prefill" or count >= far.tier.tokens:
            self._note(call, float(q.shape[1] * q.shape[2] * (call.shape.M + far.tier.tokens)))
            return merge([close, everything(q, far, call)])
        made = self._far_index(q, far, call)
        if made is None and self.kind != "flat":
            self._note(call, float(q.shape[0] * q.shape[1] * q.shape[2] * (call.shape.M + far.tier.tokens)))
            return merge([close, everything(q, far, call)])
        ids, scanned = self._search_far(q, made, far, call)
        self._note(call, scanned + float(q.shape[0] * q.shape[1] * q.shape[2] * (call.shape.M + count)), scanned)
        return merge([close, _attend_own(q, ids, far, call)])

    def estimate(self, call: Call) -> float:
        return float(call.step.get(self._name(call), (0.0, 0.0))[0])

    def scored(self, call: Call) -> float:
        return float(call.step.get(self._name(call), (0.0, 0.0))[1])

    def _search(self, q: Tensor, made: Indices | None, call: Call, last: Tensor, k: Tensor) -> tuple[Tensor, float]:
        """The best slots between sink and window for each query, and what it took."""
        B, H, G, N, M = call.shape
        count, start = self.budget - self.sink - self.near, self.sink
        found: list[Tensor] = []
        scanned = 0.0
        if made is not None:
            ids, scanned = made.search(q, count)
            found.append(torch.where(ids >= 0, ids + self.sink, -1))
            start += made.covers
        high = M - self.near
        if high > start:
            slots = torch.arange(start, high, device=q.device)
            scores = _products(q, k[:, :, start:high]).masked_fill(slots > last[:, None], NONE)
            best = scores.topk(min(count, high - start), -1)
            found.append(torch.where(best.values.isneginf(), -1, best.indices + start))
            scanned += float(B * H * N * (high - start))
        ids = torch.cat(found, -1) if found else torch.full((B, H, N, 1), -1, device=q.device)
        ids = ids.masked_fill(ids > last[:, None], -1)
        if len(found) > 1:
            # of the store only what was found is read: a copy of its keys for each query head would be most of a step
            batch = torch.arange(B, device=q.device)[:, None, None, None]
            head = (torch.arange(H, device=q.device) // (H // G))[:, None, None]
            mine = k[batch, head, ids.clamp_min(0)]
            ids = _best(ids, (mine * q[:, :, :, None]).sum(-1), count)
        return ids.int(), scanned

    def _far_index(self, q: Tensor, far: Far, call: Call) -> Indices | None:
        """The index of far keys, if it is ready. Blocks are written once and then only read: the thread reads them."""
        kv, tier = far.key_heads(call), far.tier
        return self._index(self._held(call), tier.tokens, lambda n: partial(tier.keys, 0, n, kv), len(q))

    def _search_far(self, q: Tensor, made: Indices | None, far: Far, call: Call) -> tuple[Tensor, float]:
        """The best far tokens for each query, in host memory, and what it took."""
        B, H, _, N, _ = call.shape
        count, kv, tier = self.budget - self.sink - self.near, far.key_heads(call), far.tier
        asked = q.detach().to("cpu")
        best = torch.full((B, H, N, 0), -1)
        scores = torch.zeros(B, H, N, 0, dtype=torch.promote_types(q.dtype, torch.float32))
        start, scanned = 0, 0.0
        if made is not None:
            best, scanned = made.search(asked, count)
            start = made.covers
            if start < tier.tokens:
                mine = tier.rows(best.flatten(2).unflatten(1, (len(kv), -1)).flatten(2), kv)[0]
                mine = mine.reshape(B, H, N, count, -1).to(scores.dtype)
                scores = (mine * asked[:, :, :, None]).sum(-1).masked_fill(best < 0, NONE)
        for a in range(start, tier.tokens, PIECE):
            b = min(a + PIECE, tier.tokens)
            more = _products(asked, tier.keys(a, b, kv))
            ids = torch.arange(a, b).expand(B, H, N, -1)
            best, scores = torch.cat((best, ids), -1), torch.cat((scores, more), -1)
            top = scores.topk(min(count, scores.shape[-1]), -1)
            best, scores = best.gather(-1, top.indices), top.values
        return best, scanned + float(B * H * N * (tier.tokens - start))

    def _index(
        self, held: dict[str, Any], length: int, keys: Callable[[int], Tensor | Callable[[], Tensor]], rows: int
    ) -> Indices | None:
        """The index if it is ready; one is begun where there is none, or where it has grown old."""
        learns, queries = self.kind in LEARN, held.get("queries")
        made, coming = held.get("index"), held.get("next")
        if self.kind == "flat" or length < 1 or (self.kind in NEED and queries is None):
            return None
        covered = 0 if made is None else made.covers
        if coming is None and (made is None or length - covered >= self.refresh):
            known = {"queue": self.queue if self.kind in QUEUES else None, "probes": self.probes}
            arguments = {name: value for name, value in known.items() if value is not None}
            coming = Indices(self.kind, keys(length), queries if learns else None, arguments, length, rows)
        if coming is not None and self.wait:
            coming.wait()
        if coming is not None and coming.ready():
            made, coming = coming, None
        held["index"], held["next"] = made, coming
        return made

    def _held(self, call: Call) -> dict[str, Any]:
        held: dict[str, Any] = call.memory.setdefault(self._name(call), {"slots": 0})
        return held

    def _name(self, call: Call) -> str:
        return f"retrieval {call.heads}"

    def _note(self, call: Call, pairs: float, scored: float = 0.0) -> None:
        call.step[self._name(call)] = (pairs, scored)


def _even(length: int, count: int) -> Tensor:
    """At most `count` places in a sequence, evenly spaced, the last among them."""
    return torch.linspace(0, length - 1, min(count, length)).round().long()


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q [B,H,N,D] times k [B,G,m,D] -> [B,H,N,m], in float32 or wider."""
    B, H, N, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q.to(wide).reshape(B, k.shape[1], -1, D) @ k.to(wide).transpose(-1, -2)).view(B, H, N, -1)


def _best(ids: Tensor, scores: Tensor, count: int) -> Tensor:
    scores = scores.masked_fill(ids < 0, NONE)
    top = scores.topk(min(count, ids.shape[-1]), -1)
    return ids.gather(-1, top.indices).masked_fill(top.values.isneginf(), -1)


def _attend_own(q: Tensor, ids: Tensor, far: Far, call: Call) -> Out:
    """Attention of each query to far tokens of its own, ids [B,H,N,K]: softmax over exact products."""
    B, H, _, N, _ = call.shape
    kv = far.key_heads(call)
    k, v = far.tier.rows(ids.reshape(B, len(kv), -1), kv, q.device)
    k, v = (t.reshape(B, H, N, ids.shape[3], -1) for t in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (k.to(wide) @ q.to(wide)[..., None]).squeeze(-1) * call.softmax_scale(q.shape[3])
    scores = scores.masked_fill(ids.to(q.device) < 0, NONE)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return seen_by(Out((weights[..., None, :] @ v.to(wide)).squeeze(-2).to(q.dtype), lse), call)
