"""Error codes, their domains and severities: plain ints with names.

A code is four bits: the domain in the upper two, which of its errors in the lower two.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = ["ErrorCode", "ErrorDomain", "Severity", "domain_bits"]


class Severity:
    """How bad an error is: 0 (none) to 3."""

    OK = 0
    WARN = 1
    ERROR = 2
    CRITICAL = 3

    _NAMES: ClassVar[dict[int, str]] = {0: "OK", 1: "WARN", 2: "ERROR", 3: "CRITICAL"}

    @classmethod
    def name(cls, sev: int) -> str:
        """``"CRITICAL"`` for 3; ``"SEV_n"`` for a number that is no severity."""
        return cls._NAMES.get(sev, f"SEV_{sev}")

    @classmethod
    def is_critical(cls, sev: int) -> bool:
        """Whether it is CRITICAL."""
        return sev == cls.CRITICAL

    @classmethod
    def is_error_or_worse(cls, sev: int) -> bool:
        """Whether it is ERROR or CRITICAL."""
        return sev >= cls.ERROR

    @classmethod
    def is_warn_or_worse(cls, sev: int) -> bool:
        """Whether it is anything but OK."""
        return sev >= cls.WARN


class ErrorDomain:
    """What an error is about: the upper two bits of its code.

    The constants are codes with the lower bits 0. Wherever a domain is taken, the domain's number
    0..3 is taken as well; the two ways never mean different domains.
    """

    NUMERIC = 0
    INDEX = 4
    QUALITY = 8
    RUNTIME = 12

    _NAMES: ClassVar[tuple[str, ...]] = ("NUMERIC", "INDEX", "QUALITY", "RUNTIME")

    @classmethod
    def name(cls, domain: int) -> str:
        """``"INDEX"`` for 1 and for ``ErrorDomain.INDEX``; ``"DOMAIN_n"`` for any other number."""
        bits = domain_bits(domain)
        return f"DOMAIN_{domain}" if bits is None else cls._NAMES[bits]


# Both ways of saying a domain. No number stands for two domains: 0 is NUMERIC in both.
_DOMAIN_BITS = {0: 0, 1: 1, 2: 2, 3: 3, 4: 1, 8: 2, 12: 3}


def domain_bits(domain: int) -> int | None:
    """0..3 for a domain given as that number or as an :class:`ErrorDomain` constant, else None."""
    return _DOMAIN_BITS.get(domain)


class ErrorCode:
    """Error codes, 0..15 (4, 8 and 12 stand for no error of their own)."""

    OK = 0
    NAN = 1
    INF = 2
    OVERFLOW = 3
    OUT_OF_BOUNDS = 5
    NEGATIVE_IDX = 6
    EMPTY_INPUT = 7
    ZERO_OUTPUT = 9
    CONSTANT_OUTPUT = 10
    SATURATED = 11
    FALLBACK_VALUE = 13
    VALUE_CLAMPED = 14
    UNKNOWN = 15

    # Other names of the same codes.
    OOB = 5
    UNDERFLOW = 3
    INVALID_VALUE = 6
    UNSTABLE = 11
    CLAMPED = 14
    SPARSE = 9

    _NAMES: ClassVar[dict[int, str]] = {
        0: "OK",
        1: "NAN",
        2: "INF",
        3: "OVERFLOW",
        5: "OUT_OF_BOUNDS",
        6: "NEGATIVE_IDX",
        7: "EMPTY_INPUT",
        9: "ZERO_OUTPUT",
        10: "CONSTANT_OUTPUT",
        11: "SATURATED",
        13: "FALLBACK_VALUE",
        14: "VALUE_CLAMPED",
        15: "UNKNOWN",
    }
    # 0..15; -1 where a code has no severity of its own and the configuration's default counts.
    _SEVERITIES: ClassVar[tuple[int, ...]] = (
        *(Severity.OK, Severity.CRITICAL, Severity.CRITICAL, Severity.ERROR),
        *(-1, Severity.ERROR, Severity.ERROR, Severity.ERROR),
        *(-1, Severity.WARN, Severity.WARN, Severity.WARN),
        *(-1, Severity.WARN, Severity.WARN, -1),
    )

    @classmethod
    def name(cls, code: int) -> str:
        """``"NAN"`` for 1; ``"CODE_n"`` for a number without a name."""
        return cls._NAMES.get(code, f"CODE_{code}")

    @classmethod
    def is_critical(cls, code: int) -> bool:
        """Whether it is NAN or INF."""
        return code in (cls.NAN, cls.INF)

    @classmethod
    def domain(cls, code: int) -> int:
        """The domain's number, 0..3."""
        return (code >> 2) & 0x3

    @classmethod
    def subcode(cls, code: int) -> int:
        """Which of its domain's errors it is, 0..3."""
        return code & 0x3

    @classmethod
    def in_domain(cls, code: int, domain: int) -> bool:
        """Whether the code belongs to a domain (a constant of :class:`ErrorDomain`, or 0..3)."""
        return cls.domain(code) == domain_bits(domain)

    @classmethod
    def domain_name(cls, code: int) -> str:
        """The name of the code's domain."""
        return ErrorDomain.name(cls.domain(code))

    @classmethod
    def default_severity(cls, code: int, otherwise: int = Severity.ERROR) -> int:
        """The severity a code is recorded with when none is given.

        ``otherwise`` is for the codes without one of their own (4, 8, 12, 15).
        """
        severity = cls._SEVERITIES[code] if 0 <= code < len(cls._SEVERITIES) else -1
        return otherwise if severity < 0 else severity
