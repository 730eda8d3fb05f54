"""Cap: bytes that several block caches may hold on a device together."""

from __future__ import annotations

import weakref
from typing import Protocol

from saccade.core.errors import InputError

KEY = "cap"  # its name in a memory


class Member(Protocol):
    """A cache under a cap."""

    name: str

    @property
    def least(self) -> int:
        """Bytes without which it is no use."""

    def bytes(self) -> int:
        """Bytes that it holds."""

    def shrink(self) -> None:
        """Hold no more than the cap's share."""


class Cap:
    """One budget for the block caches of all layers: each may hold an equal share, and all together never more.

    A layer reads its blocks once in a step, so one queue over all layers would serve none as soon as a step's blocks
    are more than fit; shares keep a layer that reads much from pushing out the others. Who comes later makes the
    shares smaller: who holds more gives it back before the new one takes any.

    Example:
        >>> Cap().share
        0
    """

    def __init__(self) -> None:
        self._members: weakref.WeakKeyDictionary[Member, int] = weakref.WeakKeyDictionary()

    @property
    def total(self) -> int:
        """Bytes for all: the smallest budget that a member came with."""
        return min(self._members.values(), default=0)

    @property
    def share(self) -> int:
        """Bytes that a member may hold."""
        return self.total // max(1, len(self._members))

    def join(self, member: Member, budget: int) -> None:
        """Take a member in, whose budget for all members is so many bytes.

        Raises:
            InputError: the shares would be too small for one of them; nothing was changed.
        """
        budgets = [*self._members.values(), budget]
        share = min(budgets) // len(budgets)
        for each in (*self._members, member):
            if each.least > share:
                raise InputError(
                    f"{each.name}: a cache of {min(budgets)} bytes for {len(budgets)} layers (or rows) together does "
                    f"not hold one block of {each.least} bytes for each; give it more, or make blocks smaller"
                )
        self._members[member] = budget
        for each in list(self._members):
            each.shrink()

    def held(self) -> int:
        """Bytes that all members hold."""
        return sum(member.bytes() for member in list(self._members))
