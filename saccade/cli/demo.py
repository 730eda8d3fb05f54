"""`saccade demo`: a book with planted facts, dense attention against sparse, in a table and on a page."""

from __future__ import annotations

import argparse
import datetime
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.cli.arguments import add_model, load_model, positive
from saccade.cli.main import Result
from saccade.cli.progress import Progress, warn
from saccade.cli.table import number, percent, size, table
from saccade.core.machine import cpus

if TYPE_CHECKING:
    from saccade.evaluate.model import Loaded

HELP = "ask about facts planted in a book: dense attention against sparse methods, with a page of results"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Methods, length, model, output."""
    parser.add_argument(
        "methods", nargs="*", metavar="METHOD", help='names ("minference", "minference+duo") or plan files'
    )
    parser.add_argument("--length", type=positive, default=8192, help="tokens of text, question and answer (8192)")
    parser.add_argument("--facts", type=positive, default=4, help="planted facts, one question each (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the document (0)")
    parser.add_argument("--out", default="saccade-out", metavar="DIR", help="folder of the page (saccade-out)")
    add_model(parser)


def run(args: argparse.Namespace) -> Result:
    """Measure, write the page, print the table."""
    from saccade.evaluate.demo import demo
    from saccade.evaluate.presets import defaults
    from saccade.evaluate.report.page import write_page

    loaded = load_model(args)
    warnings = [line for line in [loaded.beyond(args.length)] if line]
    for line in warnings:
        warn(line)
    methods = args.methods or defaults(loaded, args.length)
    progress = Progress(len({"dense", *methods}))

    def tell(text: str, row: dict[str, Any] | None) -> None:
        if row is None:
            if progress.live:
                progress.show(text)
            return
        progress.clear()
        progress.step(
            f"{text}: {row['exact']} of {row['asked']} exact, first token {row['ttft_s']:.2f} s"
            f" ({number(row['ttft_ratio'], '.2f')}x dense)"
        )
        progress.say("") if progress.live else None

    found = demo(loaded, methods, args.length, facts=args.facts, seed=args.seed, progress=tell)
    conditions = describe(loaded, args.length, args.command_line)
    path = write_page(Path(args.out) / "demo.html", found, conditions, warnings).resolve()
    rows = [shown.row for shown in found.shown]
    data = {
        "model": loaded.name,
        "length": args.length,
        "device": str(loaded.device),
        "dtype": loaded.dtype,
        "rows": rows,
        "page": str(path),
        "questions": found.document.questions,
        "expected": found.document.answers,
        "warnings": warnings,
        "conditions": conditions,
    }
    return Result(data, f"{text_table(rows)}\n\nThe page with pictures and answers: {path}")


def text_table(rows: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    head = ["method", "exact", "first token", "x", "per token", "x", "kv", "of dense", "reads", "mass"]
    cells = [
        [
            row["method"],
            f"{row['exact']}/{row['asked']}",
            number(row["ttft_s"], ".2f", " s"),
            number(row["ttft_ratio"]),
            "-" if row["tpot_s"] is None else f"{1000 * row['tpot_s']:.1f} ms",
            number(row["tpot_ratio"]),
            size(row["kv_bytes"]),
            percent(row["kv_share"]),
            percent(row["density"]),
            percent(row["mass"]),
        ]
        for row in rows
    ]
    lines = [table(head, cells, "lrrrrrrrrr")]
    lines.append("x: times as fast as dense. reads: measured density, of decoding where prefill is dense.")
    lines.append("mass: softmax weight on what the last 64 queries (or generated tokens) read, where it is known.")
    notes: dict[str, list[str]] = {}
    for row in rows:
        notes.setdefault(row["note"], []).append(row["method"])
    lines += [f"{text}: {', '.join(names)}" for text, names in notes.items() if text]
    return "\n".join(lines)


def describe(loaded: Loaded, length: int, command: str) -> dict[str, str]:
    """Under what conditions a measurement was made."""
    import torch
    import transformers

    import saccade

    parameters = sum(p.numel() for p in loaded.model.parameters())
    on = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else _processor()
    return {
        "model": f"{loaded.name}, {parameters / 1e6:.1f}M parameters, {loaded.dtype}",
        "length": f"{length} tokens",
        "machine": f"{on}, {cpus()} CPUs, {torch.get_num_threads()} threads",
        "software": f"saccade {saccade.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
