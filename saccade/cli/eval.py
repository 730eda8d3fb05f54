"""`saccade eval`: methods against tasks and lengths, a row per cell, resumable."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.cli.arguments import add_model, load_model, numbers, positive
from saccade.cli.demo import describe
from saccade.cli.main import Result
from saccade.cli.progress import Progress, warn
from saccade.cli.table import number, percent, size, table
from saccade.core.errors import InputError

if TYPE_CHECKING:
    from saccade.evaluate.crew import Crew
    from saccade.evaluate.model import Loaded
    from saccade.evaluate.samples import Cell
    from saccade.evaluate.significance import Verdict

COLUMNS = (
    "reads: pairs scored, choosing included, of dense's. mass: softmax weight on what is read.\n"
    "first: time to the first token. token: time of each further one. kv: bytes of keys and values."
)
HELP = "score methods and plans on tasks; an interrupted run goes on where it stopped"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to compare, on what, where to, by whom."""
    parser.add_argument("--methods", metavar="A,B", help="names from `saccade list`, A+B for both at once")
    parser.add_argument("--plans", default="", metavar="FILE,...", help="plan files")
    parser.add_argument(
        "--controls",
        action=argparse.BooleanOptionalAction,
        help="also dense, a window (streaming), random blocks, the best blocks (oracle): yes, unless a suite is named",
    )
    parser.add_argument("--tasks", metavar="A,B", help="names of tasks (needle)")
    parser.add_argument("--lengths", type=numbers, metavar="N,M", help="tokens (4096)")
    parser.add_argument("--samples", type=positive, help="per cell (10)")
    parser.add_argument(
        "--suite", metavar="quick|full", help="methods, tasks, lengths and samples that are not named here"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of rows.jsonl and config.json")
    parser.add_argument("--batch", type=positive, help="prompts read together (1 on a CPU, by memory on a GPU)")
    parser.add_argument("--jobs", type=positive, help="processes that measure, over all GPUs in turn (this one)")
    parser.add_argument("--ray", action="store_true", help="measure on Ray's workers, --jobs of them (one per GPU)")
    add_model(parser)


def run(args: argparse.Namespace) -> Result:
    """Run what is not there yet, then show all rows; exit code 1 where a cell failed."""
    from saccade.core.plan import read_text
    from saccade.evaluate.presets import CONTROLS, names_of
    from saccade.evaluate.run import Ask, get_task
    from saccade.evaluate.run import run as evaluate
    from saccade.evaluate.samples import CONDITIONS, append, read
    from saccade.evaluate.significance import against
    from saccade.evaluate.suites import Suite, get_suite

    suite = get_suite(args.suite) if args.suite else Suite((), ("needle",), (4096,), 10)
    plans = names_of(args.plans)
    controls = not args.suite if args.controls is None else args.controls
    named = [*(suite.methods if args.methods is None else names_of(args.methods)), *plans]
    if not named and not args.controls:
        raise InputError("eval: nothing to compare; give --methods, --plans, --suite or --controls")
    methods = names_of([*(CONTROLS if controls else ()), *named])
    tasks = tuple(names_of(args.tasks)) if args.tasks is not None else suite.tasks
    lengths = tuple(dict.fromkeys(args.lengths or suite.lengths))
    for name in tasks:
        get_task(name)
    loaded = load_model(args)
    for length in lengths:
        if line := loaded.beyond(length):
            warn(line)
    ask = Ask(
        model=args.model,
        methods=tuple(methods),
        tasks=tasks,
        lengths=lengths,
        samples=args.samples or suite.samples,
        seed=args.seed,
        dtype=loaded.dtype,
        device=str(loaded.device),
        plan_files={path: hashlib.sha256(read_text(path).encode()).hexdigest()[:16] for path in plans},
    )
    progress: Progress | None = None
    known = 0

    def tell(row: dict[str, Any], done: int, total: int) -> None:
        nonlocal progress, known
        if progress is None:
            # cells that an earlier run finished do not count for the time that is left
            progress = Progress(total - done + 1)
        said = row.get("error") or number(row["score"])
        if row["ttft_s"] is not None:
            said += f" in {number(row['ttft_s'], '.2f', ' s')} to the first token"
        # a row whose times came later is told twice
        say = progress.step if done > known else progress.show
        known = done
        say(f"{row['method']} on {row['task']} at {row['length']}: {said}")

    try:
        rows = evaluate(loaded, ask, args.out, tell, batch=args.batch, crew=_crew(args, loaded))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; finished cells are in {args.out}, the same command goes on there"
        ) from None
    finally:
        if progress is not None:
            progress.clear()
            held = describe(loaded, max(lengths), args.command_line)
            append(Path(args.out), [{key: text for key, text in held.items() if key != "length"}], CONDITIONS)
    failed = [row for row in rows if row.get("error")]
    verdicts = against(rows, read(Path(args.out)))
    lines = [text_table(rows, verdicts), COLUMNS]
    if any(one.found.p is not None for one in verdicts.values()):
        lines.append(
            f"vs dense: p on the same samples (McNemar, exact; paired bootstrap of part scores), {len(verdicts)} "
            "comparisons, none corrected for their number."
        )
    lines += dict.fromkeys(f"{row['task']}: scores are {row['unit']}" for row in rows if row.get("unit"))
    lines += [f"failed: {r['method']} on {r['task']} at {r['length']}: {r['error']}" for r in failed]
    lines.append(f"The rows: {(Path(args.out) / 'rows.jsonl').resolve()}")
    compared = [
        dict(zip(("method", "task", "length"), cell, strict=True)) | {"verdict": one.word} | one.found._asdict()
        for cell, one in verdicts.items()
    ]
    return Result({"rows": rows, "against_dense": compared}, "\n".join(lines), 1 if failed else 0)


def _crew(args: argparse.Namespace, loaded: Loaded) -> Callable[[], AbstractContextManager[Crew]] | None:
    """Who measures: None = this process."""
    from saccade.evaluate.crew import Processes, Setup, setups

    if args.ray:
        from saccade.evaluate.crew_ray import Actors

        return partial(Actors, Setup(loaded.name, loaded.dtype, loaded.device.type, args.threads), args.jobs)
    if args.jobs is None or args.jobs == 1:
        return None
    return partial(Processes, setups(loaded, args.jobs, args.device, args.threads))


def text_table(rows: list[dict[str, Any]], verdicts: dict[Cell, Verdict] | None = None) -> str:
    """The rows for a terminal, scores with their 95 % Wilson intervals, and what their samples say beside dense."""
    head = ["method", "task", "length", "n", "score", "95 %", "vs dense", "reads", "mass", "first", "token", "kv"]
    names = _names(row["method"] for row in rows)
    cells = [
        [
            names[row["method"]],
            row["task"],
            str(row["length"]),
            str(row["n"] or "-"),
            number(row["score"]),
            "-" if row["low"] is None else f"{row['low']:.2f}-{row['high']:.2f}",
            _verdict((verdicts or {}).get((row["method"], row["task"], row["length"]))),
            percent(row["density"]),
            percent(row["mass"]),
            number(row["ttft_s"], ".2f", " s"),
            "-" if row["tpot_s"] is None else f"{1000 * row['tpot_s']:.1f} ms",
            size(row["kv_bytes"]),
        ]
        for row in rows
    ]
    return table(head, cells, "llrrrrlrrrrr")


def _names(methods: Iterable[str]) -> dict[str, str]:
    """What the table calls each method: a plan file by its name without the folder, unless two have the same."""
    found = {name: Path(name).name if name.endswith((".json", ".tsv")) or "/" in name else name for name in methods}
    shown = list(found.values())
    return {name: short if shown.count(short) == 1 else name for name, short in found.items()}


def _verdict(one: Verdict | None) -> str:
    if one is None:
        return "-"
    p = one.found.p
    if p is None or one.word == "same":
        return one.word
    return f"{one.word} {'<.001' if p < 0.001 else f'{p:.3f}'.removeprefix('0')}"
