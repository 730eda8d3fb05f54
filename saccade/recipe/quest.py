"""The reader's Quest plan, `data/plans/quest.json`: the layer that looks up is dense, as the paper's first two are.

Run `python -m saccade.recipe.quest --out DIR`; nothing is fitted. In the reader's last layer a query answers to single
keys among others that are nothing to it, and the bounds of pages tell them apart only where pages are small and many
are read. The layers before it ask for whole neighbourhoods: large pages and few keys serve them, the same ones for the
query heads that share keys.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from saccade.core.plan import Assign, ModelShape, Plan
from saccade.recipe.model import Shape

ARGS = {"budget": {"base": 256, "slope": 1 / 64}, "block_k": 32, "first": 0, "together": True}


def quest() -> Plan:
    """Pages of 32 in all layers but the last."""
    shape = Shape()
    model = ModelShape(shape.layers, shape.heads, shape.kv_heads, "saccade-reader")
    before = [(Assign(None, "quest", ARGS, "decode"),)] * (shape.layers - 1)
    plan = Plan.per_head(model, [*before, ()])
    return replace(plan, note="Quest, last layer dense, from python -m saccade.recipe.quest")


def main() -> None:
    """Write the plan."""
    parser = argparse.ArgumentParser(description="write the reader's Quest plan")
    parser.add_argument("--out", default="plans", help="folder for quest.json")
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    quest().save(out / "quest.json")
    print(out / "quest.json")


if __name__ == "__main__":
    main()
