"""One decorator for functions, generators, async functions and async generators.

What is decorated is recognised by inspect, and each kind gets a thin real function of its own kind
around it: ``inspect`` tells the same of both, the signature stays, methods bind, and functions of a
module pickle by name. A guard's modes are on only while the decorated body's own frames run, so
neither the consumer of a generator nor a sibling task ever sees them.

The wrappers drop their arguments as soon as the body has them and whenever it fails: a traceback
through a wrapper must not keep what was passed alive.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

__all__ = ["Step", "Stepper", "decorate", "decorate_with"]

_is_compiling = torch.compiler.is_compiling

Factory = Callable[[], AbstractContextManager[Any]]


class Stepper(Protocol):
    """What drives a body: an iterator that is also awaitable, entering for each of its steps."""

    def __iter__(self) -> Generator[Any, Any, Any]: ...

    def __await__(self) -> Generator[Any, Any, Any]: ...


class _Held:
    """The manager that is entered and suspended between two steps of one body, or None."""

    __slots__ = ("manager",)

    def __init__(self) -> None:
        self.manager: Any = None


class Step:
    """Drives a generator or coroutine, inside a context manager only while its frames run.

    A context manager that has ``suspend()`` and ``resume()`` is made and entered once, told of
    every suspension, and exited at the end. Any other is made, entered and exited for each step.

    An async generator is driven by one of these for each item: they share ``held``, and ``goes_on``
    says that the end of this one is a suspension of the body, not its end.
    """

    def __init__(
        self, factory: Factory, inner: Any, held: _Held | None = None, goes_on: bool = False
    ) -> None:
        self._factory = factory
        self._inner = inner
        self._held = _Held() if held is None else held
        self._goes_on = goes_on

    def __iter__(self) -> Step:
        return self

    __await__ = __iter__

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        inner = self._inner
        advance = inner.send if hasattr(inner, "send") else lambda _: next(inner)
        return self._advance(advance, value)

    def throw(self, *error: Any) -> Any:
        return self._advance(self._inner.throw, *error)

    def close(self) -> None:
        if hasattr(self._inner, "close"):
            self._advance(lambda: (self._inner.close(), _CLOSED)[1])

    def _advance(self, advance: Callable[..., Any], *args: Any) -> Any:
        held = self._held.manager
        manager: Any = self._factory() if held is None else held
        if not (hasattr(manager, "suspend") and hasattr(manager, "resume")):
            with manager:
                return_value, item = _one(advance, args)
        else:
            self._held.manager = None
            with _Lasting(manager, manager.__enter__ if held is None else manager.resume) as state:
                return_value, item = _one(advance, args)
                state.suspended = item is not _CLOSED and (return_value is None or self._goes_on)
            self._held.manager = manager if state.suspended else None
        if return_value is not None and item is not _CLOSED:
            raise return_value
        return item


_CLOSED = object()


class _Lasting:
    """One step of a manager that lasts: left by suspend() where the body goes on, else exited."""

    def __init__(self, manager: Any, enter: Callable[[], Any]) -> None:
        self.manager = manager
        self.enter = enter
        self.suspended = False

    def __enter__(self) -> _Lasting:
        self.enter()
        return self

    def __exit__(self, *error: Any) -> Any:
        if self.suspended:
            return self.manager.suspend()
        return self.manager.__exit__(*error)


def _one(advance: Callable[..., Any], args: tuple[Any, ...]) -> tuple[StopIteration | None, Any]:
    """(None, what was yielded), or (the StopIteration with the return value, None).

    The end is caught here: a guard would take a StopIteration that crosses it for a failure.
    """
    try:
        item = advance(*args)
    except StopIteration as stop:
        return stop.with_traceback(None), None
    return (StopIteration(), item) if item is _CLOSED else (None, item)


def decorate(factory: Factory, function: Any) -> Any:
    """``function`` decorated by the context managers that ``factory`` makes, one for each call.

    Functions, generators, async functions and async generators keep their kind; for the last three
    a manager is entered for each step (see Step). classmethod and staticmethod are decorated
    inside. Raises TypeError when ``function`` cannot be called.
    """

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with factory():
            return function(*args, **kwargs)

    def items() -> Callable[[Any, bool], Stepper]:
        held = _Held()
        return lambda inner, goes_on: Step(factory, inner, held, goes_on)

    return decorate_with(
        function,
        run=run,
        step=lambda inner, _: Step(factory, inner),
        traced=run,
        again=factory,
        items=items,
    )


def decorate_with(
    function: Any,
    *,
    run: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    step: Callable[[Any, bool], Stepper],
    traced: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    again: Callable[..., Any],
    items: Callable[[], Callable[[Any, bool], Stepper]] | None = None,
) -> Any:
    """Builds the wrapper of ``function``'s kind.

    ``run(args, kwargs)`` calls a plain function under guard, ``traced`` does it inside
    torch.compile, ``step(inner, yields)`` makes what drives a body (``yields``: what it hands out
    at a suspension is the user's own value, and no future of an event loop), ``again`` makes a
    fresh guard for what is inside a classmethod or staticmethod. ``items()``, where the items of
    an async generator have something in common, makes ``(inner, goes_on) -> what drives it`` for
    one such generator; else each item is driven by a ``step`` of its own.
    """
    if isinstance(function, (classmethod, staticmethod)):
        inside = function.__func__
        return type(function)(_rebuild(again, inside))
    if not callable(function):
        raise TypeError(
            f"a guard decorates a function, generator or coroutine function, it got "
            f"{type(function).__name__}; pass a callable"
        )
    kind = _kind(function)
    if kind == "async generator":
        each = items or (lambda: lambda inner, goes_on: step(inner, False))
        return _wraps(function, _async_generator(function, each))
    if kind == "coroutine":
        return _wraps(function, _coroutine(function, step))
    if kind == "generator":
        return _wraps(function, _generator(function, step))
    return _wraps(function, _function(run, traced))


def _rebuild(again: Callable[..., Any], inside: Any) -> Any:
    made = again()
    return made(inside) if callable(made) else decorate(again, inside)


def _kind(function: Any) -> str:
    candidates = [function]
    if not isinstance(function, type) and not inspect.isroutine(function):
        candidates.append(getattr(type(function), "__call__", None))  # noqa: B004
    for candidate in candidates:
        if inspect.isasyncgenfunction(candidate):
            return "async generator"
        if inspect.iscoroutinefunction(candidate):
            return "coroutine"
        if inspect.isgeneratorfunction(candidate):
            return "generator"
    return "function"


def _wraps(function: Any, wrapper: Any) -> Any:
    # Only a function's own attributes are copied: an object's __dict__ is its state, not its face.
    updated = ("__dict__",) if inspect.isfunction(function) else ()
    return functools.update_wrapper(wrapper, function, updated=updated)


def _function(run: Callable[..., Any], traced: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return traced(args, kwargs)
        try:
            return run(args, kwargs)
        except BaseException:
            del args, kwargs
            raise

    return wrapper


def _generator(function: Any, step: Callable[[Any, bool], Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        inner = step(function(*args, **kwargs), True)
        del args, kwargs
        return (yield from inner)

    return wrapper


def _coroutine(function: Any, step: Callable[[Any, bool], Any]) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        inner = step(_awaitable(function(*args, **kwargs)), False)
        del args, kwargs
        return await inner

    return wrapper


def _awaitable(value: Any) -> Any:
    return value if inspect.iscoroutine(value) else value.__await__()


def _async_generator(
    function: Any, items: Callable[[], Callable[[Any, bool], Any]]
) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        inner = function(*args, **kwargs)
        del args, kwargs
        step, value = items(), None
        try:
            value = await step(inner.asend(None), True)
            while True:
                try:
                    sent = yield value
                except GeneratorExit:
                    await step(inner.aclose(), False)
                    raise
                except BaseException as error:
                    value = await step(inner.athrow(error), True)
                else:
                    value = await step(inner.asend(sent), True)
                    sent = None
        except StopAsyncIteration:
            return
        except BaseException:
            value = sent = None
            raise

    return wrapper
