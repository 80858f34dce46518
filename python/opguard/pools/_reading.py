"""How much of a model's pages its users read, so that those nobody reads are not brought in.

Bringing in all pages before use makes errors and waiting happen there, and not inside a forward; a
model of large tables, of which a request reads a few rows, would pay for all of them each time. So
now and then a model comes in without its pages: what is in memory when it goes was read.
"""

from __future__ import annotations

from opguard.pools._spill_format import BLOCK

__all__ = ["Reading"]

FEW = 4  # at most one part in so many was read
RECENT = 8  # who reads little is looked at this often
SELDOM = 64  # and who reads much at the powers of two up to here, and as often as this after


class Reading:
    """What is known of one model. Only who moves it asks and tells.

    Args:
        nbytes: of the model. Small ones are always brought in whole.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._times = 0
        self._little = False
        self.looking = False

    def lazily(self) -> bool:
        """Whether the pages are to be left to those who read them, this time."""
        if self._nbytes < BLOCK:
            return False
        self._times += 1
        self.looking = self._times > 1 and self._is_due()
        return self.looking or self._little

    def _is_due(self) -> bool:
        times = self._times
        if self._little:
            return times % RECENT == 0
        return times % SELDOM == 0 or (times < SELDOM and times & (times - 1) == 0)

    def saw(self, resident: int) -> None:
        """Told before the pages go: bytes in memory now."""
        self.looking = False
        if resident:  # else nobody has used it at all
            self._little = resident * FEW <= self._nbytes
