"""attend: the one door to softmax attention, whatever the pattern and whatever computes it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Full, Pattern
from saccade.kernels.attend import reference, tiled
from saccade.kernels.merge import Out

Impl = Literal["auto", "reference", "tiled", "triton"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | None = None,
    call: Call | None = None,
    *,
    key_bias: Tensor | None = None,
    lse: bool = True,
    impl: Impl = "auto",
) -> Out:
    """Softmax attention over the pairs of a pattern.

    Equal to dense attention under `pattern.mask(call)`. Query heads share key heads without copies; a query that sees
    no key gives 0. Gradients flow to q, k, v and key_bias.

    Args:
        q: queries.
        k: keys.
        v: values; their width may differ from the keys'.
        pattern: where to look; None = Full().
        call: positions, scale, causality; None = causal, the queries are the last N of the M keys.
        key_bias: added to the logits of a key: [1|B, 1|G|H, M].
        lse: also return the log-sum-exp (natural log, float32 or wider); False may be faster.
        impl: "reference" (dense, exact, slow), "tiled" (plain PyTorch, any device), "auto" (the best there is).
            A named implementation never gives way to another.

    Shapes:
        q [B,H,N,D], k [B,G,M,D], v [B,G,M,Dv], G divides H -> Out(o [B,H,N,Dv], lse [B,H,N] or None)

    Raises:
        InputError: shapes, dtypes or devices that do not fit, an empty axis, or (on a CPU, where looking costs
            nothing) NaN or infinity in q.
        UnsupportedError: impl="triton" where its kernels do not serve the call; the message says what is missing.

    Example:
        >>> q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
        >>> attend(q, k, k).o.shape
        torch.Size([1, 4, 6, 8])
    """
    pattern = Full() if pattern is None else pattern
    call = Call.of(q, k) if call is None else call
    call.check(q, k, v)
    pattern.check(call)
    B, H, G, _, M = call.shape
    bias = (1, 1, M) if key_bias is None else tuple(key_bias.shape)
    if len(bias) != 3 or bias[0] not in {1, B} or bias[1] not in {1, G, H} or bias[2] != M:
        raise InputError(f"attend: key_bias must be [1|{B}, 1|{G}|{H}, {M}], got {list(bias)}")
    if q.device.type == "cpu" and not torch.isfinite(q.detach()).all():
        bad = (~torch.isfinite(q.detach())).nonzero()
        raise InputError(
            f"attend: q holds NaN or infinity in {len(bad)} places, the first at [batch, head, query, width] "
            f"{bad[0].tolist()} (layer {call.layer}); look at the layer before"
        )
    if impl not in ("auto", "reference", "tiled", "triton"):
        raise InputError(f"attend: impl must be 'auto', 'reference', 'tiled' or 'triton', got {impl!r}")
    if impl == "reference":
        return reference.attend(q, k, v, pattern, call, key_bias)
    if impl == "triton" or (impl == "auto" and q.is_cuda):
        gpu = _triton()
        refused = "Triton is not installed" if gpu is None else gpu.refuses(q, k, v, pattern, call, key_bias)
        if gpu is not None and refused is None:
            return gpu.attend(q, k, v, pattern, call, key_bias, lse)  # type: ignore[no-any-return]
        if impl == "triton":
            raise UnsupportedError(f"attend: impl='triton' does not serve this call: {refused}; use 'tiled' or 'auto'")
    return tiled.attend(q, k, v, pattern, call, key_bias, lse)


def _triton() -> Any:
    """The GPU kernels, or None where Triton is not installed."""
    try:
        from saccade.kernels.attend import triton
    except ImportError:
        return None
    return triton
