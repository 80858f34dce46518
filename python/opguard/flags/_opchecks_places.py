"""Where in the user's code an op was called, in words, and the location id of those words.

A place is looked up only when something was found there: walking the stack costs more than a scan.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

from opguard.flags.locations import MAX_LOCATION, ErrorLocation

__all__ = [
    "HERE",
    "Place",
    "id_of",
    "in_backward",
    "innermost_module",
    "place_of_node",
    "place_of_stack",
]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OPGUARD = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_BETWEEN = ("contextlib.py", "functools.py")  # their wrappers stand between a user and torch
_MODULE_CALL = torch.nn.Module._wrapped_call_impl.__code__

# When so many ids are taken, places share one: first the ops of a line, then the lines of a module.
_LINES_FROM = MAX_LOCATION - 127
_MODULES_FROM = MAX_LOCATION - 31


class Place(NamedTuple):
    """An op, the user's line that called it, and the module whose forward ran there."""

    op: str
    line: str  # "model.py:41 in Head.forward"; "" where no line of the user's is known
    module: str  # "Head"; "" outside of modules

    @property
    def name(self) -> str:
        """``aten::log at model.py:41 in Head.forward``."""
        if self.line:
            return f"{self.op} at {self.line}"
        return f"{self.op} in {self.module}" if self.module else self.op


def id_of(place: Place) -> int:
    """The location id of a place; where ids run short, one that places share. 0 when all are gone.

    A new id is taken only where there is room for it.
    """
    taken = ErrorLocation.count()
    if ErrorLocation.is_registered(place.name) or taken < _LINES_FROM or not place.line:
        return ErrorLocation.register(place.name)
    if ErrorLocation.is_registered(place.line) or taken < _MODULES_FROM or not place.module:
        return ErrorLocation.register(place.line)
    return ErrorLocation.register(place.module)


@lru_cache(maxsize=4096)
def _is_users(filename: str) -> bool:
    return not (
        filename.startswith((_TORCH, _OPGUARD, "<eval_with_key", "<frozen", "<__array_function__"))
        or (os.path.basename(filename) in _BETWEEN and os.sep + "python3" in filename)
    )


# What Dynamo calls the rest of a function after a broken graph.
_REST = re.compile(r"^(?:.*\.)?torch_dynamo_resume_in_(?P<name>.+)_at_\d+$")


def _where(filename: str, line: int, qualname: str) -> str:
    rest = _REST.match(qualname)
    if rest is not None:
        qualname = _qualname(filename, line, rest["name"])
    name = qualname.rpartition("<locals>.")[2]
    at = f"{os.path.basename(filename)}:{line}"
    return at if name == "<module>" else f"{at} in {name}"


class _Here(threading.local):
    """What says the place instead of the stack, where this thread runs a graph node by node."""

    place_of: Callable[[str], Place] | None = None


HERE = _Here()


def place_of_stack(op: str) -> Place:
    """The place of the op that this thread runs now.

    In a backward pass the op is named with the autograd node it is a part of, and the line is the
    one that called for the pass.
    """
    if in_backward() != -1:
        node = torch._C._current_autograd_node()
        op = f"{op} in {node.name()}" if node is not None else f"{op} in backward"
    elif HERE.place_of is not None:
        place = HERE.place_of(op)
        if place.line:
            return place
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    module = innermost_module(frame)
    if frame is None:
        return Place(op, "", module)
    code = frame.f_code
    return Place(op, _where(code.co_filename, frame.f_lineno, code.co_qualname), module)


def innermost_module(frame: FrameType | None) -> str:
    """The class of the module whose call is the innermost one from ``frame`` outwards."""
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            return type(frame.f_locals["self"]).__name__
        frame = frame.f_back
    return ""


# The number of the backward pass that runs in this thread, -1 for none.
in_backward = getattr(torch._C, "_current_graph_task_id", None) or (lambda: -1)

_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in (?P<name>.+)$', re.MULTILINE)


def place_of_node(op: str, node: Any) -> Place:
    """The place of a node of a graph that Dynamo made; its line is "" where it knows none."""
    modules = node.meta.get("nn_module_stack") or {}
    module = ""
    for _, kind in modules.values():
        module = getattr(kind, "__name__", str(kind).rpartition(".")[2])
    for found in reversed(list(_FRAME.finditer(node.stack_trace or ""))):
        filename, line, name = found["file"], int(found["line"]), found["name"]
        if _is_users(filename):
            return Place(op, _where(filename, line, _qualname(filename, line, name)), module)
    return Place(op, "", module)


@lru_cache(maxsize=4096)
def _qualname(filename: str, line: int, name: str) -> str:
    """A trace has a function's bare name: its source tells the class around it."""
    for code in _codes(filename):
        if code.co_name == name and any(line == at for _, _, at in code.co_lines()):
            return code.co_qualname
    return name


@lru_cache(maxsize=256)
def _codes(filename: str) -> tuple[CodeType, ...]:
    try:
        source = "".join(linecache.getlines(filename))
        return tuple(_inside(compile(source, filename, "exec", dont_inherit=True)))
    except (SyntaxError, ValueError):
        return ()


def _inside(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _inside(constant)
