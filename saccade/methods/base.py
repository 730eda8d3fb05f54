"""The ladder: what a method is. Implement the lowest rung that your method allows.

Attention.attend                 gives the answer itself             rung 0
  Selector.select -> Pattern     says where to look                  rung 1, attend is inherited
    Scorer.score -> block scores says how much each block matters    rung 2, the choice is inherited
CachePolicy.keep -> slots        says what survives in the cache
Layer.forward -> Output          has its own weights
Editor.edit -> weights           changes the attention weights, and pays for the dense map

Methods without weights are frozen dataclasses of hyperparameters: the dataclass is the config, `asdict` is the plan
entry. State lives in `call.memory` (this layer, as long as the cache) and `call.step` (all layers of one forward).
Tokens may be taken back and written over while a method does not look: a dict in the memory whose "slots" says how many
of the first slots it describes is cut by `saccade.methods.apply` to what still stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from saccade.cache.group import Fold
from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Full, Pattern, per_head
from saccade.kernels.attend import attend
from saccade.kernels.merge import Out
from saccade.kernels.topk import top_blocks


class Output(NamedTuple):
    """What a Layer returns: the result, the state that lets it go on, and its own loss (0-d tensor or None)."""

    y: Tensor
    state: Any = None
    loss: Tensor | None = None


class Weights(NamedTuple):
    """The model that trained weights are for: its layers, query heads, and the width of a head."""

    layers: int
    heads: int
    width: int


class Method:
    """What every method says of itself; the contract and `saccade list` read it.

    Class attributes:
        phases: where it may stand in a plan: "prefill", "decode", "cache" (methods), "layer" (own weights).
        strictly_causal: outputs never depend on later tokens. False where the choice of indices looks at them.
        exact: equal to dense attention at full budget.
        chunked: "exact" when chunked prefill gives the numbers of one shot, else why not, in words.
        grouped: query heads that share a key head choose together, so that copies of the keys would choose apart.
        separate: a head looks where it would look if it were alone in the call; False where heads choose together. An
            instance may say so by its arguments.
        full_steps: now and then a query reads everything, beside others of its call that keep to the budget.
        whole_store: needs every token of every layer in the store (no eviction beside it).
        unbroken: cannot read a store with holes. Where a policy drops tokens of its heads it may not decode, and later
            prompts are read without it: dense over what the policy keeps (`saccade.methods.apply.reads`).
        reads_far: reads what a policy has moved out of the store, too (see `CachePolicy.away`).
        both: needs to see every query of its heads: a plan names it for both phases, or for prefill beside a policy.
        trained: needs trained weights.
        weights_for: the model that an instance's trained weights are for; None = any.
        paper: short reference.
    """

    phases: ClassVar[tuple[str, ...]] = ()
    strictly_causal: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    chunked: ClassVar[str] = "exact"
    grouped: ClassVar[bool] = False
    separate: bool = True
    full_steps: ClassVar[bool] = False
    whole_store: ClassVar[bool] = False
    unbroken: ClassVar[bool] = False
    reads_far: ClassVar[bool] = False
    both: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    weights_for: Weights | None = None
    paper: ClassVar[str] = ""


class Attention(Method):
    """Rung 0: gives the answer itself."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Out:
        """q [B,H,N,D], k [B,G,M,D], v [B,G,M,Dv] -> Out(o [B,H,N,Dv], lse [B,H,N] or None)."""
        raise NotImplementedError(f"{type(self).__name__} must implement attend")

    def estimate(self, call: Call) -> float:
        """What it costs beside its pattern, in (query, key) pairs scored; added to the density that is reported.

        For a selector that is the selection. A method without a pattern counts all it does; 0 = it does not say.
        """
        return 0.0

    def scored(self, call: Call) -> float:
        """Of a method without a pattern: the part of `estimate` that is scored only to choose, whose values stay."""
        return 0.0

    def source(self, layer: int) -> int | None:
        """The layer whose choice this layer reads, which then must have the same method for the same heads; or None."""
        return None

    def ready(self, call: Call) -> bool:
        """Has it seen what it needs of earlier tokens? If not, the policy of these heads, if any, serves the prompt."""
        return True

    def prompt(self, q: Tensor, k: Tensor, call: Call) -> None:
        """Called with a prompt's queries and keys after its attention, where this method is to decode: to learn."""


class Selector(Attention):
    """Rung 1: says where to look."""

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        """q [B,H,N,D], k [B,G,M,D] -> the pattern that attention then follows."""
        raise NotImplementedError(f"{type(self).__name__} must implement select")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Out:
        call.check(q, k, v, name=type(self).__name__)
        return attend(q, k, v, self.select(q, k, call), call)


@dataclass(frozen=True)
class Scorer(Selector):
    """Rung 2: scores blocks; the top blocks within the budget are chosen here.

    Args:
        budget: keys that a query block reads: a number of tokens, or a share of the keys when below 1.0.
        block_q: rows in a query block.
        block_k: slots in a key block.
    """

    budget: int | float = 0.1
    block_q: int = 64
    block_k: int = 64

    def __post_init__(self) -> None:
        check_budget(type(self).__name__, self.budget)
        check_ints(self, block_q=1, block_k=1)

    def score(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """[B, H, ceil(N/block_q), ceil(M/block_k)]; +inf forces a block in, -inf keeps it out."""
        raise NotImplementedError(f"{type(self).__name__} must implement score")

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        tokens = budget_tokens(self.budget, call.shape.M)
        return top_blocks(self.score(q, k, call), -(-tokens // self.block_k), self.block_q, self.block_k, call)


class CachePolicy(Method):
    """Says what survives in the cache. Called after attention, with the queries that were just answered.

    Class attributes:
        lossless: what leaves the store lies elsewhere and can be read; heads that no method serves stay dense.
    """

    phases: ClassVar[tuple[str, ...]] = ("cache",)
    lossless: ClassVar[bool] = False

    def keep(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
        """Slots that stay [B|1, G|1, K], ascending, or None for all. call.k_pos holds what is stored."""
        raise NotImplementedError(f"{type(self).__name__} must implement keep")

    def fold(self, k: Tensor, v: Tensor, bias: Tensor | None, slots: Tensor, call: Call) -> Fold | None:
        """A kept slot that stands for the dropped ones (their mean, with log n added to its logit), or None.

        k [B,g,M,D], v [B,g,M,Dv] and bias [B,g,M] are all slots, `slots` [B|1,g|1,K] those that stay.
        """
        return None

    def scored(self, call: Call) -> float:
        """Pairs that `keep` scores after a call; added to the density that is reported."""
        return 0.0

    def pattern(self, call: Call) -> Pattern:
        """What queries of these heads see of what is stored, where the plan names no other method for them."""
        return Full()

    def away(self, call: Call) -> bool:
        """Do tokens of this call lie outside of the store? Then methods must read them (`reads_far`)."""
        return False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Out:
        """The answer for heads that no method serves, asked for only while tokens are `away`."""
        raise NotImplementedError(f"{type(self).__name__} must implement attend, or leave nothing away")

    def estimate(self, call: Call) -> float:
        """Pairs that `attend` scores."""
        return 0.0

    def claim(self, seen: int) -> int:
        """The most slots per head held after `seen` tokens; a test compares it with the bytes in memory."""
        return seen


class Editor(Method):
    """Changes attention weights. It needs the dense map, N x M per head, and that is what it costs."""

    def edit(self, probs: Tensor, call: Call) -> Tensor:
        """probs [B,H,N,M] -> weights of the same shape."""
        raise NotImplementedError(f"{type(self).__name__} must implement edit")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Out:
        """Dense attention with edited weights. There is no lse: edited weights are no softmax."""
        call.check(q, k, v, name=type(self).__name__)
        B, H, G, N, M = call.shape
        scores = (q * call.softmax_scale(q.shape[3])).reshape(B, G, -1, q.shape[3]) @ k.transpose(-1, -2)
        q_pos, k_pos = call.positions(q.device)
        seen = call.sees(q_pos[:, None, :, None], per_head(k_pos, call)[:, :, None, :])
        probs = torch.softmax(scores.view(B, H, N, M).masked_fill(~seen, float("-inf")).float(), -1)
        probs = self.edit(probs.masked_fill(~seen, 0.0), call).to(v.dtype)
        return Out((probs.view(B, G, -1, M) @ v).view(B, H, N, -1))


class Layer(nn.Module, Method):
    """A module with its own weights that mixes tokens: x [B,N,C] -> Output(y [B,N,C], state, loss).

    `state=None` starts a sequence; passing the returned state on continues it, and any split of a sequence gives the
    same numbers as one call. A loss is returned, never stored on the module.
    """

    phases: ClassVar[tuple[str, ...]] = ("layer",)
    trained: ClassVar[bool] = True

    def forward(self, x: Tensor, state: Any = None) -> Output:
        raise NotImplementedError(f"{type(self).__name__} must implement forward(x, state)")


def check_budget(name: str, budget: int | float) -> None:
    """Budgets are tokens (int >= 1) or a share of the keys (0 < float <= 1)."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise InputError(f"{name}: budget must be tokens (int) or a share (float), got {budget!r}")
    if isinstance(budget, int) and budget < 1:
        raise InputError(f"{name}: a budget in tokens must be >= 1, got {budget}")
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise InputError(f"{name}: a budget as a share must be in (0, 1], got {budget}; tokens are an int")


def check_ints(method: Any, **least: int) -> None:
    """Hyperparameters, by name, that are integers no smaller than given: `check_ints(self, sink=0, recent=1)`."""
    for name, low in least.items():
        value = getattr(method, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(f"{type(method).__name__}: {name} must be an int >= {low}, got {value!r}")


def check_sizes(name: str, **sizes: Any) -> None:
    """Sizes of a layer that are whole numbers of at least 1: `check_sizes("Layer", width=width, heads=heads)`."""
    for label, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: {label} must be an int >= 1, got {value!r}")


def budget_tokens(budget: int | float, length: int) -> int:
    """A budget in tokens, at least 1 and at most the length."""
    return max(1, min(length, round(budget * length) if isinstance(budget, float) else budget))


def budget_now(budget: float, length: Tensor) -> Tensor:
    """`budget_tokens` of a share, for a length that only the device knows: the same numbers, int64.

    Example:
        >>> budget_now(0.1, torch.tensor([45, 5, 4])).tolist(), [budget_tokens(0.1, n) for n in (45, 5, 4)]
        ([4, 1, 1], [4, 1, 1])
    """
    return (length.double() * budget).round().long().clamp(min=1)
