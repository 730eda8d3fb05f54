"""Write docs/results/reader.md from an evaluation folder: `python bench/reader_table.py [DIR]`.

The folder is made by `saccade eval --out DIR`; the default is the committed one. What is said of a method that fails is
written here by hand and printed only while it fails.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from saccade.core.table import METHODS, family

ROOT = Path(__file__).resolve().parent.parent
WHY = {
    "streaming": "control: the fact lies outside the window",
    "random": "control: a lookup hangs on one block",
    "oracle": "control: the best blocks for 64 queries together, of which one asks",
    "pooled": "means of 64 keys hide a single fact",
    "xattention": "blocks to a share of the mass, capped a row; the fact's block has little mass for most queries",
    "flexprefill": "as xattention, and half of its heads read columns by block mass",
    "hyper": "sampled keys stand for the rest; a fact that no bucket holds is a matter of luck",
    "s2": "not training-free: a static pattern that the model must have been trained with",
    "hip": "neighbouring keys are not alike in the reader's last layer: a range's first block says little of the rest",
    "longheads": "chunk keys are means of attention inside a chunk; the reader's lookups are by single tokens",
    "actqkv": "means of rotated keys blur; budgets by entropy starve the layer that looks up",
    "moa": "one span for all heads; rules of saccade.fit.moa were not fitted here",
    "snapkv": "an answer of several tokens reaches beyond the neighbours of what the question looked at",
    "h2o": "weight summed over all queries forgets what only the question needs",
}


def main() -> None:
    """Read, sort by score, write."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench" / "results" / "reader-cpu-4k"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    about = json.loads((folder / "conditions.jsonl").read_text().splitlines()[-1])
    out = ROOT / "docs" / "results" / "reader.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text(page(rows, about), encoding="utf-8")
    print(out)


def page(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The page as Markdown."""
    dense = next(row for row in rows if row["method"] == "dense")
    head = [
        "method",
        "kind",
        "exact",
        "95 %",
        "reads",
        "mass",
        "first token",
        "a token",
        "key-value bytes",
        "probable reason",
    ]
    asked = f"Task `{dense['task']}`, {dense['length']} tokens, {dense['n']} questions, presets of each method."
    lines = ["# Every method on the bundled reader", "", f"{asked} {about['machine']}, {about['software']}."]
    lines += [
        f"`{about['command']}`, then `python bench/reader_table.py`. A first look: one length, few questions; the"
    ]
    lines += ["reasons are what is supposed, not what was proved.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda r: -(r["score"] or 0)):
        lines.append("| " + " | ".join(cells(row, dense)) + " |")
    lines += [
        "",
        "`reads` counts what selection itself scores, `mass` is the attention weight on what was read (not known",
    ]
    lines += [
        "where there is no pattern). Times are ratios to stock transformers in the same run; at this length little can"
    ]
    lines += ["be saved."]
    return "\n".join([*lines, ""])


def cells(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """One row of the table."""
    share = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("density", "mass")]
    times = [f"{dense[name] / row[name]:.2f}x" for name in ("ttft_s", "tpot_s")]
    kind = family(row["method"]) if row["method"] in METHODS else "plan"
    fails = WHY.get(row["method"], "") if row["score"] < dense["score"] else ""
    held = f"{row['kv_bytes'] / dense['kv_bytes']:.0%}"
    return [
        f"`{row['method']}`",
        kind,
        f"{row['score']:.2f}",
        f"{row['low']:.2f}-{row['high']:.2f}",
        *share,
        *times,
        held,
        fails,
    ]


if __name__ == "__main__":
    main()
