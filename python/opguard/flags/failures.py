"""Where a run broke first: one answer out of the flags of a whole batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opguard.flags._boundary import boundary
from opguard.flags._reporting_found import flags_of, read
from opguard.flags.codes import ErrorCode, Severity
from opguard.flags.constants import CODE_MASK, CODE_SHIFT, LOCATION_SHIFT, SEVERITY_MASK
from opguard.flags.locations import ErrorLocation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Failure", "first_failure", "remember_order"]

_SHOWN = 8


@dataclass(frozen=True)
class Failure:
    """An error and the samples that have it; ``str`` says it in a sentence.

    Attributes:
        samples: numbers of all samples with this error, ascending.
        sample: the first of them.
        total: how many samples the flags are of.
        code, severity, location: as numbers, and with ``_name`` in words.
    """

    samples: tuple[int, ...]
    sample: int
    total: int
    code: int
    code_name: str
    severity: int
    severity_name: str
    location: int
    location_name: str

    def __str__(self) -> str:
        if len(self.samples) == self.total and self.total > 1:
            who = f"all {self.total} samples"
        elif len(self.samples) == 1:
            who = f"sample {self.sample} of {self.total}"
        else:
            shown = ", ".join(map(str, self.samples[:_SHOWN]))
            more = len(self.samples) - _SHOWN
            who = f"samples {shown}{f' and {more} more' if more > 0 else ''} of {self.total}"
        return f"first failure: {self.code_name} at {self.location_name} in {who}"


@boundary
def first_failure(f: Any) -> Failure | None:
    """The error that came first in a run; None where there is none.

    Flags that check_ops made know in which order their errors came. Of others each sample tells
    the order of its own: an error comes before those that stand behind it in any sample, and of
    errors that nothing tells apart the one of more samples counts, then the lower location.

    Args:
        f: flags (N, words), or what has some in ``.flags``: a GuardedTensor, a ModelCheck, what
            check_ops gives.
    """
    flags = flags_of(f)
    errors = read(flags)
    if not errors.value.size:
        return None
    samples: dict[int, list[int]] = {}
    rows: dict[int, list[int]] = {}
    for sample, value in zip(errors.sample.tolist(), errors.value.tolist(), strict=True):
        samples.setdefault(value, []).append(sample)
        rows.setdefault(sample, []).append(value)
    first = _by_memory(flags, samples)
    if first is None:
        first = _by_rows(rows.values(), samples)
    code, severity = first >> CODE_SHIFT & CODE_MASK, first & SEVERITY_MASK
    location = first >> LOCATION_SHIFT
    who = tuple(dict.fromkeys(samples[first]))
    return Failure(
        who,
        who[0],
        errors.total,
        code,
        ErrorCode.name(code),
        severity,
        Severity.name(severity),
        location,
        ErrorLocation.name(location),
    )


def _by_rows(rows: Iterable[list[int]], samples: dict[int, list[int]]) -> int:
    """An error that stands behind no other; in a circle, the one that stands first most often."""
    behind: set[int] = set()
    begins: dict[int, int] = {}
    for row in {tuple(row) for row in rows}:
        begins[row[0]] = begins.get(row[0], 0) + 1
        behind.update(each for each in row[1:] if each != row[0])
    free = [each for each in begins if each not in behind] or list(begins)
    return min(free, key=lambda each: (-len(samples[each]), each >> LOCATION_SHIFT, each))


# By the identity of flags that check_ops made: their errors as (location, code), the first first.
_orders: dict[int, tuple[Any, tuple[tuple[int, int], ...]]] = {}


def remember_order(f: Tensor, order: Sequence[tuple[int, int]]) -> None:
    """Keeps in which order the errors in ``f`` came, as (location, code), while ``f`` lives."""
    at, orders = id(f), _orders
    orders[at] = (weakref.ref(f, lambda _: orders.pop(at, None)), tuple(order))


def _by_memory(f: Tensor, samples: dict[int, list[int]]) -> int | None:
    entry = _orders.get(id(f))
    if entry is None or entry[0]() is not f:
        return None
    known = {(each >> LOCATION_SHIFT, each >> CODE_SHIFT & CODE_MASK): each for each in samples}
    return next((known[each] for each in entry[1] if each in known), None)
