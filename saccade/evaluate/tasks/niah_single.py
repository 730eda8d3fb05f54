"""Niah-single: one fact in dull lines or a book, and a question for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from saccade.evaluate.tasks.niah import Niah


@dataclass(frozen=True)
class NiahSingle(Niah):
    __doc__ = Niah.__doc__

    name: ClassVar[str] = "niah-single"
    file: ClassVar[str] = __file__
    haystack: str = "noise"
