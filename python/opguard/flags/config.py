"""How flags are stored and what happens when their slots are full.

:data:`CONFIG` is a live view of the current configuration: reading and writing its attributes reads
and writes what :func:`get_config` returns at that moment. Writes are checked. Every configuration
keeps ``key``, the integer by which the ops know it (csrc/core/slots.h has its bits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, TypeVar

import torch

from opguard.flags.codes import Severity
from opguard.flags.errors import FlagsError, FlagsLayoutError, SeverityError

__all__ = [
    "CONFIG",
    "AccumulationConfig",
    "Dedupe",
    "ErrorConfig",
    "Order",
    "Priority",
    "get_config",
    "set_config",
]

MAX_SLOTS = 32768

# dtype of the words -> (its number in a key, the integers of its width, slots a word)
CARRIERS = {
    torch.int64: (0, torch.int64, 4),
    torch.int32: (1, torch.int32, 2),
    torch.float64: (2, torch.int64, 4),
    torch.float32: (3, torch.int32, 2),
}


class Priority(IntEnum):
    """What decides who stays when the slots are full."""

    CHRONO = 0
    SEVERITY = 1
    LOCATION = 2


class Order(IntEnum):
    """Which end stays: the oldest, least severe, lowest location (FIRST), or the other (LAST)."""

    FIRST = 0
    LAST = 1
    FIFO = 0  # other names of the two
    LIFO = 1


class Dedupe(IntEnum):
    """What makes two errors of a sample one: nothing, the code, the location, or both (UNIQUE)."""

    NONE = 0
    CODE = 1
    LOCATION = 2
    UNIQUE = 3
    PAIR = 3  # another name of it


_Axis = TypeVar("_Axis", bound=IntEnum)


def _axis(kind: type[_Axis], value: Any) -> _Axis:
    try:
        return kind(value)
    except ValueError:
        name = kind.__name__
        raise FlagsError(
            f"expected AccumulationConfig's {name.lower()} to be one of {name}'s members"
            f" ({', '.join(kind.__members__)}), got {value!r}"
        ) from None


@dataclass(frozen=True)
class AccumulationConfig:
    """Which errors are kept: by ``priority``, from which end (``order``), what counts as the same.

    The default keeps the oldest errors, one for each code and location.
    """

    priority: Priority = Priority.CHRONO
    order: Order = Order.FIRST
    dedupe: Dedupe = Dedupe.UNIQUE

    def __post_init__(self) -> None:
        for name, kind in (("priority", Priority), ("order", Order), ("dedupe", Dedupe)):
            object.__setattr__(self, name, _axis(kind, getattr(self, name)))


def AccumulationPolicy(
    order: Order = Order.FIRST, dedupe: Dedupe = Dedupe.UNIQUE, evict_by_severity: bool = False
) -> AccumulationConfig:
    """An :class:`AccumulationConfig`; ``evict_by_severity``: the most severe errors stay."""
    if evict_by_severity:
        return AccumulationConfig(Priority.SEVERITY, Order.LAST, dedupe)
    return AccumulationConfig(Priority.CHRONO, order, dedupe)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise FlagsError(f"expected ErrorConfig.{name} to be an int, got {value!r}")
    return int(value)


def _num_slots(value: Any) -> int:
    count = _whole("num_slots", value)
    if not 1 <= count <= MAX_SLOTS:
        raise FlagsLayoutError(
            f"expected ErrorConfig.num_slots to be 1 to {MAX_SLOTS} errors a sample, got {count}"
        )
    return count


def _flag_dtype(value: Any) -> torch.dtype:
    dtype = getattr(value, "_dtype", value)  # the aliases of opguard.flags.typing hold theirs there
    if dtype not in CARRIERS:
        raise FlagsLayoutError(
            "expected ErrorConfig.flag_dtype to be torch.int64, torch.int32, torch.float64 or"
            f" torch.float32, got {value!r}"
        )
    return dtype  # type: ignore[no-any-return]


def _accumulation(value: Any) -> AccumulationConfig:
    if not isinstance(value, AccumulationConfig):
        raise FlagsError(
            f"expected ErrorConfig.accumulation to be an AccumulationConfig, got {value!r}"
        )
    return value


def _default_severity(value: Any) -> int:
    severity = _whole("default_severity", value)
    if not Severity.WARN <= severity <= Severity.CRITICAL:
        raise SeverityError(
            "expected ErrorConfig.default_severity to be 1 (WARN) to 3 (CRITICAL), since an error"
            f" of severity 0 is not recorded, got {severity}"
        )
    return severity


def _transpose_threshold(value: Any) -> int:
    return _whole("transpose_threshold", value)


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "num_slots": _num_slots,
    "flag_dtype": _flag_dtype,
    "accumulation": _accumulation,
    "default_severity": _default_severity,
    "strict_validation": bool,
    "use_transposed_layout": bool,
    "transpose_threshold": _transpose_threshold,
}


def _key_of(config: ErrorConfig) -> int:
    how = config.accumulation
    return (
        config.num_slots
        | how.priority << 16
        | how.order << 18
        | how.dedupe << 19
        | CARRIERS[config.flag_dtype][0] << 21
    )


@dataclass
class ErrorConfig:
    """How flags are stored and errors kept. Every write is checked.

    Attributes:
        num_slots: how many errors a sample can hold, 1 to 32768.
        accumulation: which of them, when there are more.
        default_severity: of codes without one of their own (4, 8, 12 and ``UNKNOWN``).
        strict_validation: an error where there would only be a warning.
        flag_dtype: dtype of the words of new flags: int64 or float64 hold four errors a word,
            int32 or float32 two.
        use_transposed_layout, transpose_threshold: read by :meth:`should_transpose` alone; flags
            are always ``(samples, words)``.
        key: the integer by which the ops know this configuration; it follows the attributes.
    """

    num_slots: int = 16
    accumulation: AccumulationConfig = field(default_factory=AccumulationConfig)
    default_severity: int = Severity.ERROR
    strict_validation: bool = False
    flag_dtype: torch.dtype = torch.int64
    use_transposed_layout: bool = False
    transpose_threshold: int = 10000

    key: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", _key_of(self))

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        if check is None:
            raise AttributeError(f"expected one of ErrorConfig's fields to write, got {name!r}")
        object.__setattr__(self, name, check(value))
        if "key" in self.__dict__:
            object.__setattr__(self, "key", _key_of(self))

    @property
    def torch_dtype(self) -> torch.dtype:
        """``flag_dtype`` by its older name."""
        return self.flag_dtype

    @property
    def torch_int_dtype(self) -> torch.dtype:
        """The integer dtype of a word's width."""
        return CARRIERS[self.flag_dtype][1]

    @property
    def slots_per_word(self) -> int:
        """Errors a word holds: 4 of 64 bits, 2 of 32."""
        return CARRIERS[self.flag_dtype][2]

    @property
    def num_words(self) -> int:
        """Words a sample's flags take."""
        return -(-self.num_slots // self.slots_per_word)

    @property
    def word_bits(self) -> int:
        """64 or 32."""
        return 16 * self.slots_per_word

    def should_transpose(self, batch_size: int) -> bool:
        """Whether a batch of this size is above the threshold, if transposing is asked for."""
        return self.use_transposed_layout and batch_size > self.transpose_threshold


_current = ErrorConfig()


def get_config() -> ErrorConfig:
    """The current configuration: what every call without ``config=`` goes by."""
    return _current


def set_config(config: ErrorConfig) -> None:
    """Makes ``config`` the current configuration, for all threads; :data:`CONFIG` shows it."""
    global _current  # noqa: PLW0603 - one current configuration a process is the contract
    if not isinstance(config, ErrorConfig):
        raise FlagsError(f"expected set_config to get an ErrorConfig, got {config!r}")
    if config is not CONFIG:  # the view shows the current one already
        _current = config


class _CurrentConfig(ErrorConfig):
    """The view behind :data:`CONFIG`: holds nothing, reads and writes the current configuration.

    A copy of it, also by ``dataclasses.replace`` or pickle, is an ordinary configuration.
    """

    def __new__(cls, *args: Any, **changes: Any) -> Any:
        if args or changes:
            return ErrorConfig(*args, **changes)
        return super().__new__(cls)

    def __init__(self) -> None:
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_current, name, value)

    def __eq__(self, other: object) -> bool:
        return other is self or _current == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(_current)

    def __reduce__(self) -> tuple[Any, ...]:
        values = tuple(getattr(_current, f.name) for f in fields(ErrorConfig) if f.init)
        return ErrorConfig, values


def _shown(name: str) -> property:
    return property(lambda self: getattr(_current, name))


for _name in (*_CHECKS, "key"):
    setattr(_CurrentConfig, _name, _shown(_name))

CONFIG: ErrorConfig = _CurrentConfig()
