"""Here: Triton launches on the current CUDA device, so a launch is made with the tensors' device as the current one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from saccade.core.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")


def here(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function with the device of its first tensor as the current CUDA device.

    PyTorch's own operators go to where their tensors are; a Triton kernel goes to the current device, and raises
    "Pointer argument cannot be accessed from Triton" where the tensors are on another one: a model on the second GPU,
    or one that is spread over several. Every function that launches a kernel, or makes a stream or an event, for
    tensors that it is given bears this decorator. Where the device is the current one already, and on a CPU, this is
    one comparison.

    Args:
        function: takes at least one tensor among its positional arguments; the first one counts.

    Raises:
        InputError: at a call without a tensor among the positional arguments.

    Example:
        >>> @here
        ... def double(count, x):
        ...     return x * count
        >>> double(2, torch.ones(2)).tolist()
        [2.0, 2.0]
    """

    @wraps(function)
    def there(*args: P.args, **kwargs: P.kwargs) -> T:
        for value in args:
            if isinstance(value, Tensor):
                if not value.is_cuda or value.device.index == torch.cuda.current_device():
                    return function(*args, **kwargs)
                with torch.cuda.device(value.device):
                    return function(*args, **kwargs)
        name = getattr(function, "__qualname__", repr(function))
        raise InputError(
            f"{name}: no tensor among {len(args)} positional arguments says which device is meant; pass one by position"
        )

    return there


def on(device: torch.device | str) -> AbstractContextManager[Any]:
    """A `with` block in which this device is the current one; nothing changes on a CPU, or without a number ("cuda").

    For streams, events and graphs, which belong to the device that is the current one when they are made or recorded.

    Example:
        >>> with on("cpu"):
        ...     x = torch.ones(1)
    """
    device = torch.device(device)
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
