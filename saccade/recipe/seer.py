"""Train the reader's SeerAttention gate, `data/plans/seer.safetensors`, and write the plan that names it.

Run `python -m saccade.recipe.seer --books DIR --out DIR`; about five minutes on one core. The documents are those of
the training mixture, from five of the training books: a gate of 393k weights learns from few. The gate that is shipped
was made by the same steps with the books in another order and features held in half precision.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.core.plan import ModelShape, Plan
from saccade.fit.seer import fit_gate
from saccade.methods.gates import INSIDE, PACKAGE, save_gate
from saccade.reader.books import training
from saccade.recipe.books import tokenise
from saccade.recipe.mixture import Mixture

BOOKS = ("adam-bede", "emma", "federalist-papers", "nostromo", "villette")
BLOCK = 64
KINDS = ("facts", "pairs", "book", "facts", "copies", "chains")
LENGTHS = (2048, 2048, 2048, 4096) * 4 + (2048, 2048, 2048, 8192)


def documents(mixture: Mixture, count: int, seed: int = 0) -> list[Tensor]:
    """Documents of every kind, most of them short."""
    rng, found = Random(seed), []
    for i in range(count):
        ids, _ = mixture.document(rng, LENGTHS[i % len(LENGTHS)], KINDS[i % len(KINDS)])
        found.append(torch.from_numpy(ids.astype(np.int64)))
    return found


def reader_plan(model: Any, gate: str, budget: float) -> Plan:
    """The plan of a gate in prefill, for the reader's query heads in all layers."""
    shape = replace(ModelShape.of(model), name="saccade-reader")
    plan = Plan.uniform(shape, prefill=("seer", {"weights": gate, "budget": budget}))
    return replace(plan, note="SeerAttention, gate from python -m saccade.recipe.seer")


def main() -> None:
    """Train, save, and write the plan."""
    from saccade.reader import load

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", required=True, help="folder of .txt files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documents", type=int, default=90)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--budget", type=float, default=0.05)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(device=args.device)
    raw = tokenizer.backend_tokenizer
    texts = ((name, text) for name, text in training(args.books) if name in BOOKS)
    samples = documents(Mixture(tokenise(texts, raw), raw), args.documents)
    start, losses = time.time(), []

    def progress(step: int, loss: float) -> None:
        losses.append(loss)
        if len(losses) == args.documents:
            print(
                f"step {step + 1}: mean loss {sum(losses) / len(losses):.3f}, {time.time() - start:.0f} s", flush=True
            )
            losses.clear()

    file = args.out / "seer.safetensors"
    gates = fit_gate(model, samples, file, block=BLOCK, epochs=args.epochs, lr=args.lr, progress=progress)
    save_gate(file, [gate.half() for gate in gates], BLOCK)
    place = file.resolve()
    inside = place.is_relative_to(PACKAGE)
    named = INSIDE + place.relative_to(PACKAGE).as_posix() if inside else str(place)
    reader_plan(model, named, args.budget).save(args.out / "seer.json")
    print(f"gate and plan in {args.out} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
