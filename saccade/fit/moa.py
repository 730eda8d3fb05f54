"""Find MoA's rules: what the loss loses without each block of attention, and the spans that cost least of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from saccade.core.errors import InputError
from saccade.core.plan import Assign, ModelShape, Plan

NAME = "saccade_influence"
BLOCK = 64
ROUNDS = 200  # of prices, in `choose`
PACES = (2, 10, 50)  # after so many rounds a price's step is a third smaller


class Rule(NamedTuple):
    """A head's span at N tokens is alpha + beta * N."""

    alpha: int
    beta: float

    def share(self, length: int) -> float:
        """The span as a share of all keys."""
        return min(1.0, max(0.0, self.alpha / length + self.beta))


def influence(weights: Tensor, gradient: Tensor) -> Tensor:
    """How much the loss would grow without each weight, to first order, when the row is made to sum to 1 again.

    E_ij = -A_ij (G_ij - sum_n G_in A_in) / (1 - A_ij). A row of one weight has nothing to share it out to: -G A.

    Shapes:
        weights A and gradient G [.., N, N] -> [.., N, N]
    """
    mean = (gradient * weights).sum(-1, keepdim=True)
    left = 1.0 - weights
    alone = left < 1e-6
    return torch.where(alone, -gradient * weights, -weights * (gradient - mean) / left.masked_fill(alone, 1.0))


def profile(
    model: Any,
    samples: Iterable[tuple[Tensor, Tensor]],
    *,
    block: int = BLOCK,
    progress: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Influence of every block of every query head, summed without sign and averaged over samples.

    Args:
        model: a causal language model of transformers; left as it was.
        samples: (ids [N], supervised [N] bool) of one length; supervised marks the tokens whose loss counts, which
            should depend on the far past (answers, best those of the dense model itself).
        block: side of a block.
        progress: called after each sample with (number, loss).

    Shapes:
        -> [layers, heads, ceil(N/block), ceil(N/block)]
    """
    kept: dict[int, Tensor] = {}

    def function(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        share, N = q.shape[1] // k.shape[1], q.shape[2]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scores = (q @ k.transpose(-1, -2)) * (q.shape[3] ** -0.5 if scaling is None else scaling)
        future = torch.ones(N, N, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).float().softmax(-1)
        weights.retain_grad()
        kept[module.layer_idx] = weights
        return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, function)
    before, training = model.config._attn_implementation, model.training
    total: Tensor | None = None
    count = 0
    try:
        model.set_attn_implementation(NAME)
        model.eval()
        device = next(model.parameters()).device
        for ids, supervised in samples:
            kept.clear()
            # gradients flow to the weights of attention through the embedding alone: no parameter needs one
            x = model.get_input_embeddings()(ids[None].to(device)).detach().requires_grad_()
            logits = model(inputs_embeds=x, use_cache=False).logits[0, :-1].float()
            wanted = supervised[1:].to(device)
            if not wanted.any():
                raise InputError(f"profile: sample {count} supervises no token after the first")
            loss = torch.nn.functional.cross_entropy(logits[wanted], ids[1:].to(device)[wanted])
            loss.backward()
            found = []
            for layer in sorted(kept):
                weights = kept[layer]
                assert weights.grad is not None
                found.append(_pool(influence(weights.detach(), weights.grad)[0].abs(), block))
            stacked = torch.stack(found).cpu()
            if total is not None and stacked.shape != total.shape:
                raise InputError(f"profile: samples differ in length: {list(stacked.shape)} after {list(total.shape)}")
            total = stacked if total is None else total + stacked
            count += 1
            if progress is not None:
                progress(count, float(loss.detach()))
            model.zero_grad(set_to_none=True)
    finally:
        model.set_attn_implementation(before)
        model.train(training)
        kept.clear()
    if total is None:
        raise InputError("profile: there are no samples")
    return total / count


def lost(blocks: Tensor, rule: Rule, length: int, block: int = BLOCK) -> Tensor:
    """Influence outside a rule's mask (the first block and a band of blocks): [.., n, n] -> [..]."""
    n = blocks.shape[-1]
    wide = max(1, int(rule.alpha // block + rule.beta * length / block))
    i = torch.arange(n)
    covered = (i[:, None] - i < wide) | (i == 0)
    return (blocks * ~covered).sum((-1, -2))


def rules_for(lengths: Sequence[int], *, step: int = 1024, betas: int = 9) -> list[Rule]:
    """All rules of the paper's grid that give a positive span at the shortest and no more than all at the longest."""
    low, high = min(lengths), max(lengths)
    found = []
    for alpha in range(-low, high + 1, step):
        for i in range(betas):
            rule = Rule(alpha, i / (betas - 1))
            if rule.alpha + rule.beta * low > 0 and rule.alpha + rule.beta * high <= high:
                found.append(rule)
    return found


def choose(
    profiles: Mapping[int, Tensor], rules: Sequence[Rule], *, density: float = 0.5, lengths: Sequence[int] = ()
) -> list[list[Rule]]:
    """One rule per layer and key head: least influence lost while the mean span stays within the density.

    Args:
        profiles: length -> influence [layers, key heads, n, n].
        rules: to choose from.
        density: the mean of all heads' spans, as a share, is no larger at any length.
        lengths: lengths beyond the profiled ones at which the density counts too.

    Departs from the paper: it solves a 0/1 program with several objectives; here a share of the keys has a price at
        each length, every head takes the rule that is best at these prices, and prices rise where the density is
        exceeded and fall where there is room. A layer may have any number of rules.

    Raises:
        InputError: a density that is no share, or no rule is cheap enough.
    """
    if not 0.0 < density <= 1.0:
        raise InputError(f"choose: density must be in (0, 1], got {density}")
    held = sorted({*profiles, *lengths})
    # a length's loss counts as a share of what the cheapest rule loses there: lengths are alike
    losses = torch.zeros(len(rules), *next(iter(profiles.values())).shape[:2], dtype=torch.float64)
    for length, blocks in profiles.items():
        at = torch.stack([lost(blocks.double(), rule, length) for rule in rules])
        losses += at / at.sum((1, 2)).max().clamp_min(1e-30)
    cost = torch.tensor([[rule.share(length) for length in held] for rule in rules], dtype=torch.float64)
    flat, at = losses.flatten(1), torch.arange(losses[0].numel())
    # of rules that lose as little, the longer one: what a head needs at lengths without a profile is not known
    flat = flat - 1e-6 * cost.mean(1, keepdim=True) * flat.amax(0)
    best: tuple[float, Tensor] | None = None

    def excess(prices: Tensor) -> Tensor:
        """What each length has too much at these prices, as a share; the best choice that fits is kept in mind."""
        nonlocal best
        chosen = (flat + (cost @ prices)[:, None]).argmin(0)
        over = cost[chosen].mean(0) / density - 1.0
        total = float(flat[chosen, at].sum())
        if bool((over <= 1e-9).all()) and (best is None or total < best[0]):
            best = total, chosen
        return over

    for pace in PACES:
        prices = torch.full((len(held),), 1e-4, dtype=torch.float64)
        for step in range(ROUNDS):
            over = excess(prices)
            # steps grow small so that prices settle
            prices = (prices * (1.0 + over.clamp(-1, 1) / (2.0 + step / pace)) + (over > 0) * 1e-4).clamp_min(1e-9)
    low, high = 1e-12, 1e12
    for _ in range(80):
        # equal prices, as low as fits: where the others settled just outside
        middle = (low * high) ** 0.5
        low, high = (low, middle) if bool((excess(torch.full_like(prices, middle)) <= 1e-9).all()) else (middle, high)
    if best is None:
        cheapest = float(cost.amax(1).min())
        raise InputError(f"choose: no rule keeps the density at {density}; the cheapest has {cheapest:.3f}")
    chosen = best[1].clone()
    while True:
        # room that prices leave: the change of one head's rule that gains most and still fits
        spent = cost[chosen].sum(0)
        fits = (spent - cost[chosen][None] + cost[:, None] <= density * len(at) * (1 + 1e-9)).all(2)
        gain = ((flat[chosen, at] - flat) * fits).flatten()
        if float(gain.max()) <= 1e-12:
            break
        chosen[int(gain.argmax()) % len(at)] = int(gain.argmax()) // len(at)
    return [[rules[i] for i in row] for row in chosen.view(losses.shape[1:]).tolist()]


def by_key_head(blocks: Tensor, kv_heads: int) -> Tensor:
    """Influence of key heads: of the query heads that share one, the largest counts."""
    return blocks.unflatten(1, (kv_heads, -1)).amax(2)


def plan_of(model: Any, rules: Sequence[Sequence[Rule]], **sizes: Any) -> Plan:
    """The plan of chosen rules; `sizes` go to the policy (`sink`, `least`, `block`).

    Example:
        >>> plan = plan_of(ModelShape(1, 4, 2), [[Rule(64, 0.0), Rule(0, 0.5)]])
        >>> [(a.heads, a.args["span"]) for a in plan.layers[0]]
        [((0,), {'base': 64, 'slope': 0.0}), ((1,), {'base': 0, 'slope': 0.5})]
    """
    shape = ModelShape.of(model)
    rows = []
    for row in rules:
        heads: dict[Rule, list[int]] = {}
        for head, rule in enumerate(row):
            heads.setdefault(rule, []).append(head)
        rows.append(
            tuple(
                Assign(tuple(ids), "moa", {"span": {"base": rule.alpha, "slope": rule.beta}, **sizes}, phase="cache")
                for rule, ids in heads.items()
                if rule != Rule(0, 1.0)
            )
        )
    return Plan.per_head(shape, rows, note="moa: spans by length rules")


def _pool(entries: Tensor, block: int) -> Tensor:
    """Sums of blocks, short ones at the end: [h, N, N] -> [h, n, n]."""
    pad = -entries.shape[-1] % block
    entries = torch.nn.functional.pad(entries, (0, pad, 0, pad))
    return entries.unflatten(2, (-1, block)).sum(3).unflatten(1, (-1, block)).sum(2)
