"""What goes wrong in a pool, as exceptions that say who holds what."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "Deadlock",
    "LeaseTimeout",
    "PatchFailed",
    "PoolError",
    "PoolFileChanged",
    "PoolRefused",
    "Unmanageable",
    "WeightsAstray",
]


class PoolError(RuntimeError):
    """Base of everything that a pool raises."""


class PoolRefused(PoolError):
    """A request that cannot be met however long it waits.

    Attributes:
        holders: one line for each lease in the way: who holds what, since which source line.
    """

    def __init__(self, message: str, holders: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.holders = tuple(holders)


class Deadlock(PoolRefused):
    """Those who would have to let go wait for the one who asks, or for what it holds."""


class LeaseTimeout(PoolRefused, TimeoutError):
    """The bytes were not free within the time given; ``holders`` says who has them."""


class PoolFileChanged(PoolError):
    """A file that weights are read from is not the file any more that was mapped."""


class Unmanageable(PoolError, TypeError):
    """An object whose weights a pool must not move; the message says why."""


class PatchFailed(PoolError):
    """A patch that could not be applied or reverted; the object is as it was before.

    Attributes:
        patch: the commit.
    """

    def __init__(self, message: str, patch: object = None) -> None:
        super().__init__(message)
        self.patch = patch


class WeightsAstray(UserWarning):
    """A managed module was given other weights, which are outside of the pools and their budgets.

    Attributes:
        names: of the weights that are others now, or gone.
    """

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)
