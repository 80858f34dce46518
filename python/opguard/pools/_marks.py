"""What a hook leaves in a module's own dictionary, and what becomes of that in copies.

A mark, a leased callable for each method that takes leases, and one in place of ``compile``. A call
of a module asks for ``_compiled_call_impl`` first, which torch leaves out of copies; so ``forward``
stays as it is, and code that traces through the module sees nothing of the lease. Nothing here
holds the module strongly: a model that nobody names goes at once.
"""

from __future__ import annotations

import copy
import gc
import inspect
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from functools import partial
from types import AsyncGeneratorType, CoroutineType, FunctionType, GeneratorType
from typing import Any

from torch import nn

from opguard import _C
from opguard.pools._forks import ForkLock
from opguard.pools._inputs import input_mover

__all__ = [
    "BODIES",
    "CALL",
    "Mark",
    "Orphan",
    "driven",
    "lock",
    "manage_here",
    "mark_of",
    "pickles_itself",
    "take_off",
]

CALL = "_compiled_call_impl"
COMPILE = "compile"
KEY = "_opguard_pool_hook"
IGNORED = "__jit_ignored_attributes__"  # what torch.jit.script is not to look at
lock = ForkLock(threading.RLock)  # around attaching and removing, in all modules


def manage_here(module: nn.Module) -> Any:
    """The handle of ``module``, managed now if it is not."""
    from opguard.pools.wrappers import manage

    return manage(module)


def mark_of(module: nn.Module | None) -> Mark | None:
    """What the hooks of this very module share; what a shallow copy has is another module's."""
    mark = None if module is None else module.__dict__.get(KEY)
    return mark if isinstance(mark, Mark) and mark.module() is module else None


def take_off(obj: object) -> None:
    """All hooks of an object that is managed no more: its calls are its own again."""
    with lock.here:
        mark = mark_of(obj) if isinstance(obj, nn.Module) else None
        if mark is not None:
            mark.tokens.clear()
            mark.uninstall()


class Mark:
    """What all hooks of one module share, and the keeper of its leased callables."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Callable[[], nn.Module | None] = weakref.ref(module)
        self.tokens: set[Any] = set()
        self.seat: Any = None
        self.prepare: Callable[..., Any] | None = None
        self.timeout: float | None = None
        self._forwards: dict[str, weakref.ref[_C.LeasedForward]] = {}
        self._below: dict[str, Any] = {}  # what stood there before; None: the class's
        module.__dict__[KEY] = self
        ignored = getattr(type(module), IGNORED, [])
        module.__dict__.setdefault(IGNORED, [*ignored, IGNORED, KEY, CALL, COMPILE])

    def install(self, names: Sequence[str], timeout: float | None = None) -> None:
        """Calls under these names take leases from now on."""
        module = self._alive()
        self.timeout = self.timeout if timeout is None else timeout
        more = ("forward",) if _calls_differently(module) else ()
        for name in dict.fromkeys((*self._below, *names, *more)):
            forward = self._forward(name)
            if forward is None or not forward.active:
                forward = self.wrap(name, module.__dict__.get(name))
            self._equip(forward)
        if not isinstance(module.__dict__.get(COMPILE), Compile):
            self._below[COMPILE] = module.__dict__.get(COMPILE)
            module.__dict__[COMPILE] = Compile(self)

    def wrap(self, name: str, below: Any) -> _C.LeasedForward:
        """A leased callable over what stands there, or over the class's where that is None."""
        module, attribute = self._alive(), "_call_impl" if name == CALL else name
        function, owner = below, None
        if function is None:
            function = inspect.getattr_static(type(module), attribute, None)
            owner = module
            if attribute in module.__dict__ or not isinstance(function, FunctionType):
                function, owner = getattr(module, attribute), None
        forward = _C.LeasedForward(self.seat, function, owner, self)
        self._equip(forward)
        self._forwards[name], self._below[name] = weakref.ref(forward), below
        module.__dict__[name] = forward
        return forward

    def uninstall(self) -> None:
        """The module is as it was before; what others put over ours goes on without leases."""
        module = self._alive()
        for name, below in self._below.items():
            ours = self._forward(name)
            if ours is not None:
                ours.active = False
            there = module.__dict__.get(name)
            if there is not None and (there is ours or isinstance(there, Compile)):
                del module.__dict__[name]
                if below is not None:
                    module.__dict__[name] = below
        module.__dict__.pop(KEY, None)
        if KEY in module.__dict__.get(IGNORED, ()):
            del module.__dict__[IGNORED]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``module.compile``; what it compiles runs inside a lease again."""
        module, below = self._alive(), self._below.get(COMPILE)
        if below is None:
            type(module).compile(module, *args, **kwargs)
        else:
            below(*args, **kwargs)
        with lock.here:
            standing = module.__dict__.get(CALL)
            if standing is not self._forward(CALL):
                self.wrap(CALL, standing)

    def _equip(self, forward: _C.LeasedForward) -> None:
        forward.seat, forward.prepare, forward.timeout = self.seat, self.prepare, self.timeout

    def _forward(self, name: str) -> _C.LeasedForward | None:
        reference = self._forwards.get(name)
        return None if reference is None else reference()

    def _alive(self) -> nn.Module:
        module = self.module()
        if module is None:
            raise ReferenceError("expected a module that is alive, it is gone; keep the module")
        return module

    # --- what a leased callable asks of its keeper ---

    def adopt(self, forward: _C.LeasedForward) -> None:
        """The first call of a copy: it is managed now."""
        handle = manage_here(self._alive())
        with lock.here:
            self.seat, self.prepare = handle.seat, input_mover(handle.get_execution_device())
            for each in (forward, *(reference() for reference in self._forwards.values())):
                if each is not None:
                    self._equip(each)

    def drive(self, forward: _C.LeasedForward, body: Any) -> Any:
        """A body that has not begun, made to hold a lease from its first step to its last."""
        return driven(_C.Lease(forward.seat or self.seat, None, forward.timeout), body)

    def deepcopy(self, forward: _C.LeasedForward, memo: dict[int, Any]) -> Any:
        return self.part_of_copy(self._name_of(forward), memo)

    def reduce(self, forward: _C.LeasedForward) -> Any:
        return self.part_reduced(self._name_of(forward))

    def _name_of(self, forward: _C.LeasedForward) -> str:
        return next(name for name, found in self._forwards.items() if found() is forward)

    # --- copies ---

    def part_of_copy(self, name: str, memo: dict[int, Any]) -> Any:
        """What a deep copy of the module has under ``name``."""
        made = memo.get(id(self.module()))
        if isinstance(made, nn.Module):
            below = None if name in (CALL, COMPILE, KEY) else self._below.get(name)
            return revive(made, tuple(self._below), name, copy.deepcopy(below, memo))
        return _alone(name)  # its class copies what is in it before it has made the copy

    def part_reduced(self, name: str) -> Any:
        """The same for pickle, which has made the copy by then, unless its class pickles itself."""
        if pickles_itself(type(self._alive())):
            return _alone, (name,)
        below = None if name in (CALL, COMPILE, KEY) else self._below.get(name)
        return revive, (self._alive(), tuple(self._below), name, below)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.part_of_copy(KEY, memo)

    def __reduce__(self) -> Any:
        return self.part_reduced(KEY)


class Compile:
    """``module.compile`` of a module with a hook."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._mark.compile(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        module = self._mark._alive()
        return partial(type(module).compile, module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._mark.part_of_copy(COMPILE, memo)

    def __reduce__(self) -> Any:
        return self._mark.part_reduced(COMPILE)


class Orphan:
    """A method of a copy that nobody could name when it was copied; it looks for it when called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for module in _modules_with(self):
            if module.__dict__.get(self._name) is self:
                del module.__dict__[self._name]
                return getattr(module, self._name)(*args, **kwargs)
        raise RuntimeError(
            f"expected {self._name!r} to be called on the copy that it is in, that was not found; "
            f"`del copy.{self._name}` takes what a hook left there away"
        )


def _alone(name: str) -> Orphan | None:
    """What a copy has under ``name`` that cannot be named yet: it is not managed."""
    return None if name in (CALL, KEY) else Orphan(name)


def _modules_with(value: object) -> list[nn.Module]:
    """Modules in whose dictionary ``value`` is."""
    found: list[nn.Module] = []
    for holder in gc.get_referrers(value):
        if isinstance(holder, nn.Module):
            found.append(holder)
        elif type(holder) is dict:
            found.extend(m for m in gc.get_referrers(holder) if isinstance(m, nn.Module))
    return found


def revive(module: nn.Module, names: Sequence[str], name: str, below: Any) -> Any:
    """What a copy has under ``name``; it may be a bare object yet, whose state comes later."""
    with lock.here:
        mark = mark_of(module)
        if mark is None:
            mark = Mark(module)
            mark.tokens.add(Mark)
            mark._below[COMPILE] = None
            module.__dict__[COMPILE] = Compile(mark)
            for each in names:
                if each != COMPILE:
                    mark.wrap(each, None)
        if below is not None:
            mark.wrap(name, below)
        return module.__dict__[name]


def _calls_differently(module: nn.Module) -> bool:
    """Whether calls may pass by torch's own ``__call__``, so that ``forward`` needs leases too."""
    home = next(kind for kind in type(module).__mro__ if "__call__" in kind.__dict__)
    return not home.__module__.startswith("torch.")


def pickles_itself(kind: type) -> bool:
    """Whether a class decides how it is pickled, so that its parts may come before it is made."""
    own: tuple[object, ...] = kind.__reduce__, kind.__reduce_ex__
    return own != (object.__reduce__, object.__reduce_ex__)


# --- bodies ---


# What a call returns that runs later.
BODIES = (GeneratorType, CoroutineType, AsyncGeneratorType)


def driven(lease: Any, body: Any) -> Any:
    """A body that has not begun, made to hold the lease from its first step to its last."""
    if isinstance(body, GeneratorType):
        return _steps(lease, body)
    if isinstance(body, CoroutineType):
        return _awaited(lease, body)
    return _async_steps(lease, body)


def _steps(lease: Any, body: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    with lease:
        return (yield from body)


async def _awaited(lease: Any, body: Coroutine[Any, Any, Any]) -> Any:
    try:
        async with lease:
            return await body
    finally:
        body.close()  # where the lease was refused, nobody awaits it


async def _async_steps(lease: Any, body: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    async with lease:
        sent: Any = None
        step = body.asend
        while True:
            try:
                value = await step(sent)
            except StopAsyncIteration:
                return
            try:
                sent, step = (yield value), body.asend
            except GeneratorExit:
                await body.aclose()
                raise
            except BaseException as error:
                sent, step = error, body.athrow
