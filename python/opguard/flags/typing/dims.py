"""``Dim.hidden_size`` and ``Broadcast``: dimensions that are no numbers and no names."""

from __future__ import annotations

from typing import Any

__all__ = ["Broadcast", "Dim", "DimRef"]


class DimRef:
    """A size that the instance has: ``Dim.config.hidden`` stands for ``self.config.hidden``.

    Every attribute of this object is a longer path, but for :meth:`resolve`.
    """

    __slots__ = ("_path",)

    def __init__(self, path: tuple[str, ...]) -> None:
        self._path = path

    def __getattr__(self, name: str) -> DimRef:
        if name.startswith("__"):
            raise AttributeError(name)
        return DimRef((*self._path, name))

    def resolve(self, instance: Any) -> int:
        """The size.

        Raises:
            ValueError: there is no instance.
            AttributeError: it has no such attribute.
            TypeError: the attribute is no int.
        """
        if instance is None:
            raise ValueError(f"expected an instance to read {self!r} from, got None")
        value = instance
        for at, name in enumerate(self._path):
            try:
                value = getattr(value, name)
            except AttributeError:
                raise AttributeError(
                    f"expected {type(instance).__name__} to have {self!r}, it has no"
                    f" {'.'.join(self._path[: at + 1])!r}"
                ) from None
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"expected {self!r} to be an int, got {value!r}")
        return value

    def __repr__(self) -> str:
        return ".".join(("self", *self._path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DimRef) and other._path == self._path

    def __hash__(self) -> int:
        return hash(self._path)

    def __reduce__(self) -> tuple[Any, ...]:
        return DimRef, (self._path,)


class _Dim:
    """What :data:`Dim` is."""

    __slots__ = ()

    def __getattr__(self, name: str) -> DimRef:
        if name.startswith("__"):
            raise AttributeError(name)
        return DimRef((name,))

    def __repr__(self) -> str:
        return "Dim"

    def __reduce__(self) -> str:
        return "Dim"


class _Broadcast:
    """What :data:`Broadcast` is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "*"

    def __reduce__(self) -> str:
        return "Broadcast"


Dim = _Dim()
Broadcast = _Broadcast()
