"""Niah-multikey: one of several facts of the same form is asked for, or one of as many as fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from saccade.evaluate.tasks.niah import Niah


@dataclass(frozen=True)
class NiahMultikey(Niah):
    __doc__ = Niah.__doc__

    name: ClassVar[str] = "niah-multikey"
    file: ClassVar[str] = __file__
    keys: int = 4
