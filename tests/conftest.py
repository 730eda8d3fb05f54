"""For all tests: one thread, a seed for each test, and memory that is not written to holds NaN."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # before any kernel is defined: Triton's interpreter runs them on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


def poisoned(make):
    """`torch.empty` and its kin, filled with what nobody should read, for calls that come from the package."""

    def empty(*args, **kwargs):
        out = make(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "saccade":
            out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)
        return out

    return empty


@pytest.fixture(autouse=True)
def careful(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
