"""What all benches share: the clock, the machine's ceilings measured in the same run, the gate before any timing."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core.errors import SaccadeError

LEAST = 20  # runs that a median on a GPU is made of
CLEARED = 32  # before a run on a GPU one part in so many of its memory is cleared: about a millisecond


class Ceiling(NamedTuple):
    """What the machine can do: products of matrices in TFLOP/s, copies in TB/s (bytes read and written)."""

    tflops: float
    tbytes: float

    def floor_ms(self, flop: float = 0.0, bytes: float = 0.0) -> float:
        """The least time that so much arithmetic and so many bytes take, whichever is longer."""
        return max(flop / self.tflops, bytes / self.tbytes) / 1e9


def median_ms(run: Callable[[], Any], device: str, repeat: int = LEAST, warm: int = 3) -> float:
    """Median milliseconds of a call.

    On a GPU it is the device's time, by events around each call: before it a large buffer is cleared, which empties
    the caches and gives Python the time to run ahead, as it does in a model of many layers.
    """
    for _ in range(warm):
        run()
    taken = []
    cleared = None
    if device.startswith("cuda"):
        size = torch.cuda.get_device_properties(device).total_memory // CLEARED
        cleared = torch.empty(size, dtype=torch.uint8, device=device)
    for _ in range(repeat):
        if cleared is not None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)
            torch.cuda.synchronize(device)
            cleared.zero_()
            begin.record(stream)
            run()
            end.record(stream)
            torch.cuda.synchronize(device)
            taken.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            taken.append((time.perf_counter() - start) * 1e3)
    return median(taken)


def ceiling(device: str, dtype: torch.dtype) -> Ceiling:
    """Measure both: a large product of square matrices of normal numbers, and a copy far larger than the caches."""
    size, length = (8192, 1 << 30) if device.startswith("cuda") else (256, 1 << 20)
    square = torch.randn(size, size, device=device, dtype=dtype)
    tflops = 2 * size**3 / median_ms(lambda: square @ square, device) / 1e9
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    tbytes = 2 * length / median_ms(lambda: target.copy_(source), device) / 1e9
    return Ceiling(tflops, tbytes)


def gate(what: str, ours: Tensor, plain: Tensor, truth: Tensor, factor: float = 2.0) -> tuple[float, float]:
    """Errors of the kernel and of plain PyTorch in the same dtype, both against wider arithmetic.

    Raises:
        SaccadeError: the first is more than `factor` times the second, or not a number: nothing is timed then.
    """
    error, allowed = ((t.double() - truth.double()).abs().max().item() for t in (ours, plain))
    slack = 1e-7 * truth.abs().max().item()
    if not error <= factor * allowed + slack:
        raise SaccadeError(f"bench: {what} is off by {error:.2e}, plain PyTorch by {allowed:.2e}: nothing was timed")
    return error, allowed


def row(impl: str, peer: str, device: str, dtype: torch.dtype, length: int, density: float, ms: float, peer_ms: float,
        **more: Any) -> dict[str, Any]:  # fmt: skip
    """One row of a bench: the fields that all have, then what a bench adds."""
    return {
        "impl": impl,
        "peer": peer,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "length": length,
        "density": round(density, 4),
        "ms": round(ms, 4),
        "peer_ms": round(peer_ms, 4),
        "speedup": round(peer_ms / ms, 3),
        **{key: round(value, 4) if isinstance(value, float) else value for key, value in more.items()},
    }
