"""Tasks by name. Their modules are imported when a task is loaded."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from saccade.core.errors import InputError

TASKS = {
    "needle": "saccade.evaluate.tasks.needle:Needle",
    "kv": "saccade.evaluate.tasks.kv:KeyValue",
    "passkey": "saccade.evaluate.tasks.passkey:Passkey",
    "number": "saccade.evaluate.tasks.number:Number",
    "math-find": "saccade.evaluate.tasks.math_find:MathFind",
    "niah-single": "saccade.evaluate.tasks.niah_single:NiahSingle",
    "niah-multikey": "saccade.evaluate.tasks.niah_multikey:NiahMultikey",
    "niah-multivalue": "saccade.evaluate.tasks.niah_multivalue:NiahMultivalue",
    "niah-multiquery": "saccade.evaluate.tasks.niah_multiquery:NiahMultiquery",
    "variable-tracking": "saccade.evaluate.tasks.variable_tracking:VariableTracking",
    "common-words": "saccade.evaluate.tasks.common_words:CommonWords",
    "frequent-words": "saccade.evaluate.tasks.frequent_words:FrequentWords",
    "qa-facts": "saccade.evaluate.tasks.qa_facts:QaFacts",
    "mqar": "saccade.evaluate.tasks.mqar:Mqar",
    "copy": "saccade.evaluate.tasks.copy:Copy",
    "selective-copy": "saccade.evaluate.tasks.selective_copy:SelectiveCopy",
    "mrcr": "saccade.evaluate.tasks.mrcr:Mrcr",
    "graph-walks": "saccade.evaluate.tasks.graph_walks:GraphWalks",
    "perplexity": "saccade.evaluate.tasks.perplexity:Perplexity",
    "copy-perplexity": "saccade.evaluate.tasks.copy_perplexity:CopyPerplexity",
    "multi-turn": "saccade.evaluate.tasks.multi_turn:MultiTurn",
    "multi-request": "saccade.evaluate.tasks.multi_request:MultiRequest",
}

# RULER's thirteen: a task and its options; niah in books, keys of words and numbers of 7 digits unless said otherwise
RULER: dict[str, tuple[str, dict[str, Any]]] = {
    "ruler-single-1": ("niah-single", {"max_new_tokens": 128}),
    "ruler-single-2": ("niah-single", {"haystack": "books", "max_new_tokens": 128}),
    "ruler-single-3": ("niah-single", {"haystack": "books", "value": "uuid", "max_new_tokens": 128}),
    "ruler-multikey-1": ("niah-multikey", {"max_new_tokens": 128}),
    "ruler-multikey-2": ("niah-multikey", {"haystack": "facts", "keys": 1, "max_new_tokens": 128}),
    "ruler-multikey-3": (
        "niah-multikey",
        {"haystack": "facts", "keys": 1, "key": "uuid", "value": "uuid", "max_new_tokens": 128},
    ),
    "ruler-multivalue": ("niah-multivalue", {"max_new_tokens": 128}),
    "ruler-multiquery": ("niah-multiquery", {"max_new_tokens": 128}),
    "ruler-vt": ("variable-tracking", {}),
    "ruler-cwe": ("common-words", {}),
    "ruler-fwe": ("frequent-words", {}),
    "ruler-qa-1": ("qa-facts", {}),
    "ruler-qa-2": ("qa-facts", {"hops": 2}),
}


def load_task(name: str) -> Any:
    """The task of a name, with its default options or those of RULER.

    Args:
        name: a key of `TASKS` or `RULER`.

    Example:
        >>> load_task("needle")
        Needle(book=None, distractors=0, depth=None, value='number', planted=True, max_new_tokens=24)
    """
    task, options = RULER.get(name, (name, {}))
    if task not in TASKS:
        known = [*TASKS, *RULER]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise InputError(f"unknown task {name!r}; {hint}")
    module, cls = TASKS[task].split(":")
    return getattr(import_module(module), cls)(**options)
