"""`saccade list`: every method of the table."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from saccade.cli.main import Result
from saccade.cli.table import table
from saccade.core.table import METHODS, family, find

HELP = "name every method: its family, the phases it serves, whether it needs training, its paper"


def arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(args: argparse.Namespace) -> Result:
    """A row per method, in the table's order."""
    rows = [describe(name) for name in METHODS]
    cells = [[r["name"], r["family"], ", ".join(r["phases"]), "yes" if r["trained"] else "no", _said(r)] for r in rows]
    text = table(["name", "family", "phases", "trained", "idea and paper"], cells)
    return Result(rows, text + "\n\n`saccade show NAME` draws what a method looks at.")


def describe(name: str) -> dict[str, Any]:
    """What a method says of itself."""
    cls = find(name)
    doc = (sys.modules[cls.__module__].__doc__ or "").strip().split("\n\n")[0]
    return {
        "name": name,
        "family": family(name),
        "phases": list(cls.phases),
        # a method may have a hyperparameter of this name
        "trained": cls.trained is True,
        "paper": cls.paper,
        "idea": " ".join(doc.split()),
    }


def _said(row: dict[str, Any]) -> str:
    # the title of the module is its name again
    idea = row["idea"].split(": ", 1)[-1]
    return f"{idea} [{row['paper']}]" if row["paper"] else idea
