"""Where a run broke first: one answer out of the flags of a whole batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opguard.flags._boundary import boundary
from opguard.flags._reporting_found import Errors, flags_of, memory_of, read
from opguard.flags.codes import ErrorCode, Severity
from opguard.flags.constants import CODE_MASK, CODE_SHIFT, LOCATION_SHIFT, SEVERITY_MASK, SLOT_BITS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Failure", "first_failure"]

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
    return first_of(flags, read(flags))


def first_of(flags: Tensor, errors: Errors) -> Failure | None:
    """:func:`first_failure` of flags that were read already."""
    import numpy as np

    if not errors.value.size:
        return None
    counts = np.bincount(errors.value)  # of 16-bit numbers: no sort is needed
    values = np.flatnonzero(counts)
    known = dict(zip(values.tolist(), counts[values].tolist(), strict=True))
    first = _by_memory(flags, known)
    if first is None:
        first = _by_rows(errors, known)
    code, severity = first >> CODE_SHIFT & CODE_MASK, first & SEVERITY_MASK
    location = first >> LOCATION_SHIFT
    have = errors.sample[errors.value == first]  # ascending, a sample may be there twice
    who = tuple(have[np.flatnonzero(np.diff(have, prepend=-1))].tolist())
    return Failure(
        who,
        who[0],
        errors.total,
        code,
        ErrorCode.name(code),
        severity,
        Severity.name(severity),
        location,
        errors.name(location),
    )


def _by_rows(errors: Errors, counts: dict[int, int]) -> int:
    """An error that stands behind no other; in a circle, the one that there is most often."""
    import numpy as np

    begins = np.flatnonzero(np.diff(errors.sample, prepend=-1))
    heads = errors.value[begins]
    head_of_row = np.repeat(heads, np.diff(begins, append=errors.value.size))
    leads, follows = np.zeros((2, 1 << SLOT_BITS), bool)
    leads[heads] = True
    # Of a row's head 0 is noted instead, which is no error: that is faster than to leave it out.
    follows[np.where(errors.value != head_of_row, errors.value, 0)] = True
    free = np.flatnonzero(leads & ~follows)
    candidates: list[int] = (free if free.size else np.flatnonzero(leads)).tolist()
    return min(candidates, key=lambda each: (-counts[each], each >> LOCATION_SHIFT, each))


def _by_memory(f: Tensor, known: Iterable[int]) -> int | None:
    order = memory_of(f)[0]
    at = {(each >> LOCATION_SHIFT, each >> CODE_SHIFT & CODE_MASK): each for each in known}
    return next((at[each] for each in order if each in at), None)
