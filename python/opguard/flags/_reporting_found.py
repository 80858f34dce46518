"""The errors in flags as host arrays: read once, then shown in any way."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from opguard.flags._words import as_words
from opguard.flags.codes import ErrorCode, Severity
from opguard.flags.constants import (
    CODE_MASK,
    CODE_SHIFT,
    LOCATION_SHIFT,
    SEVERITY_MASK,
)
from opguard.flags.errors import FlagsError
from opguard.flags.locations import ErrorLocation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Errors", "Finding", "batch_of", "flags_of", "read"]


class Finding(NamedTuple):
    """One kind of error at one location: how often, and in which samples.

    ``errors`` counts slots; ``samples`` are the numbers of the samples, ascending, each once.
    """

    location: int
    location_name: str
    code: int
    code_name: str
    domain: str
    severity: int
    severity_name: str
    errors: int
    samples: NDArray[np.int64]


@dataclass(frozen=True)
class Errors:
    """All errors of a batch, sample after sample in the order of the slots: arrays (errors,).

    ``total`` is the number of samples, ``flags`` the host copy that all was read from.
    """

    total: int
    flags: Tensor
    sample: NDArray[np.int64]
    slot: NDArray[np.int64]
    value: NDArray[Any]
    names: Mapping[int, str]  # of locations that are called otherwise here: what a check said

    def name(self, location: int) -> str:
        """What to call a location."""
        return self.names.get(location) or ErrorLocation.name(location)

    @property
    def bad(self) -> int:
        """How many samples have an error."""
        import numpy as np

        return int(np.count_nonzero(np.diff(self.sample)) + 1) if self.sample.size else 0

    @property
    def severity(self) -> NDArray[Any]:
        """(errors,) 0..3."""
        return self.value & SEVERITY_MASK

    @property
    def code(self) -> NDArray[Any]:
        """(errors,) 0..15."""
        return self.value >> CODE_SHIFT & CODE_MASK

    @property
    def location(self) -> NDArray[Any]:
        """(errors,) 0..1023."""
        return self.value >> LOCATION_SHIFT

    def findings(self) -> list[Finding]:
        """Each kind of error at each location, by location id, code and severity."""
        import numpy as np

        if not self.value.size:
            return []
        # A slot's number is location, code, severity from the highest bit on. Stable: in each
        # group the samples stay ascending; 16-bit numbers are sorted by radix, in linear time.
        order = np.argsort(self.value, kind="stable")
        values, samples = self.value[order], self.sample[order]
        begins = np.flatnonzero(np.diff(values, prepend=~values[:1]))
        ends = [*begins[1:].tolist(), values.size]
        again = np.zeros(values.size, bool)
        again[1:] = (values[1:] == values[:-1]) & (samples[1:] == samples[:-1])
        return [
            self._finding(int(values[begin]), end - begin, samples[begin:end][~again[begin:end]])
            for begin, end in zip(begins.tolist(), ends, strict=True)
        ]

    def _finding(self, value: int, errors: int, samples: NDArray[np.int64]) -> Finding:
        location = value >> LOCATION_SHIFT
        code, severity = value >> CODE_SHIFT & CODE_MASK, value & SEVERITY_MASK
        return Finding(
            location,
            self.name(location),
            code,
            ErrorCode.name(code),
            ErrorCode.domain_name(code),
            severity,
            Severity.name(severity),
            errors,
            samples,
        )


def flags_of(source: Any) -> Tensor:
    """The flags tensor of what a person has in hand: flags, or something with ``.flags``."""
    if not isinstance(source, torch.Tensor) or hasattr(type(source), "flags"):
        source = getattr(source, "flags", source)
    if not isinstance(source, torch.Tensor):
        raise FlagsError(
            "expected a flags tensor, or an object with .flags such as a GuardedTensor or what"
            f" check_model returns, got {type(source).__qualname__}"
        )
    return source


def batch_of(source: Any, total: int) -> tuple[int, ...]:
    """The sizes of the batch's dimensions: (total,), or several of a GuardedTensor."""
    dims = getattr(source, "batch_dims", None)
    if isinstance(source, torch.Tensor) and isinstance(dims, tuple) and len(dims) > 1:
        sizes = tuple(int(source.shape[dim]) for dim in dims)
        if math.prod(sizes) == total:
            return sizes
    return (total,)


# By the identity of flags that check_ops made: their errors as (location, code), the first first,
# and what is to be called otherwise than its location.
_Memory: TypeAlias = "tuple[tuple[tuple[int, int], ...], dict[int, str]]"
_memories: dict[int, tuple[weakref.ref[Tensor], _Memory]] = {}


def remember(f: Tensor, order: Sequence[tuple[int, int]], names: dict[int, str]) -> None:
    """Keeps the order of the errors in ``f``, as (location, code), and names, while ``f`` lives."""
    at, memories = id(f), _memories
    kept = weakref.ref(f, lambda _: memories.pop(at, None))
    memories[at] = (kept, (tuple(order), names))


def memory_of(f: Tensor) -> _Memory:
    """What was remembered of ``f``; nothing of flags that others made."""
    entry = _memories.get(id(f))
    return entry[1] if entry is not None and entry[0]() is f else ((), {})


def read(f: Tensor) -> Errors:
    """Reads flags (N, words) of any of the four dtypes; waits for their device once."""
    import numpy as np

    host = as_words(f.detach()).cpu()
    # The lowest slot of a word comes first, whatever the order of bytes in this machine's words.
    words = host.numpy().astype(f"<i{host.element_size()}", order="C", copy=False)
    slots = words.view("<u2")
    samples, width = slots.shape
    slots = slots.reshape(-1)
    at = np.flatnonzero(slots)
    sample, slot = np.divmod(at, width)
    return Errors(
        samples,
        host.view(f.dtype),
        sample.astype(np.int64, copy=False),
        slot.astype(np.int64, copy=False),
        slots[at].astype(np.uint16, copy=False),
        memory_of(f)[1],
    )
