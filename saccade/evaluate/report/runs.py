"""Runs side by side: what differs between them, and whether the same method answers differently."""

from __future__ import annotations

from collections.abc import Sequence

from saccade.evaluate.report.facts import Side, difference, is_share, mean_of, shared
from saccade.evaluate.report.folder import Folder
from saccade.evaluate.report.words import several

MATTERS = {
    "model": "Different models are compared",
    "dtype": "Different number formats are compared",
    "device": "Different machines are compared",
    "seed": "Different samples are compared",
}


def mixed(folders: Sequence[Folder]) -> list[str]:
    """Warnings where runs differ in more than their methods."""
    found = []
    for key, words in MATTERS.items():
        values = [str(folder.config.get(key)) for folder in folders]
        if len(set(values)) > 1:
            pairs = [f"{folder.name} has {key} {value}" for folder, value in zip(folders, values, strict=True)]
            found.append(f"{words}: {several(pairs)}. Differences are not those of the methods alone.")
    return found


def compared(folders: Sequence[Folder]) -> list[str]:
    """A sentence per method and run, against the first run, over all cells that both finished."""
    first, *others = folders
    said = []
    for folder in others:
        both = [name for name in folder.methods if name in first.methods]
        for name in both:
            ours, theirs = Side(folder, name), Side(first, name)
            places = [place for place in shared(ours, theirs) if is_share(ours.row(place) or {})]
            found = difference(ours, theirs, places)
            if found is None:
                continue
            means = f"{mean_of(ours, places)[0]:.2f} in {folder.name}, {mean_of(theirs, places)[0]:.2f} in {first.name}"
            same = found.p is not None and found.delta == found.low == found.high == 0
            doubt = "a difference" if found.sure else "no difference" if same else "within the interval"
            said.append(f"{name}: {means} ({found.told()}): {doubt}.")
        if not both:
            said.append(f"{folder.name} and {first.name} have no method in common.")
    return said
