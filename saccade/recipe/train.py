"""Train the reader: four stages of growing length, within a given number of minutes, on one GPU.

Run `python -m saccade.recipe.train --books BOOKS --out DIR --minutes 8`. BOOKS is a folder of `.txt` files or the
`.npy` file that `python -m saccade.reader.books` makes of it. A run that was cut off goes on after its last stage.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from saccade.nn import Transformer
from saccade.reader import books
from saccade.recipe import export
from saccade.recipe.books import tokenise
from saccade.recipe.mixture import TAGS, WEIGHTS, Mixture
from saccade.recipe.model import Shape
from saccade.recipe.tokenizer import raw


@dataclass(frozen=True)
class Stage:
    """A part of the training with sequences of one length.

    Args:
        length: tokens of a sequence.
        batch: sequences of a step.
        share: part of the whole time.
    """

    length: int
    batch: int
    share: float


STAGES = (Stage(1024, 256, 0.22), Stage(4096, 64, 0.19), Stage(16384, 16, 0.19), Stage(32768, 8, 0.40))

# steps at the start of a stage that the clock leaves out: they compile
UNTIMED = 3
WARM_UP = 100


class Stream(IterableDataset):
    """Batches of the mixture without end: ids int16 [batch, length + 1], tags uint8 [batch, length + 1].

    Args:
        mixture: what to draw from.
        stage: length and batch.
        seed: streams of different seeds differ.
    """

    def __init__(self, mixture: Mixture, stage: Stage, seed: int):
        self.mixture, self.stage, self.seed = mixture, stage, seed

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        worker = get_worker_info()
        rng = Random(f"{self.seed}/{self.stage.length}/{worker.id if worker else 0}")
        while True:
            rows = [self.mixture.row(rng, self.stage.length + 1) for _ in range(self.stage.batch)]
            yield np.stack([ids for ids, _ in rows]), np.stack([tags for _, tags in rows])


def batches(stream: Stream, workers: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The stream's batches on the device, made by `workers` processes (0: by this one)."""
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        # arrays travel through pipes, so no shared memory has to be large enough
        collate_fn=_as_is,
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=4 if workers else None,
    )
    for arrays in loader:
        ids, tags = (torch.from_numpy(array) for array in arrays)
        if device.type == "cuda":
            ids, tags = ids.pin_memory(), tags.pin_memory()
        yield ids.to(device, non_blocking=True), tags.to(device, non_blocking=True)


def _as_is(arrays):
    return arrays


def token_losses(model: Transformer, ids: Tensor, tags: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted loss, and the loss of every token: ids and tags [B, N + 1] -> 0-d, [B * N]."""
    ids = ids.long()
    logits = model.head(model.hidden(ids[:, :-1]).y)
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[tags[:, 1:].flatten().long()]
    return (losses * weight).sum() / weight.sum().clamp(min=1.0), losses.detach()


def by_tag(losses: Tensor, tags: Tensor) -> dict[str, float]:
    """Mean loss of the tokens of each tag that occurs."""
    tags = tags[:, 1:].flatten().long()
    count = torch.bincount(tags, minlength=len(TAGS))
    total = torch.zeros(len(TAGS), device=losses.device).index_add_(0, tags, losses.float())
    mean = (total / count.clamp(min=1)).tolist()
    return {name: round(mean[i], 4) for i, name in enumerate(TAGS) if count[i]}


def optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    # the books are read dozens of times: with a decay of 0.01 the model learns them by heart
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(progress: float, step: int) -> float:
    """Share of the full learning rate: warm-up by steps, flat for half of the time, then linear to 3 %."""
    return min(1.0, (step + 1) / WARM_UP) * (1.0 if progress < 0.5 else max(0.03, 1 - 0.97 * (progress - 0.5) / 0.5))


@cache
def held_out_ids(name: str) -> list[int]:
    """The tokens of a held-out book."""
    return raw().encode(books.held_out(name), add_special_tokens=False).ids


@torch.no_grad()
def held_out_loss(model: Transformer, length: int, device: torch.device, windows: int = 8) -> float:
    """Bits per byte of the held-out books in windows of `length` tokens."""
    tokenizer, bits, size = raw(), 0.0, 0
    for name in books.HELD_OUT:
        ids = held_out_ids(name)
        for start in np.linspace(0, len(ids) - length, windows, dtype=int):
            window = ids[start : start + length]
            row = torch.tensor([[tokenizer.token_to_id("<bos>"), *window]], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(row[:, :-1]).y
            bits += F.cross_entropy(logits.float()[0], row[0, 1:], reduction="sum").item() / math.log(2)
            size += len(tokenizer.decode(window).encode())
    return bits / size


def train(
    ids: np.ndarray,
    out: str | Path,
    minutes: float = 8.0,
    stages: Sequence[Stage] = STAGES,
    shape: Shape | None = None,
    workers: int = 14,
    device: str = "cuda",
    compiled: bool = True,
    seed: int = 0,
) -> Transformer:
    """Train from scratch, or from the last stage that `out` holds, and export to `out/export`.

    Args:
        ids: tokens of the training books.
        out: folder of checkpoint.pt, log.json and the export.
        minutes: time of training, compilation and data start not counted.
        stages: lengths, batches and shares of the time.
        shape: of the model (default: the bundled reader's).
        workers: processes that make data.
        device: "cuda" or "cpu".
        compiled: whether to use torch.compile.
        seed: of weights and data.

    Returns:
        the trained model.
    """
    out, where = Path(out), torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    shape = shape or Shape()
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = shape.build().to(where)
    optims = optimizers(model)
    weights = torch.tensor(WEIGHTS, device=where)
    saved: dict[str, Any] = {"stage": 0, "tokens": 0, "step": 0, "seconds": 0.0, "log": []}
    if (out / "checkpoint.pt").exists():
        saved = torch.load(out / "checkpoint.pt", map_location=where, weights_only=True)
        model.load_state_dict(saved["model"])
        for optim, state in zip(optims, saved["optims"], strict=True):
            optim.load_state_dict(state)
        print(f"going on after stage {saved['stage']} of {len(stages)}", flush=True)

    def run(rows: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        return token_losses(model, rows, tags, weights)

    run = torch.compile(run, dynamic=False) if compiled else run
    mixture = Mixture(ids, raw())
    clock = Clock(60 * minutes, saved["seconds"])

    for number in range(saved["stage"], len(stages)):
        stage = stages[number]
        finish = clock.total * sum(each.share for each in stages[: number + 1])
        print(f"stage {number + 1}: {stage.length} tokens x {stage.batch}, until {finish:.0f} s", flush=True)
        clock.stop()
        started, shown, first = time.time(), clock.seconds, saved["step"]
        for rows, tags in batches(Stream(mixture, stage, seed), workers, where):
            share = rate(clock.seconds / clock.total, saved["step"])
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = group.setdefault("full_lr", group["lr"]) * share
            with torch.autocast(where.type, torch.bfloat16):
                loss, losses = run(rows, tags)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optim in optims:
                optim.step()
                optim.zero_grad(set_to_none=True)
            saved["step"] += 1
            saved["tokens"] += stage.length * stage.batch
            taken = saved["step"] - first
            if taken == UNTIMED:
                # the copy to the host waits for the device
                loss.item()
                print(f"  first {UNTIMED} steps took {time.time() - started:.0f} s", flush=True)
                clock.start()
            ended = taken >= UNTIMED and clock.seconds >= finish
            if clock.seconds - shown >= min(5.0, clock.total / 20) or ended:
                shown = clock.seconds
                entry = {"tokens": saved["tokens"], "step": saved["step"], "seconds": round(shown, 1)}
                entry |= {"length": stage.length, "rate": round(share, 4), "loss": round(loss.item(), 4)}
                entry |= by_tag(losses, tags)
                saved["log"].append(entry)
                print("  " + " ".join(f"{key} {value}" for key, value in entry.items()), flush=True)
            if ended:
                break
        clock.stop()
        entry = {"tokens": saved["tokens"], "step": saved["step"], "seconds": round(clock.seconds, 1)}
        for length in sorted({stages[0].length, stage.length}):
            entry[f"held_out_{length}"] = round(held_out_loss(model, length, where), 4)
        print("  " + " ".join(f"{key} {value}" for key, value in entry.items()), flush=True)
        saved["log"].append(entry)
        saved |= {"stage": number + 1, "seconds": clock.seconds, "shape": asdict(shape), "model": model.state_dict()}
        saved["optims"] = [optim.state_dict() for optim in optims]
        torch.save(saved, out / "checkpoint.tmp")
        (out / "checkpoint.tmp").replace(out / "checkpoint.pt")
        (out / "log.json").write_text(json.dumps(saved["log"], indent=1) + "\n", encoding="utf-8")
        export.write(model, shape, out / "export")
    return model


class Clock:
    """Seconds of training, with stops.

    Args:
        total: seconds planned.
        past: seconds gone before.
    """

    def __init__(self, total: float, past: float = 0.0):
        self.total, self.past, self.since = total, past, None

    @property
    def seconds(self) -> float:
        return self.past + (time.time() - self.since if self.since else 0.0)

    def start(self) -> None:
        self.since = time.time()

    def stop(self) -> None:
        self.past, self.since = self.seconds, None


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="train the reader")
    parser.add_argument("--books", required=True, help="folder of .txt files, or the .npy file made of it")
    parser.add_argument("--out", required=True, help="folder for checkpoint, log and export")
    parser.add_argument("--minutes", type=float, default=8.0, help="time of training, compilation not counted (8)")
    parser.add_argument("--workers", type=int, default=14, help="processes that make data (14)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if Path(args.books).is_dir():
        ids = tokenise(books.training(args.books), raw())
    else:
        ids = np.load(args.books)
    print(f"{len(ids):,} tokens of books", flush=True)
    train(ids, args.out, args.minutes, workers=args.workers, device=args.device, compiled=args.compile, seed=args.seed)


if __name__ == "__main__":
    main()
