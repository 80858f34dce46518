"""A function's annotations as objects, also where they are strings.

With ``from __future__ import annotations`` every annotation is a string, and names in it may belong
to the function around the class. So each string is evaluated when the function is decorated, while
these are at hand, and once more at the first call, when the module is complete.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import FrameType, UnionType
from typing import Annotated, Any, ForwardRef, Literal, Union, get_args, get_origin

from opguard.flags.config import get_config
from opguard.flags.typing.dtypes import DTypeAlias
from opguard.flags.typing.errors import ValidationError
from opguard.flags.typing.tensors import TensorAnnotation, tensors_in

__all__ = ["Hints"]


class _Unknown:
    """An annotation that could not be evaluated, and why."""

    def __init__(self, text: str, error: Exception) -> None:
        self.text = text
        self.error = error


class Hints:
    """The annotations of a function that say something about tensors.

    ``flag_places`` says where the returned value holds flags: True or False for itself, or
    ("tuple", of each), ("each", of all), ("values", of all of a dict). Plain values, for Dynamo.
    """

    def __init__(self, func: Callable[..., Any], frame: FrameType | None) -> None:
        self.func = inspect.unwrap(func)
        self.signature = inspect.signature(func)
        raw = dict(getattr(self.func, "__annotations__", {}))
        names = _names_around(self.func, frame)
        self._all = {name: _evaluated(hint, names) for name, hint in raw.items()}
        self._complete = not any(isinstance(h, _Unknown) for h in self._all.values())
        self._tensors = self._of_tensors()

    def any(self) -> bool:
        """Whether there is anything to check."""
        if not self._complete:
            self._complete = True
            names = _names_around(self.func, None)
            for name, hint in self._all.items():
                if isinstance(hint, _Unknown):
                    self._all[name] = _evaluated(hint.text, names)
            self._tensors = self._of_tensors()
            for name, hint in self._all.items():
                if isinstance(hint, _Unknown):
                    self._complain(name, hint)
        return bool(self._tensors)

    def parameters(self) -> dict[str, Any]:
        """Parameter -> annotation."""
        return {name: hint for name, hint in self._tensors.items() if name != "return"}

    def returned(self) -> Any:
        """The annotation of the returned value, None without one."""
        return self._tensors.get("return")

    def _of_tensors(self) -> dict[str, Any]:
        found = {name: hint for name, hint in self._all.items() if tensors_in(hint)}
        self.flag_places = _flag_places(found.get("return"))
        return found

    def _complain(self, name: str, hint: _Unknown) -> None:
        message = (
            f"expected the annotation {hint.text!r} of {name} in {self.func.__qualname__} to name"
            f" what is defined at its first call, got {hint.error!r}; it is not checked"
        )
        if get_config().strict_validation:
            self._complete = False
            raise ValidationError(message)
        warnings.warn(message, UserWarning, stacklevel=5)


def _flag_places(hint: Any) -> Any:  # noqa: PLR0911
    if isinstance(hint, TensorAnnotation):
        return hint.is_flags
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _flag_places(parts[0])
    places = tuple(_flag_places(part) for part in parts)
    if not any(places):
        return False
    if origin is tuple and not (len(parts) == 2 and parts[1] is ...):
        return ("tuple", places)
    if origin in (tuple, list):
        return ("each", places[0])
    if origin is dict:
        return ("values", places[-1])
    return next(place for place in places if place)  # a union, Ok or Result


def _names_around(func: Callable[..., Any], frame: FrameType | None) -> dict[str, Any]:
    """Names that the function's annotations may use: module, enclosing functions, class body."""
    scopes = []
    around = [part for part in func.__qualname__.split(".")[:-1] if part != "<locals>"]
    while frame is not None and around and frame.f_code.co_name == around.pop():
        scopes.append(frame.f_locals)
        frame = frame.f_back
    names = dict(func.__globals__)
    for scope in reversed(scopes):
        names.update(scope)
    cells = zip(func.__code__.co_freevars, func.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            names[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return names


def _evaluated(hint: Any, names: dict[str, Any]) -> Any:  # noqa: PLR0911
    text = hint.__forward_arg__ if isinstance(hint, ForwardRef) else hint
    if isinstance(text, str):
        try:
            hint = eval(text, names)
        except Exception as error:
            return _Unknown(text, error)
    if isinstance(hint, type) and issubclass(hint, DTypeAlias):
        return TensorAnnotation(hint)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _evaluated(parts[0], names)
    if isinstance(hint, TensorAnnotation) or origin is Literal or not parts:
        return hint
    whole = tuple(_evaluated(part, names) for part in parts)
    unknown = next((part for part in whole if isinstance(part, _Unknown)), None)
    if unknown is not None:
        return unknown
    if all(old is new for old, new in zip(parts, whole, strict=True)):
        return hint
    return hint.copy_with(whole) if hasattr(hint, "copy_with") else _subscripted(origin, whole)


def _subscripted(origin: Any, parts: tuple[Any, ...]) -> Any:
    return Union[parts] if origin is UnionType else origin[parts]  # noqa: UP007
