"""Fidelity: how near a method stays to dense attention, on one text: attention outputs, kept mass, next-token logits.

The dense model answers first; every method then reads the same prompt and the same answer (teacher forcing), so that
logits are compared at equal inputs however far the method's own answer would have gone astray. What the layers do
meanwhile is watched by a `saccade.evaluate.look.Look`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.generate import held, serving
from saccade.evaluate.look import Look
from saccade.evaluate.model import Loaded
from saccade.evaluate.presets import phases
from saccade.hf.cache import StoreLayer, cache_bytes
from saccade.hf.meter import Meter

OTHERS = 64  # random positions of the prompt whose next-token distributions are compared
LEAST = 8  # tokens that are fed in any case, so that decoding is watched for as many steps


@dataclass(frozen=True)
class Dense:
    """What stock transformers says to one prompt: made once, compared with every method.

    Args:
        ids: tokens of the prompt.
        tokens: tokens of its greedy answer; where that is short, what it goes on to say.
        answered: how many of them are the answer, the one that ends it included.
        others: positions of the prompt, ascending.
        logits: float32 [answered + len(others), vocabulary], on the CPU: of the answer's tokens, then of the token
            that follows each of the other positions.
        read_bytes: bytes of keys and values that a decoding step reads, over all layers; the mean of the steps.
        widths: of a head's keys and values.
    """

    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    answered: int
    others: tuple[int, ...]
    logits: Tensor
    read_bytes: float
    widths: tuple[int, int]


@dataclass(frozen=True)
class Fidelity:
    """How near a method stays to dense attention; all over one prompt and its answer, batch 1.

    Args:
        phase: where the method is sparse ("prefill", or "decode" where it leaves prefill dense): the next three are
            taken there.
        output_error: ||o - dense|| / ||dense|| of attention outputs per head, averaged over layers and heads. In a
            prefill of the last 64 queries and of 64 random ones.
        mass, mass_low: dense attention's mass on what is read, of the last 64 queries: mean, and 5th percentile over
            the queries of all heads and layers. What a cache policy dropped counts as lost. None without a pattern.
        kl_answer, agree_answer: KL(dense || method) in nats and the share of equal first choices, at the answer.
        kl_other, agree_other: the same at 64 random positions of the prompt. A method that leaves prefill dense changes
            nothing there.
        read_bytes: bytes of keys, values and summaries read per decoding step, over all layers.
        look: what was watched, per layer and head; None for stock attention.
    """

    phase: str
    output_error: float | None
    mass: float | None
    mass_low: float | None
    kl_answer: float
    kl_other: float
    agree_answer: float
    agree_other: float
    read_bytes: float | None
    look: Look | None


@torch.inference_mode()
def read_dense(
    loaded: Loaded, ids: Sequence[int], *, most: int = 24, stop: str = "\n", others: int = OTHERS, least: int = LEAST
) -> Dense:
    """Let stock transformers answer a prompt, and keep its logits.

    Args:
        loaded: the model.
        ids: tokens of the prompt, at least two.
        most: most tokens of the answer; where nothing is to be generated (0), its first token counts all the same.
        stop: text that ends it.
        others: random positions of the prompt whose logits are kept, too; the same ones in every run.
        least: tokens that are generated in any case.

    Raises:
        InputError: a prompt of less than two tokens.
    """
    if len(ids) < 2 or most < 0:
        raise InputError(f"read_dense: needs two tokens and most >= 0, got {len(ids)} and {most}")
    cache = DynamicCache(config=loaded.model.config)
    rng = torch.Generator().manual_seed(0)
    at = torch.randperm(len(ids) - 1, generator=rng)[:others].sort().values
    logits = _prefill(loaded, ids, at, cache).cpu()
    other, said, found = logits[:-1], [], [logits[-1:]]
    reads, answered, end = [], 0, _ends(loaded.model)
    while True:
        said.append(int(found[-1].argmax()))
        if not answered:
            text = loaded.tokenizer.decode(said)
            over = said[-1] in end or (bool(stop) and stop in text) or len(said) >= most
            answered = len(said) if over else 0
        if answered and len(said) >= least:
            break
        found.append(_step(loaded, torch.tensor([[said[-1]]], device=loaded.device), cache).cpu())
        reads.append(held(cache))
    first = next(layer for layer in cache.layers if getattr(layer, "keys", None) is not None)
    return Dense(
        ids=tuple(ids),
        tokens=tuple(said),
        answered=answered,
        others=tuple(at.tolist()),
        logits=torch.cat((*found[:answered], other)),
        read_bytes=sum(reads) / len(reads) if reads else float(held(cache)),
        widths=(first.keys.shape[-1], first.values.shape[-1]),
    )


@torch.inference_mode()
def fidelity(loaded: Loaded, plan: Plan | None, dense: Dense) -> Fidelity:
    """Read a prompt and the dense model's answer under a plan, watched, and compare.

    Costs one prefill and the answer's steps, with the watching: 128 dense rows per layer and the counting of pairs.

    Args:
        loaded: the model.
        plan: the plan; None = stock attention, at no cost and no distance.
        dense: from `read_dense`, of the same model.
    """
    if plan is None:
        return Fidelity("prefill", 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, dense.read_bytes, None)
    look = Look(evicts="cache" in phases(plan))
    logits = follow(loaded, plan, dense, look)
    kl, agree = divergence(dense.logits, logits), dense.logits.argmax(-1) == logits.argmax(-1)
    n = dense.answered
    phase = sparse_phase(plan, look)
    return Fidelity(
        phase=phase,
        output_error=look.error(phase),
        mass=look.kept(phase),
        mass_low=look.kept_low(phase),
        kl_answer=float(kl[:n].mean()),
        kl_other=float(kl[n:].mean()),
        agree_answer=float(agree[:n].double().mean()),
        agree_other=float(agree[n:].double().mean()),
        read_bytes=look.step_bytes(),
        look=look,
    )


@torch.inference_mode()
def follow(loaded: Loaded, plan: Plan, dense: Dense, look: Look | None = None) -> Tensor:
    """A plan's logits where `dense` has some, with the dense answer fed token by token."""
    at = torch.tensor(dense.others, dtype=torch.long)
    said = torch.tensor([dense.tokens], device=loaded.device)
    with serving(loaded, plan, look) as cache:
        past = cache(len(dense.ids))
        logits = _prefill(loaded, dense.ids, at, past)
        found = [logits[-1:]]
        # no logits leave the device before the last step
        found += [_step(loaded, said[:, step : step + 1], past) for step in range(len(dense.tokens) - 1)]
        if look is not None:
            look.beside = float(sum(cache_bytes(at) for at in past.layers if not isinstance(at, StoreLayer)))
    return torch.cat((*found[: dense.answered], logits[:-1])).cpu()


def divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL(dense || other) in nats at each position, from logits [n, vocabulary].

    Example:
        >>> even, uneven = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 3.0]])
        >>> round(divergence(even.log(), uneven.log()).item(), 4)  # (log 2 + log 2/3) / 2
        0.1438
    """
    p, q = dense.double().log_softmax(-1), logits.double().log_softmax(-1)
    # where dense has no weight at all, 0 * (-inf) is 0
    return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1).clamp_min(0.0)


def sparse_phase(plan: Plan, meter: Meter) -> str:
    """Where a plan is to be judged: in prefill where anything is left out there, else in decoding."""
    if "prefill" in phases(plan):
        return "prefill"
    mine = [layer for (phase, _), layer in meter.layers.items() if phase == "prefill"]
    return "prefill" if sum(v.pairs + v.whole for v in mine) < sum(v.allowed for v in mine) else "decode"


def _prefill(loaded: Loaded, ids: Sequence[int], at: Tensor, cache: object) -> Tensor:
    """Logits float32 [len(at) + 1, vocabulary] after these positions and the last."""
    wanted = torch.cat((at, torch.tensor([len(ids) - 1]))).to(loaded.device)
    text = torch.tensor([list(ids)], device=loaded.device)
    out = loaded.model(text, past_key_values=cache, use_cache=True, logits_to_keep=wanted)
    return out.logits[0].float()  # type: ignore[no-any-return]


def _step(loaded: Loaded, token: Tensor, cache: object) -> Tensor:
    """Logits float32 [1, vocabulary] after a token [1, 1]."""
    return loaded.model(token, past_key_values=cache, use_cache=True).logits[0, -1:].float()  # type: ignore[no-any-return]


def _ends(model: torch.nn.Module) -> set[int]:
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if end is None else {end} if isinstance(end, int) else set(end)
