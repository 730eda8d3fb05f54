"""Published head plans as Plans: MInference's JSON and DuoAttention's TSV."""

from __future__ import annotations

import json
import math
import os
import random
from typing import Any

from saccade.core.errors import PlanError
from saccade.core.plan import Assign, ModelShape, Plan, read_text

# a pattern of the file -> the method here and how its two numbers are called
_PATTERNS = {
    "vertical_and_slash": ("minference", ("columns", "diagonals")),
    "stream_llm": ("streaming", ("sink", "recent")),
    "block_sparse": ("pooled", ("budget", None)),
}
_MISSING = ("vertical_and_slash", 1000, 6096, 1)
_BLOCK = 64


def from_minference(path: str | os.PathLike[str], model: Any = None) -> Plan:
    """A prefill plan from a config published with MInference 1.0 (arXiv 2407.02490).

    The file is a JSON list with one object per layer: query head (as a string) -> [pattern, a, b, score]. A head that
    is missing gets vertical-slash (1000, 6096), as in the official code; the score is ignored.

    Args:
        path: the file.
        model: a ModelShape, model or config that says how many kv heads there are; None = as many as query heads.

    Raises:
        PlanError: not such a file, or for another model.

    Example:
        from_minference("Llama_3.1_8B_....json", ModelShape(32, 32, 8)) -> Plan
    """
    try:
        rows = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise PlanError(f"{path}: not readable as JSON ({error}); is the file whole?") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise PlanError(f"{path}: not an MInference config (a list with one object per layer)")
    ids = [key for row in rows for key in row]
    wrong = [key for key in ids if not (key.isascii() and key.isdigit() and len(key) < 6)]
    if wrong or not ids:
        said = f"got {wrong[0][:60]!r}" if wrong else "there is none"
        raise PlanError(f"{path}: head ids must be numbers up to 99999, {said}")
    heads = 1 + max(map(int, ids))
    shape = ModelShape(len(rows), heads, heads) if model is None else ModelShape.of(model)
    if shape.layers != len(rows) or heads > shape.heads:
        raise PlanError(
            f"{path}: for {len(rows)} layers of {heads} heads, the model has {shape.layers} of {shape.heads}"
        )
    layers = []
    for at, row in enumerate(rows):
        same: dict[tuple[Any, ...], list[int]] = {}
        for head in range(shape.heads):
            same.setdefault(_entry(row.get(str(head), _MISSING), f"{path}: layer {at}, head {head}"), []).append(head)
        layers.append([Assign(tuple(ids), name, dict(args)) for (name, args), ids in same.items()])
    note = f"MInference config {os.path.basename(path)}"
    if model is None:
        note += ", which does not say how query heads share key heads"
    return Plan.per_head(shape, layers, note=note)


def from_duo(
    path: str | os.PathLike[str],
    model: Any = None,
    *,
    sparsity: float = 0.5,
    sink: int = 64,
    recent: int = 256,
    seed: int = 0,
) -> Plan:
    """A cache plan from a head pattern published with DuoAttention (arXiv 2410.10819).

    The file is a table of gate values, a row per layer and a column per key head: 1 needs everything, 0 is a
    streaming head. The `sparsity` share of all heads with the smallest gates becomes streaming.

    Args:
        path: `full_attention_heads.tsv`.
        model: a ModelShape, model or config; None = a model with as many query heads as key heads.
        sparsity: share of key heads that stream, 0 to 1. The files' authors deploy 0.5 on models with grouped heads.
        sink, recent: tokens that a streaming head keeps.
        seed: breaks ties between equal gates.

    Raises:
        PlanError: not such a table, or for another model.
    """
    gates = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                row = [float(cell) for cell in line.split()]
            except ValueError:
                raise PlanError(
                    f"{path}: line {number} is not a row of numbers, so this is no table of DuoAttention's; a plan in "
                    "JSON begins with { or ["
                ) from None
            # a gate that is no number stays one, to be refused
            gates.append([g if math.isnan(g) else min(1.0, max(0.0, g)) for g in row])
    return from_gates(gates, model, sparsity=sparsity, sink=sink, recent=recent, seed=seed, where=str(path))


def from_gates(
    gates: list[list[float]],
    model: Any = None,
    *,
    sparsity: float = 0.5,
    sink: int = 64,
    recent: int = 256,
    seed: int = 0,
    where: str = "gates",
) -> Plan:
    """The same from gate values [layers][kv heads] in [0, 1]."""
    if not gates:
        raise PlanError(f"{where}: there is nothing in it")
    if not gates[0] or len({len(row) for row in gates}) != 1:
        raise PlanError(f"{where}: not a table with one row per layer and one column per key head")
    if not all(math.isfinite(g) for row in gates for g in row):
        raise PlanError(f"{where}: a gate is not a number")
    if not 0.0 <= sparsity <= 1.0:
        raise PlanError(f"{where}: sparsity must be in [0, 1], got {sparsity}")
    kv = len(gates[0])
    shape = ModelShape(len(gates), kv, kv) if model is None else ModelShape.of(model)
    if (shape.layers, shape.kv_heads) != (len(gates), kv):
        raise PlanError(
            f"{where}: for {len(gates)} layers of {kv} key heads, the model has {shape.layers} of {shape.kv_heads}"
        )
    rng = random.Random(seed)
    # ties are broken by noise far below any gate's precision, so that exactly the wanted share streams
    ranked = sorted(
        (g + rng.random() * 1e-6, layer, head) for layer, row in enumerate(gates) for head, g in enumerate(row)
    )
    streaming: list[list[int]] = [[] for _ in gates]
    for _, layer, head in ranked[: round(sparsity * len(ranked))]:
        streaming[layer].append(head)
    args = {"sink": sink, "recent": recent}
    layers = [[Assign(tuple(sorted(ids)), "duo", args, "cache")] if ids else [] for ids in streaming]
    note = f"DuoAttention, {sparsity:.0%} of key heads stream, from {os.path.basename(where)}"
    if model is None:
        note += ", which does not say how many query heads share a key head"
    return Plan.per_head(shape, layers, note=note)


def _entry(entry: Any, where: str) -> tuple[str, tuple[tuple[str, int], ...]]:
    known = isinstance(entry, (list, tuple)) and len(entry) >= 3 and isinstance(entry[0], str)
    if not known or entry[0] not in _PATTERNS:
        raise PlanError(
            f"{where}: must be [pattern, a, b, score], a pattern one of {', '.join(_PATTERNS)}; got {str(entry)[:200]}"
        )
    name, labels = _PATTERNS[entry[0]]
    numbers = entry[1:3]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise PlanError(f"{where}: sizes must be whole numbers, got {numbers!r}")
    if name == "pooled":
        numbers = [numbers[0] * _BLOCK, 0]
    return name, tuple((label, n) for label, n in zip(labels, numbers, strict=True) if label)
