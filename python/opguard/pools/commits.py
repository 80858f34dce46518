"""Commits: changes to an object that can be taken back, each with an identity of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar
from uuid import uuid4

__all__ = ["CommitABC"]


class CommitABC(ABC):
    """One change to an object: ``apply`` makes it, ``revert`` takes it back.

    One commit may be applied to several objects at a time, and to each of them once; what
    ``revert`` needs is kept by the object that it was applied to, not by the commit alone.

    Attributes:
        undoes_itself: True promises that an ``apply`` or ``revert`` that raises leaves the object
            as it found it. Else the attributes of the object are noted before each and put back.
        squash_key: commits that lie on each other in a stack and have an equal key, not None, are
            made into one by ``squash``.
    """

    undoes_itself: ClassVar[bool] = False
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

    def squash(self, commits: Sequence[CommitABC]) -> CommitABC:
        """One commit that does what ``commits`` (bottom first, ``self`` is the first) do."""
        raise NotImplementedError(f"{type(self).__name__} has a squash_key but no squash()")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_uuid"}
