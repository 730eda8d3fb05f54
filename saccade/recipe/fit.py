"""Fit the reader's own plans, `data/plans/*.json`: which heads stream, and which pattern suits which head.

Run `python -m saccade.recipe.fit --out DIR [--device cuda]`. The documents are of the needle task, with seeds that no
evaluation uses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.core.plan import Assign, ModelShape, Plan
from saccade.evaluate.tasks.needle import compose
from saccade.fit.duo import fit_gates
from saccade.fit.minference import search
from saccade.fit.published import from_gates
from saccade.hf.attach import attach
from saccade.methods.apply import Seen

SEED = 100_000


def gate_samples(tokenizer: Any, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Documents with ten facts, all ten questions and answers at the end; those are what is supervised."""
    samples = []
    for i, length in enumerate(lengths):
        document = compose(tokenizer, length, facts=10, seed=SEED + i)
        asked = "".join(f"\n\n{q} {a}" for q, a in zip(document.questions, document.answers, strict=True))
        tail = tokenizer(asked, add_special_tokens=False)["input_ids"]
        ids = torch.tensor(document.ids + tail)
        samples.append((ids, torch.arange(len(ids)) >= len(document.ids)))
    return samples


def duo_plan(model: Any, tokenizer: Any, steps: int, longest: int, sparsity: float) -> tuple[Plan, list[list[float]]]:
    """Half of the key heads stream: those whose gates close."""
    lengths = [1024 + i * (longest - 1024) // 19 for i in range(20)]

    def progress(step: int, loss: float, gates: Tensor) -> None:
        if step % 10 == 0:
            print(f"gates: step {step}/{steps} loss {loss:.4f} mean gate {gates.mean():.3f}", file=sys.stderr)

    samples = gate_samples(tokenizer, lengths)
    gates = fit_gates(model, samples, sink=16, recent=256, steps=steps, progress=progress)
    plan = from_gates(gates, ModelShape.of(model), sparsity=sparsity, sink=16, recent=256, where="fitted gates")
    return plan, gates


def minference_plan(model: Any, tokenizer: Any, length: int, budget: float) -> Plan:
    """The best pattern for each head at equal cost, on one document with a question."""
    document = compose(tokenizer, length - 32, facts=4, seed=SEED - 1)
    text = f"\n\n{document.questions[1]}"
    ids = torch.tensor([document.ids + tokenizer(text, add_special_tokens=False)["input_ids"]]).to(model.device)
    layers: list[list[Assign]] = []

    def look(seen: Seen) -> None:
        found = search(seen.q, seen.k, seen.v, budget=budget)
        print(f"search: layer {seen.call.layer} " + ", ".join(f"{n} {e:.3f}" for n, _, e in found), file=sys.stderr)
        layers.append([Assign((head,), name, args) for head, (name, args, _) in enumerate(found)])

    with torch.no_grad(), attach(model, Plan.uniform(model)) as session:
        session.watch = look
        model(ids, past_key_values=session.cache(), logits_to_keep=1)
    note = f"searched on one needle document of {length} tokens at {budget:.0%} of dense"
    return Plan.per_head(model, layers, note=note)


def main() -> None:
    """Fit both plans and write them."""
    from saccade.reader import load

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--length", type=int, default=8192)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(device=args.device)
    start = time.time()
    minference_plan(model, tokenizer, args.length, 0.1).save(args.out / "minference.json")
    plan, gates = duo_plan(model, tokenizer, args.steps, args.longest, 0.5)
    plan.save(args.out / "duo.json")
    (args.out / "duo-gates.json").write_text(json.dumps(gates))
    print(f"plans in {args.out} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
