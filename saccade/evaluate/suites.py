"""Suites: evaluations of the bundled reader under a name, so that everybody's figures come from the same cells.

A task is in the full suite if stock attention does half of it or more: tasks at which the reader fails whatever the
method (counting words, chains of assignments, sums: docs/eval.md) say nothing of one.
"""

from __future__ import annotations

from dataclasses import dataclass

from saccade.core.errors import InputError
from saccade.evaluate.presets import CONTROLS


@dataclass(frozen=True)
class Suite:
    """Methods with the controls among them, tasks, lengths in tokens, samples per cell."""

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int


SUITES = {
    # for two CPU cores
    "quick": Suite(
        methods=("dense", "streaming", "minference", "quest", "minference+duo"),
        tasks=("needle", "kv", "niah-single", "niah-multikey", "passkey", "copy-perplexity"),
        lengths=(2048, 4096, 8192),
        samples=10,
    ),
    # for a GPU
    "full": Suite(
        methods=(
            *CONTROLS,
            *("minference", "trishape", "xattention", "quest", "tidal", "duo", "razor", "minference+duo"),
        ),
        tasks=(
            *(
                "needle",
                "kv",
                "passkey",
                "number",
                "niah-single",
                "niah-multikey",
                "ruler-single-2",
                "ruler-multikey-2",
            ),
            *("multi-turn", "perplexity", "copy-perplexity"),
        ),
        lengths=(4096, 8192, 16384, 32768),
        samples=50,
    ),
}


def get_suite(name: str) -> Suite:
    """A suite by name.

    Raises:
        InputError: there is none of this name.

    Example:
        >>> get_suite("quick").samples
        10
    """
    if name not in SUITES:
        raise InputError(f"unknown suite {name!r}; known are {', '.join(SUITES)}")
    return SUITES[name]
