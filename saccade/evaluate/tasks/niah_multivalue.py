"""Niah-multivalue: one key has several values, each stated elsewhere, and all are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from saccade.evaluate.tasks.niah import Niah


@dataclass(frozen=True)
class NiahMultivalue(Niah):
    __doc__ = Niah.__doc__

    name: ClassVar[str] = "niah-multivalue"
    file: ClassVar[str] = __file__
    values: int = 4
