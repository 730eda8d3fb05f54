"""Progress on stderr: one line that is rewritten on a terminal, a line per step elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Counts steps and says how long the rest will take.

    Args:
        total: steps in all.
        stream: where to write (stderr).

    Example:
        >>> progress = Progress(2, stream=sys.stdout)
        >>> progress.step("dense")  # doctest: +ELLIPSIS
        [1/2] dense, ... left
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done = total, 0
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.started = time.monotonic()

    def step(self, text: str) -> None:
        """One step more is finished."""
        self.done += 1
        self.show(text)

    def show(self, text: str) -> None:
        """Say what is going on."""
        past = time.monotonic() - self.started
        left = f", {_clock(past / self.done * (self.total - self.done))} left" if self.done else ""
        line = f"[{self.done}/{self.total}] {text}{left}"
        if self.live:
            self.stream.write(f"\r\x1b[K{line[:99]}")
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        self.stream.write(text + "\n")
        self.stream.flush()

    def clear(self) -> None:
        """Take the rewritten line away."""
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def warn(text: str) -> None:
    """A warning for the person at the terminal."""
    print(f"saccade: warning: {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min, 1.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
