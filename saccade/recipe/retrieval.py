"""The reader's RetrievalAttention plan, `data/plans/retrieval.json`: an exact search in the layer that looks up.

Run `python -m saccade.recipe.retrieval --out DIR`; nothing is fitted. In the reader's last layer a query answers to
single keys that their neighbours do not resemble, so that the mean of a cluster says little of the key in it: a search
over all keys reads half of the layer's bytes and misses none. The layers before it ask for whole neighbourhoods, which
a few clusters hold.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from saccade.core.plan import Assign, ModelShape, Plan
from saccade.recipe.model import Shape

FOUND, SINK, NEAR = 100, 64, 256
ARGS: dict[str, Any] = {"budget": SINK + NEAR + FOUND, "sink": SINK, "near": NEAR, "wait": True}


def retrieval() -> Plan:
    """32 clusters in all layers but the last."""
    shape = Shape()
    model = ModelShape(shape.layers, shape.heads, shape.kv_heads, "saccade-reader")
    before = [(Assign(None, "retrieval", ARGS | {"kind": "lists", "probes": 32}, "decode"),)] * (shape.layers - 1)
    last = (Assign(None, "retrieval", ARGS | {"kind": "flat"}, "decode"),)
    plan = Plan.per_head(model, [*before, last])
    return replace(plan, note="RetrievalAttention, exact in the last layer, from python -m saccade.recipe.retrieval")


def main() -> None:
    """Write the plan."""
    parser = argparse.ArgumentParser(description="write the reader's RetrievalAttention plan")
    parser.add_argument("--out", default="plans", help="folder for retrieval.json")
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    retrieval().save(out / "retrieval.json")
    print(out / "retrieval.json")


if __name__ == "__main__":
    main()
