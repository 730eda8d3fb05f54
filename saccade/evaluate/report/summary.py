"""The summary: what is gained, what is lost, what limits; every sentence is computed from the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from saccade.core.table import METHODS, find
from saccade.evaluate.metrics import wilson
from saccade.evaluate.presets import CONTROLS, DENSE, windowed
from saccade.evaluate.report.compare import Difference
from saccade.evaluate.report.facts import (
    Faster,
    Place,
    Side,
    average,
    difference,
    faster,
    is_share,
    lower_is_better,
    mean_of,
    share_of,
    shared,
)
from saccade.evaluate.report.folder import Folder
from saccade.evaluate.report.words import percent, several, signed, tokens

WINDOW = "streaming"
FASTER = 1.05  # times as fast; less is no gain
SAME = 0.03  # times and bytes that differ by less are called equal where no interval says more


@dataclass
class Summary:
    """Sentences under three heads."""

    gain: list[str] = field(default_factory=list)
    lose: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


def summarize(folder: Folder) -> Summary:
    """What a folder shows, its methods against dense attention of the same folder."""
    said = Summary()
    dense = Side(folder, DENSE)
    methods = [Side(folder, name) for name in folder.methods if name not in CONTROLS]
    if not any(row["method"] == DENSE for row in folder.rows):
        said.limits.append(
            "Dense attention has no finished cell here, so nothing can be said about gain or loss: add dense to "
            "--methods, or use --controls."
        )
    else:
        gains = [pair for side in methods if (pair := _gain(side, dense))]
        said.gain += [text for _, text in sorted(gains, key=lambda pair: -pair[0])]
        quiet: list[tuple[str, Difference]] = []
        for side in methods:
            _scores(side, dense, said, quiet)
        said.lose += [_undecided(*pair) for pair in sorted(quiet, key=lambda pair: pair[1].delta)]
        _measured(methods, dense, said)
        if not methods:
            said.limits.append("Only controls were run: no method to speak of.")
    _limits(folder, methods, dense, said)
    said.gain = said.gain or ["Nothing that these rows show."]
    said.lose = said.lose or ["Nothing that these rows show."]
    return said


def _gain(side: Side, dense: Side) -> tuple[float, str] | None:
    """(times as fast, the sentence) at the longest length that both have."""
    places = _longest(shared(side, dense))
    if not places:
        return None
    served = _served(side.method)
    # the time of a phase that is left dense is no doing of the method
    timed = [
        (name, found)
        for phase, name, key in (("prefill", "first token", "ttft_s"), ("decode", "further tokens", "tpot_s"))
        if phase in served and (found := faster(side, dense, places, key)) is not None
    ]
    kept = share_of(side, dense, places)
    parts = [
        f"{name} {_times(found)} as fast" if found.times >= FASTER else f"{name} no faster" for name, found in timed
    ]
    if kept is not None:
        parts.append(f"{percent(kept)} of the bytes of keys and values")
    density = average(side, places, "density")
    if density is not None:
        parts.append(f"{percent(density)} of the pairs read")
    better = [found.times for _, found in timed if found.times >= FASTER]
    if not better and (kept is None or kept > 1 - SAME):
        return None
    return max(better, default=0.0), f"{side.method} at {tokens(places[0][1])} tokens: {', '.join(parts)}."


def _served(name: str) -> set[str]:
    """The phases that a method's name makes sparse; both for a plan file, of which the rows say no more."""
    found: set[str] = set()
    for part in name.split("+"):
        method = part.partition("@")[0].strip()
        if method not in METHODS:
            return {"prefill", "decode"}
        cls = find(method)
        if "cache" not in cls.phases:
            found |= {*cls.phases}
        elif not cls.lossless:
            found |= {"prefill", "decode"} if windowed(cls) else {"decode"}
    return found


def _times(found: Faster) -> str:
    if found.low is None or found.high is None:
        return f"{found.times:.1f} times"
    doubt = "" if found.sure else ", within the interval of no change"
    return f"{found.times:.1f} times (95 % {found.low:.1f} to {found.high:.1f}{doubt})"


def _scores(side: Side, dense: Side, said: Summary, quiet: list[tuple[str, Difference]]) -> None:
    """Sort a method's scores into gain and loss; what cannot be told from dense goes to `quiet`."""
    places = shared(side, dense)
    marks = [place for place in places if is_share(_row(side, place))]
    found = difference(side, dense, marks)
    if found is not None and found.sure:
        text = (
            f"{side.method} answers {'more' if found.delta > 0 else 'less'} than dense: {_beside(side, dense, marks)}"
        )
        text = f"{text} ({found.told()}).{_worst(side, dense, marks) if found.delta < 0 else ''}"
        (said.gain if found.delta > 0 else said.lose).append(text)
    elif found is not None:
        lost = [place for place in marks if (one := difference(side, dense, [place])) and one.sure and one.delta < 0]
        if len(marks) > 1 and lost:
            text = f"{side.method}: over all tasks within the interval of dense ({found.told()}), but not on every one."
            said.lose.append(text + _worst(side, dense, lost))
        else:
            quiet.append((f"{side.method} {_beside(side, dense, marks)}", found))


def _measured(methods: Sequence[Side], dense: Side, said: Summary) -> None:
    """Scores with a unit of their own, at the longest length of each task: a sentence for those that are better, one
    for those that are worse, one for those within the interval."""
    found: dict[Place, dict[str, list[str]]] = {}
    for side in methods:
        longest: dict[str, Place] = {}
        for place in shared(side, dense):
            if not is_share(_row(side, place)):
                longest[place[0]] = max(place, longest.get(place[0], place), key=lambda place: place[1])
        for place in longest.values():
            row, one = _row(side, place), difference(side, dense, [place])
            assert one is not None
            worse = one.delta > 0 if lower_is_better(row) else one.delta < 0
            kind = "quiet" if not one.sure else "worse" if worse else "better"
            text = f"{side.method} {row['score']:.4g} ({one.told()})"
            found.setdefault(place, {}).setdefault(kind, []).append(text)
    for place, kinds in found.items():
        for kind, texts in kinds.items():
            doubt = "; within the interval" if kind == "quiet" else ""
            (said.gain if kind == "better" else said.lose).append(f"{_unit(dense, place)}{doubt}: {'; '.join(texts)}.")


def _unit(dense: Side, place: Place) -> str:
    row = _row(dense, place)
    where = f"{place[0]} at {tokens(place[1])} tokens"
    return f"{where}, {row.get('unit') or 'in a unit of its own'}: dense {row['score']:.4g}"


def _undecided(text: str, found: Difference) -> str:
    if found.low is None:
        doubt = "nothing says how sure that is"
    elif found.low > 0 or (found.high or 0) < 0:
        doubt = "too few samples for the test to be sure"
    else:
        doubt = "a loss is seen, within the interval" if found.delta < 0 else "no loss is seen, within the interval"
    return f"{text} of dense: {doubt} ({found.told()})."


def _beside(side: Side, dense: Side, places: Sequence[Place]) -> str:
    ours, theirs = mean_of(side, places), mean_of(dense, places)
    return f"{ours[0]:.2f} against {theirs[0]:.2f}"


def _worst(side: Side, dense: Side, places: Sequence[Place]) -> str:
    """The task and length with the largest loss, where there are several."""
    found = [(one.delta, place) for place in places if (one := difference(side, dense, [place])) is not None]
    delta, (task, length) = min(found)
    ours, theirs = _row(side, (task, length))["score"], _row(dense, (task, length))["score"]
    return f" Worst on {task} at {tokens(length)} tokens: {ours:.2f} against {theirs:.2f} ({signed(delta)})."


def _limits(folder: Folder, methods: Sequence[Side], dense: Side, said: Summary) -> None:
    add = said.limits.append
    if folder.failed:
        cells = several([f"{r['method']} on {r['task']} at {tokens(r['length'])}" for r in folder.failed[:6]])
        more = f", and {len(folder.failed) - 6} more" if len(folder.failed) > 6 else ""
        add(f"{_cells(len(folder.failed))} failed, counted in no mean: {cells}{more}. The tables show why.")
    if folder.missing:
        names = several(list(dict.fromkeys(method for method, _, _ in folder.missing)))
        add(f"{_cells(len(folder.missing))} without a row yet, though asked for ({names}).")
    _against_window(folder, methods, said)
    counts = sorted({row["n"] for row in folder.rows if row["n"]})
    if counts:
        least = f"{counts[0]} {'sample' if counts[0] == 1 else 'samples'}"
        add(
            f"{least} in the smallest cell: there, all right means a share of {wilson(counts[0], counts[0])[0]:.2f} or "
            "more (95 %). Single cells are not corrected for how many of them are looked at."
        )
    _each(methods, dense, said, "no memory", lambda side, places: (share_of(side, dense, places) or 0) > 1 - SAME)
    slower = list(filter(None, (_slower(side, dense) for side in methods)))
    if slower:
        add(f"Slower to the first token than dense: {'; '.join(slower)}.")
    kept = [(mass, side.method) for side in methods if (mass := average(side, _all(side), "mass")) is not None]
    if kept and min(kept)[0] < 0.95:
        mass, name = min(kept)
        add(f"{name} keeps the least of the attention weight: {percent(mass)} on average.")
    if not folder.samples:
        add("Times are medians of cells without an interval, and no test is paired: there is no samples.jsonl.")
    config = folder.config
    tasks, lengths = len(config["tasks"]), len(config["lengths"])
    add(
        f"Shown for {config.get('model', 'one model')} on {config.get('device', '?')} in {config.get('dtype', '?')}, "
        f"{tasks} {'task' if tasks == 1 else 'tasks'} and {lengths} {'length' if lengths == 1 else 'lengths'}; not for "
        "other models, tasks or machines."
    )


def _slower(side: Side, dense: Side) -> str:
    """A method and the lengths at which it is slower, in words; "" where it is at none."""
    by_length: dict[int, list[Place]] = {}
    for place in shared(side, dense):
        by_length.setdefault(place[1], []).append(place)
    times = {length: faster(side, dense, places) for length, places in sorted(by_length.items())}
    timed = [length for length, found in times.items() if found is not None]
    slow = [length for length in timed if (found := times[length]) is not None and found.times < 1 - SAME]
    if not slow:
        return ""
    every = "at every length" if len(slow) == len(timed) > 1 else f"at {several([tokens(x) for x in slow])} tokens"
    return f"{side.method} {every}"


def _against_window(folder: Folder, methods: Sequence[Side], said: Summary) -> None:
    """A method that does not beat a window has shown nothing."""
    window = Side(folder, WINDOW)
    if not methods:
        return
    if not _all(window):
        said.limits.append(
            f"The window control ({WINDOW}) has no finished cell: that a method beats a plain window is not shown."
        )
        return
    beaten = []
    for side in methods:
        marks = [place for place in shared(side, window) if is_share(_row(side, place))]
        found = difference(side, window, marks)
        if found is not None and not (found.sure and found.delta > 0):
            beaten.append(side.method)
    if beaten:
        said.limits.append(f"Not better than the window control ({WINDOW}), beyond the interval: {several(beaten)}.")
    else:
        said.limits.append(f"All methods answer more than the window control ({WINDOW}), beyond the interval.")


def _each(
    methods: Sequence[Side], dense: Side, said: Summary, what: str, holds: Callable[[Side, list[Place]], bool]
) -> None:
    names = [side.method for side in methods if (places := _longest(shared(side, dense))) and holds(side, places)]
    if names:
        said.limits.append(f"{several(names)} {'saves' if len(names) == 1 else 'save'} {what}.")


def _longest(places: Sequence[Place]) -> list[Place]:
    return [place for place in places if place[1] == max(length for _, length in places)]


def _all(side: Side) -> list[Place]:
    return [(row["task"], row["length"]) for row in side.folder.rows if row["method"] == side.method]


def _row(side: Side, place: Place) -> dict:
    row = side.row(place)
    assert row is not None
    return row


def _cells(count: int) -> str:
    return f"{count} {'cell' if count == 1 else 'cells'}"
