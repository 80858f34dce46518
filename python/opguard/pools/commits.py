"""Commits: changes to an object that can be taken back, each with an identity of its own.

What ``revert`` needs is kept by object, so that one commit may be on several objects at a time.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

from torch import nn

from opguard.pools._arguments import check_timeout
from opguard.pools._undoing import through

__all__ = [
    "AttributeCommit",
    "CallableCommit",
    "CommitABC",
    "CommitWithAutoManage",
    "ForwardHookCommit",
]


class CommitABC(ABC):
    """One change to an object: ``apply`` makes it, ``revert`` takes it back.

    One commit may be applied to several objects at a time, and to each of them once.

    Attributes:
        undoes_itself: True promises that an ``apply`` or ``revert`` that raises leaves the object
            as it found it. Else the attributes of the object are noted before each and put back.
        squash_key: commits that lie on each other in a stack and have an equal key, not None, are
            made into one by ``squash``.
    """

    undoes_itself: bool = False
    squash_key: Hashable | None = None

    @property
    def uuid(self) -> str:
        """What this commit is known by, made when first asked for; a copy has one of its own."""
        known = self.__dict__.get("_uuid")
        return str(known if known is not None else self.__dict__.setdefault("_uuid", uuid4().hex))

    @abstractmethod
    def apply(self, obj: Any) -> None:
        """Makes the change to ``obj``."""

    @abstractmethod
    def revert(self, obj: Any) -> None:
        """Takes the change to ``obj`` back."""

    def get_revert_callable(self, obj: Any) -> Callable[[], None]:
        """What takes the change to ``obj`` back when called."""
        return partial(self.revert, obj)

    def release_revert_resource(self, obj: Any) -> None:  # noqa: B027 - most keep nothing
        """Forgets what ``revert(obj)`` would need: the change stays for good."""

    def settle(self, obj: Any) -> None:  # noqa: B027 - most need nothing
        """Told when the change stays on ``obj`` outside of all blocks: it may hold less for it."""

    def squash(self, commits: Sequence[CommitABC]) -> CommitABC:
        """One commit that does what ``commits`` (bottom first, ``self`` is the first) do."""
        raise NotImplementedError(f"{type(self).__name__} has a squash_key but no squash()")

    def __getstate__(self) -> dict[str, Any]:
        own = {"_uuid", "_kept"}  # a copy is another commit, applied nowhere
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.uuid[:8]}>"

    def _keep(self, obj: Any, what: Any) -> None:
        """Keeps what taking back from ``obj`` needs; the object lives while it is patched."""
        kept = self.__dict__.setdefault("_kept", {})
        if id(obj) in kept:
            raise ValueError(
                f"{self!r} is applied to this {type(obj).__name__} already: revert it first, or "
                "make a second commit"
            )
        kept[id(obj)] = (obj, what)

    def _kept_for(self, obj: Any) -> Any:
        entry = self.__dict__.get("_kept", {}).get(id(obj))
        if entry is None:
            raise ValueError(f"{self!r} is not applied to this {type(obj).__name__}")
        return entry[1]

    def _recalled(self, obj: Any) -> Any:
        """What is kept for ``obj``, for `_remember`; None for nothing."""
        return self.__dict__.get("_kept", {}).get(id(obj))

    def _remember(self, obj: Any, kept: Any) -> None:
        """What is kept for ``obj`` is this again."""
        if kept is None:
            self._forget(obj)
        else:
            self.__dict__["_kept"][id(obj)] = kept

    def _forget(self, obj: Any) -> None:
        self.__dict__.get("_kept", {}).pop(id(obj), None)


class CallableCommit(CommitABC):
    """A commit from a function: ``fn(obj)`` makes the change and returns what takes it back.

    A function that raises, or returns nothing to call, is undone as far as attributes go: those of
    the object, of its submodules, and the dicts, lists and sets they hold directly. What it wrote
    into tensors or into deeper objects is not.
    """

    def __init__(self, fn: Callable[[Any], Callable[[], Any]]) -> None:
        if not callable(fn):
            raise TypeError(
                f"expected a function of the object that returns its reverter, got {type(fn)}"
            )
        self.fn = fn

    def apply(self, obj: Any) -> None:
        """Calls the function."""
        reverter = self.fn(obj)
        if not callable(reverter):
            raise TypeError(
                f"{self!r} must return a callable that takes the change back, and returned "
                f"{type(reverter).__name__}: return a lambda that undoes it"
            )
        self._keep(obj, reverter)

    def revert(self, obj: Any) -> None:
        """Calls what the function returned; it is kept when it raises, to be called again."""
        self._kept_for(obj)()
        self._forget(obj)

    def release_revert_resource(self, obj: Any) -> None:
        """Forgets what the function returned."""
        self._forget(obj)

    def __repr__(self) -> str:
        name = getattr(self.fn, "__qualname__", None) or type(self.fn).__qualname__
        return f"<CallableCommit {name} {self.uuid[:8]}>"


_MISSING: Any = object()


def resolve(obj: Any, path: str) -> Any:
    """The object at a dotted path; "" is ``obj``. A number indexes what has no such attribute."""
    for name in path.split(".") if path else ():
        try:
            obj = getattr(obj, name)
        except AttributeError:
            if not name.isdigit():
                raise
            obj = obj[int(name)]
    return obj


def _places(owner: Any) -> list[MutableMapping[str, Any]]:
    """The dicts in which an attribute of this instance may lie, by what setattr writes."""
    places = [vars(owner)] if hasattr(owner, "__dict__") else []
    if isinstance(owner, nn.Module):
        places += [owner._parameters, owner._buffers, owner._modules]
    return places


class AttributeCommit(CommitABC):
    """Sets an attribute: ``AttributeCommit("scheduler.scale", 0.5)``.

    What the attribute was, or that there was none, is put back by ``revert``, whatever was set in
    between. Submodules, parameters and buffers keep their place in the module.
    """

    undoes_itself = True

    def __init__(self, name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise TypeError(f"expected the name of an attribute as text, got {name!r:.80}")
        self.path, _, self.name = name.rpartition(".")
        self.value = value
        if not self.name:
            raise ValueError(f"expected the name of an attribute, got {name!r}")

    def apply(self, obj: Any) -> None:
        """Sets it."""
        owner = resolve(obj, self.path)
        place = next((p for p in _places(owner) if self.name in p), None)
        order = list(place) if place is not None else []
        old = place[self.name] if place is not None else self._of_class(owner)
        self._keep(obj, (owner, place, order, old))
        try:
            setattr(owner, self.name, self.value)
        except Exception:
            self._forget(obj)
            raise
        except BaseException:  # an interrupt does not say whether it is set
            through(lambda: self.revert(obj) if self._recalled(obj) is not None else None)
            raise

    def revert(self, obj: Any) -> None:
        """Puts back what it was, or removes it where there was none."""
        kept = self._kept_for(obj)
        try:
            self._put_back(*kept)
            self._forget(obj)
        except Exception:
            raise
        except BaseException:  # an interrupt does not say how far it came: it is on it again
            setattr(kept[0], self.name, self.value)
            self._remember(obj, (obj, kept))
            raise

    def _put_back(self, owner: Any, place: Any, order: list[str], old: Any) -> None:
        now = next((p for p in _places(owner) if self.name in p), None)
        if old is _MISSING:
            if now is not None or hasattr(owner, self.name):
                delattr(owner, self.name)
        elif place is None or isinstance(owner, type) or now is place is vars(owner):
            setattr(owner, self.name, old)
        else:  # registered: setattr would refuse another kind, or register it at the end
            if now is not None and now is not place:
                delattr(owner, self.name)
            place[self.name] = old
            if list(place) != order and set(place) == set(order):
                for name in order:
                    place[name] = place.pop(name)

    def _of_class(self, owner: Any) -> Any:
        """The value to set back where the instance's own dict does not have it."""
        if isinstance(owner, type):
            return vars(owner).get(self.name, _MISSING)
        descriptor = inspect.getattr_static(type(owner), self.name, None)
        if hasattr(type(descriptor), "__set__"):  # a slot or a property: its value is the object's
            return getattr(owner, self.name, _MISSING)
        return _MISSING

    def release_revert_resource(self, obj: Any) -> None:
        """Forgets what it was."""
        self._forget(obj)

    def __repr__(self) -> str:
        path = f"{self.path}.{self.name}" if self.path else self.name
        return f"<AttributeCommit {path} {self.uuid[:8]}>"


class ForwardHookCommit(CommitABC):
    """Puts a forward hook on a module, or on the submodule at ``path``.

    Args:
        hook: as ``Module.register_forward_hook`` takes it, or with ``pre=True`` as
            ``register_forward_pre_hook`` does.
        path: dotted path of the submodule, "" for the object itself.
        prepend: before the hooks that are there; else after them. Hooks of one stack so run in
            the order of the stack.
        with_kwargs: the hook takes the keyword arguments too.
        always_call: the hook runs also when ``forward`` raised an Exception; it then gets None for
            the result, and what it raises itself is a warning of torch's.
    """

    undoes_itself = True

    def __init__(
        self,
        hook: Callable[..., Any],
        *,
        path: str = "",
        pre: bool = False,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> None:
        if not callable(hook):
            raise TypeError(f"expected a hook to call, got {type(hook).__name__}")
        if pre and always_call:
            raise ValueError("always_call is for hooks after forward: leave it out, or pre")
        self.hook, self.path, self.pre = hook, path, pre
        self._options = {"prepend": prepend, "with_kwargs": with_kwargs}
        if always_call:
            self._options["always_call"] = True

    def apply(self, obj: Any) -> None:
        """Registers the hook."""
        module = resolve(obj, self.path)
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"expected a module for {self!r}, got {type(module).__name__} at {self.path!r}: "
                "name the submodule by path="
            )
        register = module.register_forward_pre_hook if self.pre else module.register_forward_hook
        handle = register(self.hook, **self._options)
        try:
            self._keep(obj, handle)
        except ValueError:
            handle.remove()
            raise

    def revert(self, obj: Any) -> None:
        """Removes the hook."""
        self._kept_for(obj).remove()
        self._forget(obj)

    def release_revert_resource(self, obj: Any) -> None:
        """Forgets the hook's handle."""
        self._forget(obj)

    def __repr__(self) -> str:
        name = getattr(self.hook, "__qualname__", None) or type(self.hook).__qualname__
        return f"<ForwardHookCommit {name} on {self.path or 'forward'} {self.uuid[:8]}>"


class CommitWithAutoManage(CommitABC):
    """Keeps a managed object in memory while it is applied, and applies another commit meanwhile.

    For patches that run a model of their own: ``CommitWithAutoManage(controlnet, commit)``.

    Args:
        managed: what ``manage`` takes, managed here if it is not; or its handle.
        commit: what is applied to the proxy's object while ``managed`` is there.
        timeout: seconds to wait for the bytes of ``managed``; None as long as it takes.
    """

    def __init__(
        self, managed: Any, commit: CommitABC | None = None, *, timeout: float | None = None
    ) -> None:
        check_timeout(timeout)
        if commit is not None and not isinstance(commit, CommitABC):
            raise TypeError(
                f"expected a commit to apply meanwhile, got {type(commit).__name__}; use "
                "CallableCommit(fn) for a function"
            )
        self.managed, self.commit, self.timeout = managed, commit, timeout
        self.undoes_itself = commit is None or commit.undoes_itself

    def apply(self, obj: Any) -> None:
        """Brings ``managed`` in, then applies the commit."""
        from opguard.pools.wrappers import manage

        lease = manage(self.managed).lease(self.timeout)
        self._keep(obj, lease)
        try:
            with lease:
                if self.commit is not None:
                    self.commit.apply(obj)
                lease.__enter__()
        except BaseException:
            self._forget(obj)
            raise

    def revert(self, obj: Any) -> None:
        """Takes the commit back, then lets ``managed`` go."""
        lease = self._kept_for(obj)
        if self.commit is not None:
            self.commit.revert(obj)
        self._forget(obj)
        lease.__exit__(None, None, None)

    def release_revert_resource(self, obj: Any) -> None:
        """Forgets what the commit needs, and lets ``managed`` go."""
        lease = self._kept_for(obj)
        if self.commit is not None:
            self.commit.release_revert_resource(obj)
        self._forget(obj)
        lease.__exit__(None, None, None)
