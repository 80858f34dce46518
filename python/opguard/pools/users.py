"""What takes from a pool: the abstract user, and which class manages which type of object."""

from __future__ import annotations

import inspect
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from opguard.pools.errors import Unmanageable

if TYPE_CHECKING:
    from opguard.pools._books import Entry

__all__ = ["ResourcePoolUser", "make_user", "register_user"]

Factory = Callable[..., "ResourcePoolUser"]


class ResourcePoolUser(ABC):
    """Something that takes bytes of pools while it is there, and can go and come back.

    The ledger decides when; a user says how much and moves. Calls of ``bring_in`` and
    ``give_back`` never overlap for one user, and come from any thread.

    The object is held weakly: when it dies, its bytes are given back and ``close`` is called.

    Attributes:
        fixed: names of options that hold as long as the object is managed.
    """

    fixed: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, obj: object) -> None:
        try:
            self._obj = weakref.ref(obj)
        except TypeError:
            raise TypeError(
                f"expected an object that can be held weakly for {type(self).__name__}, got "
                f"{type(obj).__name__}; manage(obj) finds the class that fits"
            ) from None

    @property
    def obj(self) -> Any:
        """The object, or None when it is gone."""
        return self._obj()

    @abstractmethod
    def needs(self) -> Mapping[str, int]:
        """Bytes by name of pool, while it is there. Asked once, when it is managed."""

    @abstractmethod
    def bring_in(self) -> int | None:
        """Make the object ready for use. Returns bytes moved, if it knows.

        An exception means that nothing was brought in; it reaches whoever asked.
        """

    @abstractmethod
    def give_back(self) -> int | None:
        """Give the bytes back; nobody uses the object now. Returns bytes written back, if any.

        Called again for what was given back already, it does nothing. An exception means that all
        is as it was: the user stays, and its bytes count on.
        """

    @property
    def execution_device(self) -> torch.device:
        """Where the object runs once it is in."""
        return torch.device("cpu")

    @property
    def may_stay(self) -> bool:
        """Whether `manage`'s ``pin`` is for it: not for parts that cannot all be there together."""
        return True

    def cost(self) -> float:
        """What bringing it in costs, in units of one's own; policy ``"cost"`` weighs by it.

        Users of one pool should use one unit; by default it is bytes.
        """
        return float(sum(self.needs().values()))

    def sweep(self) -> None:  # noqa: B027
        """Give back what readers outside any lease brought in. Never called while it is in use."""

    def memory_of_calls(self) -> int:
        """Bytes that calls need beside what is brought in: when it comes, idle ones go for them."""
        return 0

    def unused_since(self, mark: Any) -> None:  # noqa: B027
        """Told before ``give_back``: what used the object was queued before this mark.

        A mark is what the pool's accelerator gave, and may be waited for; None says nothing.
        """

    def raise_if_broken(self) -> None:  # noqa: B027
        """Raise where what was computed while the object was in cannot be trusted."""

    def raise_if_lost(self) -> None:  # noqa: B027
        """PoolFileChanged where what is not in memory now could not be read again."""

    def strays(self) -> Sequence[str]:
        """Names of weights that its object has now and that are not in the pools."""
        return ()

    def warn_of_strays(self) -> None:  # noqa: B027
        """Say that there are some, as a warning."""

    def change(self, **options: Any) -> None:
        """Options named in a later ``manage`` of the object.

        Raises:
            ValueError: for what cannot change any more: what the class says in ``fixed``.
        """
        for key, value in options.items():
            name = ALIASES.get(key, key)
            now = getattr(self, name, value)
            if now != value and key in self.fixed:
                raise ValueError(
                    f"{key}: expected {now!r}, as the {type(self.obj).__name__} is managed by now, "
                    f"got {value!r}; unmanage it first"
                )
            if now != value:
                setattr(self, name, value)

    def close(self) -> None:  # noqa: B027
        """Give up what it owns: the object is dead or not managed any more."""

    def pause(self) -> None:  # noqa: B027
        """Stop what it does by itself in the background; returns when that has ended."""

    @property
    def members(self) -> tuple[Entry, ...]:
        """What it is made of, where its bytes are those of other users; they are told instead."""
        return ()

    @property
    def parts(self) -> tuple[Entry, ...]:
        """Those of its members that are managed for themselves as well."""
        return ()

    def seat(self, own: Any) -> Any:
        """What a lease on it takes: the seat of its own units, or one of its members' units."""
        return own

    def describe(self) -> str:
        """One or two words for reports: where it is from and goes to."""
        return type(self).__name__


# What a factory may call an option of ``manage``, and what it may leave out.
ALIASES = {"inference": "inference_memory_estimator"}
OPTIONAL = {"name", "management"}

_factories: dict[type, Factory] = {}
_lazy: dict[tuple[str, str], Callable[[], Factory]] = {}
_lock = threading.Lock()


def register_user(kind: type, factory: Factory) -> None:
    """Objects of type ``kind``, and of types derived from it, are managed by ``factory(obj)``.

    Args:
        kind: a type. The nearest type in the object's method resolution order decides.
        factory: a class derived from `ResourcePoolUser`, or what returns one. It is called with
            the object and, as keywords, those of ``manage``'s options that it names.

    Registering a type again replaces what was there.
    """
    if not isinstance(kind, type):
        raise TypeError(f"expected a type to register, got {type(kind).__name__}")
    if not callable(factory):
        raise TypeError(f"expected a callable that makes a user, got {type(factory).__name__}")
    with _lock:
        _factories[kind] = factory


def register_lazily(module: str, name: str, load: Callable[[], Factory]) -> None:
    """The same for a type of a library that is not imported for this: found by its name.

    Args:
        module: root of the module the type is from, as ``"diffusers"``.
        name: the type's name; any module below the root may define it.
        load: imports and returns the factory when the first such object comes.
    """
    with _lock:
        _lazy[module, name] = load


def _candidates(kind: type) -> Iterator[Factory]:
    for base in kind.__mro__:
        if base in _factories:
            yield _factories[base]
        key = (base.__module__.partition(".")[0], base.__name__)
        if key in _lazy:
            yield _lazy[key]()


def _accepted(factory: Factory, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options as the factory's keywords; one that it does not take is an error."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of C: it says itself what it does not take
        return options
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return options
    named = {
        ALIASES[key] if ALIASES.get(key) in parameters else key: options[key] for key in options
    }
    unknown = [key for key in named if key not in parameters and key not in OPTIONAL]
    if unknown:
        theirs = sorted({key for key in list(parameters)[1:] if key != "management"})
        raise TypeError(
            f"expected options of {kind} among {theirs}, got {unknown[0]!r}, which "
            f"{getattr(factory, '__name__', factory)} does not take"
        )
    return {key: value for key, value in named.items() if key in parameters}


def make_user(obj: object, **options: Any) -> ResourcePoolUser:
    """The user for ``obj``, from the class registered for its type.

    Raises:
        Unmanageable: where no class is registered, or the object refuses.
    """
    factory = next(_candidates(type(obj)), None)
    if factory is None:
        known = ", ".join(sorted(kind.__name__ for kind in _factories)) or "none"
        raise Unmanageable(
            f"expected an object of a registered type ({known}), got {type(obj).__name__}; "
            "register_user(type, factory) teaches a type"
        )
    try:
        weakref.ref(obj)
    except TypeError as error:
        raise Unmanageable(
            f"expected an object that can be held weakly, got {type(obj).__name__}; give its class "
            "a __weakref__ slot"
        ) from error
    named = {key: value for key, value in options.items() if value is not None}
    user = factory(obj, **_accepted(factory, type(obj).__name__, named))
    if not isinstance(user, ResourcePoolUser):
        raise TypeError(
            f"expected the factory for {type(obj).__name__} to return a ResourcePoolUser, "
            f"got {type(user).__name__}"
        )
    return user
