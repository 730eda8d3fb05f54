"""Find DuoAttention's retrieval heads: train one gate per key head, weights frozen, against the model's own states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Window
from saccade.core.plan import ModelShape
from saccade.kernels.attend import attend

NAME = "saccade_gates"


def fit_gates(
    model: Any,
    samples: Iterable[tuple[Tensor, Tensor]],
    *,
    sink: int = 64,
    recent: int = 256,
    steps: int = 2000,
    lr: float = 0.02,
    reg: float = 0.05,
    progress: Callable[[int, float, Tensor], None] | None = None,
) -> list[list[float]]:
    """One gate per layer and key head: 1 = needs everything, 0 = sink and recent tokens are enough.

    DuoAttention (Xiao et al., ICLR 2025, arXiv 2410.10819; official code mit-han-lab/duo-attention). Two streams run
    side by side, weights frozen: the full stream as ever, and a mixed stream whose attention is
    a * (the full stream's attention output) + (1 - a) * (its own windowed attention). The gates a minimise the
    squared difference of the last hidden states on the supervised tokens plus `reg` times their mean.

    Args:
        model: a causal language model of transformers; left as it was.
        samples: (ids [N], supervised [N] bool) pairs; supervised marks the questions and answers. Read `steps` times.
        sink, recent: the streaming heads' window, in tokens.
        steps: optimiser steps; the rate rises over the first fifth and falls over the last.
        lr: the largest rate (AdamW).
        reg: weight of the mean gate.
        progress: called after each step with (step, loss, gates).

    Returns:
        Gates [layers][kv heads] in [0, 1]; `saccade.fit.published.from_gates` makes a plan of them.

    Departs from the paper: nothing in the objective; samples are the caller's (the paper plants 10 passkeys of 32
        words each in long books).
    """
    shape = ModelShape.of(model)
    device = next(model.parameters()).device
    gates = torch.ones(shape.layers, shape.kv_heads, device=device, requires_grad=True)
    optimiser = torch.optim.AdamW([gates], lr=lr, weight_decay=0.0)
    frozen = [p for p in model.parameters() if p.requires_grad]
    before, training = model.config._attn_implementation, model.training
    AttentionInterface.register(NAME, _two_streams(gates, Window(sink, recent)))
    try:
        for p in frozen:
            p.requires_grad_(False)
        model.set_attn_implementation(NAME)
        model.eval()
        for step, (ids, supervised) in zip(range(steps), _forever(samples), strict=False):
            rise, fall = (step + 1) / (steps / 5), (steps - step) / (steps / 5)
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1.0, max(rise, 0.1), max(fall, 0.1))
            ids = ids.to(device)
            states = model.model(torch.stack((ids, ids)), use_cache=False).last_hidden_state
            apart = (states[0].detach() - states[1]).float().square().mean(-1)
            loss = apart[supervised.to(device)].mean() + reg * gates.abs().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                gates.clamp_(0.0, 1.0)
            if progress is not None:
                progress(step, float(loss.detach()), gates.detach())
    finally:
        model.set_attn_implementation(before)
        model.train(training)
        for p in frozen:
            p.requires_grad_(True)
    return [[float(g) for g in row] for row in gates.detach().cpu()]


def _two_streams(gates: Tensor, window: Window) -> Callable[..., tuple[Tensor, None]]:
    """The attention function: the first half of the batch is the full stream, the second the mixed one."""

    def function(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        half = q.shape[0] // 2
        with torch.no_grad():
            call = Call.of(q[:half], k[:half], scale=scaling, layer=module.layer_idx)
            full = attend(q[:half], k[:half], v[:half], None, call, lse=False).o
        mine = Call.of(q[half:], k[half:], scale=scaling, layer=module.layer_idx)
        near = attend(q[half:], k[half:], v[half:], window, mine, lse=False).o
        gate = gates[module.layer_idx].clamp(0.0, 1.0).repeat_interleave(q.shape[1] // k.shape[1])[:, None, None]
        mixed = gate.to(near.dtype) * full + (1 - gate).to(near.dtype) * near
        return torch.cat((full, mixed)).transpose(1, 2).contiguous(), None

    return function


def _forever(samples: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
    kept = []
    for sample in samples:
        kept.append(sample)
        yield sample
    if not kept:
        raise InputError("fit_gates: there are no samples")
    while True:
        yield from kept
