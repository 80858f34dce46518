"""What a block of checks has found, in the order in which it came, and the flags made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opguard.flags import _engine
from opguard.flags._opchecks_places import Place, id_of
from opguard.flags._reporting_found import remember
from opguard.flags.codes import ErrorCode
from opguard.flags.config import ErrorConfig
from opguard.flags.locations import ErrorLocation

__all__ = ["INF_BITS", "NAN_BIT", "Book", "Found"]

NAN_BIT = 1
INF_BITS = 6


class Found(NamedTuple):
    """One finding: a code, a place, and the samples it is about; None: all of them."""

    code: int
    place: Place
    where: Any  # (N,) bool array, or None
    text: str = ""  # what a user's check says, with the values of the first bad sample


class Book:
    """Findings of one block. A sample's NaN and its Inf are its first ones, not what they become.

    ``samples`` is None until the batch is known; ``seen`` has for each sample the bits of what
    was found of it.
    """

    def __init__(self) -> None:
        import numpy

        self.samples: int | None = None
        self.seen: Any = numpy.zeros(1, numpy.uint8)
        self.found: list[Found] = []
        # What lies on an accelerator, or was traced, is read when the flags are asked for.
        self.pending: list[Callable[[], None]] = []
        self.device: torch.device = torch.device("cpu")

    def size(self, samples: int, device: torch.device) -> None:
        """The batch is known from now on."""
        import numpy

        if self.samples is None:
            self.samples = samples
            self.device = device
            seen = int(self.seen[0])
            self.seen = numpy.full(samples, seen, numpy.uint8)

    def unseen(self, bits: Any, *, wide: bool) -> tuple[Any, Any]:
        """Of (N,) bits what is new: (NaN, Inf) as bool arrays, None where there is none.

        ``wide``: the samples are not told apart; then what one has, others may have from it.
        """
        seen = self.seen
        if wide and seen.any():
            if (seen & NAN_BIT).any():
                return None, None
            bits = bits & NAN_BIT
        fresh = bits & ~seen
        nan = (fresh & NAN_BIT) != 0
        inf = ((bits & INF_BITS) != 0) & ((seen & INF_BITS) == 0)
        return (nan if nan.any() else None), (inf if inf.any() else None)

    def add(self, code: int, place: Place, where: Any, text: str = "") -> None:
        """Records; an empty ``where`` is nothing."""
        if where is not None:
            if not where.any():
                return
            if where.all():
                where = None
        self.found.append(Found(code, place, where, text))
        if code in (ErrorCode.NAN, ErrorCode.INF):
            bit = NAN_BIT if code == ErrorCode.NAN else INF_BITS
            self.seen[... if where is None else where] |= bit

    def take(self, slots: Any, places: Sequence[Place], wide: set[int], line: str) -> None:
        """Findings out of flags whose locations are numbers of ``places``, in their order.

        ``slots`` (N or 1, slots) uint16; ``wide``: places that do not tell the samples apart;
        ``line``: that of places without one.
        """
        for slot in sorted({int(each) for each in slots[slots != 0]}, key=lambda s: (s >> 6, s)):
            number, code = slot >> 6, slot >> 2 & 15
            where = (slots == slot).any(1)
            place = places[number - 1]
            if not place.line and "::" in place.op:
                place = place._replace(line=line)
            if code in {ErrorCode.NAN, ErrorCode.INF}:
                bits = where.astype("uint8") * (NAN_BIT if code == ErrorCode.NAN else 2)
                nan, inf = self.unseen(bits, wide=number in wide)
                where = nan if code == ErrorCode.NAN else inf
                if where is None:
                    continue
            self.add(code, place, where)

    def settle(self) -> None:
        """Reads what was left to be read."""
        while self.pending:
            self.pending.pop(0)()

    def flags(self, config: ErrorConfig) -> Tensor:
        """(N, words) with all that was found; one row where no batch was."""
        self.settle()
        flags = _engine.new(1 if self.samples is None else self.samples, "cpu", config.key)
        names: dict[int, str] = {}
        for each in self.found:
            location = id_of(each.place)
            if each.text:
                names.setdefault(location, f"{each.text} at {each.place.line}")
            where = None if each.where is None else torch.from_numpy(each.where)
            if where is not None and where.shape[0] != flags.shape[0]:
                where = None
            flags = _engine.push(
                flags, where, each.code, location, None, config.key, int(config.default_severity)
            )
        flags = flags if self.device.type == "cpu" else flags.to(self.device)
        remember(flags, [(id_of(each.place), each.code) for each in self.found], names)
        return flags

    def names(self) -> dict[str, int]:
        """Each place's name and its location id."""
        return {ErrorLocation.name(id_of(each.place)): id_of(each.place) for each in self.found}
