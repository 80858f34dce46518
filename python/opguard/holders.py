"""Names who holds the memory of a device: which variable, attribute, frame or exception.

The search goes from the largest storages up their referrers to a root a person can act on: a global
of a module, a local of a running function, a class. It asks the garbage collector once per level
for all storages together, runs no code of the objects it meets, and keeps nothing: the report is
text and numbers.
"""

from __future__ import annotations

import gc
import re
import sys
import types
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from opguard._sizes import readable
from opguard.devices import DeviceLike, memory_now, normalize_device

__all__ = ["Holder", "Holders", "who_holds"]

_LEVELS = 12
_WIDTH = 200
_OPTIMIZED = 1  # CO_OPTIMIZED: the frame's locals are not a namespace of their own


class Holder(NamedTuple):
    """One storage and the chain that keeps it alive.

    size: bytes. tensors: how many tensors share it. what: type, dtype and shape of the largest of
    them. chain: from the root to the tensor.
    """

    size: int
    tensors: int
    what: str
    chain: str


class Holders(NamedTuple):
    """The storages on a device, largest first; prints as a table.

    size, storages: the bytes and number of all storages that Python's tensors use, those beyond
    `holders` included. elsewhere: bytes in use on an accelerator that no Python tensor has.
    """

    device: str
    size: int
    storages: int
    elsewhere: int
    holders: tuple[Holder, ...]

    def __repr__(self) -> str:
        lines = [f"{self.device}: {readable(self.size)} in {self.storages} storages"]
        for holder in self.holders:
            shared = f", {holder.tensors} tensors" if holder.tensors > 1 else ""
            lines.append(f"{readable(holder.size):>11}  {holder.what}{shared}: {holder.chain}")
        rest = self.storages - len(self.holders)
        if rest > 0:
            left = self.size - sum(holder.size for holder in self.holders)
            lines.append(f"{readable(left):>11}  in {rest} smaller storages")
        if self.elsewhere > 0:
            lines.append(
                f"{readable(self.elsewhere):>11}  held by no Python tensor, as autograd's graphs"
            )
        return "\n".join(lines)


class _Storage:
    __slots__ = ("grad_of", "size", "tensors")

    def __init__(self, size: int, grad_of: torch.Tensor | None) -> None:
        self.size = size
        self.tensors: list[torch.Tensor] = []
        self.grad_of = grad_of


def _storage_of(tensor: torch.Tensor) -> tuple[object, int]:
    """Returns what identifies the tensor's storage, and its bytes."""
    try:
        storage = tensor.untyped_storage()
        if storage.device.type == "meta":
            # A fake tensor says a device and has no memory there; its address must not be asked.
            return id(tensor), 0
        return (storage.data_ptr() or storage._cdata), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        # Sparse and wrapper tensors have no storage of their own.
        return id(tensor), 0


def _tensors(device: torch.device) -> Iterator[torch.Tensor]:
    for found in gc.get_objects():
        # By type: asking an object for its class can run its code.
        if issubclass(type(found), torch.Tensor):
            try:
                here = found.device == device
            except Exception:
                # A half-made subclass has no device.
                continue
            if here:
                yield found


def _storages(device: torch.device) -> list[_Storage]:
    """Returns the storages on `device`, largest first."""
    found: dict[object, _Storage] = {}

    def add(tensor: torch.Tensor, grad_of: torch.Tensor | None) -> None:
        key, size = _storage_of(tensor)
        storage = found.setdefault(key, _Storage(size, grad_of))
        if not any(tensor is known for known in storage.tensors):
            storage.tensors.append(tensor)

    with torch._C.DisableTorchFunctionSubclass():
        for tensor in list(_tensors(device)):
            add(tensor, None)
            # A gradient that nobody named has no Python object until it is asked for.
            if tensor.is_leaf and tensor.requires_grad and tensor.grad is not None:
                add(tensor.grad, tensor)
    return sorted(found.values(), key=lambda storage: -storage.size)


def _locals_of(frame: types.FrameType) -> dict[str, int]:
    """Returns the ids of the frame's locals by name, and leaves no snapshot of them behind."""
    values: Any = frame.f_locals
    found = {str(name): id(value) for name, value in values.items()}
    optimized = frame.f_code.co_flags & _OPTIMIZED
    # Up to 3.12 f_locals is a dict the frame keeps. It is emptied where nobody else has it (three:
    # the frame, this function, getrefcount), and no debugger is about to write it back.
    dropped = optimized and type(values) is dict and sys.gettrace() is None
    if dropped and sys.getrefcount(values) <= 3:
        values.clear()
    return found


def _place(frame: types.FrameType) -> str:
    code = frame.f_code
    return f"{code.co_qualname}() ({code.co_filename.rpartition('/')[2]}:{frame.f_lineno})"


def _running() -> dict[int, str]:
    """Returns, by id, the name of every local of every running function but those here."""
    found: dict[int, str] = {}
    for top in sys._current_frames().values():
        frame: types.FrameType | None = top
        while frame is not None:
            if frame.f_globals is not globals() and frame.f_code.co_flags & _OPTIMIZED:
                for name, value in _locals_of(frame).items():
                    # The outermost function that has it is the one that answers for it.
                    found[value] = f"local {name} of {_place(frame)}"
            frame = frame.f_back
    return found


def _namespaces() -> dict[int, str]:
    """Returns, by id of its namespace, the name of every module."""
    found: dict[int, str] = {}
    for name, module in list(sys.modules.items()):
        if type(module) is types.ModuleType or isinstance(module, types.ModuleType):
            found.setdefault(id(types.ModuleType.__getattribute__(module, "__dict__")), name)
    return found


class _Search:
    """The referrers of some objects, level by level, until each has met a root.

    Objects are kept in one list, which the search knows to pass over; all else refers by id.
    """

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.index: dict[int, int] = {}
        self.parents: dict[int, list[int]] = {}
        self.climbers: dict[int, int] = {}  # id of an object: which start it was met from first
        self.locals = _running()
        self.modules = _namespaces()

    def root(self, found: object) -> str | None:
        """Returns the name of `found` where it is a root."""
        name = self.locals.get(id(found))
        if name is not None:
            return name
        if id(found) in self.modules:
            return f"module {self.modules[id(found)]}"
        if issubclass(type(found), type):
            return f"class {type.__getattribute__(found, '__qualname__')}"
        return None

    def add(self, found: object) -> bool:
        if id(found) in self.index:
            return False
        self.index[id(found)] = len(self.objects)
        self.objects.append(found)
        return True

    def climb(self, start: list[Any]) -> None:
        frontier = [found for found in start if self.add(found)]
        self.climbers.update((id(found), position) for position, found in enumerate(frontier))
        for _ in range(_LEVELS):
            frontier = self._fair([found for found in frontier if self.root(found) is None])
            if not frontier:
                return
            wanted = {id(found) for found in frontier}
            passed = {id(self.objects), id(frontier), id(start)}
            level: list[Any] = []
            for parent in gc.get_referrers(*frontier):
                if id(parent) in passed or self._ours(parent):
                    continue
                for child in gc.get_referents(parent):
                    if id(child) in wanted:
                        self.parents.setdefault(id(child), []).append(id(parent))
                        self.climbers.setdefault(id(parent), self.climbers[id(child)])
                if self.add(parent):
                    level.append(parent)
            frontier = level

    def _fair(self, frontier: list[Any]) -> list[Any]:
        """Returns at most _WIDTH of them, as many of each start: none crowds another out."""
        if len(frontier) <= _WIDTH:
            return frontier
        turns: dict[int, int] = {}
        ranked = []
        for found in frontier:
            climber = self.climbers[id(found)]
            turns[climber] = turns.get(climber, -1) + 1
            ranked.append((turns[climber], found))
        ranked.sort(key=lambda turn: turn[0])
        return [found for _, found in ranked[:_WIDTH]]

    @staticmethod
    def _ours(found: object) -> bool:
        if type(found) is types.FrameType:
            return found.f_globals is globals()
        return type(found) is _Storage

    def path(self, start: object) -> list[Any]:
        """Returns the shortest chain from a root to `start`; its longest one where none is met."""
        came: dict[int, int] = {id(start): 0}
        waiting = deque([id(start)])
        last = id(start)
        while waiting:
            last = waiting.popleft()
            if self.root(self.objects[self.index[last]]) is not None:
                break
            for parent in self.parents.get(last, ()):
                if parent not in came:
                    came[parent] = last
                    waiting.append(parent)
        found = []
        while last:
            found.append(self.objects[self.index[last]])
            last = came[last]
        return found


def _key(key: object) -> str:
    return repr(key)[:60] if type(key) in (str, int) else type(key).__name__


def _attribute(owner: object, child: object) -> str:
    """Returns how an object that is no container refers to `child`."""
    if issubclass(type(owner), type):
        # A class shows its namespace as a proxy only, but refers to the dict.
        return "" if type(child) is dict else f".<{type(child).__name__}>"
    try:
        names = object.__getattribute__(owner, "__dict__")
    except (AttributeError, TypeError):
        names = {}
    if names is child:
        return ""
    if type(names) is dict:
        for name, value in names.items():
            if value is child:
                return f".{name}"
    for base in type(owner).__mro__:
        for name, slot in vars(base).items():
            if type(slot) is types.MemberDescriptorType:
                try:
                    if slot.__get__(owner) is child:
                        return f".{name}"
                except AttributeError:
                    continue
    return f".<{type(child).__name__}>"


def _edge(parent: Any, child: object, before: object) -> str:  # noqa: PLR0911 (one kind a line)
    """Returns how `parent` refers to `child`; `before` is what refers to parent in the chain."""
    kind = type(parent)
    if issubclass(kind, dict):
        for key, value in dict.items(parent):
            if value is child:
                owned = before is not None and _attribute(before, parent) == ""
                return f".{key}" if owned and isinstance(key, str) else f"[{_key(key)}]"
        return "[key]"
    if issubclass(kind, list | tuple):
        order: Any = list if issubclass(kind, list) else tuple
        for position, value in enumerate(order.__iter__(parent)):
            if value is child:
                return f"[{position}]"
    if kind is types.FrameType:
        names = [name for name, value in _locals_of(parent).items() if value == id(child)]
        return f" -> local {names[0] if names else '?'} of {_place(parent)}"
    if kind is types.TracebackType or kind is types.CellType:
        return ""
    if issubclass(kind, BaseException) and type(child) is types.TracebackType:
        return f" (exception {kind.__name__})"
    if kind in (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType):
        return f" (suspended {parent.__qualname__})"
    if kind is types.FunctionType:
        return f" (closure or default of {parent.__qualname__})"
    if issubclass(kind, set | frozenset):
        return "{...}"
    return _attribute(parent, child)


_MODULE_DICTS = r"\._(?:parameters|buffers|modules)\['([^']*)'\]"


def _chain(search: _Search, start: object) -> str:
    """Returns the chain to `start` as text."""
    path = search.path(start)
    root = search.root(path[0])
    if root is None:
        if len(path) == 1:
            return "no Python object refers to it: held by torch or another library"
        root = f"{type(path[0]).__name__} that no name was found for"
    text, before = "", None
    for parent, child in pairwise(path):
        text += _edge(parent, child, before)
        before = parent
    named = re.match(r"\['([^']*)'\]", text) if root.startswith("module ") else None
    if named:
        text = f": {named[1]}{text[named.end() :]}"
    return root + re.sub(_MODULE_DICTS, r".\1", text)


def _describe(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{type(tensor).__name__} {dtype} {tuple(tensor.shape)}"


def _owners(storages: list[_Storage]) -> list[Any]:
    """Returns the object to look for: a tensor of each storage, the parameter of a gradient."""
    return [
        storage.tensors[0] if storage.grad_of is None else storage.grad_of for storage in storages
    ]


def _holders(search: _Search, storages: list[_Storage], owners: list[Any]) -> Iterator[Holder]:
    with torch._C.DisableTorchFunctionSubclass():
        for storage, owner in zip(storages, owners, strict=True):
            largest = max(storage.tensors, key=lambda tensor: tensor.numel())
            suffix = "" if storage.grad_of is None else ".grad"
            chain = _chain(search, owner) + suffix
            yield Holder(storage.size, len(storage.tensors), _describe(largest), chain)


def who_holds(device: DeviceLike | None = None, *, limit: int = 20) -> Holders:
    """Returns who holds the memory of `device` (None: the best device), the largest first.

    Tensors that share a storage count once. The chains of the `limit` largest storages are looked
    for, which takes a tenth of a second or so for each of up to twelve levels in a large program.
    What only C++ code holds cannot be seen; its bytes are in `elsewhere`.
    """
    where = normalize_device(device)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit: expected an int from 0 up, got {limit!r}")
    storages = _storages(where)
    total, count = sum(storage.size for storage in storages), len(storages)
    del storages[limit:]
    # What is taken into these lists is let go of at the end, whatever else may refer to them.
    search, owners = _Search(), _owners(storages)
    try:
        search.climb(owners)
        holders = tuple(_holders(search, storages, owners))
    finally:
        search.objects.clear()
        owners.clear()
        storages.clear()
    elsewhere = 0 if where.type in ("cpu", "meta") else max(0, memory_now(where) - total)
    return Holders(str(where), total, count, elsewhere, holders)
