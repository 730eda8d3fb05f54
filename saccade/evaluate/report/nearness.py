"""How near a method stays to dense attention, what it reads for that, and from which length on it pays: tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from saccade.evaluate.curve import break_even_length
from saccade.evaluate.presets import DENSE
from saccade.evaluate.report.facts import Place, Side, faster
from saccade.evaluate.report.folder import Folder
from saccade.evaluate.report.tables import NONE, Cell, sheet
from saccade.evaluate.report.words import percent, size, tokens

COLUMNS = ("mass_low", "estimate", "output_error", "kl_answer", "agree_answer", "read_bytes", "peak_bytes", "ceiling")


def nearness_table(folders: Sequence[Folder]) -> str:
    """A row per method and length; nothing where no row has these columns."""
    if not any(row.get(key) is not None for folder in folders for row in folder.rows for key in COLUMNS):
        return ""
    many = len(folders) > 1
    heads = ["Method", *(["Run"] if many else []), "Tokens", "Pairs read", "Weight kept", "Output error"]
    heads += ["KL, answers", "Same token, answers", "Read a token", "Peak memory", "Faster at most"]
    cells = []
    for folder in folders:
        for length in folder.lengths:
            for method in folder.methods:
                side = Side(folder, method)
                places = [(row["task"], length) for row in folder.rows if _is(row, method, length)]
                if places:
                    run = [Cell(folder.name, folder.name)] if many else []
                    cells.append([Cell(method, method), *run, Cell(tokens(length), length), *_row(side, places)])
    caption = "How near to dense, and what is read; means over tasks"
    how = (
        "Pairs read: of which choosing took. Weight kept: mean and 5th percentile over the last queries. Output error: "
        "relative distance of attention's outputs from dense attention's on the same inputs. KL (nats) and same token: "
        "next-token distributions beside the dense model's, at the answer; small: elsewhere in the text. Read a token: "
        "bytes of keys, values and summaries read for each generated token. Peak memory: above the weights. Faster at "
        "most: what arithmetic allows at this density, if choosing and moving cost nothing more; small: reached."
    )
    table = sheet("nearness", caption, heads, cells, 2 if many else 1)
    return f"<h2>How near to dense</h2>{table}<p><small>{how}</small></p>"


def pays_table(folders: Sequence[Folder]) -> str:
    """From which length on a method is faster than dense; nothing where only one length was timed."""
    many = len(folders) > 1
    cells = []
    for folder in folders:
        if len(folder.lengths) < 2 or DENSE not in folder.methods:
            continue
        for method in folder.methods:
            if method != DENSE and any(row["method"] == method for row in folder.rows):
                run = [Cell(folder.name, folder.name)] if many else []
                ends = [break_even_length(folder.rows, method, key) for key in ("ttft_s", "tpot_s")]
                never = f"not up to {tokens(folder.lengths[-1])}"
                marks = [Cell(never, None) if end is None else _from(end, folder.lengths[0]) for end in ends]
                cells.append([Cell(method, method), *run, *marks])
    if not cells:
        return ""
    heads = ["Method", *(["Run"] if many else []), "Prompt and first token", "Each further token"]
    caption = "Faster than dense from how many tokens on; between measured lengths by a line through their logarithms"
    return f"<h2>From which length on it pays</h2>{sheet('pays', caption, heads, cells, 2 if many else 1)}"


def _from(length: int, shortest: int) -> Cell:
    return Cell(f"{tokens(length)} or less" if length <= shortest else tokens(length), length)


def _row(side: Side, places: Sequence[Place]) -> list[Cell]:
    def mean(key: str) -> float | None:
        values = [row[key] for place in places if (row := side.row(place)) is not None and row.get(key) is not None]
        return fmean(values) if values else None

    def cell(key: str, form: Callable[[float], str], below: str = "") -> Cell:
        value = mean(key)
        return NONE if value is None else Cell(form(value), value, below)

    def under(key: str, form: Callable[[float], str], words: str) -> str:
        value = mean(key)
        return "" if value is None else f"{form(value)} {words}"

    dense = Side(side.folder, DENSE)
    reached = None if side.method == DENSE else faster(side, dense, [p for p in places if dense.row(p) is not None])
    return [
        cell("density", percent, under("estimate", percent, "choosing")),
        cell("mass", percent, under("mass_low", percent, "5th percentile")),
        cell("output_error", percent),
        cell("kl_answer", "{:.2g}".format, under("kl_other", "{:.2g}".format, "elsewhere")),
        cell("agree_answer", percent, under("agree_other", percent, "elsewhere")),
        cell("read_bytes", size),
        cell("peak_bytes", size),
        cell("ceiling", "{:.2f}x".format, "" if reached is None else f"{reached.times:.2f}x reached"),
    ]


def _is(row: dict, method: str, length: int) -> bool:
    return row["method"] == method and row["length"] == length
