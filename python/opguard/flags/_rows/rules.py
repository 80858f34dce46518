"""The table of row rules: for each op, where the rows of its outputs come from.

A rule runs before its op, so that a refusal leaves in-place data untouched. It returns ``Rows`` for
every output, or a list with ``Rows`` or None for each tensor among the outputs in order, or a
function of the outputs that returns one of these. It may look at shapes and, for a function of the
outputs, at index tensors among them; it never looks at data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NoReturn, TypeAlias, TypeVar

import torch
from torch import Tensor

from opguard.flags._rows.rows import Rows, merge_rows
from opguard.flags.errors import RowsLost

__all__ = [
    "Call",
    "Found",
    "Rule",
    "load",
    "lookup",
    "lost",
    "names_of",
    "plan",
    "rule",
    "tensors_of",
]

RowsOf: TypeAlias = Callable[[Tensor], "Rows | None"]
Found: TypeAlias = "Rows | list[Rows | None] | Callable[[Any], Rows | list[Rows | None] | None]"
Rule: TypeAlias = "Callable[[Call], Found | None]"
_R = TypeVar("_R", bound=Rule)

_rules: dict[str, Rule] = {}
_CORE = {"axes", "digits", "moves", "payloads", "rows", "rules"}
_loaded = False


def names_of(text: str) -> list[str]:
    """The names of aten ops that stand in a text, without "aten::"."""
    return [f"aten::{name}" for name in text.split()]


def rule(*names: str) -> Callable[[_R], _R]:
    """Registers a function as the rule of these ops: ``"aten::sum"``, ``"aten::sum.dim_IntList"``.

    The name of a functional op covers its in-place and ``out=`` forms as well.
    """

    def register(function: _R) -> _R:
        for name in names:
            if name in _rules:
                raise ValueError(f"expected one rule for {name}, got a second one")
            _rules[name] = function
        return function

    return register


def load() -> None:
    """Imports the modules of rules, once."""
    global _loaded  # noqa: PLW0603 - a table of the process, filled once
    if _loaded:
        return
    package = __name__.rpartition(".")[0]
    for found in iter_modules(import_module(package).__path__):
        if found.name not in _CORE:
            import_module(f"{package}.{found.name}")
    _loaded = True
    _known.clear()


class _Op:
    """What is known of an overload without a call of it."""

    __slots__ = ("arguments", "defaults", "inputs", "name", "op", "places", "rule")

    def __init__(self, op: Any) -> None:
        schema = op._schema
        self.op = op
        self.name = schema.name
        self.arguments = [argument.name for argument in schema.arguments]
        self.places = {name: place for place, name in enumerate(self.arguments)}
        self.defaults = {
            argument.name: argument.default_value
            for argument in schema.arguments
            if argument.has_default_value()
        }
        # Not what is written and not read: `out` arguments.
        self.inputs = [
            (place, argument.name, "List" in str(argument.type))
            for place, argument in enumerate(schema.arguments)
            if "Tensor" in str(argument.type) and not argument.is_out
        ]
        self.rule = lookup(op)


# By identity, since hashing an OpOverload is a call; each _Op keeps its own alive.
_known: dict[int, _Op] = {}


class Call:
    """One call of an op, as its rule sees it."""

    __slots__ = ("_known", "args", "kwargs", "rows_of")

    def __init__(
        self, known: _Op, args: Sequence[Any], kwargs: dict[str, Any], rows_of: RowsOf
    ) -> None:
        self._known = known
        self.args = args
        self.kwargs = kwargs
        self.rows_of = rows_of

    @property
    def op(self) -> Any:
        """The OpOverload."""
        return self._known.op

    @property
    def name(self) -> str:
        """``aten::sum.dim_IntList``."""
        return str(self._known.op.name())

    def __getitem__(self, name: str) -> Any:
        """The argument of this name, its default if it was not given."""
        known = self._known
        place = known.places.get(name)
        if place is None:
            raise KeyError(f"{self.name} has no argument {name!r}")
        if place < len(self.args):
            return self.args[place]
        if name in self.kwargs:
            return self.kwargs[name]
        return known.defaults.get(name)

    def __contains__(self, name: str) -> bool:
        """Whether the op has such an argument."""
        return name in self._known.places

    def rows(self, name: str) -> Rows | None:
        """The rows of a tensor argument; None for one without rows, and for no tensor."""
        value = self[name]
        return self.rows_of(value) if isinstance(value, Tensor) else None

    def shape(self, name: str) -> tuple[Any, ...]:
        """The shape of a tensor argument; () for a number."""
        value = self[name]
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def rows_list(self, name: str) -> list[Rows | None]:
        """The rows of each tensor of a list argument."""
        return [
            self.rows_of(value) if isinstance(value, Tensor) else None for value in self[name] or ()
        ]

    def shapes(self, name: str) -> list[tuple[Any, ...]]:
        """The shape of each tensor of a list argument."""
        return [tuple(value.shape) for value in self[name] or ()]

    def named(self) -> list[tuple[str, Rows]]:
        """All rows of the inputs with their arguments' names; not those written by ``out=``."""
        args, rows_of = self.args, self.rows_of
        count, found = len(args), []
        for place, name, listed in self._known.inputs:
            value = args[place] if place < count else self.kwargs.get(name)
            if isinstance(value, Tensor):
                rows = rows_of(value)
                if rows is not None:
                    found.append((name, rows))
            elif listed and value is not None:
                all_rows = [rows_of(item) for item in value if isinstance(item, Tensor)]
                found += [(name, rows) for rows in all_rows if rows is not None]
        return found

    def any(self) -> list[Rows]:
        """All rows of the inputs in their order, those written by ``out=`` not among them."""
        return [rows for _, rows in self.named()]


def lost(call: Call, why: str) -> NoReturn:
    """Refuses: ``why`` says in half a sentence what keeps the rows from being followed."""
    raise RowsLost(
        f"expected an op that keeps apart where each sample went, got {call.name}: {why}; unwrap()"
        ' before it, or guard(x, lost="merge") to go on with one row for the whole batch'
    )


def lookup(op: Any) -> Rule | None:
    """The rule of an OpOverload: by its full name, its name, the functional op's, its tag."""
    load()
    full = op.name()
    name = op._schema.name
    found = _rules.get(full) or _rules.get(name)
    if found is None and name.endswith("_") and not name.endswith("__"):
        overload = full[len(name) :]
        found = _rules.get(name[:-1] + overload) or _rules.get(name[:-1])
    if found is None and _is_pointwise(op):
        found = _pointwise
    return found


def _is_pointwise(op: Any) -> bool:
    """Whether an op, or the one that it is the in-place or ``out=`` form of, has torch's tag."""
    if torch.Tag.pointwise in op.tags:
        return True
    space, _, name = op._schema.name.partition("::")
    if space != "aten":
        return False
    packet = getattr(torch.ops.aten, name.removesuffix("_") or name, None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def known(op: Any) -> bool:
    """Whether the table has a rule for this OpOverload."""
    return _of(op).rule is not None


def _of(op: Any) -> _Op:
    found = _known.get(id(op))
    if found is None:
        load()
        found = _known[id(op)] = _Op(op)
    return found


def plan(
    op: Any, args: Sequence[Any], kwargs: dict[str, Any], rows_of: RowsOf
) -> Callable[[Any], list[Rows | None]]:
    """Where the rows of an op's outputs will lie, decided before it runs.

    Args:
        op: the OpOverload.
        args, kwargs: of the call, with whatever tensors ``rows_of`` knows.
        rows_of: the Rows of a tensor, None for a tensor without.

    Returns:
        A function of the outputs that gives Rows or None for each tensor among them, in order. If
        the arguments make no sense to the rule, it is the op that says so; if that runs all the
        same, this function raises RowsLost.

    Raises:
        RowsLost: there is no rule, or the rule refuses.
    """
    this = _known.get(id(op)) or _of(op)
    call = Call(this, args, kwargs, rows_of)
    if this.rule is None:
        lost(call, "there is no rule for it")
    try:
        found = this.rule(call)
    except RowsLost:
        raise
    except Exception as error:  # arguments that make no sense: the op says so in its own words
        return _failed(call, error)
    return lambda outputs: _settled(found, outputs, call)


def _failed(call: Call, error: Exception) -> Callable[[Any], list[Rows | None]]:
    """For a rule that could do nothing with its call: if the op can, its rows are lost."""

    def finish(outputs: Any) -> list[Rows | None]:
        try:
            lost(call, f"its rule failed with {type(error).__name__}")
        except RowsLost as refusal:
            raise refusal from error

    return finish


def _settled(found: Any, outputs: Any, call: Call) -> list[Rows | None]:
    if type(found) is not Rows and callable(found):
        found = found(outputs)
    if type(found) is Rows and isinstance(outputs, Tensor) and _agree(found, outputs):
        return [found]
    tensors = list(tensors_of(outputs))
    rows = found if isinstance(found, list) else [found] * len(tensors)
    if len(rows) != len(tensors):
        lost(call, f"it gave {len(tensors)} tensors, its rule knows of {len(rows)}")
    for one, tensor in zip(rows, tensors, strict=True):
        if one is not None and not _agree(one, tensor):
            lost(call, f"it gave {tuple(tensor.shape)}, its rule expected {one.shape}")
    return rows


def _agree(rows: Rows, tensor: Tensor) -> bool:
    """Whether two shapes are one; sizes that are symbols are taken at their word."""
    ours, theirs = rows.shape, tensor.shape
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs):  # noqa: B905 - on the way of every op
        if a is not b and type(a) is int and type(b) is int and a != b:
            return False
    return True


def tensors_of(outputs: Any) -> Any:
    """The tensors in lists and tuples, in order."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (tuple, list)):
        for output in outputs:
            yield from tensors_of(output)


def _pointwise(call: Call) -> Found | None:
    found = call.any()
    if not found:
        return None
    first = found[0]
    if len(found) == 1 and _alone(call):
        return first
    return lambda outputs: merge_rows(found, next(tensors_of(outputs)).shape)


def _alone(call: Call) -> bool:
    """Whether the op has one tensor, so that its result has that one's shape."""
    return len(call._known.inputs) == 1 and not call._known.inputs[0][2]
