"""SeerAttention: a small gate, trained on the model's own attention, picks the key blocks of each query block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Blocks, Full, Pattern
from saccade.kernels.gate import gate_keys, gate_queries, gate_scores, key_features
from saccade.kernels.topk import top_blocks
from saccade.methods.base import Selector, Weights, budget_tokens, check_budget, check_ints
from saccade.methods.gates import REMEDY, Gate, header, matrices, stamp

TILE = 1 << 22  # scores held at a time


@dataclass(frozen=True)
class Seer(Selector):
    """SeerAttention's gate in prefill (Gao et al. 2024, arXiv 2410.13276; official code microsoft/SeerAttention).

    Unrotated queries are averaged in blocks; of unrotated keys each block gives its largest and smallest values and
    its mean, which one trained matrix per query head turns into a key of the gate. Both are rotated to the place of
    their block's first token, and each query block reads the key blocks with the largest products. Decoding is dense.

    Args:
        weights: path of a gate file, from `saccade.fit.seer.fit_gate` (a relative one starts in the current folder;
            "saccade:" in front stands for the package's). The file says how many tokens a block has.
        budget: keys that a query block reads: tokens (int) or a share of the keys (float).
        tail: query blocks at the end of a call that read everything.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Blocks [B,H,ceil(N/block),K], K = ceil(budget/block), or all blocks with a tail

    Departs from the paper: the key blocks that hold a query block's own tokens are always read and count in the
        budget. The budget is a share of the keys; the paper's density r of the causal half is 1 - sqrt(1 - r) of them,
        rounded down. The gate is as wide as the head, so that queries need no matrix. The threshold on the gate's
        softmax, which makes every row's count its own, is not here.

    Raises:
        InputError: no weights, or those of another model.
        FileError: a file that is missing, cut off or no gate.
        UnsupportedError: a model whose rotary positions are not known, or a store with holes.

    Example:
        >>> from saccade.core.rope import Rope
        >>> from saccade.methods.gates import save_gate
        >>> from tempfile import TemporaryDirectory
        >>> q, k = torch.randn(1, 4, 600, 8), torch.randn(1, 2, 600, 8)
        >>> call = Call.of(q, k, rope=Rope(torch.rand(4)))
        >>> with TemporaryDirectory() as folder:
        ...     save_gate(f"{folder}/gate.safetensors", [torch.randn(4, 24, 8)], block=32)
        ...     seer = Seer(f"{folder}/gate.safetensors", budget=64, tail=0)
        ...     pattern = seer.select(q, k, call)
        >>> pattern.index.shape, pattern.index[0, 0, :2].tolist()
        (torch.Size([1, 4, 19, 2]), [[0, -1], [0, 1]])
    """

    phases = ("prefill",)
    strictly_causal = False  # a query block's mean, and the features of its own key block, hold later tokens
    chunked = "query blocks start at the chunk's first query, and keys that come later are not yet in their block"
    full_steps = True
    unbroken = True
    trained = True
    paper = "SeerAttention, NeurIPS 2025, arXiv 2410.13276"

    weights: str | None = None
    budget: int | float = 0.1
    tail: int = 2

    def __post_init__(self) -> None:
        check_budget("Seer", self.budget)
        check_ints(self, tail=0)
        if self.weights is None:
            raise InputError(f"Seer: needs trained weights, give the path of a gate file; {REMEDY}")
        if not isinstance(self.weights, str):
            raise InputError(f"Seer: weights must be a path (str), got {self.weights!r}")
        # a plan that names a bad file is refused before anything runs
        _ = self.gate

    @property
    def gate(self) -> Gate:
        """What the file says of itself."""
        assert self.weights is not None
        return header(*stamp(self.weights))

    @property
    def weights_for(self) -> Weights:
        gate = self.gate
        return Weights(gate.layers, gate.heads, gate.width)

    @property
    def block_k(self) -> int:
        """Tokens of a block, of queries as of keys."""
        return self.gate.block

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        gate, rope = self._check(q, call), call.rope
        assert rope is not None and self.weights is not None
        block, (_, _, _, N, M) = gate.block, call.shape
        nq, nk = -(-N // block), -(-M // block)
        if self.tail >= nq:
            return Full()
        # a choice has no gradient
        weight = matrices(*stamp(self.weights), call.layer, q.device)[list(call.heads)]
        asked = gate_queries(q.detach(), call.offset, block, rope)
        keys = gate_keys(key_features(k.detach(), block, rope), weight, block, rope)
        count, lines = -(-budget_tokens(self.budget, M) // block), []
        width = nk if self.tail else min(count, nk)
        step = max(1, TILE // (call.shape.B * call.shape.H * nk))
        for a in range(0, nq - self.tail, step):
            b = min(a + step, nq - self.tail)
            rows, seen = min(b * block, N), call.offset + min(b * block, N)
            part = replace(call, shape=call.shape._replace(N=rows - a * block, M=seen))
            m = -(-seen // block)
            scores = gate_scores(asked[:, :, a:b], keys[:, :, :m])
            first = torch.arange(a, b, device=q.device) * block + call.offset
            at, last = torch.arange(m, device=q.device), (first + block).clamp(max=seen) - 1
            # without its own tokens a query block could be left with blocks that start after its first row
            own = (at >= (first // block)[:, None]) & (at <= (last // block)[:, None])
            index = top_blocks(scores.masked_fill(own, float("inf")), count, block, block, part).index
            lines.append(torch.nn.functional.pad(index, (0, width - index.shape[3]), value=-1))
        if self.tail:
            at = torch.arange(nk, dtype=torch.int32, device=q.device)
            last = (torch.arange(nq - self.tail + 1, nq + 1, device=q.device) * block).clamp(max=N) + call.offset
            lines.append(torch.where(at * block < last[:, None], at, -1).expand(*q.shape[:2], -1, -1))
        return Blocks(torch.cat(lines, 2), block, block)

    def estimate(self, call: Call) -> float:
        """Products of blocks, and the matrix: three products of a head's width for each of its features."""
        B, H, _, N, M = call.shape
        gate = self.gate
        nq = -(-N // gate.block)
        if self.tail >= nq:
            return 0.0
        return float(B * H * -(-M // gate.block) * (nq - self.tail + 3 * gate.width))

    def _check(self, q: Tensor, call: Call) -> Gate:
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "Seer: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        if call.rope is None:
            raise UnsupportedError("Seer: its gate looks at unrotated keys, but how this model rotates is not known")
        gate = self.gate
        if call.layer >= gate.layers or max(call.heads) >= gate.heads or q.shape[3] != gate.width:
            raise InputError(
                f"Seer: {self.weights} is for {gate.layers} layers and {gate.heads} query heads of width {gate.width}, "
                f"this is layer {call.layer}, head {max(call.heads)}, width {q.shape[3]}: another model's; {REMEDY}"
            )
        return gate
