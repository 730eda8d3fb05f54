"""Score methods that read a prompt densely, on a CPU, with each prompt's attention computed once for all of them.

`python bench/prompt_once.py --methods dense,quest --tasks kv --length 16384 --samples 50 --out DIR`

What `saccade eval` measures in hours on two cores is dense attention over the prompt, the same for every method that
decodes or keeps the cache in its own way. Here a prompt's attention is kept, by a sum over its queries, keys and
values, until the next prompt: the same rows but for times, of which there are none. Samples go through all methods in
turn, so that a run that is cut off has equally many of each; the rows are written after each sample.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.cli.demo import describe
from saccade.core.files import write_whole
from saccade.evaluate import fields
from saccade.evaluate.cells import draw, get_task
from saccade.evaluate.generate import untimed
from saccade.evaluate.measure import answers, outcomes
from saccade.evaluate.metrics import mean_score
from saccade.evaluate.model import Loaded, load
from saccade.evaluate.presets import resolve
from saccade.evaluate.run import Ask
from saccade.evaluate.samples import CONDITIONS, FILE, append, lines_of

LONG = 1024  # rows of a call from which on it is a prompt's


class Kept:
    """scaled_dot_product_attention that remembers the causal attention of long prompts.

    Args:
        attention: torch's own.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.found: dict[tuple[Any, ...], Tensor] = {}
        self.hits = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def own(q: Tensor, scale: float | None) -> Tensor:
            return self.attention(q, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        if not is_causal or query.shape[2] < LONG or attn_mask is not None:
            return own(query, scale)
        # stock attention scales the scores, a plan the queries before: by a power of two, which loses nothing
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        at = (query.shape, key.shape, *(int(t.contiguous().view(torch.int32).sum()) for t in (query, key, value)))
        if at in self.found:
            self.hits += 1
        else:
            self.found[at] = own(query, 1.0)
        return self.found[at].clone()


def main(argv: Sequence[str] | None = None) -> Kept:
    """Read sample by sample, score every method, write rows as `saccade eval` does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", required=True, metavar="A,B", help="presets or plan files")
    parser.add_argument("--tasks", required=True, metavar="A,B")
    parser.add_argument("--length", required=True, type=int)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new sample is begun after so long")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args(argv)
    if (args.out / "config.json").exists():
        raise SystemExit(f"{args.out}: holds an evaluation; choose another --out")
    started = time.monotonic()
    torch.set_num_threads(args.threads)
    loaded = load("reader", "float32", "cpu")
    methods, tasks = args.methods.split(","), args.tasks.split(",")
    plans = {method: resolve(method, loaded, args.length) for method in methods}
    found: dict[tuple[str, str, int], list[Any]] = {}
    seen: dict[tuple[str, str, int], dict[str, Any]] = {}
    kept = Kept(F.scaled_dot_product_attention)
    F.scaled_dot_product_attention = kept
    try:
        done = 0
        drawn = {task: draw(loaded, task, args.length, args.samples, args.seed) for task in tasks}
        args.out.mkdir(parents=True, exist_ok=True)
        while done < args.samples and time.monotonic() - started < args.seconds:
            for task in tasks:
                kept.found.clear()
                for method in methods:
                    cell = method, task, args.length
                    if not done:
                        seen[cell] = fields.measures(loaded, plans[method], drawn[task].dense, clocked=False).row
                    found.setdefault(cell, []).append(scored(loaded, plans[method], task, drawn[task].samples[done]))
            done += 1
            write(args.out, found, seen)
            said = ", ".join(f"{c[0]} {c[1]} {sum(s for _, s, _ in every):g}" for c, every in found.items())
            print(f"{done} of {args.samples} after {time.monotonic() - started:.0f} s: {said}", flush=True)
    finally:
        F.scaled_dot_product_attention = kept.attention
    ask = Ask("reader", tuple(methods), tuple(tasks), (args.length,), done, args.seed)
    write_whole(args.out / "config.json", json.dumps(asdict(ask), indent=1) + "\n")
    for cell, every in found.items():
        samples = drawn[cell[1]].samples[:done]
        said = [untimed(answer) for answer, _, _ in every]
        append(args.out, lines_of(cell, samples, said, [score for _, score, _ in every]), FILE)
    command = f"python bench/prompt_once.py --methods {args.methods} --tasks {args.tasks} --length {args.length}"
    command += f" --samples {done} --seed {args.seed} --threads {args.threads} --out {args.out.name}"
    held = describe(loaded, args.length, command)
    append(args.out, [{key: text for key, text in held.items() if key != "length"}], CONDITIONS)
    return kept


def scored(loaded: Loaded, plan: Any, name: str, sample: Any) -> tuple[Any, float, Any]:
    """The answer to one sample, its score, and what the task says of it if it reads by itself."""
    task = get_task(name)
    if hasattr(task, "run"):
        (outcome,), _ = outcomes(loaded, plan, task, [sample])
        return outcome.answer, outcome.score, outcome
    (said,) = answers(loaded, plan, [sample.ids], max_new_tokens=sample.max_new_tokens)
    return said, task.score(said.text, sample), None


def write(folder: Path, found: dict[Any, list[Any]], seen: dict[Any, dict[str, Any]]) -> None:
    """rows.jsonl as it stands."""
    rows = []
    for (method, name, length), every in found.items():
        task = get_task(name)
        if hasattr(task, "run"):
            row = dict(task.summary([outcome for _, _, outcome in every]))
        else:
            score = mean_score([score for _, score, _ in every])
            row = {"n": score.n, "score": score.score, "low": round(score.low, 4), "high": round(score.high, 4)}
        row |= seen[method, name, length] | {"ttft_s": None, "tpot_s": None, "batch": 1}
        row |= {"kv_bytes": max(answer.kv_bytes for answer, _, _ in every)}
        rows.append({"method": method, "task": name, "length": length} | row)
    write_whole(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
