"""Break-even lengths of the prefill methods, measured here: `python bench/crossover.py [--device cuda] [--save]`.

--save writes them into the table that `Above(inner, length="auto")` reads; lengths of the other kind of device stay.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from saccade.evaluate.crossover import crossover
from saccade.methods.controls import above

TABLE = Path(above.__file__).parent / "crossover.json"
METHODS = ("streaming", "trishape", "minference", "pooled", "xattention", "flexprefill")


def main() -> None:
    """Measure, print a table, and with --save write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--save", action="store_true", help="write the table that is shipped")
    parser.add_argument("--json", metavar="FILE", help="write every measurement")
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    found = [crossover(m, args.device, dtype, done=lambda text: print(text, file=sys.stderr)) for m in args.methods]
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{'method':12} {'break-even, tokens':>20}   ({machine}, {dtype}, torch {torch.__version__})")
    for row in found:
        print(f"{row['method']:12} {row['tokens'] or 'never':>20}")
    if args.json:
        about = {"command": " ".join(["python", *sys.argv]), "machine": machine, "python": platform.python_version()}
        Path(args.json).write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
    if args.save:
        table = json.loads(TABLE.read_text())
        tokens = {k: v for k, v in table["tokens"].items() if not k.startswith(args.device)}
        # a method that never paid within what was measured is used nowhere
        tokens |= {f"{args.device}/{row['method']}": row["tokens"] or 1 << 20 for row in found}
        machines = {**table["machines"], args.device: machine}
        note = "python bench/crossover.py --save, on each kind of device"
        TABLE.write_text(
            json.dumps({"command": note, "machines": machines, "tokens": dict(sorted(tokens.items()))}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
