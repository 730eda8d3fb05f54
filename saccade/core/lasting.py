"""Lasting: what a function makes can be written again later, whoever called it under `torch.inference_mode`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def lasting(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function make ordinary tensors, without gradients, also where its caller is in inference mode.

    A tensor that is born in inference mode may not be written after it. A cache outlives the call that fills it: a
    prompt read under `torch.inference_mode()` goes on in `generate`, which knows `no_grad` only, and what a cache holds
    is given back by whoever collects it.

    Example:
        >>> zeros = lasting(torch.zeros)
        >>> with torch.inference_mode():
        ...     kept = zeros(2)
        >>> kept.add_(1).tolist()
        [1.0, 1.0]
    """

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside
