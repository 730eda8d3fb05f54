"""TidalDecode: pick tokens in two layers, reuse them in all the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Full, Pattern, Tokens, per_head
from saccade.kernels.topk import top_tokens
from saccade.methods.base import Selector, budget_now, budget_tokens, check_budget


@dataclass(frozen=True)
class TidalDecode(Selector):
    """Position-persistent sparse attention for decoding (Yang et al. 2024, arXiv 2410.05076,
    github.com/DerrickYLJ/TidalDecode).

    Layers before `first` attend to everything. Layers `first` and `correct` also attend to everything, and remember the
    tokens with the largest scores, for each query head; the layers after them read only those. The pick lives for one
    forward. While the store holds no more than the budget, every layer is dense.

    Args:
        budget: tokens that a query reads in a sparse layer: a number (int) or a share of the stored tokens (float).
        first: the first layer that picks.
        correct: the layer that picks again; at or beyond the number of layers it never does.
        keep_newest: a query's own token is always one of the budget, as in the paper's CUDA path; False leaves it to
            its score, as in the paper's Hugging Face path.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Full, or Tokens [B,H,N,K], K = min(budget, M)

    Departs from the paper: several queries at once (speculative decoding) each have their own pick. The KV-cache
    correction is left out. Needs: this method, for the same heads, in all layers from `first` on, in order.

    Example:
        >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 0.0]).view(1, 1, 6, 1)
        >>> method, call = TidalDecode(budget=3, first=0), Call.of(q, k)
        >>> method.select(q, k, call)
        Full()
        >>> method.select(q, k, Call.of(q, k, layer=1, step=call.step)).index.tolist()
        [[[[4, 2, 5]]]]
    """

    phases = ("decode",)
    whole_store = True
    paper = "TidalDecode, ICLR 2025, arXiv 2410.05076"

    budget: int | float = 256
    first: int = 2
    correct: int = 13
    keep_newest: bool = True

    def __post_init__(self) -> None:
        check_budget("TidalDecode", self.budget)
        for name, least in (("first", 0), ("correct", self.first)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"TidalDecode: {name} must be a layer >= {least}, got {value!r}")

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        length = call.shape.M
        budget = budget_tokens(self.budget, length)
        if call.layer < self.first or length <= budget:
            return Full()
        picks: dict[tuple[int, ...], tuple[int, Tokens]] = call.step.setdefault("tidal", {})
        if call.layer in (self.first, self.correct):
            picks[call.heads] = call.layer, self._pick(q, k, budget, call)
            return Full()
        source = self.source(call.layer)
        layer, pick = picks.get(call.heads, (None, None))
        if pick is None or layer != source:
            seen = "none was made" if layer is None else f"the newest is layer {layer}'s"
            raise InputError(
                f"TidalDecode: layer {call.layer} reads what layer {source} picked for heads {list(call.heads)}, but "
                f"{seen} in this forward; put tidal in every layer from {self.first} on for the same heads, and run "
                "layers in order"
            )
        if pick.index.device != q.device:
            # a model spread over devices: the layers behind this one find it here
            pick = Tokens(pick.index.to(q.device))
            picks[call.heads] = source, pick
        return pick

    def source(self, layer: int) -> int | None:
        if layer <= self.first or layer == self.correct:
            return None
        return self.correct if layer > self.correct else self.first

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        dense = budget_tokens(self.budget, M) == M
        return 0.0 if dense or call.layer not in (self.first, self.correct) else float(B * H * N * M)

    def _pick(self, q: Tensor, k: Tensor, budget: int, call: Call) -> Tokens:
        """The largest keys of each query; its own takes the smallest one's place if it is not among them."""
        index = top_tokens(q, k, budget, call).index
        rank = torch.arange(budget, device=q.device)
        last: int | Tensor = budget - 1
        if call.filled is not None and isinstance(self.budget, float):
            # a share of what is stored now, which only the device knows, not of all the room
            last = budget_now(self.budget, call.filled.length) - 1
            index = index.masked_fill(rank > last, -1)
        if self.keep_newest:
            own = self._own(call, q).int().expand(*index.shape[:3])[..., None]
            found = (index == own).any(-1, keepdim=True)
            index = torch.where((rank == last) & ~found, own, index)
        return Tokens(index)

    @staticmethod
    def _own(call: Call, q: Tensor) -> Tensor:
        """The slots of the queries' own tokens [1|B,1|H,N]."""
        if call.filled is not None:
            return (call.filled.length - 1)[None, None]
        q_pos, k_pos = call.positions(q.device)
        return (per_head(k_pos, call)[:, :, None, :] == q_pos[:, None, :, None]).int().argmax(-1)
