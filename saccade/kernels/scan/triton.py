"""scan on a GPU."""

from __future__ import annotations

from torch import Tensor


def refuses(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> str | None:
    """Why the kernel does not serve the call; None where it does. decay [1|B,1|H,1|N,1|D]."""
    return "not written yet"


def scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `saccade.kernels.scan.scan`."""
    raise NotImplementedError
