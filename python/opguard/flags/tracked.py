"""``@tracked``: every module of a model gets a name for the errors that are found at it."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

from torch import nn

from opguard.flags.locations import ErrorLocation, claim, note
from opguard.flags.tree import LocationTree, WeightedLocationTree

__all__ = ["assign_locations", "tracked"]

_Model = TypeVar("_Model", bound=nn.Module)
_MARK = "_opguard_tracked"


def track(model: _Model) -> _Model:
    """:func:`assign_locations` of a model that is built; the model."""
    assign_locations(model)
    return model


class _Building(threading.local):
    """The models whose construction is under way in this thread; only the outermost is assigned."""

    depth = 0


_building = _Building()


def assign_locations(
    model: nn.Module, *, weights: Mapping[str, float] | None = None, every: bool = False
) -> dict[str, int]:
    """Gives the modules of ``model`` their paths and ids now; path -> id.

    ``@tracked`` calls this when a model is built. Call it for a model of somebody else's class, or
    again after modules were added: a module's path is that in the model assigned last.

    Args:
        model: its modules with parameters or buffers, in themselves or below, get ids in the order
            of ``named_modules``; the others get theirs when they are first used as a location.
        weights: pattern -> weight, see :class:`~opguard.flags.tree.WeightedLocationTree`: what
            stays apart in a model with more modules than there are ids.
        every: gives modules without parameters and buffers ids as well.
    """
    members = [(path, module) for path, module in model.named_modules() if path]
    paths = [path for path, module in members if every or _has_state(module)]

    def prune(names: Sequence[str], room: int) -> dict[str, str | None]:
        return _pruned(names, room, weights or {})

    prefix, names = claim(model, paths, prune)
    note(model, None, prefix.removesuffix(".") or type(model).__name__, now=False)
    with_id = set(paths)
    refused = []
    for path, module in members:
        if path in with_id:
            done = note(module, path, names.get(path))
        else:
            done = note(module, None, prefix + path, now=False)
        if not done:
            refused.append(path)
    if refused:
        warnings.warn(
            f"{len(refused)} modules of {type(model).__name__} cannot be written to and stay"
            f" without a location of their own, {refused[0]!r} among them; pass its path instead",
            UserWarning,
            stacklevel=2,
        )
    return {path: ErrorLocation.get(names.get(path, "")) for path in paths}


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _pruned(paths: Sequence[str], room: int, weights: Mapping[str, float]) -> dict[str, str | None]:
    if room == 0:
        return dict.fromkeys(paths)
    tree: LocationTree = LocationTree(room)
    if weights:
        tree = WeightedLocationTree(room)
        for pattern, weight in weights.items():
            tree.set_weight(pattern, weight)
    for path in paths:
        tree.add_path(path)
    tree.build_ids()
    return {path: tree.stands_for(path) for path in paths}


@overload
def tracked(cls: type[_Model], /) -> type[_Model]: ...
@overload
def tracked(
    cls: None = None, /, *, weights: Mapping[str, float] | None = None
) -> Callable[[type[_Model]], type[_Model]]: ...
def tracked(
    cls: type[_Model] | None = None, /, *, weights: Mapping[str, float] | None = None
) -> type[_Model] | Callable[[type[_Model]], type[_Model]]:
    """Class decorator, with or without parentheses: instances know where their modules are.

    After construction every submodule with parameters or buffers has ``_fx_path``, its path, and
    an id; see :func:`assign_locations`. A tracked model inside a tracked model has the outer
    one's paths. Copies and unpickled instances are models of their own; subclasses are tracked too.

    Raises:
        TypeError: the class is no nn.Module.
    """
    if cls is None:
        return lambda c: _track(c, weights)
    return _track(cls, weights)


def _track(cls: type[_Model], weights: Mapping[str, float] | None) -> type[_Model]:
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"expected @tracked on a class derived from nn.Module, got {cls!r}")
    setattr(cls, _MARK, dict(weights) if weights else {})
    _wrap_init(cls)
    _wrap_setstate(cls)
    if not hasattr(cls.__init_subclass__, _MARK):
        _wrap_subclassing(cls)
    return cls


def _assign(model: nn.Module) -> None:
    assign_locations(model, weights=getattr(model, _MARK, None))


def _wrap_init(cls: type[nn.Module]) -> None:
    init = cls.__init__
    if hasattr(init, _MARK):
        return

    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        _building.depth += 1
        try:
            init(self, *args, **kwargs)
        finally:
            _building.depth -= 1
        if _building.depth == 0:
            _assign(self)

    setattr(__init__, _MARK, True)
    cls.__init__ = __init__  # type: ignore[method-assign]


def _wrap_setstate(cls: type[nn.Module]) -> None:
    setstate: Callable[[nn.Module, Any], None] = cls.__setstate__
    if hasattr(setstate, _MARK):
        return

    @functools.wraps(setstate)
    def __setstate__(self: nn.Module, state: Any) -> None:
        setstate(self, state)
        if "_fx_path" not in self.__dict__:  # a module inside another keeps its path there
            _assign(self)

    setattr(__setstate__, _MARK, True)
    cls.__setstate__ = __setstate__  # type: ignore[method-assign]


def _wrap_subclassing(cls: type[nn.Module]) -> None:
    # What a subclass adds after its base's __init__ is part of the model as well.
    own = cls.__dict__.get("__init_subclass__")

    def __init_subclass__(sub: type[nn.Module], /, **kwargs: Any) -> None:
        if own is None:
            super(cls, sub).__init_subclass__(**kwargs)
        else:
            own.__func__(sub, **kwargs)
        for name, wrap in (("__init__", _wrap_init), ("__setstate__", _wrap_setstate)):
            if name in sub.__dict__:
                wrap(sub)

    setattr(__init_subclass__, _MARK, True)
    cls.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]
