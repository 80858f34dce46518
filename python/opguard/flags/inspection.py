"""What flags say, as Python values: for the boundary, not for compiled code.

Everything is read off the tensor itself, whatever its width and dtype and whatever the current
configuration is; ``config`` is taken for the sake of older code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from opguard import _C
from opguard.flags import _engine, failures, reporting
from opguard.flags._boundary import boundary
from opguard.flags._err import err
from opguard.flags._guarded_record import flags_of
from opguard.flags._words import as_words
from opguard.flags.codes import ErrorCode, Severity
from opguard.flags.config import CARRIERS, ErrorConfig, get_config
from opguard.flags.errors import FlagsError
from opguard.flags.locations import ErrorLocation

__all__ = ["ErrorFlags", "UnpackedError", "flags", "inspect"]


class UnpackedError(NamedTuple):
    """One error of a sample: its numbers and their names."""

    severity: int
    code: int
    location: int
    severity_name: str
    code_name: str
    location_name: str

    def __repr__(self) -> str:
        if self.severity == Severity.OK:
            return "UnpackedError(OK)"
        return f"UnpackedError({self.severity_name}:{self.code_name}@{self.location_name})"


def _named(error: tuple[int, int, int]) -> UnpackedError:
    severity, code, location = error
    return UnpackedError(
        severity,
        code,
        location,
        Severity.name(severity),
        ErrorCode.name(code),
        ErrorLocation.name(location),
    )


# What _engine.read makes an UnpackedError by.
_HOW = (
    UnpackedError,
    tuple(Severity.name(severity) for severity in range(4)),
    tuple(ErrorCode.name(code) for code in range(16)),
    ErrorLocation.name,
)


def _counts(flags: torch.Tensor) -> list[tuple[int, int, int]]:
    """(location, code, how often), by location and code, of the errors of the whole batch."""
    # int16 is the narrowest integer dtype that every device's unique and comparisons know.
    slots = as_words(flags_of(flags)).contiguous().view(torch.int16)
    values, counts = torch.unique(slots[slots != 0], return_counts=True)
    found: dict[tuple[int, int], int] = {}
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        slot = value & 0xFFFF
        place = (slot >> 6, slot >> 2 & 0xF)
        found[place] = found.get(place, 0) + count
    return [(location, code, count) for (location, code), count in sorted(found.items())]


class ErrorFlags:
    """Reads flags for people and logs; a GuardedTensor stands for its flags."""

    @classmethod
    @boundary
    def unpack(
        cls, flags: torch.Tensor, sample_idx: int = 0, config: ErrorConfig | None = None
    ) -> list[UnpackedError]:
        """The errors of one sample, in the order of its slots."""
        return _C.flags_read(flags, sample_idx, _HOW)  # _engine.read, a call less

    @classmethod
    @boundary
    def unpack_all(
        cls, flags: torch.Tensor, config: ErrorConfig | None = None
    ) -> list[list[UnpackedError]]:
        """The errors of every sample."""
        names: dict[tuple[int, int, int], UnpackedError] = {}
        samples = _engine.read_all(flags)
        for errors in samples:
            for error in errors:
                if error not in names:
                    names[error] = _named(error)
        return [[names[error] for error in errors] for errors in samples]

    unpack_all_vectorized = unpack_all

    @classmethod
    @boundary
    def to_errors(
        cls, flags: torch.Tensor, config: ErrorConfig | None = None
    ) -> list[UnpackedError]:
        """The errors of all samples in one list, sample after sample."""
        return [error for errors in cls.unpack_all(flags) for error in errors]

    @classmethod
    @boundary
    def interpret(
        cls, flags: torch.Tensor, component: str, config: ErrorConfig | None = None
    ) -> list[UnpackedError]:
        """:meth:`to_errors` with ``component.`` put before the name of every location."""
        return [
            error._replace(location_name=f"{component}.{error.location_name}")
            for error in cls.to_errors(flags)
        ]

    @classmethod
    @boundary
    def summary(
        cls, flags: torch.Tensor, config: ErrorConfig | None = None
    ) -> dict[str, dict[str, int]]:
        """``{location name: {code name: how often}}`` over the batch, by location and code."""
        found: dict[str, dict[str, int]] = {}
        for location, code, count in _counts(flags):
            codes = found.setdefault(ErrorLocation.name(location), {})
            name = ErrorCode.name(code)
            codes[name] = codes.get(name, 0) + count
        return found

    @classmethod
    @boundary
    def repr(cls, flags: torch.Tensor, config: ErrorConfig | None = None) -> str:
        """One line: ``ErrorFlags(32 samples, 5 errors: 3xNAN, 2xINF @ encoder, output)``.

        The codes come by how often they are there; of the locations the first three by name.
        """
        flags = flags_of(flags)
        counts = _counts(flags)
        samples = flags.shape[0]
        if not counts:
            return f"ErrorFlags({samples} samples, no errors)"
        by_code: dict[int, int] = {}
        for _, code, count in counts:
            by_code[code] = by_code.get(code, 0) + count
        most = sorted(by_code.items(), key=lambda item: (-item[1], item[0]))
        codes = ", ".join(f"{count}x{ErrorCode.name(code)}" for code, count in most)
        places = sorted({ErrorLocation.name(location) for location, _, _ in counts})
        shown = ", ".join(places[:3]) + (f" +{len(places) - 3} more" if len(places) > 3 else "")
        return f"ErrorFlags({samples} samples, {sum(by_code.values())} errors: {codes} @ {shown})"

    @classmethod
    @boundary
    def pretty_print(
        cls, flags: torch.Tensor, sample_idx: int = 0, config: ErrorConfig | None = None
    ) -> str:
        """A line an error of one sample; the text is returned, not printed."""
        errors = cls.unpack(flags, sample_idx)
        if not errors:
            return "[OK] No errors"
        lines = [
            f"  [{i}] {error.severity_name} | {ErrorCode.domain_name(error.code)}."
            f"{error.code_name} | @ {error.location_name}"
            for i, error in enumerate(errors)
        ]
        return "\n".join([f"Found {len(errors)} error(s):", *lines])

    @classmethod
    def reduce_or(cls, flags_list: Sequence[torch.Tensor]) -> torch.Tensor:
        """The bits of all flags, or-ed: whether anything is wrong, not what.

        All have one shape and dtype; the result is on the first one's device.
        """
        if not flags_list:
            raise FlagsError("expected at least one flags tensor to reduce, got none")
        first = flags_of(flags_list[0])
        bits = as_words(first).clone()
        for each in flags_list[1:]:
            other = flags_of(each)
            if other.shape != first.shape or other.dtype != first.dtype:
                raise FlagsError(
                    f"expected flags of shape {tuple(first.shape)} and {first.dtype} to reduce,"
                    f" got {tuple(other.shape)} and {other.dtype}"
                )
            bits |= as_words(other).to(first.device)
        return bits.view(first.dtype)


def pack_slot_scalar(code: int, location: _engine.Location, severity: int | None = None) -> int:
    """The 16 bits of one error; ``severity`` None: the code's own."""
    return _engine.slot_of(location, code, severity, get_config().default_severity)


def extract_slots(f: torch.Tensor, config: ErrorConfig | None = None) -> torch.Tensor:
    """The errors of flags (N, words) one by one: (N, slots) int64, 0 where nothing is recorded."""
    words = as_words(flags_of(f)).contiguous()
    return words.view(torch.int16).to(torch.int64) & 0xFFFF


def pack_slots(slots: torch.Tensor, config: ErrorConfig | None = None) -> torch.Tensor:
    """Flags of slots (N, slots), in the dtype of ``config`` and as wide as they need."""
    dtype = (get_config() if config is None else config).flag_dtype
    a_word = CARRIERS[dtype][2]
    missing = -slots.shape[1] % a_word
    slots = torch.nn.functional.pad(slots, (0, missing))
    return slots.to(torch.int16).contiguous().view(dtype)


class _Inspect:
    """What :data:`inspect` is: flags in a word, without their places."""

    __slots__ = ()

    @staticmethod
    @boundary
    def summary(f: torch.Tensor, config: ErrorConfig | None = None) -> dict[str, int]:
        """``{code name: how often}`` over the batch, by code."""
        found: dict[int, int] = {}
        for _, code, count in _counts(f):
            found[code] = found.get(code, 0) + count
        return {ErrorCode.name(code): found[code] for code in sorted(found)}

    @staticmethod
    @boundary
    def report(f: torch.Tensor, config: ErrorConfig | None = None) -> str:
        """What :func:`opguard.flags.report` says, as a string."""
        return str(reporting.report(f))


class _Flags:
    """What :data:`flags` is: readers, queries and makers of flags in one place."""

    __slots__ = ()

    new = staticmethod(err.new_t)
    push = staticmethod(err.push)
    merge = staticmethod(err.merge)
    is_ok = staticmethod(err.is_ok)
    is_err = staticmethod(err.is_err)
    any_err = staticmethod(err.any_err)
    find = staticmethod(err.find)
    count = staticmethod(err.count_errors)
    has_critical = staticmethod(err.has_critical)
    pack_slot_scalar = staticmethod(pack_slot_scalar)
    extract_slots = staticmethod(extract_slots)
    pack_slots = staticmethod(pack_slots)

    unpack = staticmethod(ErrorFlags.unpack)
    unpack_all = staticmethod(ErrorFlags.unpack_all)
    repr = staticmethod(ErrorFlags.repr)
    summary = staticmethod(ErrorFlags.summary)
    pretty_print = staticmethod(ErrorFlags.pretty_print)
    report = staticmethod(reporting.report)
    plot = staticmethod(reporting.plot)
    to_dataframe = staticmethod(reporting.to_dataframe)
    prometheus = staticmethod(reporting.prometheus)
    first_failure = staticmethod(failures.first_failure)


flags = _Flags()
inspect = _Inspect()
