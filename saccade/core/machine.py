"""The machine that this process runs on."""

from __future__ import annotations

import os


def cpus() -> int:
    """CPUs that this process may use: fewer than there are, in a container or under `taskset`.

    Example:
        >>> cpus() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
