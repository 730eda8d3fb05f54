"""A greedy search over elements by a loss: one pass, keeping what does not hurt, and a record of all that was tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Generic, TypeVar

from saccade.core.errors import InputError

T = TypeVar("T")


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
