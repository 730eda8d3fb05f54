"""AxFormer's search: what a model does better without, and where few keys do as well as all, by the loss on examples.

found = prune(model, lambda: answer_loss(model, subset), held=lambda: answer_loss(model, others))
print(found)
with without(model, found.accepted):
    ...  # train on, or serve; `remove` makes it last
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.errors import InputError, UnsupportedError
from saccade.core.plan import Assign, ModelShape, Plan

T = TypeVar("T")

BLOCKS = {"attention": "attention", "head": "attention", "ffn": "ffn", "neurons": "ffn"}


@dataclass(frozen=True)
class Trial(Generic[T]):
    """One element that was tried: the loss with it and with all that was accepted before it, and what came of it."""

    element: T
    loss: float
    accepted: bool


@dataclass(frozen=True)
class Found(Generic[T]):
    """What a greedy search did, in its order.

    Attributes:
        before: the loss with nothing accepted.
        trials: every element that was tried.
        passed: elements that were not looked at, since something accepted had settled them.
        held: the loss on the second set with nothing, then after each acceptance; None without such a set.
        tolerance: what was asked for.
    """

    before: float
    trials: tuple[Trial[T], ...]
    passed: tuple[T, ...] = ()
    held: tuple[float, ...] | None = None
    tolerance: float = 0.0

    @property
    def accepted(self) -> tuple[T, ...]:
        return tuple(trial.element for trial in self.trials if trial.accepted)

    @property
    def rejected(self) -> tuple[T, ...]:
        return tuple(trial.element for trial in self.trials if not trial.accepted)

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss after each acceptance."""
        return tuple(trial.loss for trial in self.trials if trial.accepted)

    @property
    def after(self) -> float:
        """The loss with all of `accepted`."""
        return (self.before, *self.losses)[-1]

    @property
    def overfitted(self) -> tuple[T, ...]:
        """The accepted elements with which the loss on the second set rose by more than the tolerance."""
        steps = pairwise(self.held or ())
        return tuple(e for e, (old, new) in zip(self.accepted, steps, strict=False) if new > old + self.tolerance)

    def __str__(self) -> str:
        held = iter(self.held or ())
        rows = [("loss", "held out" if self.held else "", "")]
        rows.append((f"{self.before:.4f}", "".join(f"{x:.4f}" for x in islice(held, 1)), "with nothing"))
        for trial in self.trials:
            beside = "".join(f"{x:.4f}" for x in islice(held, int(trial.accepted)))
            rows.append(
                (f"{trial.loss:.4f}", beside, f"{'accepted' if trial.accepted else 'rejected'} {trial.element}")
            )
        lines = [f"{loss:>10}  {beside:>10}  {said}".rstrip() for loss, beside, said in rows]
        lines.append(f"{len(self.accepted)} accepted, {len(self.rejected)} rejected, {len(self.passed)} not looked at")
        if self.held is not None:
            lines.append(f"over-fitted: {', '.join(map(str, self.overfitted)) or 'none'}")
        return "\n".join(lines)


def greedy(
    elements: Iterable[T],
    loss: Callable[[tuple[T, ...]], float],
    *,
    tolerance: float = 0.0,
    settled: Callable[[T, tuple[T, ...]], bool] = lambda element, accepted: False,
    held: Callable[[tuple[T, ...]], float] | None = None,
    progress: Callable[[Trial[T]], None] | None = None,
) -> Found[T]:
    """Try elements one by one and keep those that do not hurt.

    The search of AxFormer (Nagarajan et al., IJCNN 2022, arXiv 2010.03688; no official code). An element is accepted if
    the loss with it is at most the best loss so far plus the tolerance. One pass, in the given order; coarse elements
    first is what makes it cheap.

    Args:
        elements: to try, in order; no two alike.
        loss: of a tuple of elements, those accepted so far and the one on trial.
        tolerance: slack in the units of the loss; 0 = nothing may be lost. The best loss never rises, so however many
            elements are accepted, the last loss is within one tolerance of it.
        settled: is there nothing left to examine in an element, given what was accepted?
        held: the loss on a second set, asked at the start and after each acceptance, for people to read: greedy
            choices over-fit the first set. It decides nothing.
        progress: called after each trial.

    Raises:
        InputError: elements that repeat, a tolerance below 0, or a loss that is no finite number to begin with. A
            trial whose loss is not finite is rejected.

    Departs from the paper: how it treats equal losses and a tolerance is not known here. Equal losses are accepted, and
        the tolerance counts from the best loss, not from the last, so that small losses do not add up.

    Example:
        >>> harm = {"a": 0.3, "b": -0.2, "c": 0.0}
        >>> found = greedy("abc", lambda chosen: 1.0 + sum(harm[name] for name in chosen))
        >>> found.accepted, found.rejected, found.after
        (('b', 'c'), ('a',), 0.8)
    """
    queue = list(elements)
    if len(set(queue)) != len(queue):
        twice = next(element for i, element in enumerate(queue) if element in queue[:i])
        raise InputError(f"greedy: {twice} is there twice; give each element once")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"greedy: tolerance must be a number >= 0 in the units of the loss, got {tolerance!r}")
    best = before = float(loss(()))
    others = [] if held is None else [float(held(()))]
    for value, name in zip((before, *others), ("loss", "loss on the held-out set"), strict=False):
        if not math.isfinite(value):
            raise InputError(f"greedy: with nothing accepted the {name} is {value}; it must be a finite number")
    accepted: tuple[T, ...] = ()
    trials: list[Trial[T]] = []
    passed: list[T] = []
    for element in queue:
        if settled(element, accepted):
            passed.append(element)
            continue
        tried = (*accepted, element)
        now = float(loss(tried))
        fine = math.isfinite(now) and now <= best + tolerance
        trials.append(Trial(element, now, fine))
        if fine:
            accepted, best = tried, min(best, now)
            if held is not None:
                others.append(float(held(accepted)))
        if progress is not None:
            progress(trials[-1])
    return Found(before, tuple(trials), tuple(passed), tuple(others) or None, tolerance)


@dataclass(frozen=True)
class Element:
    """A part of a decoder that can be taken away.

    Args:
        layer: where it is.
        kind: "attention" or "ffn" (the whole block), "head" or "neurons" (part of one).
        start, stop: query heads or neurons `start .. stop - 1`; of a whole block both are 0.

    Raises:
        InputError: another kind, or no such range.
    """

    layer: int
    kind: str
    start: int = 0
    stop: int = 0

    def __post_init__(self) -> None:
        if self.kind not in BLOCKS or self.layer < 0:
            raise InputError(f"Element: layer {self.layer}, kind {self.kind!r}: a layer >= 0 and {', '.join(BLOCKS)}")
        whole = self.kind == BLOCKS[self.kind]
        if not (self.start == self.stop == 0 if whole else 0 <= self.start < self.stop):
            raise InputError(
                f"Element: {self.kind} {self.start}:{self.stop}; heads and neurons have 0 <= start < stop, blocks 0:0"
            )

    @property
    def block(self) -> Element:
        """The block that it is, or that holds it."""
        return Element(self.layer, BLOCKS[self.kind])

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}" + (f" {self.start}:{self.stop}" if self != self.block else "")


class Part(NamedTuple):
    """One decoder layer's two last projections, and the query heads that the first one's columns belong to."""

    o_proj: nn.Linear
    down_proj: nn.Linear
    heads: int


def parts(model: Any) -> list[Part]:
    """Every layer's projections into the residual stream, first layer first.

    Args:
        model: a decoder of transformers, or a `saccade.nn.Transformer`: any whose layers hold one module with an
            `o_proj` and one with a `down_proj`.

    Raises:
        UnsupportedError: no such layers, other than the config says, or heads that do not divide o_proj's columns.
    """
    found = []
    for module in model.modules():
        mixers = [child for child in module.children() if isinstance(getattr(child, "o_proj", None), nn.Linear)]
        widths = [child for child in module.children() if isinstance(getattr(child, "down_proj", None), nn.Linear)]
        if len(mixers) == len(widths) == 1:
            heads = getattr(mixers[0], "heads", None) or ModelShape.of(model).heads
            found.append(Part(mixers[0].o_proj, widths[0].down_proj, heads))
    told = ModelShape.of(model).layers if hasattr(model, "config") else len(found)
    if not found or len(found) != told:
        raise UnsupportedError(
            f"axformer: {type(model).__name__} has {len(found)} layers that hold an o_proj and a down_proj, of {told}; "
            "only decoders whose every layer has both, as linear maps, can be pruned"
        )
    for layer, part in enumerate(found):
        if part.o_proj.in_features % part.heads:
            raise UnsupportedError(
                f"axformer: layer {layer}: o_proj reads {part.o_proj.in_features} channels, which {part.heads} heads "
                "do not divide"
            )
    return found


def elements(model: Any, *, group: int = 64) -> list[Element]:
    """A decoder's elements from coarse to fine: all blocks, then heads and groups of neurons; last layer first.

    Args:
        model: see `parts`.
        group: neurons that stand or fall together; the last group of a layer has what is left.

    Example:
        >>> from saccade.nn import Attention, Transformer
        >>> model = Transformer(9, 8, [Attention(8, heads=2)], mlp_width=10)
        >>> print(*elements(model, group=6), sep=", ")
        layer 0 attention, layer 0 ffn, layer 0 head 0:1, layer 0 head 1:2, layer 0 neurons 0:6, layer 0 neurons 6:10
    """
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise InputError(f"elements: group must be an int >= 1, in neurons, got {group!r}")
    numbered = list(enumerate(parts(model)))[::-1]
    coarse = [Element(layer, kind) for layer, _ in numbered for kind in ("attention", "ffn")]
    fine = []
    for layer, part in numbered:
        fine += [Element(layer, "head", head, head + 1) for head in range(part.heads)]
        wide = part.down_proj.in_features
        fine += [Element(layer, "neurons", at, min(at + group, wide)) for at in range(0, wide, group)]
    return coarse + fine


@contextmanager
def without(model: Any, removed: Iterable[Element]) -> Iterator[None]:
    """The model with elements taken away, as long as the block lasts.

    A head or a group of neurons adds exactly 0 (its columns of the last projection read zeros), a whole block adds
    exactly 0, bias included. Hooks do it: no weight is touched, and what was taken away gets a gradient of zero or
    none, so that the rest can be trained on. Time and memory are not saved.

    Args:
        model: see `parts`.
        removed: what to take away.

    Raises:
        InputError: an element that the model has not.
    """
    found = parts(model)
    hooks = []
    try:
        for (layer, block), gone in _columns(found, removed).items():
            linear = _linear(found[layer], block)
            if gone is None:
                hooks.append(linear.register_forward_hook(_silent))
            else:
                hooks.append(linear.register_forward_pre_hook(_deaf(gone.to(linear.weight.device))))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def remove(model: Any, removed: Iterable[Element]) -> None:
    """Take elements away for good: their columns of the last projections become 0, in place (of a block, bias too).

    All shapes stay as they are, so nothing is faster; and the zeros learn again if they are trained, so train first,
    under `without`.
    """
    found = parts(model)
    for (layer, block), gone in _columns(found, removed).items():
        linear = _linear(found[layer], block)
        if gone is None:
            linear.weight.zero_()
            if linear.bias is not None:
                linear.bias.zero_()
        else:
            linear.weight[:, gone.to(linear.weight.device)] = 0


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


def _columns(found: Sequence[Part], removed: Iterable[Element]) -> dict[tuple[int, str], Tensor | None]:
    """By layer and block, the input channels of its last projection that go, bool [channels]; None = the block."""
    gone: dict[tuple[int, str], Tensor | None] = {}
    for element in removed:
        if not 0 <= element.layer < len(found) or element.kind not in BLOCKS:
            raise InputError(
                f"axformer: {element}: the model has layers 0..{len(found) - 1}, kinds {', '.join(BLOCKS)}"
            )
        at = (element.layer, BLOCKS[element.kind])
        if element.kind == at[1]:
            gone[at] = None
            continue
        wide = _linear(found[element.layer], at[1]).in_features
        each = wide // found[element.layer].heads if element.kind == "head" else 1
        if element.stop > wide // each:
            raise InputError(f"axformer: {element}: the layer has 0:{wide // each}")
        mask = gone.setdefault(at, torch.zeros(wide, dtype=torch.bool))
        if mask is not None:
            mask[element.start * each : element.stop * each] = True
    return gone


def _linear(part: Part, block: str) -> nn.Linear:
    return part.o_proj if block == "attention" else part.down_proj


def _silent(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _deaf(gone: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].masked_fill(gone, 0.0),)

    return hook
