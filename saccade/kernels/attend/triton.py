"""attend on a GPU: which kernel serves which call. A kernel is compiled at its first use, never at import."""

from __future__ import annotations

import os

from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Pattern
from saccade.kernels.attend import triton_decode, triton_prefill
from saccade.kernels.here import here
from saccade.kernels.merge import Out

PACKED = 16  # with a past and at most so many queries, the decode kernel splits the keys instead of the rows


def refuses(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None) -> str | None:
    """Why no kernel serves this call, in words; None where one does."""
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {q.device}, the kernels need a GPU"
    return _kernel(call).refuses(q, k, v, pattern, call, bias)  # type: ignore[no-any-return]


@here
def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None, lse: bool) -> Out:
    """As `saccade.kernels.attend.attend`, on checked arguments that `refuses` let pass."""
    return _kernel(call).attend(q, k, v, pattern, call, bias, lse)  # type: ignore[no-any-return]


def _kernel(call: Call):  # type: ignore[no-untyped-def]
    decoding = call.shape.N <= PACKED and call.shape.M > call.shape.N
    return triton_decode if decoding else triton_prefill
