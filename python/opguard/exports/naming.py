"""What code names: the functions and constants behind a loader, told apart without their module.

A program's module has another name as a script than imported, and another again in a package. Where
what is in it is described, by its code and its values, the module's name says nothing of the
weights. Of installed code the name counts, and the version says the rest.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, cast

import torch

__all__ = [
    "LIBRARIES",
    "describe_globals",
    "full_name_of",
    "is_of_library",
    "is_of_program",
    "is_plain",
    "is_versioned",
    "name_of",
    "names_in",
]

LIBRARIES = ("transformers", "diffusers")
# Whose code a version number stands for.
_VERSIONED = {"opguard", "torch", *LIBRARIES, *sys.stdlib_module_names}
_PLAIN = (str, bytes, int, float, complex, os.PathLike, torch.dtype, torch.device)
_INSTALLED = {"site-packages", "dist-packages"}


def _module_of(found: Any) -> str:
    name = str(getattr(found, "__module__", None) or "builtins")
    if name == "__main__":  # of `python -m`, which knows the module's own name
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        return spec.name if spec is not None else name
    return name


def _root(found: Any) -> str:
    return _module_of(found).partition(".")[0]


def is_of_library(found: Any) -> bool:
    """Returns whether a class is one of the hub's libraries', which loads what it has saved."""
    return _root(found) in LIBRARIES


def is_versioned(found: Any) -> bool:
    """Returns whether a function or class is of a library whose version is in the key."""
    return _root(found) in _VERSIONED


def _is_installed(root: str) -> bool:
    module = sys.modules.get(root)
    places = [getattr(module, "__file__", None), *(getattr(module, "__path__", None) or ())]
    return any(_INSTALLED & set(Path(place).parts) for place in places if place)


def is_of_program(found: Any) -> bool:
    """Returns whether a function or class is the program's own: of no library, not installed."""
    return not is_versioned(found) and not _is_installed(_root(found))


def full_name_of(found: Any) -> str:
    """Returns ``module.qualname``, by which installed code is known."""
    name = getattr(found, "__qualname__", None) or getattr(found, "__name__", type(found).__name__)
    return f"{_module_of(found)}.{name}"


def name_of(found: Any) -> str:
    """Returns the name of a class, or of a function whose code is described beside it."""
    if is_of_program(found):
        return str(getattr(found, "__qualname__", None) or full_name_of(found))
    return full_name_of(found)


def _version_of(root: str) -> str | None:
    """The version of an installed package; None for a program's own modules, which have none."""
    if not _is_installed(root):
        return None
    try:
        return metadata.version(root)
    except metadata.PackageNotFoundError:
        return "unknown"


def names_in(code: CodeType) -> Iterator[str]:
    """Yields the names that code looks up, also those of the functions inside it."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from names_in(value)


def is_plain(value: Any, holders: tuple[type, ...] = (tuple, frozenset)) -> bool:
    """Returns whether a value is what it is for good: objects change while a model loads."""
    if isinstance(value, holders):
        inner = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        return all(is_plain(each, holders) for each in cast(Iterable[Any], inner))
    return isinstance(value, _PLAIN)


def describe_globals(functions: Iterable[Callable[..., Any]]) -> dict[str, Any]:
    """Returns the functions and plain values of their modules that loaders name, at any depth.

    Of an installed package the function that is named and the version, not what is behind it: that
    is no cause of the weights that the version would not tell, and some of it changes as it runs.
    """
    from opguard.exports.identity import describe_function, describe_named

    found: dict[str, Any] = {}
    seen = set()
    pending = list(functions)
    while pending:
        function = inspect.unwrap(pending.pop())
        where = function.__globals__
        for name in sorted(set(names_in(function.__code__)) & where.keys()):
            value, place = where[name], (id(where), name)
            if place in seen or name.startswith("__"):
                continue
            seen.add(place)
            if isinstance(value, FunctionType):
                if is_versioned(value):
                    continue
                found[_free_key(found, name)] = describe_function(value)
                root = _root(value)
                version = _version_of(root)
                if version is None:
                    pending.append(value)
                else:
                    found[f"{root} (version)"] = version
            elif is_plain(value):
                found[_free_key(found, name)] = describe_named(name, value)
    return found


def _free_key(found: Mapping[str, Any], name: str) -> str:
    """Returns the name, or a numbered one where another module has another of that name."""
    key, number = name, 1
    while key in found:
        number += 1
        key = f"{name} ({number})"
    return key
