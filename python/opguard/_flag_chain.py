"""Which flag ops of a graph that Inductor lowers become one call, and what that call is told.

At small batches an op costs its call and the memory of its result, not its work. So an op whose
result only another flag op reads waits for that one, and the last runs them all. What it reads
stays alive until then, so only small tensors wait, or ops with nothing but flag ops between them.
"""

from __future__ import annotations

import struct
import weakref
from typing import Any, NamedTuple

import torch

__all__ = ["MOST_FLAGS", "Waiting", "joined", "waits"]

# op -> (step of csrc/torch/opguard_ops.h, how many flags it takes first; None: a list of them)
LOAD, CHECK, PUSH, MERGE = range(4)
STEPS: dict[str, tuple[int, int | None]] = {
    "check": (CHECK, 1),
    "check_new": (CHECK, 0),
    "push": (PUSH, 1),
    "push_all": (PUSH, 1),
    "merge": (MERGE, None),
}
MOST_FLAGS = 16  # that an op takes as one call of its C function
MOST_STEPS = 24  # half as many again fit in a call, for what several chains add up to
MOST_BYTES = 1 << 18  # of tensors that are kept for a chain's end


class _Size(NamedTuple):
    steps: int
    kept: int  # bytes


class Waiting(dict[str, Any]):
    """An op that is not run yet: its node, and what Inductor has for its tensors.

    An empty dict: Inductor takes containers of its IR for results, and nothing else of ours.
    """

    def __init__(self, node: Any, inputs: list[Any]) -> None:
        super().__init__()
        self.node = node
        self.inputs = inputs


_safe: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _name(node: Any) -> str:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return ""
    space, _, name = target._schema.name.partition("::")
    return name.removeprefix("flags_") if space == "opguard" else ""


def _flags_of(node: Any) -> list[Any]:
    count = STEPS[_name(node)][1]
    return list(node.args[0]) if count is None else list(node.args[:count])


def _changes_nothing(node: Any) -> bool:
    if node.op != "call_function":
        return node.op not in {"call_function", "call_module", "call_method"}
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return getattr(node.target, "__module__", "") == "_operator"


def _graph_is_safe(graph: Any) -> bool:
    """No tensor is written to before the last flag op, so all can be read at any later time."""
    if graph not in _safe:
        changed, safe = False, True
        for node in graph.nodes:
            changed = changed or not _changes_nothing(node)
            if changed and _name(node) in STEPS:
                safe = False
        _safe[graph] = safe
    return _safe[graph]


def _fits(node: Any) -> bool:
    """Whether a step can be made of it: on the host, of a shape that is known."""
    if _name(node) not in STEPS:
        return False
    value = node.meta["val"]
    return value.device.type == "cpu" and all(type(n) is int for n in value.shape)


def _layout(node: Any) -> tuple[Any, ...]:
    value = node.meta["val"]
    return value.shape, value.dtype, value.device


def _kept(node: Any, user: Any) -> int:
    """Bytes that live on when ``node`` waits for ``user``."""
    between = node.next
    while between is not user and _name(between) in STEPS:
        between = between.next
    if between is user:
        return 0
    count = STEPS[_name(node)][1]
    tensors = node.args[count : count + 1] if count is not None else ()
    values = [x.meta["val"] for x in tensors if isinstance(x, torch.fx.Node)]
    if not all(type(n) is int for value in values for n in value.shape):
        return MOST_BYTES
    return sum(value.numel() * value.element_size() for value in values)


def _size(node: Any) -> _Size:
    """Of the chain that ends in ``node``."""
    if "opguard_chain" not in node.meta:
        steps, kept = 1, 0
        for flags in _flags_of(node):
            below = _size(flags) if waits(flags) else _Size(1, 0)
            steps, kept = steps + below.steps, kept + below.kept
            kept += _kept(flags, node) if waits(flags) else 0
        node.meta["opguard_chain"] = _Size(steps, kept)
    size: _Size = node.meta["opguard_chain"]
    return size


def waits(node: Any) -> bool:
    """Whether ``node`` is run by the flag op that reads its result."""
    if not _fits(node) or len(node.users) != 1 or not _graph_is_safe(node.graph):
        return False
    (user,) = node.users
    if not _fits(user) or node not in _flags_of(user):
        return False
    layout = _layout(user)
    together = len(_flags_of(user))
    if together > MOST_FLAGS or any(_layout(flags) != layout for flags in _flags_of(user)):
        return False
    size = _size(node)
    return (
        size.steps * together < MOST_STEPS
        and (size.kept + _kept(node, user)) * together <= MOST_BYTES
    )


def joined(last: Waiting) -> tuple[list[Any], list[Any]]:
    """The tensors of the chain that ends in ``last``, and its steps: a call's arguments."""
    tensors: list[Any] = []
    steps: list[tuple[int, ...]] = []

    def add(x: Any) -> int:
        tensors.append(x)
        return len(tensors) - 1

    def put(one: Any, to: int) -> None:
        """Steps that leave in register ``to`` what ``one`` is."""
        if not isinstance(one, Waiting):
            steps.append((LOAD, to, -1, add(one), 0, 0, _key(last)))
            return
        name = _name(one.node)
        kind, count = STEPS[name]
        numbers = [n for n in one.node.args if type(n) is int]
        if count is None:
            put(one.inputs[0], to)
            for other in one.inputs[1:]:
                put(other, to + 1)
                steps.append((MERGE, to, to, to + 1, 0, 0, numbers[-1]))
            return
        if count:
            put(one.inputs[0], to)
        source = to if count else -1
        other = add(one.inputs[count]) if len(one.inputs) > count else -1
        checks = numbers[1] if kind == CHECK else 0
        steps.append((kind, to, source, other, numbers[0], checks, numbers[-1]))

    put(last, 0)
    return tensors, [b"".join(struct.pack("=7q", *step) for step in steps)]


def _key(one: Waiting) -> int:
    key: int = one.node.args[-1]
    return key
