"""One call's values against its annotations."""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

import torch

from opguard.flags._hints import Hints
from opguard.flags.typing.dtypes import DTypeAlias
from opguard.flags.typing.errors import (
    InvalidParameterError,
    TypeMismatchError,
    ValidationError,
    combined,
)
from opguard.flags.typing.tensors import TensorAnnotation, tensors_in

__all__ = ["Checker"]


class Checker:
    """Checks the arguments when it is made, and the returned value with the same named sizes."""

    def __init__(
        self, function: str, hints: Hints, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.function = function
        self.sizes: dict[str, int] = {}
        self.instance: Any = None
        bound = hints.signature.bind(*args, **kwargs)
        first = next(iter(hints.signature.parameters.values()), None)
        if args and first is not None and first.annotation is first.empty:
            self.instance = args[0]  # of a function too: Dim then looks at its first argument
        errors: list[ValidationError] = []
        for name, hint in hints.parameters().items():
            parameter = hints.signature.parameters[name]
            if name not in bound.arguments:
                continue  # its default, which need not fit: None mostly
            value = bound.arguments[name]
            if value is parameter.default:
                continue
            if parameter.kind is parameter.VAR_POSITIONAL:
                parts = [(f"{name}[{i}]", part) for i, part in enumerate(value)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                parts = list(value.items())
            else:
                parts = [(name, value)]
            for label, part in parts:
                errors += self.errors_in(part, hint, label)
        if errors:
            raise combined(errors, InvalidParameterError, function)

    def check_return(self, value: Any, hint: Any) -> None:
        """Raises what does not fit in a returned value; hint None: anything fits."""
        if hint is None:
            return
        errors = self.errors_in(value, hint, "the returned value")
        if errors:
            raise combined(errors, TypeMismatchError, self.function)

    def errors_in(  # noqa: PLR0911
        self, value: Any, hint: Any, name: str
    ) -> list[ValidationError]:
        """The errors of a value; sizes of names are bound on the way."""
        if isinstance(value, torch.fx.Proxy) or not tensors_in(hint):
            return []
        if isinstance(hint, type) and issubclass(hint, DTypeAlias):
            hint = TensorAnnotation(hint)
        if isinstance(hint, TensorAnnotation):
            try:
                hint.validate(name, value, self.sizes, self.instance, self.function)
            except ValidationError as error:
                return [error]
            return []
        origin, parts = get_origin(hint), get_args(hint)
        if origin is Annotated:
            return self.errors_in(value, parts[0], name)
        if origin is Union or origin is types.UnionType:
            return self.errors_in_union(value, parts, name)
        if origin in (tuple, list):
            return self.errors_in_sequence(value, hint, name)
        if origin is dict and len(parts) == 2:
            if not isinstance(value, dict):
                return [self.other_type(value, "a dict", name)]
            return [
                e for k, v in value.items() for e in self.errors_in(v, parts[1], f"{name}[{k!r}]")
            ]
        return []

    def errors_in_sequence(self, value: Any, hint: Any, name: str) -> list[ValidationError]:
        kind, parts = get_origin(hint), get_args(hint)
        if not isinstance(value, kind):
            return [self.other_type(value, f"a {kind.__name__}", name)]
        if kind is list or (len(parts) == 2 and parts[1] is ...):
            parts = (parts[0],) * len(value)
        if len(parts) != len(value):
            return [self.other_type(value, f"a tuple of {len(parts)}", name, f"of {len(value)}")]
        errors: list[ValidationError] = []
        for i, (part, inner) in enumerate(zip(value, parts, strict=True)):
            errors += self.errors_in(part, inner, f"{name}[{i}]")
        return errors

    def errors_in_union(
        self, value: Any, parts: tuple[Any, ...], name: str
    ) -> list[ValidationError]:
        best: list[ValidationError] | None = None
        for part in parts:
            if part is type(None) or part is None:
                fits = value is None
                errors = None
            elif not tensors_in(part):
                kind = get_origin(part) or part
                fits = not isinstance(kind, type) or isinstance(value, kind)
                errors = None
            else:
                before = dict(self.sizes)
                errors = self.errors_in(value, part, name)
                fits = not errors
                if not fits:
                    self.sizes = before
            if fits:
                return []
            if errors and best is None:
                best = errors
        return best or []

    def other_type(self, value: Any, want: str, name: str, got: str = "") -> ValidationError:
        what = f"{type(value).__qualname__} {got}".rstrip()
        return TypeMismatchError(
            f"expected {name} to be {want}, got {what}",
            expected=want,
            actual=what,
            function=self.function,
        )
