"""The demonstration as one HTML file: no script, nothing loaded from anywhere, readable on a phone and in the dark."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from saccade.core.files import write_whole
from saccade.evaluate.demo import Demo, Shown
from saccade.evaluate.report.ideas import idea
from saccade.evaluate.report.image import figure
from saccade.evaluate.report.panels import KEPT, MASS, READ, kept_panel, prefill_panel, reading
from saccade.evaluate.report.template import fill
from saccade.evaluate.report.words import percent

AROUND = 170  # characters of book text shown on either side of a fact


def write_page(path: Path, demo: Demo, conditions: Mapping[str, str], warnings: Sequence[str] = ()) -> Path:
    """Write the page; the file is whole or not there.

    Args:
        path: the file.
        demo: what was measured.
        conditions: machine, versions, command, ...: name -> text.
        warnings: shown at the top.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(demo, conditions, warnings))
    return path


def page(demo: Demo, conditions: Mapping[str, str], warnings: Sequence[str] = ()) -> str:
    """The page as text."""
    dense = demo.shown[0].row
    return fill(
        "page.html",
        lead=_lead(demo),
        warnings="".join(f'<p class="warn">{html.escape(line)}</p>' for line in warnings),
        rows="\n".join(_row(s.row, dense) for s in demo.shown),
        how=html.escape(f"{READ} {KEPT} Triangles mark the planted facts."),
        pictures="\n".join(_picture(demo, s) for s in demo.shown),
        questions="\n".join(_question(demo, at) for at in range(len(demo.document.questions))),
        conditions="\n".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in conditions.items()),
    )


def _lead(demo: Demo) -> str:
    dense = demo.shown[0].row
    equal = [s.row for s in demo.shown[1:] if s.row["exact"] >= dense["exact"] and s.row["ttft_ratio"]]
    first = (
        f"A document of {demo.length:,} tokens, {len(demo.document.facts)} facts planted in it, one question about "
        f"each. Dense attention answers {dense['exact']} of {dense['asked']} exactly and takes "
        f"{dense['ttft_s']:.2f} s to its first token."
    )
    if not equal:
        return html.escape(f"{first} No other method answers as many.")
    best = max(equal, key=lambda row: row["ttft_ratio"])
    if best["ttft_ratio"] <= 1:
        return html.escape(f"{first} No method that answers as many was faster.")
    return html.escape(
        f"{first} The fastest method that answers as many, {best['method']}, takes {best['ttft_s']:.2f} s: it is "
        f"{best['ttft_ratio']:.1f} times as fast and reads {percent(best['density'])} of the pairs."
    )


def _row(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    good = "good" if row["exact"] >= dense["exact"] else "bad"
    step = "-" if row["tpot_s"] is None else f"{1000 * row['tpot_s']:.1f} ms"
    both = f"{percent(row['density_prefill'])} / {percent(row['density_decode'])}"
    name = html.escape(row["method"]) + (f"<small>{html.escape(row['note'])}</small>" if row["note"] else "")
    cells = (
        ("Exact answers", f'<span class="{good}">{row["exact"]} of {row["asked"]}</span>'),
        ("First token", f"{row['ttft_s']:.2f} s{_times(row['ttft_ratio'])}"),
        ("Per token", f"{step}{_times(row['tpot_ratio'])}"),
        ("Keys and values", f"{row['kv_bytes'] / 1e6:.1f} MB<small>{percent(row['kv_share'])} of dense</small>"),
        ("Pairs read, prefill / decode", both),
        ("Weight kept", percent(row["mass"])),
    )
    body = "".join(f'<td data-label="{label}"><span>{value}</span></td>' for label, value in cells)
    return f'<tr><th scope="row">{name}</th>{body}</tr>'


def _picture(demo: Demo, shown: Shown) -> str:
    name, plan, trace = shown.row["method"], shown.plan, shown.trace
    head = demo.head
    panels = [_panel("queries", prefill_panel(trace, demo.layer, head))]
    if plan is None:
        other = next((h for h in trace.drawn if h != head), head)
        panels.append(_panel("queries", prefill_panel(trace, demo.layer, other)))
        how = f"{MASS} The left head is the one that looks hardest at the first fact once the question has been read."
    else:
        how = f"Left: what layer {demo.layer}, head {head} reads in prefill."
        if trace.steps:
            panels.append(_panel("layers and heads", kept_panel(trace)))
            how += " Right: what all heads read for the last token."
    drawing = figure(panels, "key position", demo.marks, label=f"what {name} looks at")
    return (
        f"<figure><h3>{html.escape(name)}</h3><p>{html.escape(idea(name))}</p>{drawing}"
        f"<figcaption>{html.escape(reading(trace, plan))} {html.escape(how)}</figcaption></figure>"
    )


def _panel(down: str, panel: tuple[str, Tensor]) -> tuple[str, str, Tensor]:
    return panel[0], down, panel[1]


def _question(demo: Demo, at: int) -> str:
    document = demo.document
    said = "".join(
        f'<li class="{"good" if s.row["answers"][at] == document.answers[at] else "bad"}">'
        f"<b>{html.escape(s.row['method'])}</b> <q>{html.escape(s.row['answers'][at][:60])}</q></li>"
        for s in demo.shown
    )
    return (
        f"<section><p class='where'>Fact {at + 1}, {document.places[at]:.0%} into the document</p>"
        f"<blockquote>{_excerpt(document.text, document.facts[at])}</blockquote>"
        f"<p><b>{html.escape(document.questions[at])}</b> <i>Expected: {html.escape(document.answers[at])}</i></p>"
        f"<ul class='said'>{said}</ul></section>"
    )


def _excerpt(text: str, fact: str) -> str:
    at = text.index(fact)
    before, after = text[max(0, at - AROUND) : at], text[at + len(fact) : at + len(fact) + AROUND]
    return f"… {html.escape(before)}<mark>{html.escape(fact)}</mark>{html.escape(after)} …"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"<small>{ratio:.2f}x</small>"
