"""`saccade lm-eval`: tasks of lm-evaluation-harness under plans, with dense attention beside."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from saccade.cli.arguments import add_model, load_model, numbers, positive
from saccade.cli.main import Result
from saccade.cli.progress import Progress, warn
from saccade.cli.table import number, table
from saccade.core.errors import InputError

HELP = "run tasks of lm-evaluation-harness (RULER, LongBench, BABILong, your own) under plans, dense beside"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Methods, tasks, lengths, output."""
    parser.add_argument("--methods", default="", metavar="A,B", help="names from `saccade list` or plan files")
    parser.add_argument("--tasks", required=True, metavar="A,B", help="names that lm_eval knows: ruler, longbench, ...")
    parser.add_argument("--include-path", metavar="DIR", help="folder of YAML tasks of your own")
    parser.add_argument(
        "--lengths",
        type=numbers,
        default=[8192],
        metavar="N,M",
        help="of RULER's samples; budgets fit the longest (8192)",
    )
    parser.add_argument("--limit", type=positive, help="documents of each task (all)")
    parser.add_argument("--fewshot", type=int, help="examples in each prompt (as each task says)")
    parser.add_argument("--batch", type=positive, default=1, help="prompts that generate together (1)")
    parser.add_argument("--max-length", type=positive, help="tokens of context and answer (what the model says)")
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the model's chat template")
    parser.add_argument("--out", metavar="DIR", help="folder where rows are kept, to go on after an interruption")
    add_model(parser)


def run(args: argparse.Namespace) -> Result:
    """Evaluate what is not there yet, print the table, write it."""
    from saccade.core.files import write_whole
    from saccade.evaluate.harness import Ask
    from saccade.evaluate.harness import run as evaluate
    from saccade.evaluate.presets import DENSE, names_of

    if args.fewshot is not None and args.fewshot < 0:
        raise InputError(f"lm-eval: --fewshot must be >= 0, got {args.fewshot}")
    methods, tasks = names_of([DENSE, *names_of(args.methods)]), names_of(args.tasks)
    loaded = load_model(args)
    for length in args.lengths:
        if line := loaded.beyond(length):
            warn(line)
    ask = Ask(
        model=args.model,
        tasks=tuple(tasks),
        lengths=tuple(args.lengths),
        include=args.include_path,
        limit=args.limit,
        fewshot=args.fewshot,
        batch=args.batch,
        max_length=args.max_length,
        chat=args.chat,
        dtype=loaded.dtype,
        device=str(loaded.device),
    )
    progress = Progress(len(methods) * len(tasks))
    try:
        rows = evaluate(loaded, ask, methods, args.out, lambda method, task: progress.step(f"{method} on {task}"))
    except KeyboardInterrupt:
        kept = f"; finished tasks are in {args.out}, the same command goes on there" if args.out else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    finally:
        progress.clear()
    text = text_table(rows)
    if args.out:
        page = Path(args.out) / "lm_eval.txt"
        write_whole(page, text + "\n")
        text += f"\nThe table: {page.resolve()}"
    return Result({"rows": rows, "command": args.command_line}, text)


def text_table(rows: list[dict[str, Any]]) -> str:
    """A line per method, task and metric, with what dense attention has."""
    head = ["method", "task", "metric", "filter", "n", "value", "+-", "dense", "difference"]
    cells = [
        [
            row["method"],
            row["task"],
            row["metric"] + {True: "", False: " (lower is better)", None: ""}[row["higher"]],
            row["filter"],
            str(row["n"] or "-"),
            number(row["value"], ".4f"),
            number(row["stderr"], ".4f"),
            number(row["dense"], ".4f"),
            number(None if row["dense"] is None else row["value"] - row["dense"], "+.4f"),
        ]
        for row in rows
    ]
    return table(head, cells, "llllrrrrr")
