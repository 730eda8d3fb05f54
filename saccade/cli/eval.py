"""`saccade eval`: methods against tasks and lengths, a row per cell, resumable."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from saccade.cli.arguments import add_model, load_model, numbers, positive
from saccade.cli.demo import describe
from saccade.cli.main import Result
from saccade.cli.progress import Progress, warn
from saccade.cli.table import number, percent, size, table
from saccade.core.errors import InputError

HELP = "score methods and plans on tasks; an interrupted run goes on where it stopped"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to compare, on what, where to."""
    parser.add_argument("--methods", default="", metavar="A,B", help="names from `saccade list`, A+B for both at once")
    parser.add_argument("--plans", default="", metavar="FILE,...", help="plan files")
    parser.add_argument("--controls", action="store_true", help="add dense, streaming, random and oracle")
    parser.add_argument("--tasks", default="needle", metavar="A,B", help="names of tasks (needle)")
    parser.add_argument("--lengths", type=numbers, default=[4096], metavar="N,M", help="tokens (4096)")
    parser.add_argument("--samples", type=positive, default=10, help="per cell (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of rows.jsonl and config.json")
    add_model(parser)


def run(args: argparse.Namespace) -> Result:
    """Run what is not there yet, then show all rows."""
    from saccade.core.plan import read_text
    from saccade.evaluate.presets import CONTROLS, names_of
    from saccade.evaluate.run import Ask, get_task
    from saccade.evaluate.run import run as evaluate
    from saccade.evaluate.samples import CONDITIONS, append

    plans = names_of(args.plans)
    methods = names_of([*(CONTROLS if args.controls else ()), *names_of(args.methods), *plans])
    if not methods:
        raise InputError("eval: nothing to compare; give --methods, --plans or --controls")
    tasks = tuple(names_of(args.tasks))
    for name in tasks:
        get_task(name)
    loaded = load_model(args)
    for length in args.lengths:
        if line := loaded.beyond(length):
            warn(line)
    ask = Ask(
        model=args.model,
        methods=tuple(methods),
        tasks=tasks,
        lengths=tuple(dict.fromkeys(args.lengths)),
        samples=args.samples,
        seed=args.seed,
        dtype=loaded.dtype,
        device=str(loaded.device),
        plan_files={path: hashlib.sha256(read_text(path).encode()).hexdigest()[:16] for path in plans},
    )
    progress: Progress | None = None

    def tell(row: dict[str, Any], done: int, total: int) -> None:
        nonlocal progress
        if progress is None:
            # cells that an earlier run finished do not count for the time that is left
            progress = Progress(total - done + 1)
        said = row.get("error") or f"{number(row['score'])} in {number(row['ttft_s'], '.2f', ' s')} to the first token"
        progress.step(f"{row['method']} on {row['task']} at {row['length']}: {said}")

    try:
        rows = evaluate(loaded, ask, args.out, tell)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; finished cells are in {args.out}, the same command goes on there"
        ) from None
    finally:
        if progress is not None:
            progress.clear()
            held = describe(loaded, max(args.lengths), args.command_line)
            append(Path(args.out), [{key: text for key, text in held.items() if key != "length"}], CONDITIONS)
    failed = [row for row in rows if row.get("error")]
    lines = [text_table(rows)]
    lines += dict.fromkeys(f"{row['task']}: scores are {row['unit']}" for row in rows if row.get("unit"))
    lines += [f"failed: {r['method']} on {r['task']} at {r['length']}: {r['error']}" for r in failed]
    lines.append(f"The rows: {(Path(args.out) / 'rows.jsonl').resolve()}")
    return Result({"rows": rows}, "\n".join(lines))


def text_table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal, scores with their 95 % Wilson intervals."""
    head = ["method", "task", "length", "n", "score", "95 %", "reads", "mass", "first token", "per token", "kv"]
    cells = [
        [
            row["method"],
            row["task"],
            str(row["length"]),
            str(row["n"] or "-"),
            number(row["score"]),
            "-" if row["low"] is None else f"{row['low']:.2f}-{row['high']:.2f}",
            percent(row["density"]),
            percent(row["mass"]),
            number(row["ttft_s"], ".2f", " s"),
            "-" if row["tpot_s"] is None else f"{1000 * row['tpot_s']:.1f} ms",
            size(row["kv_bytes"]),
        ]
        for row in rows
    ]
    return table(head, cells, "llrrrrrrrrr")
