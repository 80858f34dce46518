"""opguard's pytest plugin: the fixture ``no_tensor_leak``.

A test that asks for it fails when a tensor made while the test ran is still alive after it; the
report names each one's shape, dtype, device and who holds it. Light at import: neither torch nor
opguard is loaded before a test that uses the fixture.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Generator, Iterator
from typing import Any

import pytest

__all__ = ["LeakCheck", "no_tensor_leak"]

SHOWN = 5  # tensors described in one report; each asks the collector several times
STEPS = 6  # longest road of holders


class LeakCheck:
    """What the fixture ``no_tensor_leak`` gives to the test."""

    def __init__(self) -> None:
        self._before: dict[int, weakref.ref[Any]] = {}
        self._allowed: list[weakref.ref[Any]] = []

    def allow(self, *tensors: Any) -> None:
        """Says that these tensors may outlive the test, for example a cache's."""
        self._allowed += [weakref.ref(tensor) for tensor in tensors]

    def start(self) -> None:
        """Remembers, weakly, every tensor there is; a later one is the test's."""
        self._before = {id(tensor): weakref.ref(tensor) for tensor in _living_tensors()}

    def survivors(self) -> list[Any]:
        """The tensors made since ``start`` that something still holds.

        Those that only await the cycle collector are not among them: it runs, but only when
        there is something to decide, so a clean test does not pay for it.
        """
        if not any(self._is_new(tensor) for tensor in _living_tensors()):
            return []
        gc.collect()
        return [tensor for tensor in _living_tensors() if self._is_new(tensor)]

    def _is_new(self, tensor: Any) -> bool:
        before = self._before.get(id(tensor))
        if before is not None and before() is tensor:
            return False
        return not any(allowed() is tensor for allowed in self._allowed)


def _living_tensors() -> Iterator[Any]:
    """Every tensor that Python knows; by type, because isinstance runs code of odd objects."""
    torch = sys.modules.get("torch")
    if not hasattr(torch, "Tensor"):
        return
    base: type = torch.Tensor  # type: ignore[union-attr]
    for thing in gc.get_objects():
        if issubclass(type(thing), base):
            yield thing


def _place(holder: Any, held: Any) -> str:
    """Where inside ``holder`` the held object is: a name, an index, or nothing."""
    if isinstance(holder, dict):
        return next((f"{key!r:.60}" for key, value in holder.items() if value is held), "a key")
    if isinstance(holder, list | tuple):
        return next((f"[{index}]" for index, value in enumerate(holder) if value is held), "")
    if isinstance(holder, types.FrameType):
        return next((name for name, value in holder.f_locals.items() if value is held), "")
    try:
        attributes = vars(holder)
    except TypeError:
        return ""
    return next((repr(name) for name, value in attributes.items() if value is held), "")


def _owner(table: dict[Any, Any], skip: set[int]) -> Any:
    """The object whose ``__dict__`` this is, or None for an ordinary dict."""
    for thing in gc.get_referrers(table):
        if id(thing) not in skip and hasattr(thing, "__dict__"):
            try:
                if vars(thing) is table:
                    return thing
            except TypeError:
                continue
    return None


def _best(holders: list[Any]) -> Any:
    """The holder that says most: frames and namespaces before other containers."""
    return min(holders, key=lambda one: not isinstance(one, types.FrameType | dict), default=None)


def _chain(tensor: Any, skip: set[int]) -> str:
    """One road from the tensor up to what keeps it: a variable, a module's global, an exception."""
    parts: list[str] = []
    held, seen = tensor, {id(tensor)} | skip
    seen.add(id(sys._getframe()))
    while len(parts) < STEPS:
        # No closure over held or tensor anywhere here: its cell would be found as a holder.
        holder = _best([one for one in gc.get_referrers(held) if id(one) not in seen])
        if holder is None:
            break
        place = _place(holder, held)
        owner = _owner(holder, seen) if isinstance(holder, dict) else None
        if isinstance(owner, types.ModuleType):
            parts.append(f"global {place} of module {owner.__name__}")
            break
        if isinstance(holder, types.FrameType):
            code = holder.f_code
            parts.append(f"variable {place!r} of {code.co_name} ({code.co_filename})")
            break
        seen |= {id(holder), id(owner)}
        container = owner is None and isinstance(holder, dict | list | tuple)
        held = holder if owner is None else owner
        name = getattr(held, "__qualname__", "") or type(held).__name__
        if container or not place:
            parts.append(f"{name}{place and ' at '}{place}")
        else:
            parts.append(f"attribute {place} of {name}")
    return " <- ".join(parts) or "nothing Python can see (a C or C++ object)"


def _report(tensors: list[Any]) -> str:
    many = "tensors" if len(tensors) != 1 else "tensor"
    lines = [f"expected no tensor of this test to outlive it, {len(tensors)} {many} did:"]
    frame = sys._getframe()
    skip = {id(tensors), id(lines), id(frame), id(frame.f_back)}
    for index in range(min(len(tensors), SHOWN)):
        tensor = tensors[index]
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = tuple(tensor.shape)
        lines.append(f"  {type(tensor).__name__} {shape} {dtype} on {tensor.device}")
        lines.append(f"    held by {_chain(tensor, skip)}")
    if len(tensors) > SHOWN:
        lines.append(f"  and {len(tensors) - SHOWN} more")
    lines.append("drop what holds them, or say no_tensor_leak.allow(tensor) where it is meant")
    return "\n".join(lines)


@pytest.fixture
def no_tensor_leak() -> LeakCheck:
    """Fails the test when a tensor made while it runs is alive after it.

    Tensors made by fixtures before the test starts are not looked at. A test that fails by
    itself is not checked: its traceback holds its variables.
    """
    return LeakCheck()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Looks before and after the test function itself, between set-up and tear-down."""
    check = getattr(item, "funcargs", {}).get("no_tensor_leak")
    if not isinstance(check, LeakCheck):
        return (yield)
    check.start()
    result = yield
    survivors = check.survivors()
    if survivors:
        pytest.fail(_report(survivors), pytrace=False)
    return result
