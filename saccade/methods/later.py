"""Later prompts: those heads of a plan that a cache policy serves once it has dropped or moved tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from saccade.core.plan import Plan
from saccade.methods.base import Attention, CachePolicy, Selector


class Later(NamedTuple):
    """Heads whose later prompts a policy serves, dense over what it keeps, once it has dropped or moved something.

    Args:
        method: their method in prefill, by its name in the plan.
        policy: the policy's name.
        heads: query heads by layer.

    Example:
        >>> Later("minference", "snapkv", {1: (0, 1), 2: (0, 1), 3: (0, 1)}).text()
        'dense in heads 0-1 of layers 1-3, over what snapkv keeps: minference cannot read that'
    """

    method: str
    policy: str
    heads: dict[int, tuple[int, ...]]

    def text(self) -> str:
        """For a person, behind "later prompts"."""
        alike = set(self.heads.values())
        which = f"heads {ranges(alike.pop())}" if len(alike) == 1 else "some heads"
        where = f"{which} of layers {ranges(self.heads)}"
        return f"dense in {where}, over what {self.policy} keeps: {self.method} cannot read that"


def later_prompts(plan: Plan) -> list[Later]:
    """What a plan's methods cannot read of later prompts: see `saccade.methods.apply.reads`.

    Example:
        >>> from saccade.core.plan import ModelShape
        >>> later_prompts(Plan.uniform(ModelShape(2, 4, 2), prefill="minference", cache="snapkv"))
        [Later(method='minference', policy='snapkv', heads={0: (0, 1, 2, 3), 1: (0, 1, 2, 3)})]
        >>> later_prompts(Plan.uniform(ModelShape(2, 4, 2), prefill="streaming", cache="snapkv"))
        []
    """
    found: dict[tuple[str, str], dict[int, tuple[int, ...]]] = {}
    share = plan.model.heads // plan.model.kv_heads
    for layer in range(plan.model.layers):
        for kept in plan.phase(layer, "cache"):
            policy, kv = kept.build(), range(plan.model.kv_heads) if kept.heads is None else kept.heads
            held = {h * share + i for h in kv for i in range(share)}
            for assign in plan.phase(layer, "prefill"):
                both = held if assign.heads is None else held.intersection(assign.heads)
                if both and _is_left_out(assign.build(), policy):
                    heads = found.setdefault((assign.method, kept.method), {})
                    heads[layer] = tuple(sorted({*heads.get(layer, ()), *both}))
    return [Later(method, policy, heads) for (method, policy), heads in found.items()]


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers for a person.

    Example:
        >>> ranges([0, 1, 2, 5]), ranges([])
        ('0-2, 5', 'none')
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def _is_left_out(method: Attention, policy: CachePolicy) -> bool:
    """`saccade.methods.apply.reads`, turned round, for when something will have been dropped, folded or moved."""
    if policy.lossless:
        return not method.reads_far
    folds = type(policy).fold is not CachePolicy.fold
    return method.unbroken or (folds and not isinstance(method, Selector))
