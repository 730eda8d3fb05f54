"""Train SeerAttention's gate: it learns, from the model's own attention, which key blocks each query block looks at."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.plan import ModelShape, Plan
from saccade.core.rope import Rope
from saccade.hf.attach import attach
from saccade.kernels.gate import gate_keys, gate_queries, gate_scores, key_features
from saccade.methods.apply import Seen
from saccade.methods.gates import save_gate

TILE = 1 << 22  # scores held at a time


class Lesson(NamedTuple):
    """What one layer's gate sees of a text, and what it should say.

    Shapes: asked [B,H,n,D], features [B,G,n,3D], target [B,H,n,n].
    """

    asked: Tensor
    features: Tensor
    target: Tensor
    rope: Rope


def fit_gate(
    model: Any,
    samples: Iterable[Tensor],
    path: str | os.PathLike[str],
    *,
    block: int = 64,
    epochs: int = 1,
    steps: int | None = None,
    lr: float = 1e-3,
    warmup: int = 20,
    drop: float = 0.25,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[Tensor]:
    """Distil a model's attention into gates and save them for the method `seer`.

    SeerAttention (Gao et al. 2024, arXiv 2410.13276; official code microsoft/SeerAttention). The model reads each
    sample with its own dense attention, weights frozen; the largest softmax weight in every block of every head, rows
    made to sum to 1, is what the gate's softmax over key blocks should be. The gates of all layers minimise the KL
    divergence from it; AdamW, no weight decay, a rate that rises for `warmup` steps and falls as a cosine.

    Args:
        model: a causal language model of transformers; left as it was.
        samples: token ids, [N] or rows [B,N] of one length without padding; one step each. Read once.
        path: the file to save, see `saccade.methods.gates.save_gate`.
        block: tokens of a block.
        epochs: times that every sample is a step; above 1 what was seen of all samples is held on the CPU, n x n
            numbers per head and layer for n blocks.
        steps: steps of one epoch, where `samples` has no length; more samples are not read.
        lr: the largest rate.
        warmup: steps of the rise.
        drop: share of the first query blocks that do not count: they have few blocks to choose from.
        seed: of the order of samples after the first epoch.
        progress: called after each step with (step, loss): nats, the mean over rows and heads, summed over layers.

    Returns:
        The gates: a matrix per query head, float32 [H, 3D, D], for each layer.

    Departs from the paper: the loss is the mean over rows, where the paper's is also divided by the number of key
        blocks and taken times 10, a factor that AdamW does not see; gates start as mean pooling (the block's mean is
        passed on, largest and smallest values are not), not from noise.

    Raises:
        InputError: no samples, or nothing in them to learn from.
        UnsupportedError: a layer that is not served (a sliding window), or whose rotary positions are not known.
    """
    shape = ModelShape.of(model)
    if steps is None:
        if not hasattr(samples, "__len__"):
            raise InputError("fit_gate: samples have no length, so give steps")
        steps = len(samples)
    if steps < 1 or epochs < 1 or block < 1 or not 0.0 <= drop < 1.0:
        raise InputError(
            f"fit_gate: needs samples, epochs and block >= 1 and drop in [0, 1), got {steps}, {epochs}, {block}, {drop}"
        )
    gates: list[Tensor] = []
    optimiser: torch.optim.Optimizer | None = None
    for step, lessons in enumerate(_lessons(model, samples, steps, block, epochs, Random(seed))):
        if optimiser is None:
            width = lessons[0].asked.shape[3]
            start = torch.cat((torch.zeros(2 * width, width), torch.eye(width)))
            gates = [start.repeat(shape.heads, 1, 1).to(l.asked.device).requires_grad_() for l in lessons]
            optimiser = torch.optim.AdamW(gates, lr=lr, weight_decay=0.0)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(warmup, 1)) * _cosine(step, steps * epochs)
        total = 0.0
        optimiser.zero_grad()
        with torch.enable_grad():
            for lesson, gate in zip(lessons, gates, strict=True):
                keys = gate_keys(lesson.features, gate, block, lesson.rope)
                loss = divergence(gate_scores(lesson.asked, keys), lesson.target, drop)
                loss.backward()
                total += float(loss.detach())
        if not math.isfinite(total):
            raise InputError(f"fit_gate: the loss at step {step} is {total}; does the model's attention hold NaN?")
        optimiser.step()
        if progress is not None:
            progress(step, total)
    found = [gate.detach() for gate in gates]
    save_gate(path, found, block)
    return found


def divergence(scores: Tensor, target: Tensor, drop: float = 0.25) -> Tensor:
    """KL divergence of the scores' softmax from the target, the mean over rows; 0 if and only if they are equal.

    Blocks above the diagonal do not count, nor does the share `drop` of the first rows.

    Shapes:
        scores and target [B,H,n,n] -> a number
    """
    n = scores.shape[3]
    rows = torch.arange(int(drop * n), n, device=scores.device)
    scores, target = scores[:, :, rows], target[:, :, rows]
    ahead = torch.arange(n, device=scores.device) > rows[:, None]
    said = scores.masked_fill(ahead, float("-inf")).log_softmax(-1).masked_fill(ahead, 0.0)
    return (torch.xlogy(target, target) - target * said).sum(-1).mean()


def block_maxima(q: Tensor, k: Tensor, call: Call, block: int) -> Tensor:
    """The largest weight of dense attention in each block, rows made to sum to 1, a few rows at a time.

    Args:
        q, k: rotated queries and keys of a whole contiguous prompt.
        call: the call.
        block: tokens of a block.

    Shapes:
        q [B,H,N,D], k [B,G,N,D] -> [B,H,n,n] float32 or wider, n = ceil(N/block)

    Example:
        >>> q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
        >>> block_maxima(q, k, Call.of(q, k), 2).tolist()
        [[[[1.0, 0.0], [0.5, 0.5]]]]
    """
    B, H, G, N, _ = call.shape
    n, scale = -(-N // block), call.softmax_scale(q.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    found = q.new_zeros((B, H, n, n), dtype=wide)
    step = max(1, TILE // (B * H * N * block))
    for a in range(0, n, step):
        start, end = a * block, min((a + step) * block, N)
        packed = (q[:, :, start:end] * scale).to(wide).reshape(B, G, -1, q.shape[3])
        scores = (packed @ k[:, :, :end].to(wide).transpose(-1, -2)).view(B, H, end - start, end)
        rows = torch.arange(start, end, device=q.device)
        scores.masked_fill_(torch.arange(end, device=q.device) > rows[:, None], float("-inf"))
        weights = torch.nn.functional.pad(scores.softmax(-1), (0, -end % block, 0, -end % block))
        best = weights.unflatten(3, (-1, block)).amax(4).unflatten(2, (-1, block)).amax(3)
        found[:, :, a : a + best.shape[2], : best.shape[3]] = best
    return found / found.sum(-1, keepdim=True)


def lessons_of(model: Any, ids: Tensor, block: int) -> list[Lesson]:
    """What every layer's gate sees of a text, and what it should say; the model runs once, dense.

    Args:
        model: a causal language model of transformers.
        ids: token ids [N] or [B,N].
        block: tokens of a block.

    Raises:
        UnsupportedError: a layer that is not served, or whose rotary positions are not known.
    """
    shape = ModelShape.of(model)
    found: dict[int, Lesson] = {}

    def watch(seen: Seen) -> None:
        call = seen.call
        if call.rope is None:
            raise UnsupportedError(f"fit_gate: how layer {call.layer} rotates its keys is not known")
        asked, features = gate_queries(seen.q, 0, block, call.rope), key_features(seen.k, block, call.rope)
        found[call.layer] = Lesson(asked, features, block_maxima(seen.q, seen.k, call, block), call.rope)

    # a plan of no layers: what is attended stays as it is, and every call can be seen
    with torch.no_grad(), attach(model, Plan.per_head(model, [()] * shape.layers)) as session:
        session.watch = watch
        device = next(model.parameters()).device
        model(ids.to(device).reshape(-1, ids.shape[-1]), past_key_values=session.cache(), logits_to_keep=1)
    missing = sorted(set(range(shape.layers)) - set(found))
    if missing:
        raise UnsupportedError(f"fit_gate: layers {missing} keep their own attention (sliding windows?)")
    return [found[layer] for layer in range(shape.layers)]


def _lessons(
    model: Any, samples: Iterable[Tensor], steps: int, block: int, epochs: int, rng: Random
) -> Iterator[list[Lesson]]:
    """The lessons of every sample, and again in another order in each epoch after the first."""
    kept, count = [], 0
    training = model.training
    try:
        model.eval()
        device = next(model.parameters()).device
        for _, ids in zip(range(steps), samples, strict=False):
            if ids.ndim not in (1, 2) or ids.shape[-1] <= block:
                raise InputError(f"fit_gate: samples are ids [N] or [B,N] longer than {block}, got {list(ids.shape)}")
            lessons = lessons_of(model, ids, block)
            count += 1
            if epochs > 1:
                kept.append([Lesson(*(t.cpu() for t in lesson[:3]), lesson.rope) for lesson in lessons])
            yield lessons
        if count < steps:
            raise InputError(f"fit_gate: {steps} steps an epoch, but there are {count} samples")
        for _ in range(epochs - 1):
            rng.shuffle(kept)
            for held in kept:
                yield [Lesson(*(t.to(device) for t in lesson[:3]), lesson.rope) for lesson in held]
    finally:
        model.train(training)


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))
