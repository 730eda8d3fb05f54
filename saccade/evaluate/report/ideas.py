"""What a method does, in the line that `saccade list` prints."""

from __future__ import annotations

import importlib
import sys

from saccade.core.table import METHODS, find

STOCK = "Stock transformers (sdpa and DynamicCache), nothing of saccade attached."


def idea(name: str) -> str:
    """The idea of a method, or of each part of a combination.

    Example:
        >>> idea("dense") == STOCK
        True
    """
    if name == "dense":
        return STOCK
    ideas = []
    for part in name.split("+"):
        if part in METHODS:
            module = importlib.import_module(find(part).__module__)
            ideas.append(" ".join((sys.modules[module.__name__].__doc__ or "").split("\n\n")[0].split()))
    return " ".join(ideas) or f"The plan of {name}."
