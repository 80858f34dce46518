"""How an ``OpGuardBase`` instance is made again, and what one is told that was never made.

What the constructor was given is kept, so that a copy, a pickle, or a process that is spawned has
the same class made with the same arguments: nothing of the model itself travels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

__all__ = ["Instances", "not_made"]


class NotMade:
    """Stands on the class for what the constructor sets, and is hidden by it from then on."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        # No AttributeError: hasattr and getattr with a default would hide it.
        raise RuntimeError(
            f"{owner.__name__}: expected OpGuardBase's constructor to have run, it has not; call "
            f"super().__init__(...) first in __init__ of {owner.__name__}, or in __post_init__ "
            "of a dataclass"
        )


def not_made() -> Any:
    return NotMade()


class Signature:
    """The signature of a class's ``__init__``; ``__new__``, which takes anything, would hide it."""

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")  # an instance's is that of its __call__
        whole = inspect.signature(owner.__init__)
        return whole.replace(parameters=list(whole.parameters.values())[1:])


def remake(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any], state: dict[str, Any]) -> Any:
    """Makes an instance of ``cls`` that is not loaded, with the settings of the one it copies."""
    made = cls.__new__(cls, *args, **kwargs)
    made._copied = state
    made.__init__(*args, **kwargs)
    return made


class Instances:
    """Keeps what an instance was made with, and makes it again by that."""

    __signature__ = Signature()

    _given: tuple[tuple[Any, ...], dict[str, Any]]  # the constructor's arguments
    _copied: dict[str, Any] | None = None  # of an instance made again: what it was made by
    _settings: dict[str, Any] = not_made()  # its keywords that are not at their defaults
    _matched: Mapping[str, Any] = MappingProxyType({})  # those that instance_to_match chose
    _model_id: str = not_made()
    _use_safetensors: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        made.__dict__["_given"] = args, kwargs
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """The same class, made with the same arguments, of the same ``model_id``; not loaded."""
        state = {
            "_settings": dict(self._settings),
            "_matched": dict(self._matched),
            "_model_id": self._model_id,
            "_use_safetensors": self._use_safetensors,
        }
        return remake, (type(self), *self._given, state)

    def _forget_match(self, match: Any) -> None:
        """Lets go of an instance that was only to be matched: the settings have its choices."""
        args, kwargs = self._given
        if kwargs.get("instance_to_match") is match:
            self._given = args, kwargs | {"instance_to_match": None}
