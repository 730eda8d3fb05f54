"""scan on a GPU: which Triton kernels serve which call, and its gradients. Compiled at the first use, not at import."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saccade.kernels.here import here
from saccade.kernels.scan import triton_channels, triton_chunks, triton_step

WIDEST = 256
FEW = 8  # at most so many tokens run through the recurrence itself where no gradient is wanted


def refuses(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> str | None:
    """Why no kernel serves the call, in words; None where one does. decay [1|B,1|H,1|N,1|D]."""
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {q.device}, the kernels need a GPU"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q, k, v must have one dtype of float32, bfloat16, float16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if torch.float64 in (decay.dtype, state.dtype):
        return f"sums are float32, decay is {decay.dtype}, state {state.dtype}"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"widths up to {WIDEST}, got {q.shape[3]} and {v.shape[3]}"
    return None


@here
def scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `saccade.kernels.scan.scan`, on arguments that `refuses` let pass."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, decay, state))
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    if q.shape[2] <= FEW and not wanted:
        return triton_step.walk(q, k, v, decay.expand_as(q), state.float().contiguous())
    return (_Channels if decay.shape[3] > 1 else _Scan).apply(q, k, v, decay, state)  # type: ignore[no-any-return]


class _Scan(torch.autograd.Function):
    """A scan whose gradients are scans; decay [1|B,1|H,1|N,1]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        start = state.float().contiguous()
        by = triton_chunks.cut(q, v)
        log = triton_chunks.add_up(decay, q.shape[:3], by)
        before = triton_chunks.states(k, v, log, start, by)
        end = torch.empty_like(start)
        o = triton_chunks.outputs(q, k, v, log, before, by, end=end).o
        ctx.save_for_backward(q, k, v, log, before)
        ctx.by, ctx.state_dtype, ctx.decay = by, state.dtype, (decay.shape, decay.dtype)
        return o, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dend: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log, before = ctx.saved_tensors
        by = ctx.by
        for_q, for_k, for_v, for_decay, for_state = ctx.needs_input_grad
        do, dend = do.to(v.dtype).contiguous(), dend.float().contiguous()
        dq = dk = dv = ddecay = dstate = None
        behind = triton_chunks.states(q, do, log, dend, by, reverse=True)
        # the same kernel twice: what it kept forwards, it needs against time
        before, turned = before.transpose(3, 4), behind.transpose(3, 4)
        if for_decay:
            forth = triton_chunks.outputs(do, v, k, log, before, by, times=q)
            back = triton_chunks.outputs(v, do, q, log, turned, by, reverse=True, times=k, kept=forth.kept)
            dq, dk = forth.o, back.o
            shape, dtype = ctx.decay
            ddecay = _decay_gradient(forth.products, back.products, back.whole, by.chunk)
            ddecay = ddecay.sum_to_size(shape[:3])[..., None].to(dtype)
        else:
            if for_q:
                dq = triton_chunks.outputs(do, v, k, log, before, by).o
            if for_k:
                dk = triton_chunks.outputs(v, do, q, log, turned, by, reverse=True).o
        if for_v or for_state:
            dstate = torch.empty_like(dend)
            dv = triton_chunks.outputs(k, q, do, log, behind, by, reverse=True, end=dstate).o
            dstate = dstate.to(ctx.state_dtype)
        return dq, dk, dv, ddecay, dstate


def _decay_gradient(forth: Tensor, back: Tensor, whole: Tensor, chunk: int) -> Tensor:
    """The gradient of each token's log decay [B,H,N]: all pairs that cross the token, weighed with their gradient.

    forth, back [2,B,H,N] are q·dq and k·dk, from outside the token's chunk and from its other tokens; whole
    [B,H,chunks] is what crosses a chunk from end to end. A pair that enters a chunk crosses its tokens up to the
    query, one that leaves those behind the key; differences are only taken of the pairs inside.
    """
    N = forth.shape[3]
    forth, back = (torch.nn.functional.pad(t, (0, -N % chunk)).unflatten(3, (-1, chunk)) for t in (forth, back))
    later = (forth[0] + forth[1] - back[1]).flip(3).cumsum(3).flip(3)
    earlier = back[0].cumsum(3) - back[0]
    return (whole[..., None] + later + earlier).flatten(2)[..., :N]


class _Channels(torch.autograd.Function):
    """The same for a decay per key channel [1|B,1|H,1|N,K]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        start = state.float().contiguous()
        log = decay.expand(q.shape)
        by = triton_channels.cut(q, v)
        before = triton_channels.states(k, v, log, start, by)
        end = torch.empty_like(start)
        o = triton_channels.values(q, k, v, log, before, by, end)
        ctx.save_for_backward(q, k, v, decay, before, end)
        ctx.by, ctx.state_dtype = by, state.dtype
        return o, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dend: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, before, end = ctx.saved_tensors
        by = ctx.by
        _, _, _, for_decay, for_state = ctx.needs_input_grad
        log = decay.expand(q.shape)
        do, dend = do.to(v.dtype).contiguous(), dend.float().contiguous()
        # the decay's gradient is a difference of the two: it is not to see their rounding
        dtype = torch.float32 if for_decay else q.dtype
        behind = triton_channels.states(q, do, log, dend, by, reverse=True)
        dq = triton_channels.keys(do, v, k, log, before, by, dtype)
        dk = triton_channels.keys(v, do, q, log, behind, by, dtype, reverse=True)
        dstate = torch.empty_like(dend)
        dv = triton_channels.values(k, q, do, log, behind, by, dstate, reverse=True)
        ddecay = None
        if for_decay:
            # what crosses the end of a segment, then back through it: each token adds its q·dq - k·dk
            crossing = (torch.cat((before[:, :, 1:], end[:, :, None]), 2) * behind).sum(4)
            pull, size = q * dq - k * dk, by.chunk * by.chunks
            pull = torch.nn.functional.pad(pull, (0, 0, 0, by.segments * size - q.shape[2]))
            inside = pull.unflatten(2, (by.segments, size)).flip(3).cumsum(3).flip(3)
            ddecay = (inside + crossing[:, :, :, None]).flatten(2, 3)[:, :, : q.shape[2]]
            ddecay = ddecay.sum_to_size(decay.shape).to(decay.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv, ddecay, dstate.to(ctx.state_dtype) if for_state else None
