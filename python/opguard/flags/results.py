"""``Ok`` or ``Err``: an outcome as a value, and the way from exceptions to it and back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeAlias, TypeVar

__all__ = ["Err", "Ok", "Result", "as_exception", "as_result", "unwrap"]

T = TypeVar("T")
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Ok(Generic[T]):
    """A success and its value."""

    value: T

    def is_ok(self) -> bool:
        """True."""
        return True

    def is_err(self) -> bool:
        """False."""
        return False

    def unwrap(self) -> T:
        """The value."""
        return self.value

    def unwrap_or(self, default: Any) -> T:
        """The value."""
        return self.value

    def unwrap_err(self) -> NoReturn:
        """ValueError: there is no error."""
        raise ValueError(f"expected an Err to take the error of, got {self!r}")

    def map(self, fn: Callable[[T], Any]) -> Ok[Any]:
        """``Ok(fn(value))``."""
        return Ok(fn(self.value))

    def map_err(self, fn: Callable[[Any], Any]) -> Ok[T]:
        """Itself."""
        return self

    def and_then(self, fn: Callable[[T], Result[Any, Any]]) -> Result[Any, Any]:
        """``fn(value)``, which is a Result."""
        return fn(self.value)

    @property
    def ok_value(self) -> T:
        """The value."""
        return self.value

    @property
    def err_value(self) -> None:
        """None."""
        return None


@dataclass(frozen=True, slots=True)
class Err(Generic[E]):
    """A failure and its error: an exception, or anything else that says what went wrong."""

    error: E

    def is_ok(self) -> bool:
        """False."""
        return False

    def is_err(self) -> bool:
        """True."""
        return True

    def unwrap(self) -> NoReturn:
        """Raises the error; ValueError if it is no exception."""
        if isinstance(self.error, BaseException):
            raise self.error
        raise ValueError(f"expected an Ok to take the value of, got {self!r}")

    def unwrap_or(self, default: T) -> T:
        """``default``."""
        return default

    def unwrap_err(self) -> E:
        """The error."""
        return self.error

    def map(self, fn: Callable[[Any], Any]) -> Err[E]:
        """Itself."""
        return self

    def map_err(self, fn: Callable[[E], Any]) -> Err[Any]:
        """``Err(fn(error))``."""
        return Err(fn(self.error))

    def and_then(self, fn: Callable[[Any], Any]) -> Err[E]:
        """Itself."""
        return self

    @property
    def ok_value(self) -> None:
        """None."""
        return None

    @property
    def err_value(self) -> E:
        """The error."""
        return self.error


Result: TypeAlias = Ok[T] | Err[E]


def as_result(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: ``Ok`` of what the function returns, ``Err`` of the Exception it raises.

    Of a coroutine function: awaiting it gives the Result. KeyboardInterrupt and the like pass.
    """
    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def awaited(*args: Any, **kwargs: Any) -> Result[Any, Exception]:
            try:
                return Ok(await func(*args, **kwargs))
            except Exception as error:
                return Err(error)

        return awaited

    @functools.wraps(func)
    def called(*args: Any, **kwargs: Any) -> Result[Any, Exception]:
        try:
            return Ok(func(*args, **kwargs))
        except Exception as error:
            return Err(error)

    return called


def _value(result: Any, who: str) -> Any:
    if isinstance(result, Ok):
        return result.value
    if isinstance(result, Err):
        result.unwrap()
    raise TypeError(f"expected {who} to return Ok or Err, got {type(result).__name__}")


def as_exception(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the value of the ``Ok`` that the function returns; the error of an ``Err`` raised.

    Of a coroutine function: when awaited.
    """
    who = getattr(func, "__qualname__", repr(func))
    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            return _value(await func(*args, **kwargs), who)

        return awaited

    @functools.wraps(func)
    def called(*args: Any, **kwargs: Any) -> Any:
        return _value(func(*args, **kwargs), who)

    return called


def unwrap(result: Any) -> Any:
    """The value of an ``Ok``; raises the error of an ``Err``. Decorates a function likewise."""
    if isinstance(result, Ok | Err):
        return result.unwrap()
    if callable(result):
        return as_exception(result)
    raise TypeError(
        "expected unwrap to get Ok, Err, or a function that returns one, got"
        f" {type(result).__name__}"
    )
