"""The specification of scan: a loop over tokens. Every other implementation is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence itself; decay [1|B,1|H,1|N,1|D], one dtype for all."""
    B, H, N, D = q.shape
    factor = decay.exp().expand(B, H, N, D)
    outs = []
    for t in range(N):
        state = factor[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(outs, 2), state
