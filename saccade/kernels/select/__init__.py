"""Where to look, found on the device: pooled blocks, the largest of a row, vertical-slash.

Each idea has a plain PyTorch form, which any device runs and the CPU should, and a Triton kernel. Nothing here waits
for the device: lists have a length that follows from shapes and budgets, and -1 where nothing more is meant.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

WIDEST = 256  # features of a head that a kernel multiplies at once
SCRATCH = 1 << 26  # scores held at once: 256 MB in float32


def kernels_serve(t: Tensor) -> bool:
    """Is the tensor on a GPU, and Triton installed?"""
    return t.is_cuda and find_spec("triton") is not None


def on_gpu(*tensors: Tensor, width: int = 1) -> bool:
    """Do the Triton kernels serve these tensors, multiplied over `width` features? Not for gradients or float64."""
    served = (torch.float32, torch.float16, torch.bfloat16)
    fits = width <= WIDEST and all(kernels_serve(t) and t.dtype in served for t in tensors)
    return fits and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
