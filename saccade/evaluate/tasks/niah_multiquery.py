"""Niah-multiquery: several keys are asked for at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from saccade.evaluate.tasks.niah import Niah


@dataclass(frozen=True)
class NiahMultiquery(Niah):
    __doc__ = Niah.__doc__

    name: ClassVar[str] = "niah-multiquery"
    file: ClassVar[str] = __file__
    keys: int = 4
    queries: int = 4
