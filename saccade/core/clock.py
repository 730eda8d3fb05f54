"""Clock: what is told where the time of a forward goes. There is none unless somebody measures."""

from __future__ import annotations

from typing import Protocol

PARTS = ("select", "attend", "copy", "rest")


class Clock(Protocol):
    """Whoever measures: `lap(part)` says that all since the lap before was spent on that part.

    Parts are "select" (choosing where to look, or what stays), "attend" (a method that gives the answer itself is all
    of this), "copy" (keys and values that move) and "rest" (the model around attention).
    """

    def lap(self, part: str) -> None:
        """The end of a stretch of time."""


def lap(clock: Clock | None, part: str) -> None:
    """A lap of a clock, where there is one."""
    if clock is not None:
        clock.lap(part)
