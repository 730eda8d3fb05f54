"""Find RazorAttention's retrieval heads: echo and induction scores on random tokens that repeat."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.plan import Assign, ModelShape, Plan
from saccade.hf.attach import attach
from saccade.methods.apply import Seen

ROWS = 256  # query rows whose scores are formed at a time


class Scores(NamedTuple):
    """Of every query head, the share of its attention that goes where a repeat sends it. Shapes: [layers, heads]."""

    echo: Tensor
    induction: Tensor


def score_heads(
    model: Any, *, period: int = 2500, repeats: int = 4, first: int | None = None, bos: int | None = None, seed: int = 0
) -> Scores:
    """Echo and induction scores (RazorAttention, Tang et al., ICLR 2025, arXiv 2407.15891; no official code).

    The model reads `period` random tokens `repeats` times, no data. A query in a later copy may look at earlier
    copies of its own token (echo) or at the tokens that came after them (induction): the mean share of its weights that
    lies there is the head's score.

    Args:
        model: a causal language model of transformers; left as it was.
        period: tokens of one copy.
        repeats: copies, at least 2.
        first: smallest token id drawn; None = a tenth of the vocabulary, so that special tokens are out of reach.
        bos: id of a token to put in front, None = none.
        seed: of the draw.

    Raises:
        InputError: fewer than two copies, or no token in range.
    """
    config = model.config.get_text_config()
    low = config.vocab_size // 10 if first is None else first
    if repeats < 2 or period < 2:
        raise InputError(f"score_heads: needs period >= 2 and repeats >= 2, got {period} and {repeats}")
    if not 0 <= low < config.vocab_size:
        raise InputError(f"score_heads: first must be a token id below {config.vocab_size}, got {low}")
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, config.vocab_size, (period,), generator=rng).repeat(repeats)
    ids = ids if bos is None else torch.cat((torch.tensor([bos]), ids))
    shape = ModelShape.of(model)
    found = torch.zeros(2, shape.layers, shape.heads)
    # a plan of no layers: what is attended stays as it is, and every call can be seen
    with torch.no_grad(), attach(model, Plan.per_head(model, [()] * shape.layers)) as session:

        def watch(seen: Seen) -> None:
            masses = repeat_masses(seen.q, seen.k, seen.call, period, start=0 if bos is None else 1)
            found[:, seen.call.layer] = torch.stack(masses).mean(1).cpu()

        session.watch = watch
        device = next(model.parameters()).device
        model(ids[None].to(device), past_key_values=session.cache(), logits_to_keep=1)
    return Scores(*found)


def repeat_masses(q: Tensor, k: Tensor, call: Call, period: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Mean weight that queries in later copies give earlier copies of their token, and the tokens after those.

    Args:
        q, k: of a contiguous call with as many queries as keys.
        call: the call.
        period: distance of copies.
        start: tokens before the first copy.

    Shapes:
        q [B,H,N,D], k [B,G,N,D] -> two of [B,H]
    """
    B, H, G, N, _ = call.shape
    totals = [q.new_zeros((B, H), dtype=torch.float32) for _ in range(2)]
    device = q.device
    for a in range(start + period, N, ROWS):
        rows = torch.arange(a, min(a + ROWS, N), device=device)
        packed = (q[:, :, rows] * call.softmax_scale(q.shape[3])).reshape(B, G, -1, q.shape[3])
        scores = (packed @ k.transpose(-1, -2)).view(B, H, len(rows), N)
        probs = scores.masked_fill(torch.arange(N, device=device) > rows[:, None], float("-inf")).float().softmax(-1)
        back = torch.arange(1, N // period + 1, device=device) * period
        for total, shift in zip(totals, (0, 1), strict=True):
            at = rows[:, None] - back + shift
            # what comes after an earlier copy must lie before the query; a period of 1 would make it the query itself
            there = (at - shift >= start).expand(B, H, -1, -1)
            total += (probs.gather(3, at.clamp_min(0).expand(B, H, -1, -1)) * there).sum((2, 3))
    return totals[0] / (N - start - period), totals[1] / (N - start - period)


def plan_of(
    model: Any,
    scores: Scores,
    *,
    induction: float = 0.14,
    echo: float = 0.01,
    **sizes: Any,
) -> Plan:
    """The plan that gives every head but the best scored RazorAttention's cache policy.

    Args:
        model: a ModelShape, a model or its config.
        scores: from `score_heads`.
        induction, echo: shares of all key heads that are kept whole for each score; a key head counts as the best of
            its query heads.
        sizes: of the policy (`sink`, `least`, `ratio`, `slack`, `compensate`).

    Example:
        >>> scores = Scores(torch.zeros(1, 4), torch.tensor([[0.0, 0.1, 0.9, 0.0]]))
        >>> plan = plan_of(ModelShape(1, 4, 2), scores, induction=0.5, echo=0.0, ratio=8)
        >>> [(a.heads, a.args) for a in plan.layers[0]]
        [((0,), {'ratio': 8})]
    """
    shape = ModelShape.of(model)
    total = shape.layers * shape.kv_heads
    whole: set[int] = set()
    for score, share in ((scores.induction, induction), (scores.echo, echo)):
        best = score.view(shape.layers, shape.kv_heads, -1).amax(2).flatten()
        whole |= set(best.topk(round(share * total)).indices.tolist())
    rows = []
    for layer in range(shape.layers):
        cut = tuple(g for g in range(shape.kv_heads) if layer * shape.kv_heads + g not in whole)
        rows.append((Assign(cut, "razor", dict(sizes), phase="cache"),) if cut else ())
    return Plan.per_head(shape, rows, note=f"razor: {len(whole)} of {total} key heads are kept whole")
