"""The ladder: what a method is. Implement the lowest rung that your method allows."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Output(NamedTuple):
    """What a Layer returns: the result, the state that lets it go on, and its own loss (0-d tensor or None)."""

    y: Tensor
    state: Any = None
    loss: Tensor | None = None


class Layer(nn.Module):
    """A module with its own weights that mixes tokens: x [B,N,C] -> Output(y [B,N,C], state, loss).

    `state=None` starts a sequence; passing the returned state on continues it, and any split of a sequence gives the
    same numbers as one call. A loss is returned, never stored on the module.
    """

    def forward(self, x: Tensor, state: Any = None) -> Output:
        raise NotImplementedError(f"{type(self).__name__} must implement forward(x, state)")
