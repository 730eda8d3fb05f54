"""scan: the one door to linear attention with decay: chunked over the sequence, or one token at a time."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from saccade.core.errors import InputError, UnsupportedError
from saccade.core.lasting import lasting
from saccade.kernels.scan import chunked, reference

Impl = Literal["auto", "reference", "chunked", "triton"]


# the state goes on in other calls, and where gradients are asked for it is kept for the backward pass
@lasting
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk: int = 64,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(decay_t) S_{t-1} + k_t v_t^T and o_t = q_t S_t: no softmax, no scale, no denominator.

    A token enters the state with weight 1, after the decay; its own output sees it. Sums and state are float32, or
    float64 when an input is. Gradients flow to q, k, v, decay and state. A sequence may be cut anywhere: going on with
    the returned state gives what one call gives.

    Args:
        q: queries.
        k: keys.
        v: values; their width may differ from the keys'.
        decay: natural log of the factor on the state, <= 0 and finite; None = no decay. One number per head [H]
            (lightning attention, retention), per token (gated), or per token and key channel (GLA).
        state: where to go on; None = zeros.
        chunk: tokens that are handled by matrix products among themselves; the result does not depend on it.
        impl: "reference" (token by token, slow), "chunked" (plain PyTorch, any device), "triton" (GPU), "auto" (the
            best there is).
            A named implementation never gives way to another.

    Shapes:
        q, k [B,H,N,D], v [B,H,N,E], decay [H] | [1|B,1|H,1|N] | [1|B,1|H,1|N,1|D], state [B,H,D,E]
        -> (o [B,H,N,E] in v's dtype, state [B,H,D,E])

    Raises:
        InputError: shapes, dtypes or devices that do not fit, an empty axis, or (on a CPU, where looking costs
            nothing) a decay that is positive or not finite.
        UnsupportedError: impl="triton" where its kernels do not serve the call; the message says what is missing.

    Example:
        >>> one = torch.ones(1, 1, 4, 1)
        >>> scan(one, one, one, torch.tensor([0.5]).log())[0].flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    _check(q, k, v, decay, state, chunk)
    B, H, N, D = q.shape
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    log = torch.zeros(1, 1, 1, 1, device=q.device) if decay is None else decay
    log = log[None, :, None, None] if log.ndim == 1 else log[..., None] if log.ndim == 3 else log
    start = torch.zeros(B, H, D, v.shape[3], device=q.device) if state is None else state
    if impl not in ("auto", "chunked", "reference", "triton"):
        raise InputError(f"scan: impl must be 'auto', 'reference', 'chunked' or 'triton', got {impl!r}")
    if impl == "triton" or (impl == "auto" and q.is_cuda):
        gpu = _triton()
        refused = "Triton is not installed" if gpu is None else gpu.refuses(q, k, v, log, start)
        if gpu is not None and refused is None:
            return gpu.scan(q, k, v, log, start)  # type: ignore[no-any-return]
        if impl == "triton":
            raise UnsupportedError(f"scan: impl='triton' does not serve this call: {refused}; use 'chunked' or 'auto'")
    # autocast would round the products of float32 sums to half precision
    with torch.autocast(q.device.type, enabled=False):
        args = (q.to(wide), k.to(wide), v.to(wide), log.to(wide), start.to(wide))
        # one token needs no chunks: the loop is the recurrent step
        if impl == "reference" or (impl == "auto" and N == 1):
            o, end = reference.scan(*args)
        else:
            o, end = chunked.scan(*args, chunk)
    return o.to(v.dtype), end


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, chunk: int) -> None:
    """Raise InputError unless everything fits together."""
    seen = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise InputError(f"scan: q, k, v must be [batch, heads, length, width], got {seen}")
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise InputError(f"scan: q and k must have one shape, v the same but for its width, got {seen}")
    if 0 in q.shape or 0 in v.shape:
        raise InputError(f"scan: empty sequence or axis: {seen}")
    if chunk < 1:
        raise InputError(f"scan: chunk must be >= 1, got {chunk}")
    for name, t in (("q", q), ("k", k), ("v", v), ("decay", decay), ("state", state)):
        if t is not None and not t.dtype.is_floating_point:
            raise InputError(f"scan: {name} must be floating point, got {t.dtype}")
        if t is not None and t.device != q.device:
            raise InputError(f"scan: {name} is on {t.device}, q on {q.device}")
    B, H, N, D = q.shape
    if state is not None and state.shape != (B, H, D, v.shape[3]):
        raise InputError(f"scan: state must be {[B, H, D, v.shape[3]]}, got {list(state.shape)}")
    if decay is None:
        return
    full = (H,) if decay.ndim == 1 else (B, H, N, D)[: decay.ndim]
    fits = decay.ndim in (1, 3, 4) and all(n in (1, want) for n, want in zip(decay.shape, full, strict=True))
    if not fits or (decay.ndim == 1 and decay.shape[0] != H):
        raise InputError(
            f"scan: decay must be [{H}], [1|{B}, 1|{H}, 1|{N}] or [1|{B}, 1|{H}, 1|{N}, 1|{D}], got {list(decay.shape)}"
        )
    if decay.device.type == "cpu" and not ((decay <= 0) & decay.isfinite()).all():
        raise InputError(
            f"scan: decay is the log of a factor, finite and <= 0, got values from {decay.min().item():g} "
            f"to {decay.max().item():g}; a slope s >= 0 is decay=-s, a gate g is decay=log(g)"
        )


def _triton() -> Any:
    """The GPU kernels, or None where Triton is not installed."""
    try:
        from saccade.kernels.scan import triton
    except ImportError:
        return None
    return triton
