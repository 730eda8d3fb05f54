"""Run one layer's part of a plan: each head's method selects, and one call of attend answers for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import Call, kv_heads
from saccade.core.clock import Clock, lap
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Full, Pattern, PerHead
from saccade.core.plan import Plan
from saccade.kernels.attend import attend
from saccade.methods.base import Attention, CachePolicy, Selector

ASIDE = "later prompt dense"  # with the layer's number in `call.step`: a policy has served a prompt for a method
PACKED = 16  # a call with a past and at most so many queries is decoding (a token, or a draft to verify)


@dataclass(frozen=True)
class Roles:
    """The methods of one layer: (heads, method) pairs per phase; heads None means all."""

    prefill: tuple[tuple[tuple[int, ...] | None, Attention], ...] = ()
    decode: tuple[tuple[tuple[int, ...] | None, Attention], ...] = ()
    cache: tuple[tuple[tuple[int, ...], CachePolicy], ...] = ()

    @classmethod
    def of(cls, plan: Plan, layer: int, length: int = 0) -> Roles:
        """Build one layer's methods for a length (length rules are worked out here)."""

        def phase(name: str) -> tuple[Any, ...]:
            every = range(plan.model.kv_heads)
            pairs = [(assign.heads, assign.build(length)) for assign in plan.phase(layer, name)]
            return tuple((tuple(every) if name == "cache" and heads is None else heads, m) for heads, m in pairs)

        return cls(phase("prefill"), phase("decode"), phase("cache"))


@dataclass(frozen=True)
class Seen:
    """What one attend of one layer looked at, for whoever watches: see `apply`.

    Where a method gave the answer itself there is no pattern: `estimate` is then all that was scored, NaN if unknown,
    and `scored` the part of it that only chose.
    """

    call: Call
    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern | None
    estimate: float
    methods: tuple[str, ...]
    bias: Tensor | None = None
    o: Tensor | None = None  # the answer [B,H,N,Dv]
    scored: float = 0.0


def phase_of(queries: int, past: int) -> str:
    """ "decode" for up to 16 queries with a past, else "prefill"."""
    return "decode" if past > 0 and queries <= PACKED else "prefill"


def reads(method: Attention, call: Call, policy: CachePolicy | None, bias: Tensor | None = None) -> bool:
    """Can a method read what is held for its heads: a store with holes, folded tokens, tokens that lie elsewhere?

    It says so itself (`Method.unbroken`, `Method.reads_far`, `Attention.ready`). A prompt that it cannot read is served
    by the policy.

    Example:
        >>> from saccade.core.call import Shape
        >>> from saccade.core.table import build
        >>> holes = Call(Shape(1, 1, 1, 1, 2), q_pos=torch.tensor([[9]]), k_pos=torch.tensor([[[0, 9]]]))
        >>> reads(build("minference"), holes, None), reads(build("streaming"), holes, None)
        (False, True)
    """
    if policy is not None and policy.away(call):
        return method.reads_far
    if bias is not None and not isinstance(method, Selector):
        # it gives the answer itself, and knows nothing of slots that stand for many tokens
        return False
    # in steps of a fixed shape positions are given although nothing is missing
    holes = not call.contiguous and call.filled is None
    return not (holes and method.unbroken) and (policy is None or method.ready(call))


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    methods: Sequence[tuple[tuple[int, ...] | None, Attention]],
    policy: CachePolicy | None = None,
    watch: Callable[[Seen], None] | None = None,
    bias: Tensor | None = None,
    clock: Clock | None = None,
    phase: str | None = None,
) -> Tensor:
    """Attention of some heads under the methods that a plan gives them.

    A later prompt of heads whose policy has dropped or moved tokens is read by the method only if it `reads` such a
    store. Else the policy serves it, exactly over what it keeps: causal by the stored positions, its pattern and the
    weights of folded tokens honoured.

    Args:
        q, k, v: queries [B,H,N,D] and what is stored for them [B,G,M,D], [B,G,M,Dv].
        call: the call; `call.heads` are the global ids of these heads.
        methods: (global head ids or None, method) pairs of this layer and phase; other heads may be named.
        policy: the cache policy of these heads; it says what heads without a method see.
        watch: called with what was done, for measuring.
        bias: added to the logits of stored keys [B,G,M]: a slot that stands for n tokens has log n.
        clock: told what each stretch of time was spent on.
        phase: what the methods are here for, "prefill" or "decode"; None = by the number of queries (`phase_of`). A
            row of a ragged batch may bring fewer tokens of a prompt than a draft has.

    Returns:
        o [B,H,N,Dv].

    Raises:
        UnsupportedError: in decoding, a method that cannot read what the policy left (`reads`): tokens lie elsewhere;
            tokens were folded and the method gives the answer itself; or the method's own words, for holes.
    """
    H, share = call.shape.H, call.shape.H // call.shape.G
    if call.contiguous and f"cut {call.layer}" not in call.step:
        # tokens may have been taken back, and others written in their place by calls that a method does not see; once
        # for all heads of the layer, because what one group of heads has just learned lies behind the others' offset
        call.step[f"cut {call.layer}"] = True
        for held in call.memory.values():
            if isinstance(held, dict) and held.get("slots", 0) > call.offset:
                held["slots"] = call.offset
    ids = call.heads
    default = policy.pattern(call) if policy is not None else Full()
    away = policy is not None and policy.away(call)
    prompt = (phase_of(call.shape.N, call.offset) if phase is None else phase) == "prefill"
    left = set(range(H))
    patterns: list[tuple[tuple[int, ...], Pattern]] = []
    answers: list[tuple[tuple[int, ...], Tensor]] = []
    estimate, scored, names = 0.0, 0.0, []
    for heads, method in methods:
        local = tuple(i for i in range(H) if heads is None or ids[i] in heads)
        if not local:
            continue
        kv = kv_heads(local, share)
        sub = call.take(local, kv) if len(local) < H else call
        if prompt and not reads(method, sub, policy, bias):
            # served with the heads that no method names; noted for who counts
            call.step[f"{ASIDE} {call.layer}"] = True
            continue
        left -= set(local)
        names.append(type(method).__name__)
        mine, keys, values = q, k, v
        if len(local) < H:
            mine = q[:, list(local)]
            keys, values = (t if kv == tuple(range(t.shape[1])) else t[:, list(kv)] for t in (k, v))
            lap(clock, "copy")
        if away and not method.reads_far:
            raise UnsupportedError(
                f"{type(method).__name__} reads the store only, and {type(policy).__name__} has moved tokens of these "
                "heads out of it; give them retrieval or fetch, or no method, which is dense"
            )
        if isinstance(method, Selector) and not away:
            patterns.append((local, method.select(mine, keys, sub)))
            lap(clock, "select")
            estimate += method.estimate(sub)
            scored += method.estimate(sub)
        elif bias is not None:
            raise UnsupportedError(
                f"{type(method).__name__} gives the answer itself and cannot weigh the folded tokens that "
                f"{type(policy).__name__} keeps; give these heads another method"
            )
        else:
            answers.append((local, method.attend(mine, keys, values, sub).o))
            lap(clock, "attend")
            # one that does not say what it costs makes the sum unknown
            estimate += method.estimate(sub) or math.nan
            scored += method.scored(sub)
    if left and away and policy is not None:
        rest = tuple(sorted(left))
        kv = kv_heads(rest, share)
        sub = call.take(rest, kv)
        answers.append((rest, policy.attend(q[:, list(rest)], k[:, list(kv)], v[:, list(kv)], sub).o))
        lap(clock, "attend")
        estimate += policy.estimate(sub) or math.nan
    elif left:
        patterns.append((tuple(sorted(left)), default.heads(sorted(left), call)))
    if policy is not None:
        votes = policy.scored(call)
        estimate, scored = estimate + votes, scored + votes
    if not answers:
        pattern = patterns[0][1] if len(patterns) == 1 else PerHead(tuple(patterns))
        out = attend(q, k, v, pattern, call, key_bias=bias, lse=False).o
        lap(clock, "attend")
        if watch is not None:
            watch(Seen(call, q, k, v, pattern, estimate, tuple(names), bias, out))
        return out
    for local, pattern in patterns:
        kv = kv_heads(local, share)
        sub = call.take(local, kv)
        part = [t[:, list(kv)] for t in (k, v)]
        lap(clock, "copy")
        answers.append((local, attend(q[:, list(local)], *part, pattern, sub, lse=False).o))
        estimate += pattern.pairs(sub) if watch is not None else 0.0
    if len(answers) == 1:
        out = answers[0][1]
    else:
        order = torch.tensor([i for local, _ in answers for i in local], device=q.device).argsort()
        out = torch.cat([o for _, o in answers], 1).index_select(1, order)
    lap(clock, "attend")
    if watch is not None:
        watch(Seen(call, q, k, v, None, estimate, tuple(names), bias, out, scored))
    return out


def overheard(q: Tensor, k: Tensor, call: Call, methods: Sequence[tuple[tuple[int, ...] | None, Attention]]) -> None:
    """Tell the methods that are to decode what a prompt asked: see `Attention.prompt`."""
    H, share = call.shape.H, call.shape.H // call.shape.G
    for heads, method in methods:
        local = tuple(i for i in range(H) if heads is None or call.heads[i] in heads)
        if local and type(method).prompt is not Attention.prompt:
            kv = kv_heads(local, share)
            if len(local) == H:
                method.prompt(q, k, call)
            else:
                method.prompt(q[:, list(local)], k[:, list(kv)], call.take(local, kv))
