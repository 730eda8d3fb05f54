"""Tasks by name. Their modules are imported when a task is loaded."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from saccade.core.errors import InputError

TASKS = {
    "needle": "saccade.evaluate.tasks.needle:Needle",
    "kv": "saccade.evaluate.tasks.kv:KeyValue",
}


def load_task(name: str) -> Any:
    """The task of a name, with its default options.

    Args:
        name: a key of `TASKS`.

    Example:
        >>> load_task("needle")
        Needle(book=None, distractors=0, depth=None, value='number', planted=True, max_new_tokens=24)
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(TASKS)}"
        raise InputError(f"unknown task {name!r}; {hint}")
    module, cls = TASKS[name].split(":")
    return getattr(import_module(module), cls)()
