"""Above: dense below the length at which a method pays, the method from there on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Full, Pattern
from saccade.core.table import build
from saccade.methods.base import Selector


@dataclass(frozen=True)
class Above(Selector):
    """Dense attention to fewer keys than a method's break-even length, the method from there on.

    No paper. Selection costs something and short sequences save little: below some length dense attention is faster
    and exact. That length depends on the machine; "auto" takes it from `crossover.json` beside this file, which
    `python bench/crossover.py` measured, by the kind of device that the queries are on.

    Args:
        inner: the method, {"method": name, "args": {...}} as in a plan; it must say where to look (a Selector).
        length: stored keys from which on it is used, or "auto".

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Full() or the inner method's pattern

    Raises:
        InputError: an inner method that gives the answer itself, or a length below 1.

    Departs from the paper: nothing, there is none.

    Example:
        >>> import torch
        >>> above = Above({"method": "streaming", "args": {"sink": 2, "recent": 8}}, length=100)
        >>> q = torch.zeros(1, 1, 99, 4)
        >>> above.select(q, q, Call.of(q, q))
        Full()
        >>> q = torch.zeros(1, 1, 100, 4)
        >>> above.select(q, q, Call.of(q, q))
        Window(sink=2, recent=8)
    """

    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    inner: dict[str, Any]
    length: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, dict) or set(self.inner) - {"method", "args"} or "method" not in self.inner:
            raise InputError(f'Above: inner must be {{"method": name, "args": {{...}}}}, got {str(self.inner)[:80]}')
        if self.length != "auto" and (isinstance(self.length, bool) or not isinstance(self.length, int)):
            raise InputError(f'Above: length must be an int >= 1 or "auto", got {self.length!r}')
        if self.length != "auto" and self.length < 1:
            raise InputError(f"Above: length must be >= 1, got {self.length}")
        inner = self.method
        if not isinstance(inner, Selector):
            raise InputError(
                f"Above: {self.inner['method']} gives the answer itself; only a method that says where fits"
            )
        # what is true of the inner method is true here; below the length all is exact
        for name in ("phases", "strictly_causal", "exact", "chunked", "whole_store", "unbroken"):
            object.__setattr__(self, name, getattr(inner, name))

    @property
    def method(self) -> Any:
        """The inner method itself."""
        return build(self.inner["method"], self.inner.get("args", {}))

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        length = self._length(q)
        if call.filled is not None:
            # in steps of a fixed shape the host knows the position, not the shape
            call.memory.setdefault(f"above {call.heads}", {})["turn"] = lambda at: at + 1 >= length
        if length > (call.shape.M if call.filled is None else call.filled.at + 1):
            return Full()
        pattern: Pattern = self.method.select(q, k, call)
        return pattern

    def source(self, layer: int) -> int | None:
        found: int | None = self.method.source(layer)
        return found

    def estimate(self, call: Call) -> float:
        # the device is not known here; a call that was dense made no estimate worth counting against the method
        fewest = self.length if isinstance(self.length, int) else min(crossovers().values(), default=1)
        return 0.0 if fewest > call.shape.M else float(self.method.estimate(call))

    def _length(self, q: Tensor) -> int:
        if self.length != "auto":
            return self.length
        known = crossovers()
        name = f"{q.device.type}/{self.inner['method']}"
        if name not in known:
            raise InputError(
                f"Above: no measured break-even length for {self.inner['method']} on {q.device.type}; give length= in "
                f"tokens (measured: {', '.join(sorted(known))})"
            )
        return known[name]


@cache
def crossovers() -> dict[str, int]:
    """Measured break-even lengths in tokens, by "device/method"."""
    found: dict[str, int] = json.loads((Path(__file__).parent / "crossover.json").read_text())["tokens"]
    return found
