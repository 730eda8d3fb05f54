"""Recall against the share of keys scanned, for indices that know a prompt's queries and indices that know keys only.

    python bench/search.py --length 8192

A key's recall counts by its attention: what is found of a query's 100 best keys, as a share of their attention mass.
Keys and queries come from the bundled reader on a document (queries of the last 512 tokens are asked, those before
them drew the graph), and from a made-up head whose queries lie far from its keys: queries look at 6 channels that make
up little of what keys differ in. Its control asks queries that are drawn like keys. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade import Plan, attach
from saccade.evaluate.tasks.needle import Needle
from saccade.kernels.search import index
from saccade.reader import load

TOP, SINK, RECENT = 100, 128, 512
QUEUES = (100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 4000)
PROBES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
HERE = Path(__file__).parent
# name: kind, whether it is given queries, what is turned, over which values
INDICES: dict[str, tuple[str, bool, str, tuple[int, ...]]] = {
    "graph by queries": ("graph", True, "queue", QUEUES),
    "graph by keys": ("graph", False, "queue", QUEUES),
    "faiss HNSW": ("faiss-hnsw", False, "queue", QUEUES),
    "faiss IVF": ("faiss-ivf", False, "probes", PROBES),
}


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--length", type=int, default=8192)
    given.add_argument("--asked", type=int, default=64, help="queries that are asked, for each head")
    given.add_argument("--out", type=Path, default=HERE / "results" / "search-cpu.json")
    given.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "search.svg")
    args = given.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    heads = []
    for name, keys, learned, asked in [*made_up(args.length), *reader(args.length)]:
        pick = torch.randperm(len(asked))[: args.asked]
        heads.append(measured(name, keys, learned, asked[pick]))
        print(say(heads[-1]), flush=True)
    result = {"length": args.length, "top": TOP, "torch": torch.__version__, "threads": 1, "heads": heads}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(heads, args.plot)


def reader(length: int) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, keys, queries to learn from, queries to ask) of one key head in each layer of the reader."""
    model, tokenizer = load()
    ids = torch.tensor(Needle().sample(tokenizer, length, 0).ids)[None]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with attach(model, Plan.uniform(model, prefill="dense")) as session, torch.no_grad():
        session.watch = lambda look: seen.__setitem__(look.call.layer, (look.q[0].clone(), look.k[0].clone()))
        model(ids, past_key_values=session.cache(), logits_to_keep=1)
    heads = []
    for layer, (q, k) in seen.items():
        head, share, end = layer % len(k), len(q) // len(k), ids.shape[1] - RECENT
        mine = q[head * share : (head + 1) * share]
        learned = mine[:, SINK + RECENT : end : 4].flatten(0, 1)
        heads.append((f"reader layer {layer}", k[head, SINK:end], learned, mine[:, end:].flatten(0, 1)))
    return heads


def made_up(n: int, D: int = 64, few: int = 6) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """A head whose queries lie far from its keys, and the same keys asked by queries like them."""
    spread = torch.cat((torch.full((few,), 1.0), torch.full((D - few,), 3.0)))
    turn = torch.linalg.qr(torch.randn(D, D)).Q
    keys = (torch.randn(n, D) * spread) @ turn
    far = torch.cat((torch.full((few,), 16.0), torch.full((D - few,), 0.3)))
    queries = (torch.randn(n, D) * far) @ turn
    like = (torch.randn(n, D) * spread) @ turn
    return [
        ("made up, far queries", keys, queries[: n // 2], queries[n // 2 :]),
        ("made up, queries like keys", keys, like[: n // 2], like[n // 2 :]),
    ]


def measured(name: str, keys: Tensor, learned: Tensor, asked: Tensor) -> dict[str, Any]:
    """Curves of all indices for one head."""
    scores = asked @ keys.T / math.sqrt(keys.shape[1])
    probs, best = scores.softmax(-1), scores.topk(TOP, -1).indices
    mass = probs.gather(1, best).sum(-1)
    curves = {}
    for label, (kind, taught, turned, values) in INDICES.items():
        made = index(kind)
        made.build(keys.contiguous(), learned if taught else None)
        points = []
        for value in values:
            setattr(made, turned, value)
            found = made.search(asked, TOP)
            hit = (found.ids[:, :, None] == best[:, None]).any(-1)
            recall = (probs.gather(1, found.ids.clamp_min(0)) * hit).sum(-1) / mass
            points.append((found.scanned / len(keys), float(recall.mean())))
            if points[-1][1] > 0.99 or points[-1][0] > 0.9:
                break
        curves[label] = points
    centre, spread = keys.mean(0), torch.linalg.inv(torch.cov(keys.T) + 1e-3 * torch.eye(keys.shape[1]))
    apart = [float(((t - centre) @ spread * (t - centre)).sum(-1).sqrt().mean()) for t in (asked, keys)]
    return {
        **{"head": name, "keys": len(keys), "top_mass": float(mass.mean()), "mahalanobis_queries": apart[0]},
        **{"mahalanobis_keys": apart[1], "scanned_at_0.95": {k: at(p, 0.95) for k, p in curves.items()}},
        "curves": curves,
    }


def at(points: list[tuple[float, float]], recall: float) -> float | None:
    """The share scanned at this recall, between the two points around it; None where it is not reached."""
    for i, (scanned, found) in enumerate(points):
        if found >= recall:
            if i == 0:
                return scanned
            less, below = points[i - 1]
            return less + (scanned - less) * (recall - below) / (found - below)
    return None


def say(head: dict[str, Any]) -> str:
    """One line for one head."""
    shares = {k: "never" if s is None else f"{s:.3f}" for k, s in head["scanned_at_0.95"].items()}
    apart = f"{head['mahalanobis_queries']:.1f} against {head['mahalanobis_keys']:.1f}"
    return f"{head['head']:28s} apart {apart}; scanned at 0.95: {shares}"


def plot(heads: list[dict[str, Any]], path: Path) -> None:
    """A panel for each head."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "search"
    columns = 5
    rows = -(-len(heads) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3 * columns, 2.7 * rows), sharey=True, squeeze=False)
    for axis, head in zip(axes.flat, heads, strict=False):
        for label, points in head["curves"].items():
            axis.plot([p[0] for p in points], [p[1] for p in points], marker=".", label=label)
        axis.axhline(0.95, color="grey", linewidth=0.6)
        axis.set(title=head["head"], xscale="log", xlabel="share of keys scanned", ylim=(0, 1.02))
        axis.set_xlim(0.04, 1.1)
        axis.set_xticks((0.05, 0.1, 0.2, 0.5, 1), ("0.05", "0.1", "0.2", "0.5", "1"))
        axis.minorticks_off()
        axis.title.set_fontsize(9)
    axes[0, 0].set_ylabel("recall of top-100 mass")
    axes[0, 0].legend(fontsize=7)
    for axis in list(axes.flat)[len(heads) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
