"""The reader's HiP plans, `data/plans/hip.json` and `infinitehip.json`: layers with settings of their own.

Run `python -m saccade.recipe.hip --out DIR`; nothing is fitted. In the reader's layers 1 to 6 neighbouring keys are
alike to a query, as the tree search assumes; in its last layer, which looks up, a query answers to single keys among
others that are nothing to it. There `hip` is left dense, and `infinitehip` looks at every key, by chunks of four.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from saccade.core.plan import Assign, ModelShape, Plan
from saccade.recipe.model import Shape

BUDGET = {"base": 256, "slope": 1 / 64}  # 512 keys at 16384 tokens
BROAD = {"base": 512, "slope": 1 / 32}  # the first layer looks everywhere
# where the last layer is dense the others have less: together at most a fifth is read from 16384 tokens on
BESIDE_DENSE = {"base": 256, "slope": 1 / 80}
BROAD_BESIDE_DENSE = {"base": 256, "slope": 1 / 32}
NEAR = {"sink": 64, "window": 128, "first": 0}


def hip() -> Plan:
    """HiP in all layers but the last, with every 16th row of a query block judging."""
    args = {"budget": BESIDE_DENSE, **NEAR, "stride": 16, "refresh": 2}
    first = {**args, "budget": BROAD_BESIDE_DENSE}
    rows: list[dict[str, Any] | None] = [first, *[args] * (Shape().layers - 2), None]
    return _plan("hip", rows, "HiP, last layer dense")


def infinitehip() -> Plan:
    """InfiniteHiP with coarse chunks in the middle layers, fine ones in the first, and every key in the last."""
    coarse = {"chunks": [64, 16], "keep": [1024], "strides": [8, 4], "refresh": [4, 2]}
    fine = {"chunks": [16], "keep": [], "strides": [8], "refresh": [2]}
    every = {"chunks": [4], "keep": [], "strides": [8], "refresh": [1]}
    middle = {"budget": BUDGET, **NEAR, **coarse}
    first, last = {**middle, "budget": BROAD, **fine}, {**middle, **every}
    return _plan(
        "infinitehip", [first, *[middle] * (Shape().layers - 2), last], "InfiniteHiP, every key in the last layer"
    )


def _plan(name: str, rows: list[dict[str, Any] | None], note: str) -> Plan:
    shape = Shape()
    model = ModelShape(shape.layers, shape.heads, shape.kv_heads, "saccade-reader")
    layers = [
        () if args is None else tuple(Assign(None, name, args, phase) for phase in ("prefill", "decode"))
        for args in rows
    ]
    return replace(Plan.per_head(model, layers), note=f"{note}, from python -m saccade.recipe.hip")


def main() -> None:
    """Write both plans."""
    parser = argparse.ArgumentParser(description="write the reader's HiP plans")
    parser.add_argument("--out", default="plans", help="folder for hip.json and infinitehip.json")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, plan in (("hip", hip()), ("infinitehip", infinitehip())):
        plan.save(out / f"{name}.json")
        print(out / f"{name}.json")


if __name__ == "__main__":
    main()
