"""attend: softmax attention under a pattern. `reference` says what is right, `tiled` is fast in plain PyTorch."""

from saccade.kernels.attend.api import attend

__all__ = ["attend"]
