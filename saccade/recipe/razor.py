"""Find the reader's RazorAttention heads and write `data/plans/razor.json`: which key heads are kept whole.

Run `python -m saccade.recipe.razor --out DIR`; half a minute on one core. Random tokens are all that is read, no text.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from saccade.core.plan import ModelShape, Plan
from saccade.fit.razor import plan_of, score_heads

# half of the paper's 2500: the heads that stand out are the same at 64, 128 and 1250
PERIOD, REPEATS = 1250, 4
# a sixteenth of the tokens in the other heads, where the paper keeps a fifth
SIZES = {"sink": 16, "least": 256, "ratio": 16}


def reader_plan(model: Any) -> Plan:
    """Score, keep the best whole, and name the reader."""
    shape = replace(ModelShape.of(model), name="saccade-reader")
    scores = score_heads(model, period=PERIOD, repeats=REPEATS)
    plan = plan_of(shape, scores, **SIZES)
    return replace(plan, note=f"{plan.note}; from python -m saccade.recipe.razor")


def main() -> None:
    """Score and write."""
    from saccade.reader import load

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, _ = load(device=args.device)
    start = time.time()
    reader_plan(model).save(args.out / "razor.json")
    print(f"plan in {args.out} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
