"""AxFormer's search: what a model does better without, and where few keys do as well as all, by the loss on examples.

found = prune(model, lambda: answer_loss(model, subset), held=lambda: answer_loss(model, others))
print(found)
with without(model, found.accepted):
    ...  # train on, or serve; `parts.remove` makes it last
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.errors import InputError
from saccade.core.plan import Assign, ModelShape, Plan
from saccade.fit.greedy import Found, Trial, greedy
from saccade.fit.parts import Element, elements, without


def prune(
    model: Any,
    loss: Callable[[], float],
    *,
    group: int = 64,
    tolerance: float = 0.0,
    held: Callable[[], float] | None = None,
    progress: Callable[[Trial[Element]], None] | None = None,
) -> Found[Element]:
    """Find the elements that a fine-tuned model is no worse without (AxFormer, arXiv 2010.03688).

    Blocks first; inside a block that was taken away nothing is examined. The model is left as it was: `without` or
    `remove` take `found.accepted` away. One evaluation for each element.

    Args:
        model: see `parts`; fine-tuned for its task.
        loss: of the model as it stands, on a small subset (see `answer_loss`); the same at every call.
        group: neurons that stand or fall together.
        tolerance: see `greedy`: 0 aims at accuracy, more trades it for size.
        held: the loss on a second set, which says what was over-fitted.
        progress: called after each trial.

    Departs from the paper: decoders instead of classifiers; blocks and heads are tried from the last layer to the
        first (its order was not at hand); fine-tuning afterwards is the caller's.
    """

    def under(of: Callable[[], float]) -> Callable[[tuple[Element, ...]], float]:
        def value(gone: tuple[Element, ...]) -> float:
            with without(model, gone):
                return of()

        return value

    return greedy(
        elements(model, group=group),
        under(loss),
        tolerance=tolerance,
        settled=lambda element, gone: element != element.block and element.block in gone,
        held=None if held is None else under(held),
        progress=progress,
    )


class Hard(NamedTuple):
    """Hard attention in one layer: each of its queries reads its `budget` best keys (tokens, or a share below 1.0)."""

    layer: int
    budget: int | float

    def __str__(self) -> str:
        return f"layer {self.layer} hard, budget {self.budget}"


def plan_of(
    model: Any,
    chosen: Iterable[Hard],
    *,
    candidates: int | None = None,
    phases: Sequence[str] = ("prefill", "decode"),
) -> Plan:
    """The plan that serves chosen layers by `hard` and leaves the others dense.

    Example:
        >>> plan = plan_of(ModelShape(2, 4, 2), [Hard(1, 32)], phases=("prefill",))
        >>> [[(a.method, a.args["budget"]) for a in row] for row in plan.layers]
        [[], [('hard', 32)]]
    """
    shape = ModelShape.of(model)
    budgets: dict[int, int | float] = {}
    for one in chosen:
        if not 0 <= one.layer < shape.layers or one.layer in budgets:
            raise InputError(f"plan_of: {one}: layers must be distinct and in 0..{shape.layers - 1}")
        budgets[one.layer] = one.budget
    more = {} if candidates is None else {"candidates": candidates}
    rows = [
        tuple(Assign(None, "hard", {"budget": budgets[layer], **more}, phase) for phase in phases)
        if layer in budgets
        else ()
        for layer in range(shape.layers)
    ]
    return Plan.per_head(shape, rows, note=f"axformer: hard attention in {len(budgets)} of {shape.layers} layers")


def hard_layers(
    model: Any,
    loss: Callable[[Plan], float],
    *,
    budgets: Sequence[int | float] = (32,),
    layers: Iterable[int] | None = None,
    tolerance: float = 0.0,
    candidates: int | None = None,
    phases: Sequence[str] = ("prefill", "decode"),
    held: Callable[[Plan], float] | None = None,
    progress: Callable[[Trial[Hard]], None] | None = None,
) -> tuple[Plan, Found[Hard]]:
    """Find the layers in which hard attention does not hurt, and with how few keys (AxFormer, arXiv 2010.03688).

    A layer takes the first of the budgets that does not hurt, so the smallest one belongs in front; then the next
    layer is tried beside it.

    Args:
        model: a ModelShape, a model or its config.
        loss: under a plan, on a small subset; for a model of transformers `with attach(model, plan): ...`.
        budgets: to try in each layer, in this order: tokens, or shares of the keys below 1.0.
        layers: to try, in this order; None = all, last layer first.
        tolerance: see `greedy`.
        candidates: see `HardAttention`.
        phases: "prefill", "decode" or both: a loss that is read in one forward knows of the first only.
        held: the loss on a second set, which says what was over-fitted.
        progress: called after each trial.

    Example:
        >>> late = lambda plan: 1.0 if plan.layers[0] else 0.4 if plan.layers[1] else 0.5
        >>> plan, found = hard_layers(ModelShape(2, 4, 2), late, budgets=[8])
        >>> plan.note, str(found.rejected[0])
        ('axformer: hard attention in 1 of 2 layers', 'layer 0 hard, budget 8')
    """
    shape = ModelShape.of(model)
    order = list(range(shape.layers))[::-1] if layers is None else list(layers)
    if not budgets or not phases:
        raise InputError(f"hard_layers: needs a budget and a phase at least, got {budgets!r} and {phases!r}")

    def plan(chosen: Iterable[Hard]) -> Plan:
        return plan_of(shape, chosen, candidates=candidates, phases=phases)

    queue = [Hard(layer, budget) for layer in order for budget in budgets]
    for one in queue:
        # a wrong budget, layer or phase is told before any time is spent
        plan([one])
    found = greedy(
        queue,
        lambda chosen: loss(plan(chosen)),
        tolerance=tolerance,
        settled=lambda one, chosen: one.layer in {other.layer for other in chosen},
        held=None if held is None else lambda chosen: held(plan(chosen)),
        progress=progress,
    )
    return plan(found.accepted), found


@torch.no_grad()
def answer_loss(model: Any, samples: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean cross-entropy of the supervised tokens of all samples, in nats.

    Args:
        model: a causal language model of transformers, with or without a plan attached; left in its mode.
        samples: (ids [N], supervised [N] bool); supervised marks the tokens whose loss counts.
    """
    device, training = next(model.parameters()).device, model.training
    total, count = 0.0, 0
    try:
        model.eval()
        for ids, supervised in samples:
            wanted, ids = supervised[1:].to(device), ids.to(device)
            logits = model(ids[None], use_cache=False).logits[0, :-1][wanted].float()
            total += float(F.cross_entropy(logits, ids[1:][wanted], reduction="sum"))
            count += int(wanted.sum())
    finally:
        model.train(training)
    if not count:
        raise InputError("answer_loss: the samples supervise no token after the first")
    return total / count
