"""`saccade plan show FILE`: a plan as a map of layers and heads."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from saccade.cli.main import Result

if TYPE_CHECKING:
    from saccade.core.plan import Plan

HELP = "look at a plan file: saccade's own, or one published with MInference (JSON) or DuoAttention (TSV)"
COLOURS = (34, 32, 33, 35, 36, 31, 94, 92)
REST = "."
COLUMNS = 72


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to do with which file."""
    parser.add_argument("verb", choices=("show",), help="show: draw the plan")
    parser.add_argument("file", metavar="FILE", help="plan file")
    parser.add_argument("--out", metavar="FILE.png", help="also draw it as a picture")


def run(args: argparse.Namespace) -> Result:
    """Draw the plan."""
    from saccade.evaluate.presets import read_plan

    plan = read_plan(args.file)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    text = text_map(plan, colour)
    if args.out:
        from saccade.evaluate.report.planmap import save_map

        save_map(plan, args.out)
        text += f"\nThe picture: {os.path.abspath(args.out)}"
    data = json.loads(plan.to_json())
    data["letters"] = letters(plan)
    data["later_prompts"] = later(plan)
    data["maps"] = {phase: head_map(plan, phase) for phase in used(plan)}
    return Result(data, text)


def used(plan: Plan) -> list[str]:
    """The phases in which the plan says anything."""
    from saccade.core.plan import PHASES

    return [phase for phase in PHASES if any(plan.phase(at, phase) for at in range(plan.model.layers))]


def later(plan: Plan) -> list[str]:
    """Where a later prompt over the same cache is not read by its own method, because a policy has evicted.

    Example:
        >>> from saccade.core.plan import ModelShape, Plan
        >>> later(Plan.uniform(ModelShape(1, 2, 2), prefill="trishape", cache="duo"))
        ['dense in heads 0-1 of layers 0, over what duo keeps: trishape cannot read that']
    """
    from saccade.methods.later import later_prompts

    return [entry.text() for entry in later_prompts(plan)]


def letters(plan: Plan) -> dict[str, str]:
    """A letter for each method of the plan: its first one that is still free.

    Example:
        >>> from saccade.core.plan import ModelShape, Plan
        >>> letters(Plan.uniform(ModelShape(1, 2, 2), prefill="trishape", decode="tidal"))
        {'trishape': 'T', 'tidal': 'I'}
    """
    found: dict[str, str] = {}
    for row in plan.layers:
        for assign in row:
            free = [c for c in assign.method.upper() + "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789" if c.isalnum()]
            found.setdefault(assign.method, next((c for c in free if c not in found.values()), "?"))
    return found


def head_map(plan: Plan, phase: str) -> list[str]:
    """One string per layer: the letter of each head's method, "." where the plan names none."""
    letter = letters(plan)
    count = plan.model.kv_heads if phase == "cache" else plan.model.heads
    rows = []
    for at in range(plan.model.layers):
        row = [REST] * count
        for assign in plan.phase(at, phase):
            for head in range(count) if assign.heads is None else assign.heads:
                row[head] = letter[assign.method]
        rows.append("".join(row))
    return rows


def text_map(plan: Plan, colour: bool = False) -> str:
    """Maps of all phases with a legend."""
    shape, letter = plan.model, letters(plan)
    paint = {c: f"\x1b[{COLOURS[i % len(COLOURS)]}m{c}\x1b[0m" for i, c in enumerate(letter.values())}
    lines = [
        f"{_plain(shape.name) or 'model'}: {shape.layers} layers, {shape.heads} query heads, {shape.kv_heads} key heads"
    ]
    if plan.note:
        lines.append(_plain(plan.note))
    for phase in used(plan):
        kind = "key heads" if phase == "cache" else "query heads"
        lines += ["", f"{phase} (rows: layers, columns: {kind})"]
        for at, row in enumerate(head_map(plan, phase)):
            for start in range(0, len(row), COLUMNS):
                part = row[start : start + COLUMNS]
                shown = "".join(paint.get(c, c) for c in part) if colour else part
                lines.append(f"{at if start == 0 else '':>4}  {shown}")
    lines.append("")
    lines += [f"{paint[c] if colour else c}  {name}: {_settings(plan, name)}" for name, c in letter.items()]
    lines.append(f"{REST}  dense, everything kept")
    lines += [f"later prompts are {text}" for text in later(plan)]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A file's words without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def _settings(plan: Plan, method: str) -> str:
    """The arguments of a method where they are the same everywhere, else how many settings there are."""
    found = {json.dumps(a.args, sort_keys=True): a.args for row in plan.layers for a in row if a.method == method}
    if len(found) > 1:
        return f"{len(found)} settings"
    args = next(iter(found.values()))
    return ", ".join(f"{key} {value}" for key, value in args.items()) or "its defaults"
