"""What an object's attributes were, so that a change that failed half way can be undone.

Attributes and the dicts, lists, sets and deques they hold directly are noted, of the object itself,
of the modules it holds, and of their submodules. Contents of tensors and of deeper objects are not.
`through` sees cleaning up to its end, whoever interrupts it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["Snapshot", "through"]

_CONTAINERS = (dict, list, set, deque, bytearray)


def through(clean: Callable[[], object]) -> None:
    """Calls what cleans up until it has come to its end.

    A second Ctrl-C inside of it is raised after it. What is called may have done its work, or a
    part of it, before.
    """
    late: KeyboardInterrupt | None = None
    while True:
        try:
            clean()
            break
        except KeyboardInterrupt as interrupt:
            late = interrupt
    try:
        if late is not None:
            raise late
    finally:
        late = None  # its traceback has this frame, and those of the caller with all they hold


def _objects(obj: Any) -> Iterator[Any]:
    """The object, and every module it is made of."""
    seen = {id(obj)}
    yield obj
    held = list(vars(obj).values()) if hasattr(obj, "__dict__") else []
    if isinstance(obj, dict):
        held += obj.values()
    elif isinstance(obj, (list, tuple)):
        held += obj
    for root in [obj, *held]:
        if isinstance(root, nn.Module):
            for module in root.modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield module


def _slots(obj: Any) -> Iterator[str]:
    for cls in type(obj).__mro__:
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__"):
                if name.startswith("__") and not name.endswith("__"):
                    name = f"_{cls.__name__.lstrip('_')}{name}"  # noqa: PLW2901
                yield name


class Snapshot:
    """Notes an object when made; ``restore()`` puts back what differs."""

    def __init__(self, obj: Any) -> None:
        self._contents: list[tuple[Any, Any]] = []
        self._values: list[tuple[Any, str, Any]] = []
        for one in _objects(obj):
            if isinstance(one, _CONTAINERS):
                self._contents.append((one, _copied(one)))
            if isinstance(one, type):  # its dict cannot be exchanged: name by name
                self._values += [(one, name, value) for name, value in vars(one).items()]
                continue
            attributes = getattr(one, "__dict__", None)
            if isinstance(attributes, dict):
                self._contents.append((attributes, dict(attributes)))
                self._contents += [
                    (value, _copied(value) if value else None)
                    for value in attributes.values()
                    if isinstance(value, _CONTAINERS)
                ]
            for name in _slots(one):
                value = getattr(one, name, _SLOT_EMPTY)
                self._values.append((one, name, value))
                if isinstance(value, _CONTAINERS):
                    self._contents.append((value, _copied(value)))
        self._types = [obj] if isinstance(obj, type) else []

    def restore(self) -> None:
        """Puts back every attribute and direct container that is not as it was noted."""
        for container, copy in self._contents:
            if copy is None:
                if container:
                    container.clear()
            elif not _same(container, copy):
                _refill(container, copy)
        for cls in self._types:
            noted = {name for _, name, _ in self._values}
            for name in set(vars(cls)) - noted:
                delattr(cls, name)
        for owner, name, value in self._values:
            if isinstance(owner, type):
                if vars(owner).get(name, _SLOT_EMPTY) is not value:
                    setattr(owner, name, value)
            elif getattr(owner, name, _SLOT_EMPTY) is not value:
                if value is _SLOT_EMPTY:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


_SLOT_EMPTY: Any = object()


def _copied(container: Any) -> Any:
    """The contents, in a plain type: a subclass may forbid its own copy()."""
    plain: Any = next((k for k in (dict, set, bytearray) if isinstance(container, k)), list)
    return plain(container)


def _same(container: Any, copy: Any) -> bool:
    """Whether both hold the same objects in the same order; equality of tensors is not asked."""
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), copy.items(), strict=True)
        return all(a is c and b is d for (a, b), (c, d) in pairs)
    if isinstance(container, set):
        return bool(container == copy)
    if isinstance(container, bytearray):
        return bool(container == copy)
    return all(a is b for a, b in zip(container, copy, strict=True))


def _refill(container: Any, copy: Any) -> None:
    if isinstance(container, (list, bytearray)):
        container[:] = copy
        return
    container.clear()
    if isinstance(container, deque):
        container.extend(copy)
    else:
        container.update(copy)
