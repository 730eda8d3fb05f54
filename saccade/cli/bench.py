"""`saccade bench`: kernels and whole models, timed beside their peers in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from saccade.cli.arguments import numbers, positive
from saccade.cli.main import Result
from saccade.cli.progress import Progress
from saccade.cli.table import number, table
from saccade.core.errors import InputError, UnsupportedError

HELP = "time attention, decoding, selection, scans or a whole model against their peers in the same run"
VERBS = {
    "attend": "softmax attention over blocks (cuda: also FlexAttention, backwards, columns and diagonals)",
    "decode": "one query over a long store",
    "select": "choosing what is read",
    "scan": "linear attention",
    "e2e": "prefill and decode of an 8B Llama's shape with random weights",
}
PEERS = ("sdpa-flash", "sdpa-cudnn", "flex")
DEFAULTS = {
    **{"length": [32768], "density": [0.1], "block": 128, "peers": list(PEERS), "backward": False, "slash": False},
    **{"decay": "both", "layers": 32, "prefill": "pooled", "decode": "tidal"},
}
USES = {
    "attend": ("length", "density", "dtype", "heads", "kv_heads", "width", "block", "repeat"),
    "attend on cuda": ("peers", "backward", "slash"),
    "decode": ("length", "density", "dtype", "repeat"),
    "select": ("length", "density", "dtype", "repeat"),
    "scan": ("length", "dtype", "heads", "width", "repeat", "decay"),
    "e2e": ("length", "density", "dtype", "repeat", "layers", "prefill", "decode"),
    "e2e --methods": ("length", "dtype", "layers", "methods"),
}
CPU, GPU = (4, 2, 64, 5), (32, 8, 128, 20)  # query heads, key heads, width, runs of a median


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to time."""
    parser.add_argument("verb", choices=VERBS, help="; ".join(f"{verb}: {what}" for verb, what in VERBS.items()))
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--length", type=numbers, metavar="N,...", help="tokens (32768)")
    parser.add_argument("--density", type=shares, metavar="R,...", help="shares of the causal pairs read (0.1)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "both"), help="(cpu: float32, cuda: bfloat16)"
    )
    parser.add_argument("--heads", type=positive, help="query heads (cpu: 4, cuda: 32)")
    parser.add_argument("--kv-heads", type=positive, help="key heads (cpu: 2, cuda: 8)")
    parser.add_argument("--width", type=positive, help="channels of a head (cpu: 64, cuda: 128)")
    parser.add_argument("--block", type=positive, help="rows and keys of a block (128)")
    parser.add_argument("--repeat", type=positive, help="runs that a median is made of (cpu: 5, cuda: 20, e2e: 1)")
    parser.add_argument("--peers", type=words, help=f"attend on cuda ({','.join(PEERS)})")
    parser.add_argument("--backward", action="store_true", default=None, help="attend on cuda: also the gradients")
    parser.add_argument("--slash", action="store_true", default=None, help="attend on cuda: also columns and diagonals")
    parser.add_argument("--decay", choices=("head", "token", "both"), help="scan: per what (both)")
    parser.add_argument("--layers", type=positive, help="e2e: layers of the model (32)")
    parser.add_argument("--prefill", help="e2e: pooled or minference (pooled)")
    parser.add_argument("--decode", help="e2e: a decode method (tidal)")
    parser.add_argument(
        "--methods",
        metavar="NAME,...",
        help="e2e: time decoding alone, with each of these (dense, duo, quest@0.05, ...)",
    )
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")


def run(args: argparse.Namespace) -> Result:
    """Check, then time, row by row."""
    import torch

    from saccade.evaluate.model import DTYPES, check_device

    if args.threads:
        torch.set_num_threads(args.threads)
    device = str(check_device(args.device))
    gpu = device.startswith("cuda")
    _check_used(args, gpu)
    for option, default in DEFAULTS.items():
        if getattr(args, option) is None:
            setattr(args, option, default)
    heads, kv_heads, width, repeat = GPU if gpu else CPU
    args.heads, args.kv_heads = args.heads or heads, args.kv_heads or kv_heads
    args.width = args.width or width
    args.repeat = args.repeat or (1 if args.verb == "e2e" else repeat)
    name = args.dtype or ("bfloat16" if gpu else "float32")
    dtypes = [DTYPES[n] for n in (("float32", "bfloat16") if name == "both" else (name,))]
    progress = Progress(0)
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        rows += _rows(args, dtype, device, progress.say)
    progress.clear()
    data = {"rows": rows, "torch": torch.__version__, "threads": torch.get_num_threads(), "command": args.command_line}
    where = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if gpu:
        data["machine"] = torch.cuda.get_device_name(device)
        where = f"{data['machine']}, torch {torch.__version__}"
    return Result(data, f"{_table(rows)}\n{where}")


def _check_used(args: argparse.Namespace, gpu: bool) -> None:
    """Refuse options that were given and would change nothing."""
    verb = args.verb
    mode = "e2e --methods" if verb == "e2e" and args.methods else verb
    used = [*USES[mode], *(USES["attend on cuda"] if verb == "attend" and gpu else ())]
    for option in dict.fromkeys(name for names in USES.values() for name in names):
        if getattr(args, option) is not None and option not in used:
            others = ", ".join(other for other, names in USES.items() if option in names)
            raise InputError(
                f"bench {mode}: {_flag(option)} is not used here, but by {others}; leave it out. "
                f"Used here: {', '.join(map(_flag, used))}"
            )


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def shares(text: str) -> list[float]:
    """Shares in (0, 1] separated by commas, for argparse."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"must be numbers in (0, 1], got {text!r}")
    return found


def words(text: str) -> list[str]:
    """Names of peers separated by commas, for argparse."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in found if part not in PEERS]
    if wrong:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(PEERS)}, got {', '.join(wrong)}")
    return found


def _rows(args: argparse.Namespace, dtype: Any, device: str, done: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of a verb in one dtype."""
    gpu = device.startswith("cuda")
    found: list[dict[str, Any]] = []
    if args.verb == "attend" and gpu:
        from saccade.evaluate.bench_attend import attend_rows
        from saccade.evaluate.bench_clock import ceiling

        limits = ceiling(device, dtype)
        sizes = {"heads": args.heads, "kv_heads": args.kv_heads, "width": args.width, "block": args.block}
        choice = {"peers": args.peers, "backward": args.backward, "slash": args.slash}
        for length in args.length:
            found += attend_rows(
                length, args.density, dtype, device, args.repeat, limits=limits, done=done, **choice, **sizes
            )
        return found
    for length in args.length:
        if args.verb == "scan":
            from saccade.evaluate.bench_scan import KINDS, scan_rows

            impl, kinds = "triton" if gpu else "chunked", KINDS if args.decay == "both" else (args.decay,)
            sizes = {"heads": args.heads, "width": args.width}
            found += scan_rows(length, dtype, device, args.repeat, impl=impl, kinds=kinds, done=done, **sizes)
            continue
        for density in args.density:
            if args.verb == "attend":
                from saccade.evaluate.bench import Case, measure

                case = Case(length, density, args.heads, args.kv_heads, args.width, args.block, dtype, device)
                found.append(measure(case, args.repeat, done=done))
            elif args.verb == "decode":
                from saccade.evaluate.bench_decode import decode_rows

                found += decode_rows(length, density, dtype, device, args.repeat)
            elif args.verb == "select":
                from saccade.evaluate.bench_select import select_rows

                found += select_rows(length, density, dtype, device, args.repeat)
            elif args.verb == "e2e":
                found += _e2e(args, length, density, dtype, device, done)
    return found


def _e2e(
    args: argparse.Namespace, length: int, density: float, dtype: Any, device: str, done: Callable[[str], None]
) -> list[dict[str, Any]]:
    if not device.startswith("cuda"):
        raise UnsupportedError("bench e2e: a model of this size needs a GPU; use --device cuda")
    from saccade.evaluate.bench_e2e import Shape, e2e_rows

    if args.methods:
        from saccade.evaluate.bench_tokens import token_rows

        names = [name.strip() for name in args.methods.split(",") if name.strip()]
        return token_rows(length, names, dtype, device, shape=Shape(layers=args.layers), done=done)
    shape, methods = Shape(layers=args.layers), {"prefill": args.prefill, "decode": args.decode}
    return e2e_rows(length, density, dtype, device, args.repeat, shape=shape, done=done, **methods)


def _table(rows: list[dict[str, Any]]) -> str:
    """All rows under the fields that all of them have, and what they are in a last column."""
    cells = [
        [
            row["impl"],
            row["peer"],
            row["dtype"],
            str(row["length"]),
            f"{row['density']:.3f}",
            number(row["ms"], ".3f"),
            number(row["peer_ms"], ".3f"),
            f"{row['speedup']:.2f}x",
            number(row.get("floor_ms", row.get("ceiling_ms")), ".3f"),
            ", ".join(str(row[key]) for key in ("pattern", "decay", "direction", "method") if key in row) or "-",
        ]
        for row in rows
    ]
    head = ["impl", "peer", "dtype", "length", "density", "ms", "peer ms", "speedup", "floor ms", "what"]
    return table(head, cells, "lllrrrrrrl")
