"""Associative recall on a CPU: small models of one kind of layer each, trained from scratch, at equal cost or more.

    OMP_NUM_THREADS=1 python bench/recall.py              # three seeds, about half an hour on one core
    python bench/recall.py --seeds 0 --only routing window

Sequences of 128 tokens hold 4 key-value pairs and ask for each value once, anywhere behind. Two layers, 4 heads of 16.
Routing heads see 4 clusters of 32 tokens, local heads 4 tokens; the window of the `window` model costs as much.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.pattern import Window
from saccade.evaluate.tasks.recall import IGNORE, recall_batch
from saccade.kernels.attend import attend
from saccade.methods.base import Layer
from saccade.methods.linear.lightning import LightningAttention
from saccade.methods.sparse.routing import RoutingAttention
from saccade.nn import Attention, Transformer

LENGTH, PAIRS, VOCAB = 128, 4, 32
WIDTH, HEADS, LAYERS = 64, 4, 2
CLUSTERS, MEMBERS, NEAR, WINDOW = 4, 32, 4, 13
BATCH, STEPS, RATE, TESTED = 16, 3000, 3e-3, 1000
KINDS = ("dense", "routing", "lightning", "window", "routing, fixed centroids", "routing, random members")


class Nearby(Attention):
    """Dense attention's layer, cut down to the last tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, Window(0, WINDOW), lse=False).o


class RandomMembers(RoutingAttention):
    """Routing whose clusters are drawn: what is left without content."""

    def members(self, q: Tensor) -> Tensor:
        B, H, M, _ = q.shape
        return torch.rand(B, H, self.clusters, M).topk(min(self.window, M)).indices.sort(-1).values


def mixer(kind: str, layer: int) -> Layer:
    """The layer of a kind."""
    if kind == "dense":
        return Attention(WIDTH, HEADS, rope_base=10_000.0)
    if kind == "window":
        return Nearby(WIDTH, HEADS, rope_base=10_000.0)
    if kind == "lightning":
        return LightningAttention(WIDTH, HEADS, layer, LAYERS)
    cls = RandomMembers if kind.endswith("random members") else RoutingAttention
    # a centroid of a short training must move faster than the paper's 0.999
    return cls(WIDTH, HEADS, CLUSTERS, MEMBERS, NEAR, ema=1.0 if kind.endswith("fixed centroids") else 0.99)


def cost(kind: str) -> float:
    """Score entries per row and head, the scores of centroids included.

    Linear attention has none: its step updates and reads a state of D x D, as many multiplications as D entries.
    """
    near = {n: sum(min(i + 1, n) for i in range(LENGTH)) / LENGTH for n in (NEAR, WINDOW, LENGTH)}
    if kind == "lightning":
        return WIDTH / HEADS
    if kind in ("dense", "window"):
        return near[LENGTH if kind == "dense" else WINDOW]
    chosen = CLUSTERS * MEMBERS * (MEMBERS + 1) / 2 / LENGTH
    return (near[NEAR] + chosen + (0 if kind.endswith("random members") else CLUSTERS)) / 2


def make(kind: str, seed: int) -> Transformer:
    """An untrained model. Matrices start at std 0.1, near 1/sqrt(width); 0.02 is for models of a thousand channels."""
    torch.manual_seed(seed)
    model = Transformer(VOCAB, WIDTH, [mixer(kind, i) for i in range(LAYERS)], mlp_width=WIDTH)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p *= 5.0
    return model


def answer(model: Transformer, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and right values where something is asked, in rows of one sequence each, and the layers' own loss."""
    out = model.hidden(ids)
    asked = labels != IGNORE
    return model.head(out.y[asked]).view(len(ids), PAIRS, -1), labels[asked].view(len(ids), PAIRS), out.loss


def train(model: nn.Module, seed: int, steps: int) -> tuple[int, list[float]]:
    """Train until 100 batches have under 0.2 % of errors, or to the last step -> steps done, accuracy per 100."""
    rng = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 200) * (1 + math.cos(math.pi * i / steps)) / 2
    )
    right, curve = 0.0, []
    for step in range(1, steps + 1):
        logits, want, own = answer(model, *recall_batch(BATCH, LENGTH, PAIRS, VOCAB, rng))
        loss = F.cross_entropy(logits.flatten(0, 1), want.flatten())
        optimizer.zero_grad()
        (loss if own is None else loss + own).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right += (logits.argmax(-1) == want).float().mean().item()
        if step % 100 == 0:
            curve.append(round(right / 100, 4))
            right = 0.0
            if curve[-1] > 0.998:
                break
    return step, curve


@torch.no_grad()
def examine(model: nn.Module) -> Tensor:
    """Share of right answers in each of the tested sequences, the same ones for all models."""
    model.eval()
    rng = torch.Generator().manual_seed(7)
    logits, want, _ = answer(model, *recall_batch(TESTED, LENGTH, PAIRS, VOCAB, rng))
    return (logits.argmax(-1) == want).float().mean(-1)


def interval(right: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share among the tested sequences; wide rather than narrow, as each is asked often."""
    z = 1.96**2 / TESTED
    half = math.sqrt(z * (right * (1 - right) + z / 4))
    return (right + z / 2 - half) / (1 + z), (right + z / 2 + half) / (1 + z)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=KINDS, choices=KINDS, metavar="KIND")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recall-cpu.json")
    args = parser.parse_args()
    task = {"length": LENGTH, "pairs": PAIRS, "vocab": VOCAB, "batch": BATCH, "steps": args.steps, "rate": RATE}
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    runs: list[dict[str, object]] = []
    result = {"command": " ".join(["python", "bench/recall.py", *sys.argv[1:]]), **where, "task": task, "runs": runs}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'layer':26} {'seed':>4} {'entries/row':>11} {'steps':>6} {'CPU s':>8}  right of {TESTED} sequences")
    for seed in args.seeds:
        for kind in args.only:
            model, start = make(kind, seed), time.process_time()
            steps, curve = train(model, seed, args.steps)
            seconds = time.process_time() - start
            right = examine(model).mean().item()
            low, high = interval(right)
            runs.append(
                {
                    "layer": kind,
                    "seed": seed,
                    "entries_per_row": round(cost(kind), 2),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "steps": steps,
                    "cpu_seconds": round(seconds, 1),
                    "right": round(right, 4),
                    "interval95": [round(low, 4), round(high, 4)],
                    "sequences": TESTED,
                    "training": curve,
                }
            )
            # after every model, so that a run that is cut short leaves what it has
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            row = f"{kind:26} {seed:4} {cost(kind):11.1f} {steps:6} {seconds:8.1f}"
            print(f"{row}  {right:.3f} [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
