"""`saccade cab`: the four attention patterns of CAB, offline: what a method serves, how true it stays, when it pays."""

from __future__ import annotations

import argparse
from typing import Any

from saccade.cli.arguments import numbers, positive
from saccade.cli.main import Result
from saccade.cli.progress import Progress
from saccade.cli.table import table
from saccade.core.errors import InputError

HELP = "which of CAB's four attention patterns a method serves, its compositional index and its efficiency length"
DEFAULT = "dense,streaming,pooled,random,oracle,hyper,s2,xattention,hard"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Methods, sizes, times."""
    parser.add_argument("--methods", default=DEFAULT, metavar="A,B", help=f"names from `saccade list` ({DEFAULT})")
    parser.add_argument("--length", type=positive, default=512, help="keys; the index is frozen at 512 (512)")
    parser.add_argument("--times", action="store_true", help="also measure the efficiency length")
    parser.add_argument(
        "--lengths", type=numbers, default=[256, 512, 1024, 2048, 4096], metavar="N,...", help="that are timed"
    )
    parser.add_argument("--runs", type=positive, default=20, help="of each timed call, the middle half counts (20)")
    parser.add_argument("--batch", type=positive, default=1, help="of timed tensors (1; CAB: 4)")
    parser.add_argument("--device", help="where to time (cpu)")
    parser.add_argument("--threads", type=positive, help="CPU threads that torch uses (default: torch's own choice)")


def run(args: argparse.Namespace) -> Result:
    """A card per method, then its times."""
    import torch

    from saccade.evaluate.cab import PATTERNS, card, efficiency
    from saccade.evaluate.model import check_device
    from saccade.evaluate.presets import names_of

    if args.threads:
        torch.set_num_threads(args.threads)
    names = names_of(args.methods)
    if not names:
        raise InputError("cab: nothing to look at; give --methods")
    if args.times and len(set(args.lengths)) < 3:
        raise InputError(f"cab: an efficiency length needs three --lengths or more, got {args.lengths}")
    check(names)
    device = "cpu" if args.device is None else check_device(args.device)
    progress = Progress(len(names) * (2 if args.times else 1))
    rows: list[dict[str, Any]] = []
    for name in names:
        row = card(name, args.length)
        progress.step(f"{name}: patterns")
        if args.times:
            timed = efficiency(name, device, args.lengths, batch=args.batch, runs=args.runs)
            row["efficiency"] = {key: value for key, value in timed.items() if key != "method"}
            progress.step(f"{name}: times")
        rows.append(row)
    progress.clear()
    data = {"rows": rows, "length": args.length, "patterns": list(PATTERNS), "torch": torch.__version__}
    data |= {"device": device, "threads": torch.get_num_threads(), "command": args.command_line}
    return Result(data, text_table(rows, list(PATTERNS)))


def check(names: list[str]) -> None:
    """Refuse names that are no attention without weights, before anything runs.

    Raises:
        PlanError: no such method.
        InputError: a layer with weights, a method for decoding or for caches, or one that must be fitted first.
    """
    from saccade.core.table import build, find
    from saccade.evaluate.cab import LAYERS
    from saccade.evaluate.presets import arguments as preset
    from saccade.methods.base import Attention

    for name in names:
        cls = find(name)
        fitted = ""
        if issubclass(cls, Attention) and "prefill" in cls.phases:
            try:
                build(name, preset(name, LAYERS, 512))
                continue
            except (TypeError, ValueError) as error:
                fitted = f" ({' '.join(str(error).split())})"
        raise InputError(f"cab: {name} does not read whole sequences by itself{fitted}; CAB looks at prefill methods")


def text_table(rows: list[dict[str, Any]], patterns: list[str]) -> str:
    """Index per pattern where a method serves it; why not, below."""
    timed = any("efficiency" in row for row in rows)
    head = ["method", *patterns, *(["pays from"] if timed else [])]
    cells: list[list[str]] = []
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        line = [row["method"]]
        for pattern in patterns:
            index = row["index"].get(pattern)
            line.append("no" if index is None else f"{index:+.2f}")
            if index is None:
                notes.setdefault((row["method"], row["support"][pattern]), []).append(pattern)
        if timed:
            tokens = row["efficiency"]["tokens"] if "efficiency" in row else None
            line.append("never" if tokens is None else f"{tokens:.0f}")
        cells.append(line)
    lines = [table(head, cells, "l" + "r" * (len(head) - 1))]
    lines.append(
        "An index above 0 is better than the mean of the frozen references: outputs nearer to dense attention."
    )
    if timed:
        lines.append("pays from: tokens from which on a method takes less time than dense attention here.")
    lines += [f"{name}, {', '.join(where)}: {said}" for (name, said), where in notes.items()]
    return "\n".join(lines)
