"""The reader's Quest plan, `data/plans/quest.json`: small pages in the layer that looks up, larger ones before it.

Run `python -m saccade.recipe.quest --out DIR`; nothing is fitted. In the reader's last layer a query answers to single
keys among others that are nothing to it, so that only the bounds of small pages tell one from another; the layers
before it ask for whole neighbourhoods. Query heads that share keys read the same pages.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from saccade.core.plan import Assign, ModelShape, Plan
from saccade.recipe.model import Shape

ARGS = {"budget": {"base": 256, "slope": 1 / 16}, "block_k": 16, "first": 0, "together": True}
LOOKS_UP = 4  # slots in a page of the last layer


def quest() -> Plan:
    """Pages of 16, in the last layer of 4; a sixteenth of the keys."""
    shape = Shape()
    model = ModelShape(shape.layers, shape.heads, shape.kv_heads, "saccade-reader")
    rows = [ARGS] * (shape.layers - 1) + [{**ARGS, "block_k": LOOKS_UP}]
    plan = Plan.per_head(model, [(Assign(None, "quest", args, "decode"),) for args in rows])
    return replace(plan, note="Quest, small pages in the last layer, from python -m saccade.recipe.quest")


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
