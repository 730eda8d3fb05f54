"""`saccade bench attend`: attention alone, against torch's own in the same run."""

from __future__ import annotations

import argparse

from saccade.cli.arguments import positive
from saccade.cli.main import Result
from saccade.cli.progress import Progress
from saccade.cli.table import number, table

HELP = "time attention alone on random causal blocks, against torch's scaled_dot_product_attention"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to time."""
    parser.add_argument("verb", choices=("attend",), help="attend: softmax attention over blocks")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--length", type=positive, default=32768, help="tokens (32768)")
    parser.add_argument("--density", type=float, default=0.1, help="share of the causal pairs that is read (0.1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="float32", help="(float32)")
    parser.add_argument("--heads", type=positive, default=4, help="query heads (4)")
    parser.add_argument("--kv-heads", type=positive, default=2, help="key heads (2)")
    parser.add_argument("--width", type=positive, default=64, help="channels of a head (64)")
    parser.add_argument("--block", type=positive, default=128, help="rows and keys of a block (128)")
    parser.add_argument("--repeat", type=positive, default=5, help="turns, of which the medians are shown (5)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")


def run(args: argparse.Namespace) -> Result:
    """Check, then time, per dtype."""
    import torch

    from saccade.evaluate.bench import Case, measure
    from saccade.evaluate.model import DTYPES, check_device

    if args.threads:
        torch.set_num_threads(args.threads)
    device = check_device(args.device)
    names = ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,)
    progress = Progress(len(names) * (args.repeat + 1))
    rows = []
    for name in names:
        case = Case(args.length, args.density, args.heads, args.kv_heads, args.width, args.block, DTYPES[name], device)
        rows.append(measure(case, args.repeat, done=progress.step))
    progress.clear()
    cells = [
        [
            row["impl"],
            row["dtype"],
            str(row["length"]),
            f"{row['density']:.3f}",
            number(row["ms"], ".1f"),
            number(row["gflops"], ".0f"),
            number(row["peer_ms"], ".1f"),
            number(row["peer_gflops"], ".0f"),
            f"{row['speedup']:.2f}x",
        ]
        for row in rows
    ]
    head = ["impl", "dtype", "length", "density", "ms", "GFLOP/s", "sdpa ms", "GFLOP/s", "speedup"]
    where = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    data = {"rows": rows, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return Result(data, f"{table(head, cells, 'llrrrrrrr')}\n{where}")
