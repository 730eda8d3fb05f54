"""scan by chunks: matrix products inside a chunk, the recurrence from chunk to chunk. Any device, trainable.

With c the running sum of log decays inside a chunk, a pair i >= j of it weighs exp(c_i - c_j), the state before the
chunk exp(c_i), and a key of the chunk enters the next state with exp(c_last - c_j). All exponents are <= 0, so nothing
overflows at any length or decay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """As `reference.scan`: all whole chunks at once, then what is left as one chunk of its own length."""
    N = q.shape[2]
    whole = N - N % chunk
    outs = []
    for a, b, size in ((0, whole, chunk), (whole, N, N - whole)):
        if a < b:
            log = decay if decay.shape[2] == 1 else decay[:, :, a:b]
            o, state = _chunks(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], log, state, size)
            outs.append(o)
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0], state


def _chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Chunks of `size` that fill the length exactly: q, k [B,H,N,D], v [B,H,N,E], decay [b,h,1|N,1|D]."""
    q, k, v = (t.unflatten(2, (-1, size)) for t in (q, k, v))
    # a constant decay has the same sums in every chunk: one chunk stands for all
    log = decay[:, :, None].expand(-1, -1, -1, size, -1) if decay.shape[2] == 1 else decay.unflatten(2, (-1, size))
    c = log.cumsum(3)
    last = c[:, :, :, -1:]
    o = _inside(q, k, v, c)
    grown = (k * (last - c).exp()).transpose(-1, -2) @ v
    shrink = last.exp().transpose(-1, -2).expand(-1, -1, q.shape[2], -1, -1)
    before = []
    for i in range(q.shape[2]):
        before.append(state)
        state = shrink[:, :, i] * state + grown[:, :, i]
    o = o + (q * c.exp()) @ torch.stack(before, 2)
    return o.flatten(2, 3), state


def _inside(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """What the tokens of a chunk give each other: q, k [B,H,n,C,D], v [B,H,n,C,E], c [b,h,1|n,C,1|D]."""
    if c.shape[4] > 1:
        return _inside_channels(q, k, v, c)
    future = torch.ones(c.shape[3], c.shape[3], dtype=torch.bool, device=c.device).triu(1)
    # the future is masked before exp: its exponents are positive and would overflow
    weight = (c - c.transpose(-1, -2)).masked_fill(future, float("-inf")).exp()
    return ((q @ k.transpose(-1, -2)) * weight) @ v


def _inside_channels(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """The same for decays per channel, which no weight per pair can hold.

    Spans are halved: the later half of each sees the earlier half through the sum at the last token of the earlier
    half, c_i - c_mid and c_mid - c_j, both <= 0. Spans of 2, 4, 8, ... tokens and the diagonal cover all pairs once.
    """
    length = q.shape[3]
    size = 1 << (length - 1).bit_length()
    o = (q * k).sum(-1, keepdim=True) * v
    q, k, v = (pad(t, (0, 0, 0, size - length)) for t in (q, k, v))
    c = torch.cat((c, c[..., -1:, :].expand(*c.shape[:3], size - length, -1)), 3)
    half = 1
    while half < size:
        (_, late), (early, _), (values, _), (c_early, c_late) = (
            t.unflatten(3, (-1, 2, half)).unbind(4) for t in (q, k, v, c)
        )
        mid = c_early[..., -1:, :]
        scores = (late * (c_late - mid).exp()) @ (early * (mid - c_early).exp()).transpose(-1, -2)
        seen = torch.stack((torch.zeros_like(values), scores @ values), 4).flatten(3, 5)
        o = o + seen[..., :length, :]
        half *= 2
    return o
