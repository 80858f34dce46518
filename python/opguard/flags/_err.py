"""``err``: everything that makes, fills, asks and combines flags, in compiled code too.

And the ``err`` of opguard.flags.experimental, whose new flags have floating words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from opguard import _C
from opguard.flags import _engine, combinators
from opguard.flags import config as _config
from opguard.flags._compiled import merge_all as compiled_merge_all
from opguard.flags._guarded_record import flags_of
from opguard.flags._traced import Location, code_bits
from opguard.flags._words import as_words
from opguard.flags.codes import ErrorCode, ErrorDomain, Severity, domain_bits
from opguard.flags.config import CARRIERS, ErrorConfig, get_config
from opguard.flags.constants import (
    CODE_MASK,
    CODE_SHIFT,
    LOCATION_MASK,
    LOCATION_SHIFT,
    SEVERITY_MASK,
    SEVERITY_SHIFT,
)
from opguard.flags.errors import CodeError, FlagsLayoutError

__all__ = ["err", "experimental_err"]

_CODE_BITS = CODE_MASK << CODE_SHIFT
_DOMAIN_BITS = 0xC << CODE_SHIFT


def _samples(batch_size: int) -> int:
    if batch_size < 0:
        raise FlagsLayoutError(f"expected a batch_size of 0 samples or more, got {batch_size}")
    return batch_size


def _first(flags: Tensor, shift: int, mask: int) -> Tensor:
    return ((as_words(flags_of(flags))[:, 0] >> shift) & mask).to(torch.int32)


class _Err:
    """What :data:`err` is. ``flags`` are ``(N, words)``, masks are ``(N,)`` bool.

    A :class:`GuardedTensor` in the place of flags stands for its flags, and what would give flags
    gives it back with those. A location is an id 0..1023, a name, a module, or None for unknown.
    ``config`` overrides the current configuration for one call; flags that are given keep their
    dtype and width anyway, and queries read all of them.
    """

    __slots__ = ()

    OK = ErrorCode.OK
    NAN = ErrorCode.NAN
    INF = ErrorCode.INF
    OVERFLOW = ErrorCode.OVERFLOW
    OUT_OF_BOUNDS = ErrorCode.OUT_OF_BOUNDS
    OOB = ErrorCode.OOB
    NEGATIVE_IDX = ErrorCode.NEGATIVE_IDX
    EMPTY_INPUT = ErrorCode.EMPTY_INPUT
    ZERO_OUTPUT = ErrorCode.ZERO_OUTPUT
    CONSTANT_OUTPUT = ErrorCode.CONSTANT_OUTPUT
    SATURATED = ErrorCode.SATURATED
    FALLBACK_VALUE = ErrorCode.FALLBACK_VALUE
    VALUE_CLAMPED = ErrorCode.VALUE_CLAMPED
    UNKNOWN = ErrorCode.UNKNOWN
    UNDERFLOW = ErrorCode.UNDERFLOW
    INVALID_VALUE = ErrorCode.INVALID_VALUE
    UNSTABLE = ErrorCode.UNSTABLE
    CLAMPED = ErrorCode.CLAMPED
    SPARSE = ErrorCode.SPARSE

    WARN = Severity.WARN
    ERROR = Severity.ERROR
    CRITICAL = Severity.CRITICAL

    ErrorCode = ErrorCode
    ErrorDomain = ErrorDomain
    Severity = Severity

    # --- making ---

    @staticmethod
    def new(reference: Tensor, config: ErrorConfig | None = None) -> Tensor:
        """Flags without errors for the samples (dim 0) of ``reference``, on its device."""
        key = (get_config() if config is None else config).key
        reference = flags_of(reference)  # of a GuardedTensor: a row for each of its own
        return _engine.new(reference.shape[0] if reference.dim() else 1, reference.device, key)

    @staticmethod
    def new_t(
        batch_size: int,
        device: torch.device | str | None = None,
        config: ErrorConfig | None = None,
    ) -> Tensor:
        """Flags without errors for ``batch_size`` samples."""
        key = (get_config() if config is None else config).key
        return _engine.new(_samples(batch_size), device, key)

    @staticmethod
    def from_code(  # noqa: PLR0917 - as documented
        code: int,
        location: Location,
        batch_size: int,
        device: torch.device | str | None = None,
        severity: int | None = None,
        config: ErrorConfig | None = None,
    ) -> Tensor:
        """Flags with one error in each of ``batch_size`` samples."""
        config = get_config() if config is None else config
        flags = _engine.new(_samples(batch_size), device, config.key)
        return _engine.push(
            flags, None, code, location, severity, config.key, config.default_severity
        )

    # --- recording ---

    @staticmethod
    def push(
        flags: Tensor,
        code: int | Tensor,
        location: Location,
        severity: int | None = None,
        config: ErrorConfig | None = None,
        *,
        where: Tensor | None = None,
    ) -> Tensor:
        """``flags`` with one error more, in the samples where ``where`` says so, or in all.

        ``code`` may be an integer tensor ``(N,)``: each sample's own code, 0 for none. Without a
        ``severity`` each code is recorded with its own.
        """
        config = get_config() if config is None else config
        if isinstance(code, Tensor):
            return _engine.push_codes(
                flags, code, where, location, severity, config.default_severity, config.key
            )
        return _engine.push(
            flags, where, code, location, severity, config.key, config.default_severity
        )

    @staticmethod
    def push_scalar(
        flags: Tensor,
        code: int,
        location: Location,
        severity: int | None = None,
        config: ErrorConfig | None = None,
    ) -> Tensor:
        """``flags`` with one error more in every sample."""
        config = get_config() if config is None else config
        return _engine.push(
            flags, None, code, location, severity, config.key, config.default_severity
        )

    @staticmethod
    def merge(*flag_tensors: Tensor, config: ErrorConfig | None = None) -> Tensor:
        """The errors of all, the later tensors' pushed after the earlier's; the first's dtype."""
        if is_dynamo_compiling():
            return compiled_merge_all(flag_tensors, config)
        return _C.flags_merge(flag_tensors, (_config._current if config is None else config).key)

    @staticmethod
    def clear(flags: Tensor, code: int, config: ErrorConfig | None = None) -> Tensor:
        """``flags`` without the errors of this code; the others close up."""
        return _engine.clear(flags, code)

    # --- asking ---

    @staticmethod
    def is_ok(flags: Tensor) -> Tensor:
        """(N,) bool: the sample has no errors."""
        return _engine.is_ok(flags)

    @staticmethod
    def is_err(flags: Tensor) -> Tensor:
        """(N,) bool: the sample has errors."""
        return _engine.is_err(flags)

    @staticmethod
    def has_any(flags: Tensor) -> Tensor:
        """0-d bool: some sample has errors."""
        return _engine.is_err(flags).any()

    @staticmethod
    def any_err(flags: Tensor) -> Tensor:
        """0-d bool: some sample has errors."""
        return _engine.is_err(flags).any()

    @staticmethod
    def all_ok(flags: Tensor) -> Tensor:
        """0-d bool: no sample has errors."""
        return _engine.is_ok(flags).all()

    @staticmethod
    def has_code(flags: Tensor, code: int, config: ErrorConfig | None = None) -> Tensor:
        """(N,) bool: the sample has an error of this code."""
        return _engine.find(flags, _CODE_BITS, code_bits(code))

    @staticmethod
    def find(code: int, flags: Tensor, config: ErrorConfig | None = None) -> Tensor:
        """(N,) bool: the sample has an error of this code."""
        return _engine.find(flags, _CODE_BITS, code_bits(code))

    @staticmethod
    def has_nan(flags: Tensor, config: ErrorConfig | None = None) -> Tensor:
        """(N,) bool: a NaN is recorded for the sample."""
        return _engine.find(flags, _CODE_BITS, ErrorCode.NAN << CODE_SHIFT)

    @staticmethod
    def has_inf(flags: Tensor, config: ErrorConfig | None = None) -> Tensor:
        """(N,) bool: an infinity is recorded for the sample."""
        return _engine.find(flags, _CODE_BITS, ErrorCode.INF << CODE_SHIFT)

    @staticmethod
    def has_fallback(flags: Tensor, config: ErrorConfig | None = None) -> Tensor:
        """(N,) bool: the sample's value was replaced by a fallback."""
        return _engine.find(flags, _CODE_BITS, ErrorCode.FALLBACK_VALUE << CODE_SHIFT)

    @staticmethod
    def has_critical(flags: Tensor, config: ErrorConfig | None = None) -> Tensor:
        """(N,) bool: the sample has a CRITICAL error."""
        return _engine.find(
            flags, SEVERITY_MASK << SEVERITY_SHIFT, Severity.CRITICAL << SEVERITY_SHIFT
        )

    @staticmethod
    def has_domain(flags: Tensor, domain: int, config: ErrorConfig | None = None) -> Tensor:
        """(N,) bool: the sample has an error of this domain (ErrorDomain.X, or 0..3)."""
        bits = domain_bits(domain)
        if bits is None:
            raise CodeError(
                "expected a domain: 0 to 3, or ErrorDomain.NUMERIC (0), INDEX (4), QUALITY (8) or"
                f" RUNTIME (12), got {domain!r}"
            )
        return _engine.find(flags, _DOMAIN_BITS, bits << CODE_SHIFT + 2)

    @staticmethod
    def count_errors(flags: Tensor, config: ErrorConfig | None = None) -> Tensor:
        """(N,) int32: how many errors the sample has."""
        return _engine.count(flags)

    @staticmethod
    def max_severity(flags: Tensor, config: ErrorConfig | None = None) -> Tensor:
        """(N,) int64, int32 for 32-bit words: the worst severity, 0 without errors."""
        return _engine.max_severity(flags)

    @staticmethod
    def get_first_code(flags: Tensor) -> Tensor:
        """(N,) int32: the code in slot 0."""
        return _first(flags, CODE_SHIFT, CODE_MASK)

    @staticmethod
    def get_first_location(flags: Tensor) -> Tensor:
        """(N,) int32: the location in slot 0."""
        return _first(flags, LOCATION_SHIFT, LOCATION_MASK)

    @staticmethod
    def get_first_severity(flags: Tensor) -> Tensor:
        """(N,) int32: the severity in slot 0."""
        return _first(flags, SEVERITY_SHIFT, SEVERITY_MASK)

    # --- values and flags together ---

    get_ok = staticmethod(combinators.get_ok)
    get_err = staticmethod(combinators.get_err)
    take_ok = staticmethod(combinators.take_ok)
    take_err = staticmethod(combinators.take_err)
    Ok = staticmethod(combinators.take_ok)
    Err = staticmethod(combinators.take_err)
    partition = staticmethod(combinators.partition)
    partition_many = staticmethod(combinators.partition_many)
    take_ok_p = staticmethod(combinators.take_ok_p)
    take_err_p = staticmethod(combinators.take_err_p)
    map_ok = staticmethod(combinators.map_ok)
    map_err = staticmethod(combinators.map_err)
    map_err_flags = staticmethod(combinators.map_err_flags)
    and_then = staticmethod(combinators.and_then)
    bind = staticmethod(combinators.bind)
    ensure_mask = staticmethod(combinators.ensure_mask)
    guard = staticmethod(combinators.guard)
    recover_with_fallback = staticmethod(combinators.recover_with_fallback)
    replace = staticmethod(combinators.replace)


def _floating(key: int) -> int:
    """A configuration's key, with float32 words where its own are integers."""
    return (
        key if key >> 21 & 3 in _FLOATING else key & ~(3 << 21) | CARRIERS[torch.float32][0] << 21
    )


_FLOATING = (CARRIERS[torch.float64][0], CARRIERS[torch.float32][0])


class _ExperimentalErr(_Err):
    """:class:`_Err`, whose new flags have words of the configuration's dtype if that is floating.

    If not, of float32. Flags that are given keep their dtype here, too.
    """

    __slots__ = ()

    @staticmethod
    def new(reference: Tensor, config: ErrorConfig | None = None) -> Tensor:
        """Flags without errors for the samples (dim 0) of ``reference``, on its device."""
        key = _floating((get_config() if config is None else config).key)
        reference = flags_of(reference)
        return _engine.new(reference.shape[0] if reference.dim() else 1, reference.device, key)

    @staticmethod
    def new_t(
        batch_size: int,
        device: torch.device | str | None = None,
        config: ErrorConfig | None = None,
    ) -> Tensor:
        """Flags without errors for ``batch_size`` samples."""
        key = _floating((get_config() if config is None else config).key)
        return _engine.new(_samples(batch_size), device, key)

    @staticmethod
    def from_code(  # noqa: PLR0917
        code: int,
        location: Location,
        batch_size: int,
        device: torch.device | str | None = None,
        severity: int | None = None,
        config: ErrorConfig | None = None,
    ) -> Tensor:
        """Flags with one error in each of ``batch_size`` samples."""
        flags = _ExperimentalErr.new_t(batch_size, device, config)
        return _Err.push_scalar(flags, code, location, severity, config)


err = _Err()
experimental_err = _ExperimentalErr()
