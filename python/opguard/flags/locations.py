"""Where an error came from, as a number of ten bits: names, their ids, and the ids of modules.

A module that belongs to a tracked model keeps three plain values in its own ``__dict__``, so that
they travel with copies and pickles and never show in a state dict: ``_fx_path`` (its path in the
model), ``_opguard_name`` (the name its errors get) and ``_opguard_location`` (epoch, id). The epoch
is a number of this process and of the registry's present content; an id of another epoch is looked
up again by name.

What is written here is traced by torch.compile: names become ids at trace time, by
:func:`_id_of_name` and :func:`_id_of_class`, which run as ordinary Python then, and a module's id
becomes a constant that Dynamo guards.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from opguard import _C
from opguard.flags.config import get_config
from opguard.flags.constants import LOCATION_BITS
from opguard.flags.errors import LocationError

__all__ = ["ErrorLocation", "clear_location_cache", "clear_warn_cache", "resolve_location"]

MAX_LOCATION = (1 << LOCATION_BITS) - 1

# Random, so that an id unpickled from another process is never taken for one of this process; the
# first epoch is nobody's, for modules that are given their id when it is first asked for.
_FIRST_EPOCH = int.from_bytes(os.urandom(6), "little") + 1
_epoch = _FIRST_EPOCH


@dataclass
class _Owner:
    """A living tracked model and the names that are its own."""

    model: Callable[[], nn.Module | None]
    kind: str
    names: frozenset[str]


class _Registry:
    """Names and ids; the lock is held by whoever calls the methods with an underscore."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ids: dict[str, int] = {}  # also the names that share the id of another one
        self.names: dict[int, str] = {}
        self.given: set[str] = set()  # registered by hand: theirs for good
        self.owners: list[_Owner] = []
        self.warned: set[str] = set()
        self.reused = False

    def register(self, name: str, *, given: bool) -> int:
        """The id of a name, a new one if need be; 0 when there is none left."""
        place = self.ids.get(name)
        if place is not None and (not given or name in self.given):
            return place
        with self.lock:
            if given:
                self.given.add(name)
            place = self.ids.get(name)
            if place is None:
                place = self._new_id(name)
            return place

    def _new_id(self, name: str) -> int:
        if len(self.names) >= MAX_LOCATION and not self._reclaim():
            self.given.discard(name)
            complain(
                "full",
                f"expected at most {MAX_LOCATION} locations, all are taken: {name!r} and later"
                " ones are recorded as Unknown; pass ids of your own, or ErrorLocation.reset()",
            )
            return 0
        place = len(self.names) + 1
        if place in self.names or place > MAX_LOCATION:
            place = next(i for i in range(1, MAX_LOCATION + 1) if i not in self.names)
        self.ids[name] = place
        self.names[place] = name
        return place

    def _spare(self) -> set[int]:
        """Ids that only models had which are gone."""
        owned = set().union(*(owner.names for owner in self.living()))
        needed = {place for name, place in self.ids.items() if name in self.given or name in owned}
        return self.names.keys() - needed

    def _reclaim(self) -> bool:
        """Frees the ids of models that are gone; whether there are any."""
        spare = self._spare()
        if not spare:
            return False
        if not self.reused:
            self.reused = True
            warnings.warn(
                f"all {MAX_LOCATION} locations were taken: ids of models that are gone now name"
                " modules of new models, also in flags recorded before",
                UserWarning,
                stacklevel=2,
            )
        self.ids = {name: place for name, place in self.ids.items() if place not in spare}
        self.names = {place: name for place, name in self.names.items() if place not in spare}
        return True

    def living(self, *, but: Iterable[nn.Module] = ()) -> list[_Owner]:
        """Forgets models that are gone, and those in ``but``; the other owners."""
        out = {id(module) for module in but}
        kept = []
        for owner in self.owners:
            model = owner.model()
            if model is not None and id(model) not in out:
                kept.append(owner)
        self.owners = kept
        return kept

    def room_for(self, names: Sequence[str]) -> int:
        """How many of these names can have an id of their own."""
        mine = {self.ids[name] for name in names if name in self.ids}
        free = MAX_LOCATION - len(self.names)
        if free + len(mine) >= len(names):
            return len(names)
        return free + len(mine | self._spare())


_registry = _Registry()


def complain(key: str, message: str) -> None:
    """Warns once for each ``key``; with ``strict_validation`` raises LocationError each time."""
    if get_config().strict_validation:
        raise LocationError(message)
    if key not in _registry.warned:
        _registry.warned.add(key)
        warnings.warn(message, UserWarning, stacklevel=4)


def _id_of_name(name: str) -> int:
    return _registry.register(name, given=True)


def _id_of_member(name: str) -> int:
    return _registry.register(name, given=False)


def _id_of_class(name: str) -> int:
    complain(
        f"class {name}",
        f"expected a module of a @tracked model as the location, got a {name} of none: its errors"
        f" are recorded at {name!r}; decorate the model's class with opguard.flags.tracked",
    )
    return _registry.register(name, given=True)


# What torch.compiler.assume_constant_result sets; called through it, torch._dynamo is imported,
# and that takes 0.8 s.
for _function in (_id_of_name, _id_of_member, _id_of_class):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _next_epoch() -> None:
    global _epoch  # noqa: PLW0603  (one number, read by traced code, where it is guarded)
    _epoch += 1
    tell = getattr(_C, "flags_epoch", None)
    if tell is not None:
        tell(_epoch)


_next_epoch()


def resolve_location(module: int | str | nn.Module | None) -> int:
    """The id of a location: 0 for None, an id itself, a string's, a module's.

    A string is registered when it is new. A module of a tracked model has the id of its path, the
    root that of its class; other modules get that of their class name, with one warning a class.
    The ids are the same in eager code, under torch.compile and in torch.export.

    Raises:
        LocationError: an integer outside 0..1023; with ``strict_validation`` also a full registry
            and an untracked module.
        TypeError: anything else.
    """
    if module is None:
        return 0
    if isinstance(module, str):
        # The epoch is there to be guarded: a graph must not outlive the registry its ids are of.
        return _id_of_name(module) if _epoch else 0
    if isinstance(module, nn.Module):
        return _of_module(module)
    if not hasattr(module, "__index__"):
        raise TypeError(
            "expected a location as an id, a string, a module or None, got"
            f" {type(module).__qualname__}"
        )
    place = int(module)
    if not 0 <= place <= MAX_LOCATION:
        raise LocationError(f"expected a location id from 0 to {MAX_LOCATION}, got {place}")
    return place


def _of_module(module: nn.Module) -> int:
    values = module.__dict__
    kept = values.get("_opguard_location")
    if kept is not None and kept[0] == _epoch:
        return kept[1]  # type: ignore[no-any-return]
    name = None
    if kept is not None and _FIRST_EPOCH <= kept[0] <= _epoch:
        name = values.get("_opguard_name")
    if name is None:
        name = values.get("_fx_path")
    if name is None:
        return _id_of_class(type(module).__name__) if _epoch else 0
    if torch.compiler.is_compiling():
        # For good: the graph serves later models with the same names as well.
        return _id_of_name(name) if _epoch else 0
    place = _id_of_member(name)
    if place != 0:
        values["_opguard_location"] = (_epoch, place)
    return place


def clear_location_cache() -> None:
    """Makes every module look its id up again at its next use; names keep their ids."""
    _next_epoch()


def clear_warn_cache() -> None:
    """Makes each warning about locations come once more."""
    _registry.warned.clear()


class ErrorLocation:
    """The registry of locations, one for the process. Thread-safe.

    Ids are given in order, from 1 to 1023; 0 is ``UNKNOWN``. Ids that only models had which were
    collected are given again when all are taken, or to a new model with the same paths.
    """

    UNKNOWN: ClassVar[int] = 0
    MAX_LOCATION_ID: ClassVar[int] = MAX_LOCATION

    @classmethod
    def register(cls, path: str) -> int:
        """The id of ``path``, a new one the first time; 0 with a warning when all are taken.

        Raises:
            LocationError: all are taken and ``strict_validation`` is set.
        """
        return _id_of_name(path)

    @classmethod
    def get(cls, path: str) -> int:
        """The id of ``path``, 0 when it is not registered."""
        return _registry.ids.get(path, 0)

    @classmethod
    def is_registered(cls, path: str) -> bool:
        """Whether ``path`` has an id, its own or, in a pruned model, its ancestor's."""
        return path in _registry.ids

    @classmethod
    def count(cls) -> int:
        """How many ids are taken; 0 when nothing is registered."""
        return len(_registry.names)

    @classmethod
    def name(cls, loc: int) -> str:
        """The path of an id for people: "Unknown" for 0, "Location_n" for one that is free."""
        return _registry.names.get(loc) or (f"Location_{loc}" if loc else "Unknown")

    @classmethod
    def path(cls, loc: int) -> str:
        """The path of an id, "" for one that is free; "Unknown" for 0."""
        return _registry.names.get(loc, "" if loc else "Unknown")

    @classmethod
    def reset(cls) -> None:
        """Forgets all locations; modules of living models get theirs again at their next use.

        A :class:`ModelCheck` keeps its ids, which new names may be given: check the model anew.
        """
        with _registry.lock:
            _registry.ids = {}
            _registry.names = {}
            _registry.given.clear()
            _registry.warned.clear()
            _registry.reused = False
            _next_epoch()

    @classmethod
    def get_all_paths(cls) -> dict[str, int]:
        """Path -> id; several paths of a pruned model may share one."""
        with _registry.lock:
            return dict(_registry.ids)

    @classmethod
    def get_all_ids(cls) -> dict[int, str]:
        """Id -> path, {0: "Unknown"} included."""
        with _registry.lock:
            return {0: "Unknown", **_registry.names}


Prune = Callable[[Sequence[str], int], "dict[str, str | None]"]


def claim(model: nn.Module, paths: Sequence[str], prune: Prune) -> tuple[str, dict[str, str]]:
    """Makes ``paths`` of a model its own; what stands before them, and each path's registered name.

    The first living model with these paths has them as they are, others behind their class:
    "Model.layer1", "Model#2.layer1". Where there are too few ids, ``prune(paths, room)`` says which
    path stands for which: its ancestor's, or None's for Unknown.
    """
    registry = _registry
    with registry.lock:
        living = registry.living(but=model.modules())
        kind = type(model).__name__
        prefix = _free_prefix(kind, paths, living)
        full = [prefix + path for path in paths]
        room = registry.room_for(full)
        stands = {p: p for p in paths} if room >= len(paths) else prune(paths, room)
        kept = dict.fromkeys(prefix + p for p in stands.values() if p is not None)
        root = prefix.removesuffix(".") or kind
        owner = _Owner(weakref.ref(model), kind, frozenset([root, *full]))
        registry.owners = [*living, owner]
        places = {name: registry.register(name, given=False) for name in kept}
        names = {}
        for path, ancestor in stands.items():
            if ancestor is None:
                complain(
                    "full",
                    f"expected room for the {len(paths)} modules of {kind} among {MAX_LOCATION}"
                    f" locations, there is for {room}: {path!r} is recorded as Unknown",
                )
                continue
            names[path] = prefix + ancestor
            if ancestor != path:
                registry.ids.setdefault(prefix + path, places[prefix + ancestor])
        return prefix, names


def _free_prefix(kind: str, paths: Sequence[str], living: list[_Owner]) -> str:
    owned = set().union(*(owner.names for owner in living))
    alike = sum(owner.kind == kind for owner in living)
    candidates = ["", *([f"{kind}."] if not alike else [])]
    candidates += [f"{kind}#{n}." for n in range(2, len(living) + 3)]
    for prefix in candidates:
        root = prefix.removesuffix(".") or kind
        if root not in owned and owned.isdisjoint(prefix + path for path in paths):
            return prefix
    raise AssertionError("one more candidate than living models was tried")


def note(module: nn.Module, path: str | None, name: str | None, *, now: bool = True) -> bool:
    """Writes a module's place into it; ``now=False``: its id is given at its first use.

    False for a module whose ``__dict__`` cannot be written.
    """
    try:
        values: dict[str, Any] = module.__dict__
        if path is None:
            values.pop("_fx_path", None)
        else:
            values["_fx_path"] = path
        if name is None:
            values.pop("_opguard_name", None)
            values["_opguard_location"] = (_epoch, 0)
        else:
            values["_opguard_name"] = name
            place = _registry.ids.get(name, 0) if now else 0
            values["_opguard_location"] = (_epoch, place) if now else (_FIRST_EPOCH, 0)
    except (AttributeError, TypeError):
        return False
    return True
