"""Pools to look at: in words, as tables, as a picture of memory over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opguard.pools._reporting_text import as_html, as_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from opguard.pools._snapshots import Snapshot
    from opguard.pools.management import Management

__all__ = ["Report", "report"]

_ROWS = 40


class Report:
    """What `report` returns: the pools as they were when it was made.

    ``str`` gives the text, Jupyter shows tables.

    Attributes:
        snapshot: the figures, as plain data (`opguard.pools.Snapshot`).
    """

    def __init__(self, snapshot: Snapshot, rows: int = _ROWS) -> None:
        self.snapshot = snapshot
        self._rows = max(0, rows)

    def __str__(self) -> str:
        return as_text(self.snapshot, self._rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self.snapshot, self._rows)

    def plot(self, ax: Axes | None = None, *, pool: str | None = None) -> Axes:
        """A picture: bytes used over time, a band a user, the budget as a dashed line.

        The last few thousand moves are kept; the ten users that had most of the memory in that
        time have a band of their own. What no band covers, under the line of what is used, are
        bytes that are reserved, being moved in or being given back.

        Args:
            ax: matplotlib Axes to draw one pool into; None for a figure of its own with each pool
                that was used, ``.figure`` of what is returned. pyplot is not used, so there is
                nothing to close.
            pool: the name of one pool; None for all, and with ``ax`` for the first that was used.

        Returns:
            The Axes, of several the topmost.

        Raises:
            ImportError: matplotlib is not installed.
            KeyError: there is no such pool.
        """
        from opguard.pools._reporting_plot import draw

        return draw(self.snapshot, ax, pool)


def report(*, rows: int = _ROWS, management: Management | None = None) -> Report:
    """Pools in words: what is in which memory, who holds it, what was moved, who waits.

        print(pools.report())

        2 of 3 users in memory, policy lru: 4 hits, 3 misses, 6.0 MiB moved in, 0 requests waiting
          pool  device     used   budget     peak  there  managed
          cpu   cpu     4.0 MiB  4.0 MiB  4.0 MiB      2        3

    Args:
        rows: how many users the table has at most; those in memory come first.
        management: whose pools; None for those of this process, set up with defaults if nobody did.
    """
    from opguard.pools.management import get_management

    return Report((management or get_management()).snapshot(), rows)
