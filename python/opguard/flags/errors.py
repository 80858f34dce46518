"""What opguard.flags raises for bad arguments: all of it is a ValueError."""

from __future__ import annotations

__all__ = [
    "BatchMismatchError",
    "CodeError",
    "FlagsError",
    "FlagsLayoutError",
    "LocationError",
    "RowsLost",
    "SeverityError",
]


class FlagsError(ValueError):
    """An argument that flags, or a configuration of them, cannot take."""


class LocationError(FlagsError):
    """A location outside 0..1023, or something that names no location."""


class CodeError(FlagsError):
    """An error code outside 0..15."""


class SeverityError(FlagsError):
    """A severity outside 0..3."""


class FlagsLayoutError(FlagsError):
    """Not a flags tensor: two dimensions, at least one word, one of the four word dtypes.

    Also flags of different capacities where they must be equal, and a ``num_slots`` or
    ``flag_dtype`` that no flags tensor can have.
    """


class BatchMismatchError(FlagsError):
    """Flags and data of different numbers of samples."""


class RowsLost(FlagsError, NotImplementedError):
    """An op after which nobody can tell which sample an element belongs to."""
