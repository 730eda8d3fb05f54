"""The reader's acceptance test: lookups at every claimed length, with their controls, and held-out bits per byte.

Run `python -m saccade.recipe.score --model DIR --out score.json`; about a minute on a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.evaluate.tasks.base import Sample
from saccade.evaluate.tasks.kv import KeyValue
from saccade.evaluate.tasks.needle import Needle
from saccade.nn import Attention, Transformer
from saccade.reader import books
from saccade.recipe import export

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
WINDOW, SINK = 512, 16
BATCH_TOKENS = 131_072

# name -> (task, share of the count that is run, whether the window reads it as well)
CELLS: dict[str, tuple[Any, float, bool]] = {
    "needle": (Needle(), 1.0, True),
    "needle, 30 distractors": (Needle(distractors=30), 1.0, True),
    "needle, adjective-noun": (Needle(value="pair"), 0.4, False),
    "needle, hex": (Needle(value="hex"), 0.4, False),
    "needle, left out": (Needle(planted=False, distractors=10), 1.0, False),
    "kv": (KeyValue(), 1.0, True),
}


class WindowAttention(Attention):
    """The control: every query reads the first `SINK` and the last `WINDOW` tokens only."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        N, M = q.shape[2], k.shape[2]
        share = self.heads // self.kv_heads
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        parts = []
        for start in range(M - N, M, 1024):
            stop = min(start + 1024, M)
            first = max(start - WINDOW + 1, 0)
            place = torch.cat((torch.arange(min(SINK, first)), torch.arange(first, stop))).to(q.device)
            query = torch.arange(start, stop, device=q.device)[:, None]
            seen = (place <= query) & ((place > query - WINDOW) | (place < SINK))
            some = slice(start - (M - N), stop - (M - N))
            parts.append(F.scaled_dot_product_attention(q[:, :, some], k[:, :, place], v[:, :, place], attn_mask=seen))
        return torch.cat(parts, dim=2)


def windowed(folder: str | Path, device: str) -> Transformer:
    """The model of a folder, reading through a window with sinks in every layer."""
    model, shape = export.read(folder), export.shape_of(folder)
    for block in model.blocks:
        layer = WindowAttention(shape.width, shape.heads, shape.kv_heads, shape.head_dim, shape.rope_base)
        layer.load_state_dict(block.layer.state_dict())
        block.layer = layer
    return model.to(device).eval()


@torch.inference_mode()
def generate(model: Transformer, ids: Tensor, count: int, newline: int) -> Tensor:
    """Greedy continuation of prompts of one length until each has a newline: ids [B, N] -> [B, up to count]."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        out = model.hidden(ids)
        said = []
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for step in range(count):
            said.append(model.head(out.y[:, -1]).argmax(-1))
            ended |= said[-1] == newline
            if ended.all() or step == count - 1:
                break
            out = model.hidden(said[-1][:, None], out.state)
    return torch.stack(said, dim=1)


def answers(model: Transformer, samples: Sequence[Sample], tokenizer: Any, device: str) -> list[str]:
    """What the model says to each sample; all prompts have the same length."""
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    size = max(1, BATCH_TOKENS // len(samples[0].ids))
    texts = []
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        ids = torch.tensor([sample.ids for sample in some], device=device)
        said = generate(model, ids, some[0].max_new_tokens, newline)
        texts += tokenizer.batch_decode(said.tolist())
    return texts


def make(folder: str, seed: int, job: tuple[str, int, int]) -> Sample:
    """One sample, in a process of its own."""
    name, length, index = job
    return CELLS[name][0].sample(_tokenizer(folder), length, index, seed)


_LOADED: dict[str, Any] = {}


def _tokenizer(folder: str) -> Any:
    if folder not in _LOADED:
        from transformers import AutoTokenizer

        _LOADED[folder] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return _LOADED[folder]


def summary(task: Any, samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, Any]:
    """Share of exact answers, by depth too, with the first wrong ones."""
    right = [task.score(text, sample) for text, sample in zip(texts, samples, strict=True)]
    depths: dict[str, list[float]] = {}
    if task.name == "needle":
        for sample, hit in zip(samples, right, strict=True):
            depths.setdefault(f"{sample.depth:g}", []).append(hit)
    wrong = [
        {"question": sample.question, "answer": sample.answer, "said": text[:40], "depth": sample.depth}
        for text, sample, hit in zip(texts, samples, right, strict=True)
        if not hit
    ]
    found = {"exact": round(float(np.mean(right)), 4), "n": len(right)}
    if depths:
        found["by_depth"] = {depth: round(float(np.mean(hits)), 3) for depth, hits in sorted(depths.items())}
    return found | {"wrong": wrong[:3]}


@torch.inference_mode()
def bits_per_byte(model: Transformer, tokenizer: Any, lengths: Sequence[int], device: str, regions: int = 6) -> dict:
    """Held-out bits per byte: the same text read in windows of each length, and by position in the longest ones."""
    longest = max(lengths)
    bos = tokenizer.bos_token_id
    edges = [2**power for power in range(7, 32) if 2**power < longest] + [longest]
    bits, size = dict.fromkeys(lengths, 0.0), 0
    place_bits, place_bytes = np.zeros(len(edges)), np.zeros(len(edges))
    for name in books.HELD_OUT:
        ids = tokenizer(books.held_out(name), add_special_tokens=False)["input_ids"]
        for start in np.linspace(0, len(ids) - longest, regions, dtype=int):
            region = ids[start : start + longest]
            width = np.array([len(tokenizer.decode([token]).encode()) for token in region])
            # a character cut in two has no text of its own, so the sum is taken from the whole
            width = width * len(tokenizer.decode(region).encode()) / width.sum()
            size += width.sum()
            for length in lengths:
                rows = torch.tensor(region[: longest // length * length], device=device).view(-1, length)
                for row in rows.split(max(1, BATCH_TOKENS // length)):
                    inputs = F.pad(row[:, :-1], (1, 0), value=bos)
                    with torch.autocast(row.device.type, torch.bfloat16, enabled=row.is_cuda):
                        logits = model(inputs).y
                    loss = F.cross_entropy(logits.float().flatten(0, 1), row.flatten(), reduction="none") / np.log(2)
                    bits[length] += loss.sum().item()
                    if length == longest:
                        slot = np.searchsorted(edges, np.arange(1, length + 1))
                        place_bits += np.bincount(slot, loss.cpu().numpy(), minlength=len(edges))
                        place_bytes += np.bincount(slot, width, minlength=len(edges))
    return {
        "by_length": {str(length): round(float(total / size), 4) for length, total in bits.items()},
        "by_position": {
            str(edge): round(float(b / w), 4) for edge, b, w in zip(edges, place_bits, place_bytes, strict=True)
        },
    }


def transformers_check(folder: str, samples: Sequence[Sample], device: str) -> dict[str, Any]:
    """The same lookups through `AutoModelForCausalLM.generate` in bfloat16, one by one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).to(device).eval()
    tokenizer, texts = _tokenizer(folder), []
    for sample in samples:
        ids = torch.tensor([sample.ids], device=device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :]))
    return summary(Needle(), samples, texts)


def score(
    folder: str | Path,
    out: str | Path,
    count: int = 50,
    lengths: Sequence[int] = LENGTHS,
    device: str = "cuda",
    workers: int = 14,
    seed: int = 1,
) -> dict[str, Any]:
    """Run all cells and write one JSON.

    Args:
        folder: exported model.
        out: the JSON file to write.
        count: samples per cell and length.
        lengths: lengths to test.
        device: "cuda" or "cpu".
        workers: processes that make the prompts (0: this one).
        seed: of the samples.
    """
    folder, started = str(folder), time.time()
    jobs = [
        (name, length, index)
        for length in lengths
        for name, (_, part, _) in CELLS.items()
        for index in range(max(1, round(count * part)))
    ]
    if workers:
        # before the first use of the GPU, which does not survive a fork
        with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            made = list(pool.map(partial(make, folder, seed), jobs, chunksize=8))
    else:
        made = [make(folder, seed, job) for job in jobs]
    print(f"{len(made)} prompts made in {time.time() - started:.0f} s", flush=True)
    samples: dict[tuple[str, int], list[Sample]] = {}
    for (name, length, _), sample in zip(jobs, made, strict=True):
        samples.setdefault((name, length), []).append(sample)

    tokenizer = _tokenizer(folder)
    dense, window = export.read(folder, device), windowed(folder, device)
    result: dict[str, Any] = {"dense": {}, "window": {}}
    for (name, length), some in samples.items():
        task, _, controlled = CELLS[name]
        for kind, model in (("dense", dense), ("window", window)) if controlled else (("dense", dense),):
            found = summary(task, some, answers(model, some, tokenizer, device))
            result[kind].setdefault(name, {})[str(length)] = found
            shown = " ".join(f"{depth}:{hit}" for depth, hit in found.get("by_depth", {}).items())
            print(
                f"{time.time() - started:5.0f} s  {kind:6s} {name:24s} {length:6d}  {found['exact']:.3f}  {shown}",
                flush=True,
            )
    result["bits_per_byte"] = bits_per_byte(dense, tokenizer, lengths, device)
    print(f"{time.time() - started:5.0f} s  bits per byte {json.dumps(result['bits_per_byte'])}", flush=True)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    result["about"] = {"torch": torch.__version__, "device": name, "count": count, "seed": seed}
    result["about"] |= {"window": WINDOW, "sink": SINK, "weights": "bfloat16", "seconds": round(time.time() - started)}
    Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    longest = samples["needle", max(lengths)][:20]
    result["transformers"] = {str(max(lengths)): transformers_check(folder, longest, device)}
    Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{time.time() - started:5.0f} s  transformers, bfloat16: {result['transformers']}", flush=True)
    return result


def main() -> None:
    """Score an exported model from the command line."""
    parser = argparse.ArgumentParser(description="score the reader")
    parser.add_argument("--model", default=str(books.DATA), help="exported folder (the package data)")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument("--count", type=int, default=50, help="samples per cell and length (50)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=14)
    args = parser.parse_args()
    score(args.model, args.out, args.count, args.lengths, args.device, args.workers)


if __name__ == "__main__":
    main()
