"""What does not fit its annotation. All of it is a ValidationError, and that is a ValueError."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

__all__ = [
    "DTypeMismatchError",
    "DeviceMismatchError",
    "DimensionMismatchError",
    "InvalidParameterError",
    "InvalidReturnTypeError",
    "TypeMismatchError",
    "ValidationError",
    "combined",
]


class ValidationError(ValueError):
    """A value does not fit its annotation.

    Attributes:
        message: what was expected and what came.
        context: more of it by name, shown behind the message.
        errors: the single errors that this one stands for, when there is more than one place.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, message: str, context: dict[str, Any] | None = None, *values: Any, **fields: Any
    ) -> None:
        if len(values) > len(self.FIELDS):
            raise TypeError(
                f"expected at most {len(self.FIELDS) + 2} arguments for {type(self).__name__}, got"
                f" {len(values) + 2}"
            )
        given = dict(zip(self.FIELDS, values, strict=False))
        twice = given.keys() & fields.keys()
        unknown = fields.keys() - set(self.FIELDS)
        if twice or unknown:
            raise TypeError(
                f"expected each of {', '.join(self.FIELDS)} once for {type(self).__name__}, got"
                f" {sorted(twice | unknown)}"
            )
        super().__init__(message)
        self.message = message
        self.context = dict(context or {})
        self.errors: tuple[ValidationError, ...] = ()
        for name in self.FIELDS:
            setattr(self, name, given.get(name, fields.get(name)))

    def __str__(self) -> str:
        if not self.context:
            return self.message
        return f"{self.message} ({', '.join(f'{k}={v}' for k, v in self.context.items())})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, context={self.context!r})"

    def _values(self) -> tuple[Any, ...]:
        fields = [getattr(self, name) for name in self.FIELDS]
        return (self.message, self.context, self.errors, *fields)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self.message))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (_parts(type(self)), self.message, dict(self.__dict__))


class DimensionMismatchError(ValidationError):
    """A tensor's shape is another one; ``dim_name`` for a named dimension."""

    FIELDS = ("expected", "actual", "dim_name", "parameter", "function")
    expected: Any
    actual: Any
    dim_name: str | None
    parameter: str | None
    function: str | None


class DTypeMismatchError(ValidationError):
    """A tensor's dtype is another one."""

    FIELDS = ("expected", "actual", "parameter", "function")
    expected: Any
    actual: Any
    parameter: str | None
    function: str | None


class DeviceMismatchError(ValidationError):
    """A tensor is on another device."""

    FIELDS = ("expected", "actual", "parameter", "function")
    expected: Any
    actual: Any
    parameter: str | None
    function: str | None


class InvalidParameterError(ValidationError):
    """Arguments of a call do not fit; ``num_errors`` of them, each in ``errors``."""

    FIELDS = ("parameter", "function", "num_errors")
    parameter: str | None
    function: str | None
    num_errors: int | None


class TypeMismatchError(ValidationError):
    """A value of another type, or parts of a returned tuple that do not fit."""

    FIELDS = ("expected", "actual", "function", "num_errors")
    expected: Any
    actual: Any
    function: str | None
    num_errors: int | None


class InvalidReturnTypeError(ValidationError):
    """A function annotated to return a Result returned something else."""

    FIELDS = ("expected", "actual", "function")
    expected: Any
    actual: Any
    function: str | None


@functools.cache
def _joined(parts: tuple[type[ValidationError], ...]) -> type[ValidationError]:
    if len(parts) == 1:
        return parts[0]
    fields = tuple(dict.fromkeys(name for part in parts for name in part.FIELDS))
    body = {"FIELDS": fields, "__module__": __name__, "__doc__": parts[0].__doc__, "_parts": parts}
    return type(parts[0].__name__, parts, body)


def _parts(cls: type[ValidationError]) -> tuple[type[ValidationError], ...]:
    return getattr(cls, "_parts", (cls,))


def _rebuilt(
    parts: tuple[type[ValidationError], ...], message: str, values: dict[str, Any]
) -> ValidationError:
    error = _joined(parts)(message)
    error.__dict__.update(values)
    return error


def combined(
    errors: Sequence[ValidationError], whole: type[ValidationError], function: str
) -> ValidationError:
    """One error for all of ``errors``: an instance of every one's class and of ``whole``.

    Its fields are those of the first; ``errors`` and ``num_errors`` have the rest.
    """
    if len(errors) == 1 and isinstance(errors[0], whole):
        return errors[0]
    kinds = dict.fromkeys(part for error in errors for part in _parts(type(error)))
    if ValidationError in kinds:  # a base of all the others, and so the last of bases
        del kinds[ValidationError]
    kinds[whole] = None
    first = errors[0]
    text = "; ".join(str(error) for error in errors)
    error = _joined(tuple(kinds))(text)
    for name in type(error).FIELDS:
        setattr(error, name, getattr(first, name, None))
    error.function = function  # type: ignore[attr-defined]
    if "num_errors" in type(error).FIELDS:
        error.num_errors = len(errors)  # type: ignore[attr-defined]
    error.errors = tuple(errors)
    return error
