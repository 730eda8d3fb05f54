"""`saccade report`: one page from the folders of evaluations, with tables, plots and a summary."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from saccade.cli.main import Result
from saccade.cli.progress import warn

HELP = "one page from what eval wrote: what is gained, what is lost, plots and tables"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Folders and the page."""
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders that `saccade eval --out` wrote")
    parser.add_argument("--times", metavar="DIR", help="an evaluation run alone, for the times that rows do not have")
    parser.add_argument("--out", metavar="FILE", help="the page (report.html in the first folder)")


def run(args: argparse.Namespace) -> Result:
    """Write the page and its pictures, print the summary."""
    from saccade.evaluate.report.report import write_report

    page = Path(args.out) if args.out else Path(args.folders[0]) / "report.html"
    if page.is_dir():
        page = page / "report.html"
    found = write_report(page, args.folders, args.times)
    for line in found.warnings:
        warn(line)
    lines = []
    for name, summary in found.summaries.items():
        lines += [name] if len(found.summaries) > 1 else []
        for head, sentences in (("Gain", summary.gain), ("Loss", summary.lose), ("Limits", summary.limits)):
            lines += [head, *map(_item, sentences)]
        lines.append("")
    if found.compared:
        lines += ["Side by side", *map(_item, found.compared), ""]
    lines.append(f"The page: {found.page}")
    if found.pictures:
        lines.append(f"Its plots as files: {found.pictures[0].parent}")
    return Result(found.data(), "\n".join(lines))


def _item(sentence: str) -> str:
    return textwrap.fill(sentence, 100, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
