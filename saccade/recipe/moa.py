"""Fit the reader's MoA plan, `data/plans/moa.json`: which key head's span must grow with the text, and how fast.

Run `python -m saccade.recipe.moa --out DIR`; under a minute on one core. The documents are of the needle task, with
seeds that no evaluation uses. Only answers are supervised: with the questions' own words supervised too, the first
layer's heads seem to need the far past most, and the heads that look up are given short spans.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.core.plan import ModelShape, Plan
from saccade.evaluate.tasks.needle import compose
from saccade.fit.moa import BLOCK, by_key_head, choose, plan_of, profile, rules_for

SEED = 200_000
PROFILED = {1024: (5, 6), 2048: (10, 4)}  # tokens -> facts in a document, documents
EXTENDED = (4096, 8192, 16384, 32768)  # the density counts here too
STEP = 128  # between the grid's constants, in tokens: the paper's 1024 of 8192, for shorter profiles


def samples(tokenizer: Any, length: int, facts: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Documents with all their questions and answers behind them, less than a block shorter than `length`.

    The answers are what is supervised: the reader's own are the same.
    """
    found: list[tuple[Tensor, Tensor]] = []
    seed = SEED
    while len(found) < count:
        document = compose(tokenizer, length - 31 * facts, facts=facts, seed=seed)
        ids, marks = list(document.ids), [False] * len(document.ids)
        for question, answer in zip(document.questions, document.answers, strict=True):
            for text, supervised in ((f"\n\n{question}", False), (f" {answer}", True)):
                part = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += part
                marks += [supervised] * len(part)
        seed += 1
        if length - BLOCK < len(ids) <= length:
            found.append((torch.tensor(ids), torch.tensor(marks)))
    return found


def reader_plan(model: Any, tokenizer: Any, density: float) -> Plan:
    """Profile, choose, and name the reader."""
    shape = replace(ModelShape.of(model), name="saccade-reader")
    profiles = {}
    for length, (facts, count) in PROFILED.items():
        blocks = profile(model, samples(tokenizer, length, facts, count))
        profiles[length] = by_key_head(blocks, shape.kv_heads)
    rules = choose(profiles, rules_for([*PROFILED], step=STEP), density=density, lengths=EXTENDED)
    note = f"MoA, spans of at most {density:.0%} of the keys on average, from python -m saccade.recipe.moa"
    return replace(plan_of(shape, rules), note=note)


def main() -> None:
    """Fit and write."""
    from saccade.reader import load

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--density", type=float, default=0.25)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(device=args.device)
    start = time.time()
    reader_plan(model, tokenizer, args.density).save(args.out / "moa.json")
    print(f"plan in {args.out} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
