"""Write docs/results/reader.md from evaluations: `python bench/reader_table.py DIR [DIR...] [--times DIR...]`.

A folder is what `saccade eval --out DIR` leaves; without one, the committed run at 4096 tokens. Where two folders have
the same cell the later one counts. With `--times`, the times come from those folders alone: a run that shared its
machine has scores and bytes to give, but no times. What is said of a method that falls short stands in
bench/reader_why.md; it was measured, and is printed only while the method falls short.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from saccade.core.table import METHODS, find

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "bench" / "results" / "reader-cpu-4k"
OUT = ROOT / "docs" / "results" / "reader.md"
WHY = ROOT / "bench" / "reader_why.md"
DENSE = "dense"
TITLE = "Every method on the bundled reader"
CONTROLS = ("dense", "oracle", "random", "streaming")
TITLES = {"needle": "needle", "niah-multikey": "multi-key", "kv": "key-value", "multi-turn": "multi-turn"}
NEAR, CHEAP = 0.02, 0.2  # what counts as like dense, and as cheap
FEW = 10  # samples a task, below which nobody is judged
EVERY, MEAN, UNLIKE = "every", "mean", "unlike"
PREFILL, LATER = "prefill", "decode or cache"
KINDS = ("control", "prefill", "decode", "prefill, decode", "cache")

Row = dict[str, Any]


LAUNCHES = (
    "The reader is small: on a GPU its time goes into launching kernels, whatever they read, and what launches more is "
    "slower than dense here; for a model of 8 billion parameters see docs/gpu.md. `retrieval` builds its index in the "
    "first step after the prompt, which the time a token, a mean over one short answer, includes."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, compare with dense, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--times", nargs="+", type=Path, default=None, metavar="DIR", help="times from these alone")
    parser.add_argument("--tasks", default="", metavar="A,B", help="only these tasks (all)")
    parser.add_argument("--lengths", default="", metavar="N,M", help="only these lengths (all)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--title", default=TITLE)
    args = parser.parse_args(argv)
    folders = args.folders or [COMMITTED]
    tasks, lengths = args.tasks.split(","), args.lengths.split(",")
    rows, failed = (
        [
            row
            for row in found
            if (not args.tasks or row["task"] in tasks) and (not args.lengths or str(row["length"]) in lengths)
        ]
        for found in collect(folders, args.times)
    )
    command = " ".join(["python bench/reader_table.py", *map(_shown, args.folders)])
    if args.times:
        command += " --times " + " ".join(map(_shown, args.times))
    command += f" --tasks {args.tasks}" * bool(args.tasks) + f" --lengths {args.lengths}" * bool(args.lengths)
    command += f" --out {_shown(args.out)}" * (args.out != OUT)
    command += f" --title {shlex.quote(args.title)}" * (args.title != TITLE)
    said = [(folder, conditions(folder)) for folder in dict.fromkeys([*folders, *(args.times or [])])]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(rows, failed, said, command, known_reasons(WHY), args.title), encoding="utf-8")
    print(args.out)


def collect(folders: Iterable[Path], times: Iterable[Path] | None = None) -> tuple[list[Row], list[Row]]:
    """Finished rows with their times as ratios to dense in the same folder, and the cells that failed."""
    found: dict[tuple[str, str, int], Row] = {}
    for folder in folders:
        found |= {_cell(row): row for row in _timed(read(folder))}
    if times is not None:
        clocks: dict[tuple[str, str, int], Row] = {}
        for folder in times:
            clocks |= {_cell(row): row for row in _timed(read(folder)) if row.get("score") is not None}
        # methods that were not timed have no times, whatever the other folders say
        names = ("ttft_s", "tpot_s", "first", "step")
        found = {cell: row | {name: clocks.get(cell, {}).get(name) for name in names} for cell, row in found.items()}
    good = [row for row in found.values() if row.get("score") is not None and not row.get("error")]
    return good, [row for row in found.values() if row.get("score") is None or row.get("error")]


def read(folder: Path) -> list[Row]:
    """The rows of a folder; a line that was cut off by a crash is left out."""
    rows = {}
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            if at < len(lines) - 1:
                raise SystemExit(f"{folder / 'rows.jsonl'}: line {at + 1} is not a row of an evaluation") from None
            continue
        rows[_cell(row)] = row
    return list(rows.values())


def conditions(folder: Path) -> Row:
    """Machine, software and command of the folder's last run, as far as they are written down."""
    path = folder / "conditions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return dict(json.loads(lines[-1])) if lines else {}


def known_reasons(path: Path) -> dict[str, str]:
    """Lines `- name: reason` and rows `| name | reason |`; several names are parted by commas."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("- "):
            names, _, reason = line[2:].partition(": ")
        elif line.startswith("| "):
            names, _, reason = line.strip("| ").partition(" | ")
        else:
            continue
        found |= {name.strip(" `"): reason.strip().rstrip(".") for name in names.split(",") if reason}
    return found


def phases(method: str) -> tuple[str, ...]:
    """The phases that a preset serves; none for a plan file."""
    parts = [part.strip().partition("@")[0] for part in method.split("+")]
    served = {phase for part in parts if part in METHODS for phase in find(part).phases}  # type: ignore[attr-defined]
    return tuple(phase for phase in ("prefill", "decode", "cache") if phase in served)


def kind(method: str) -> str:
    """What the table calls it."""
    return "control" if method in CONTROLS else ", ".join(phases(method)) or "plan"


def costs(rows: Sequence[Row], dense: Sequence[Row], method: str) -> dict[str, float]:
    """What a method saves, as shares of dense: pairs scored in prefill; of bytes read and held the dearer share."""
    found: dict[str, float] = {}
    served = phases(method)
    pairs, read = mean(rows, "density"), share(rows, dense, "read_bytes")
    if "prefill" in served and pairs is not None:
        found[PREFILL] = pairs
    later = [read] if set(served) & {"decode", "cache"} else []
    if read is None and served == ("decode",):
        # a plan for decoding alone has its density there
        later = [pairs]
    if "cache" in served:
        later.append(share(rows, dense, "kv_bytes"))
    known = [value for value in later if value is not None]
    return found | ({LATER: max(known)} if known else {})


def mean(rows: Iterable[Row], name: str) -> float | None:
    """Mean over rows that know it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return fmean(values) if values else None


def share(rows: Sequence[Row], dense: Sequence[Row], name: str) -> float | None:
    """Mean over tasks of a number as a share of what dense has there."""
    whole = {row["task"]: row.get(name) for row in dense}
    pairs = [(row.get(name), whole.get(row["task"])) for row in rows]
    values = [a / b for a, b in pairs if a is not None and b]
    return fmean(values) if values else None


def likeness(rows: Sequence[Row], dense: Sequence[Row]) -> str:
    """Like dense in EVERY task, in their MEAN, or UNLIKE; a task that is missing is lost."""
    mine = {row["task"]: row["score"] for row in rows}
    lost = [row["score"] - mine.get(row["task"], -1.0) for row in dense]
    return EVERY if max(lost) <= NEAR + 1e-9 else MEAN if fmean(lost) <= NEAR + 1e-9 else UNLIKE


def page(
    rows: Sequence[Row],
    failed: Sequence[Row],
    said: Sequence[tuple[Path, Row]],
    command: str,
    why: dict[str, str],
    title: str = TITLE,
) -> str:
    """The page as Markdown: summaries, a table for each length, reasons, conditions."""
    lengths = sorted({row["length"] for row in rows})
    plain = [row for row in rows if "@" not in row["method"]]
    tasks = _tasks(plain)
    parts = [f"# {title}", ""]
    fewest = min((row["n"] for row in plain if row.get("n")), default=0)
    # a verdict on a handful of answers would be read as one
    judged = fewest == 0 or fewest >= FEW
    if judged:
        parts += ["## In short", ""]
        for length in lengths:
            parts += summary(_by_method(plain, length), length)
        absent = [name for name in METHODS if phases(name) and not any(name in r["method"].split("+") for r in plain)]
        if absent:
            parts += [f"Not run here: {', '.join(f'`{name}`' for name in absent)}.", ""]
        parts += [
            f"Like dense: no more than {NEAR * 100:.0f} points below dense attention, in each of the tasks "
            f"({', '.join(tasks)}) or in their mean. "
            + (f"With {fewest} samples a task one sample is {100 / fewest:.1f} points. " if fewest else "")
            + "The cost in brackets: for prefill the share of query-key pairs that are scored, choosing included; for "
            "decoding and caches the share of the cache's bytes that a step reads, or of its bytes that are held, "
            "whichever is dearer. Whoever saves on both stands in both, if both are cheap. Where bytes read were not "
            "measured, the density of decoding stands for them.",
            "",
        ]
    else:
        parts += [
            f"From {fewest} sample{'s' * (fewest > 1)} a task: for times and bytes, too few to say who is like dense.",
            "",
        ]
    for length in lengths:
        parts += table(_by_method(plain, length), length, tasks)
    if any("NVIDIA" in str(about.get("machine")) for _, about in said):
        parts += [LAUNCHES, ""]
    parts += reasons(plain, lengths, why) if judged else []
    parts += curves([row for row in rows if "@" in row["method"]])
    if failed:
        parts += ["## Cells without a score", ""]
        parts += [f"- `{r['method']}`, {r['task']}, {r['length']}: {r.get('error') or 'no score'}" for r in failed]
        parts += [""]
    parts += ["## Conditions", ""]
    for folder, about in said:
        known = [about[name] for name in ("model", "machine", "software") if about.get(name)]
        parts += [f"- `{_shown(folder)}`: {'; '.join(known) or 'not written down'}."]
        parts += [f"  `{about['command']}`"] if about.get("command") else []
    return "\n".join([*parts, "", f"This page: `{command}`.", ""])


def summary(found: dict[str, list[Row]], length: int) -> list[str]:
    """Who is like dense at a fifth of its cost, by what it saves on; who serves both stands in both."""
    if DENSE not in found:
        return [f"At {length} tokens dense attention was not measured.", ""]
    dense = found[DENSE]
    lines = [f"**{length} tokens.** Like dense at {CHEAP:.2f} of its cost or less:", ""]
    rest: dict[str, dict[str, float]] = {
        "like dense, but dearer": {},
        "not like dense": {},
        "not run in every task": {},
    }
    for side in (PREFILL, LATER):
        cheap: dict[str, dict[str, float]] = {EVERY: {}, MEAN: {}}
        for method, rows in found.items():
            prices, near = costs(rows, dense, method), likeness(rows, dense)
            if method in CONTROLS or side not in prices:
                continue
            if len(rows) < len(dense) and near == UNLIKE:
                rest["not run in every task"][method] = max(prices.values())
            elif near == UNLIKE:
                rest["not like dense"][method] = max(prices.values())
            elif max(prices.values()) > CHEAP:
                rest["like dense, but dearer"][method] = max(prices.values())
            else:
                cheap[near][method] = prices[side]
        lines.append(f"- {side}, {len(cheap[EVERY])} in every task: {_priced(cheap[EVERY])}")
        if cheap[MEAN]:
            lines.append(f"- {side}, {len(cheap[MEAN])} more over the tasks together: {_priced(cheap[MEAN])}")
    return [*lines, *(f"- {name}, {len(members)}: {_priced(members)}" for name, members in rest.items() if members), ""]


def table(found: dict[str, list[Row]], length: int, tasks: Sequence[str]) -> list[str]:
    """One row per method; columns that nobody knows are left out."""
    dense = found.get(DENSE, [])
    columns = ["method", "kind", *(TITLES.get(task, task) for task in tasks), "density", "choosing", "mass", "5 %"]
    columns += ["held", "read", "first token", "a token"]
    lines = []
    order = sorted(found, key=lambda m: (_rank(m), -(mean(found[m], "score") or 0.0), m))
    for method in order:
        rows = {row["task"]: row for row in found[method]}
        cells = [f"`{method}`", kind(method)]
        cells += [_score(rows.get(task)) for task in tasks]
        cells += [_number(mean(rows.values(), name)) for name in ("density", "estimate", "mass", "mass_low")]
        cells += [_percent(share(found[method], dense, name)) for name in ("kv_bytes", "read_bytes")]
        cells += [_ratio(mean(rows.values(), name)) for name in ("first", "step")]
        lines.append(cells)
    known = [at for at in range(len(columns)) if any(cells[at] != "-" for cells in lines)]
    text = [f"## {length} tokens", ""]
    text += ["| " + " | ".join(columns[at] for at in known) + " |", "|" + "---|" * len(known)]
    text += ["| " + " | ".join(cells[at] for at in known) + " |" for cells in lines]
    text += [
        "",
        "Scores are shares of answers that are right to the last character, `multi-turn` the share of three questions "
        "over one cache. The rest are means over the tasks: `density` the share of pairs that are scored, `choosing` "
        "the part of it that finds what to read, `mass` the attention weight on what is read and `5 %` its 5th "
        "percentile over queries, `held` and `read` the bytes of the cache and those that a generated token reads, "
        f"against dense. Times are against dense in the same run{_absolute(dense)}; above 1x is faster. A dash: not "
        "known.",
        "",
    ]
    return text


def reasons(rows: Sequence[Row], lengths: Sequence[int], known: dict[str, str]) -> list[str]:
    """What is known of the methods that fall short somewhere."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        where: dict[str, list[str]] = {}
        for length in lengths:
            found = _by_method(rows, length)
            mine = {row["task"]: row["score"] for row in found.get(method, [])}
            for row in found.get(DENSE, []):
                if row["task"] in mine and mine[row["task"]] < row["score"] - NEAR - 1e-9:
                    where.setdefault(TITLES.get(row["task"], row["task"]), []).append(str(length))
        if where:
            places = ", ".join(f"{task} ({', '.join(at)})" for task, at in where.items())
            parts = [part for part in method.split("+") if part in known]
            why = known.get(method) or "; ".join(f"`{part}`: {known[part]}" for part in parts)
            lines.append(f"- `{method}`, {places}: {why or 'no reason was measured'}.")
    if not lines:
        return []
    head = "Measured at 4096 tokens, on a CPU in float32, unless it says otherwise."
    return ["## Why some fall short", "", head, "", *lines, ""]


def curves(rows: Sequence[Row]) -> list[str]:
    """Presets whose budget was set: mean score over tasks by share, one row per method and length."""
    if not rows:
        return []
    shares = sorted({float(row["method"].split("@")[1]) for row in rows})
    lines = ["## Budgets", "", "Mean score over the tasks where a method may read so much of dense.", ""]
    lines += ["| method | tokens | " + " | ".join(f"{s:g}" for s in shares) + " |", "|" + "---|" * (2 + len(shares))]
    for name in dict.fromkeys(row["method"].split("@")[0] for row in rows):
        for length in sorted({row["length"] for row in rows}):
            mine = [row for row in rows if row["method"].split("@")[0] == name and row["length"] == length]
            by_share = {s: [row for row in mine if float(row["method"].split("@")[1]) == s] for s in shares}
            if mine:
                cells = [_number(mean(by_share[s], "score")) for s in shares]
                lines.append(f"| `{name}` | {length} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _timed(rows: list[Row]) -> list[Row]:
    """Rows with `first` and `step`: how much faster than dense, for the same task and length in the same folder."""
    dense = {(row["task"], row["length"]): row for row in rows if row["method"] == DENSE}
    out = []
    for row in rows:
        base = dense.get((row["task"], row["length"]), {})
        ratios = {}
        for name, key in (("first", "ttft_s"), ("step", "tpot_s")):
            a, b = base.get(key), row.get(key)
            ratios[name] = a / b if a is not None and b else None
        out.append(row | ratios)
    return out


def _cell(row: Row) -> tuple[str, str, int]:
    return row["method"], row["task"], row["length"]


def _by_method(rows: Iterable[Row], length: int) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["length"] == length:
            found.setdefault(row["method"], []).append(row)
    return found


def _tasks(rows: Sequence[Row]) -> list[str]:
    there = list(dict.fromkeys(row["task"] for row in rows))
    return [task for task in TITLES if task in there] + [task for task in there if task not in TITLES]


def _rank(method: str) -> int:
    name = kind(method)
    return KINDS.index(name) if name in KINDS else len(KINDS)


def _priced(members: dict[str, float]) -> str:
    return ", ".join(f"`{name}` ({price:.2f})" for price, name in sorted((p, n) for n, p in members.items())) or "none"


def _score(row: Row | None) -> str:
    if row is None:
        return "-"
    unit = f" {row['unit']}" if row.get("unit") else ""
    return f"{row['score']:.2f}{unit}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    # a method that reads a thousandth reads something
    return "-" if value is None else f"{value:.1%}" if 0 < value < 0.01 else f"{value:.0%}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _absolute(dense: Sequence[Row]) -> str:
    """What dense took, for whoever wants seconds and bytes."""
    first, step, held = mean(dense, "ttft_s"), mean(dense, "tpot_s"), mean(dense, "kv_bytes")
    parts = [] if first is None else [f"{first:.3g} s to the first token"]
    parts += [] if step is None else [f"{step * 1000:.3g} ms a token"]
    parts += [] if held is None else [f"{held / 1e6:.0f} MB held"]
    return f" (dense: {', '.join(parts)})" if parts else ""


def _shown(path: Path) -> str:
    """A path as it is typed in the repository."""
    full = path.resolve()
    return full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else path.name


if __name__ == "__main__":
    main()
