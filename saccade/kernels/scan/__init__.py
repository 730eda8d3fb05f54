"""scan: linear attention with decay. `reference` says what is right, `chunked` is fast in plain PyTorch."""

from saccade.kernels.scan.api import scan

__all__ = ["scan"]
