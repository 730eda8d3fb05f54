"""The reader's plan for fetching, `data/plans/fetch+offload.json`: the layer that looks up reads all that is far.

Run `python -m saccade.recipe.fetch --out DIR`; nothing is fitted. In the reader's last layer a query answers to single
keys among others that are nothing to it, and the bounds of a block do not tell which block holds one. The layers before
it ask for whole neighbourhoods: large blocks, whose bounds cost little, and as many keys as the reader's Quest plan.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from saccade.core.plan import Assign, ModelShape, Plan
from saccade.recipe.model import Shape

NAME = "fetch+offload.json"
AWAY = Assign(None, "offload", {"sink": 64, "recent": 128, "block": 64}, "cache")
NEAR = Assign(None, "fetch", {"blocks": {"base": 4, "slope": 1 / 4096}}, "decode")


def fetch() -> Plan:
    """Blocks of 64 far away in all layers, a few of them fetched in all layers but the last."""
    shape = Shape()
    model = ModelShape(shape.layers, shape.heads, shape.kv_heads, "saccade-reader")
    plan = Plan.per_head(model, [*[(NEAR, AWAY)] * (shape.layers - 1), (AWAY,)])
    return replace(plan, note="fetch beside offload, last layer dense, from python -m saccade.recipe.fetch")


def main() -> None:
    """Write the plan."""
    parser = argparse.ArgumentParser(description="write the reader's plan for fetching from host memory")
    parser.add_argument("--out", default="plans", help=f"folder for {NAME}")
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    fetch().save(out / NAME)
    print(out / NAME)


if __name__ == "__main__":
    main()
