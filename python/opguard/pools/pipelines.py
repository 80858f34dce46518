"""Objects made of modules: diffusers and transformers pipelines, guarded models, dicts and lists.

The components are users of their own, one each however many pipelines share them. A set that fits
the budget is taken as a whole for a ``with`` block; one that does not runs each component by a
hook of its own, just in time. Nothing of the pipeline itself is changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from opguard.pools._forks import ForkLock
from opguard.pools._parts import find_parts, refuse_offloaded
from opguard.pools.errors import PoolFileChanged, PoolRefused, Unmanageable
from opguard.pools.users import ResourcePoolUser, register_user

if TYPE_CHECKING:
    from opguard.pools._books import Entry
    from opguard.pools.management import Management

__all__ = ["DiffusersPipelineWrapper", "PipelineWrapper"]

# What components are called by beside forward, where they have it.
ENTRY_POINTS = (
    "encode",
    "decode",
    "generate",
    "get_image_features",
    "get_text_features",
    "get_audio_features",
)


class PipelineWrapper(ResourcePoolUser):
    """An object whose parts are modules. It takes nothing itself, its components do.

    Args:
        obj: the object, or a `Keeper` of one that cannot be referred to weakly.
        management: whose pools the components take from; the process's own unless given.
        name: components are called ``name.unet`` and so on.
        trust_files, verify: of the components, see `opguard.pools.modules.TorchModuleWrapper`.

    Raises:
        Unmanageable: where there is no module in it, a component cannot be moved, or offload
            hooks of another library move it already.
    """

    def __init__(
        self,
        obj: object,
        *,
        management: Management | None = None,
        name: str | None = None,
        trust_files: bool = False,
        verify: str | None = None,
    ) -> None:
        super().__init__(obj)
        if management is None:
            from opguard.pools.management import get_management

            management = get_management()
        self._management = management
        self._name = name or type(_kept(obj)).__name__
        told = {"trust_files": trust_files, "verify": verify}
        self._options: dict[str, Any] = {key: value for key, value in told.items() if value}
        self._modules: tuple[weakref.ref[nn.Module], ...] = ()
        self._entries: tuple[Entry, ...] = ()
        self._refreshing = ForkLock(threading.RLock)
        self.refresh()
        if not self._entries:
            slot = (
                " whose objects can be held weakly (see __weakref__)"
                if isinstance(obj, Keeper)
                else ""
            )
            raise Unmanageable(
                f"expected a module, or an object made of modules, got "
                f"{type(_kept(obj)).__name__}; register_user(type, factory) teaches a type{slot}"
            )

    # What a user does; the bytes are its components'.

    def needs(self) -> Mapping[str, int]:
        return {}

    def bring_in(self) -> int:
        return 0

    def give_back(self) -> int:
        return 0

    def pause(self) -> None:
        for entry in self._entries:
            entry.user.pause()

    @property
    def execution_device(self) -> torch.device:
        return self._management.execution_device

    def describe(self) -> str:
        return f"{len(self._entries)} components"

    # Its components

    @property
    def members(self) -> tuple[Entry, ...]:
        """The entries of its components, as of the last look."""
        return self._entries

    @property
    def parts(self) -> tuple[Entry, ...]:
        return self._entries

    def refresh(self) -> None:
        """See which components it has now; new ones are managed, what is gone is let go."""
        obj = _kept(self.obj)
        if obj is None:
            return
        parts = find_parts(obj)
        modules = tuple(parts.values())
        with self._refreshing.here:
            if not self._is_as_before(modules):
                refuse_offloaded(parts, self._name)
                before, entries = self._alive(), self._joined(parts)
                self._entries, self._modules = entries, tuple(map(weakref.ref, modules))
                self._leave([module for module in before if module not in modules])
            else:
                refuse_offloaded(parts, self._name, deep=False)

    def _is_as_before(self, modules: tuple[nn.Module, ...]) -> bool:
        if len(modules) != len(self._modules):
            return False
        pairs = zip(modules, self._modules, self._entries, strict=True)
        return all(
            before() is module and self._management.find(module) is entry
            for module, before, entry in pairs
        )

    def _joined(self, parts: Mapping[str, nn.Module]) -> tuple[Entry, ...]:
        """The parts as components: all of them, or what was managed before and no other."""
        before, entries = self._alive(), []
        try:
            for name, module in parts.items():
                entries.append(self._component(name, module))
        except BaseException:
            self._leave([module for module in parts.values() if module not in before])
            raise
        return tuple(entries)

    def _leave(self, modules: list[nn.Module]) -> None:
        """Parts that are components no more. What somebody still uses stays managed."""
        for module in modules:
            _components.leave(module, self, self._management)

    def _component(self, name: str, module: nn.Module) -> Entry:
        mine = self._management.find(module) is None
        options = self._options | ({"name": f"{self._name}.{name}"} if mine else {})
        entry = self._management.manage(module, **options, **self._as_others())
        _components.join(module, self, mine=mine)
        return entry

    def _as_others(self) -> dict[str, Any]:
        """What the components it had were told last: those that come later are told the same."""
        infos = [self._management.unit(unit) for e in self._entries for unit in e.all_units]
        if not infos or infos[0] is None:
            return {}
        return {"priority": infos[0].priority, "pin": infos[0].pinned}

    def change(self, **options: Any) -> None:
        for entry in self._entries:
            entry.user.change(**options)
        self._options |= options

    def _alive(self) -> list[nn.Module]:
        return [module for ref in self._modules if (module := ref()) is not None]

    # Taking them

    def seat(self, own: Any) -> Any:
        """The whole set where it fits; else nothing, and hooks take each component in turn."""
        self.refresh()
        units = tuple(unit for entry in self._entries for unit in entry.units.values())
        if self._fits(units):
            return self._management.seat(units)
        for module in self._alive():
            _components.attach(module, self._management)
        return own

    def _fits(self, units: tuple[int, ...]) -> bool:
        """Whether all of it can be there at once, beside what is pinned by others."""
        management = self._management
        own = set(units)
        needs: dict[str, int] = {}
        for unit in own:
            self._add(needs, unit)
        for unit, entry in tuple(management.entries.items()):
            info = management.unit(unit)
            if unit not in own and entry not in self._entries and info and info.pinned:
                self._add(needs, unit)
        for entry in self._entries:
            largest = getattr(entry.user, "largest_need", 0)
            pool = management.execution_pool.name
            needs[pool] = needs.get(pool, 0) + largest
        return all(nbytes <= management.pool(pool).budget for pool, nbytes in needs.items())

    def _add(self, needs: dict[str, int], unit: int) -> None:
        for pool, each in self._management.entries[unit].units.items():
            if each == unit:
                needs[pool] = needs.get(pool, 0) + self._management.nbytes(unit)

    def close(self) -> None:
        """Take its hooks off. Where it is told to, and not dead, its components go as well.

        What another pipeline has, or was managed before this one came, stays managed.
        """
        told = self.obj is not None
        for module in self._alive():
            _components.leave(module, self, self._management if told else None)
        self._modules, self._entries = (), ()


class DiffusersPipelineWrapper(PipelineWrapper):
    """A diffusers pipeline; its components are its modules, by their names there."""


class Keeper:
    """Stands for an object that cannot be referred to weakly: a dict, a list, a namespace."""

    __slots__ = ("__weakref__", "obj")
    all: ClassVar[weakref.WeakSet[Keeper]] = weakref.WeakSet()

    def __init__(self, obj: object) -> None:
        self.obj = obj
        Keeper.all.add(self)


def weakly(obj: object) -> object:
    """``obj`` itself, or a keeper of it where it cannot be referred to weakly."""
    try:
        weakref.ref(obj)
    except TypeError:
        return Keeper(obj)
    return obj


def keepers_of(obj: object) -> list[Keeper]:
    """Those that stand for ``obj`` now."""
    return [keeper for keeper in tuple(Keeper.all) if keeper.obj is obj]


def _kept(obj: object) -> object:
    return obj.obj if isinstance(obj, Keeper) else obj


class Where:
    """Tells diffusers on which device a component runs that is not there now.

    A pipeline makes its latents where ``_hf_hook.execution_device`` of its first component says.
    """

    def __init__(self, execution_device: torch.device | None = None) -> None:
        self.execution_device = execution_device

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """What accelerate calls when it takes hooks off."""
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Where:
        return Where()  # a copy is its own model, which is where it is

    def __reduce__(self) -> tuple[Any, ...]:
        return Where, ()


def tell_where(module: nn.Module, device: torch.device | None) -> None:
    """Put a `Where` on the module, or with None take it off; hooks of others are left alone."""
    if isinstance(module.__dict__.get("_hf_hook"), Where):
        del module.__dict__["_hf_hook"]
    if device is not None and "_hf_hook" not in module.__dict__:
        module.__dict__["_hf_hook"] = Where(device)


class _Components:
    """Which pipelines a module is a component of, and the hook that takes it just in time."""

    def __init__(self) -> None:
        self._lock = ForkLock(threading.RLock)
        self._pipelines: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[PipelineWrapper]] = (
            weakref.WeakKeyDictionary()
        )
        self._managed_here: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._hooks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    def join(self, module: nn.Module, pipeline: PipelineWrapper, *, mine: bool) -> None:
        """``pipeline`` has it. mine: it was not managed before."""
        with self._lock.here:
            self._pipelines.setdefault(module, weakref.WeakSet()).add(pipeline)
            if mine:
                self._managed_here.add(module)

    def leave(
        self, module: nn.Module, pipeline: PipelineWrapper, management: Management | None
    ) -> None:
        """``pipeline`` has it no more. After the last one a management, if given, lets go of it."""
        with self._lock.here:
            pipelines = self._pipelines.get(module)
            if pipelines is None or pipeline not in pipelines:
                return
            pipelines.discard(pipeline)
            if pipelines:
                return
            self._pipelines.pop(module, None)
            hook = self._hooks.pop(module, None)
            here = module in self._managed_here
        if hook is not None:
            hook.remove()
            tell_where(module, None)
        if here and management is not None:
            with suppress(PoolRefused):  # somebody uses it: it goes on without us
                with suppress(PoolFileChanged):  # said to whoever lets go of the pipeline
                    management.unmanage(module)
                self._managed_here.discard(module)

    def attach(self, module: nn.Module, management: Management) -> None:
        """Have the module take itself while it runs, whichever way it is called."""
        from opguard.pools.hooks import AutoManageHook

        with self._lock.here:
            entry = management.find(module)
            if module in self._hooks or entry is None or not entry.units:
                return  # what is streamed takes its blocks itself
            methods = tuple(name for name in ENTRY_POINTS if callable(getattr(module, name, None)))
            self._hooks[module] = AutoManageHook(module, methods=methods).attach()
            if (device := entry.user.execution_device).type != "cpu":
                tell_where(module, device)


_components = _Components()
register_user(object, PipelineWrapper)
