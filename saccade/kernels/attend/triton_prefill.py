"""Rows of queries against blocks, windows and tokens, one launch for a layer."""

from __future__ import annotations

from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Pattern
from saccade.kernels.merge import Out


def refuses(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None) -> str | None:
    """Why this kernel does not serve the call; None where it does."""
    return "not written yet"


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None, lse: bool) -> Out:
    """As `saccade.kernels.attend.attend`."""
    raise NotImplementedError
