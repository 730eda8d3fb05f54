"""The Triton kernel of scan for a few tokens: the recurrence itself, one launch, the state in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.here import here


@triton.jit(do_not_specialize=["N"])
def _walk(
    q_ptr, k_ptr, v_ptr, log_ptr, start_ptr, o_ptr, end_ptr, N, H, K, V,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, log_b, log_h, log_n, log_k,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Token by token for one head and some columns of its state: o [B,H,N,V], start and end [B,H,K,V]."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    i = tl.arange(0, BK)
    j = tl.program_id(0) * BV + tl.arange(0, BV)
    inside = (i < K)[:, None] & (j < V)[None, :]
    at = bh * K * V + i[:, None] * V + j[None, :]
    state = tl.load(start_ptr + at, mask=inside, other=0.0)
    q = q_ptr + b * q_b + h * q_h
    k = k_ptr + b * k_b + h * k_h
    v = v_ptr + b * v_b + h * v_h
    log = log_ptr + b * log_b + h * log_h
    start_row = bh * 0
    for t in range(N):
        row = start_row + t
        factor = tl.exp(tl.load(log + row * log_n + i * log_k, mask=i < K, other=0.0).to(tl.float32))
        key = tl.load(k + row * k_n + i, mask=i < K, other=0.0).to(tl.float32)
        query = tl.load(q + row * q_n + i, mask=i < K, other=0.0).to(tl.float32)
        value = tl.load(v + row * v_n + j, mask=j < V, other=0.0).to(tl.float32)
        state = state * factor[:, None] + key[:, None] * value[None, :]
        out = tl.sum(query[:, None] * state, 0)
        tl.store(o_ptr + (bh * N + row) * V + j, out.to(o_ptr.dtype.element_ty), mask=j < V)
    tl.store(end_ptr + at, state, mask=inside)


@here
def walk(q: Tensor, k: Tensor, v: Tensor, log: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.scan`: log [B,H,N,K] as a view with strides of 0, start [B,H,K,V] float32, contiguous."""
    B, H, N, K = q.shape
    V = v.shape[3]
    o = torch.empty(B, H, N, V, dtype=v.dtype, device=v.device)
    end = torch.empty_like(start)
    BK, BV = triton.next_power_of_2(K), min(16, triton.next_power_of_2(V))
    _walk[(triton.cdiv(V, BV), B * H)](
        q, k, v, log, start, o, end, N, H, K, V,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *log.stride(),
        BK=BK, BV=BV, num_warps=4 if BK * BV >= 2048 else 1,
    )  # fmt: skip
    return o, end
