"""Conditions on a whole batch, and branches on them, that a compiled graph holds.

    z, f = IF(IS(err.NAN, f), lambda: fix(z, f, layer)).ELSE(lambda: (z.clone(), f.clone()))

In eager code the condition is read and one branch runs. While compiling, all branches are traced.
If no gradient flows, all run and ``torch.where`` selects. If one does, ``torch.cond`` runs the one
taken alone, forward and backward, because where's gradient of a branch not taken is 0 times that
branch's derivative: NaN wherever that is not finite. On a GPU torch.cond reads the condition.
Branches that draw random numbers (dropout in training) are always selected by ``torch.where``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from opguard.flags import _engine
from opguard.flags._drawing import draws_since, traced_so_far
from opguard.flags._err import err
from opguard.flags._guarded_ops import ATTACH
from opguard.flags._guarded_record import data_of
from opguard.flags.config import ErrorConfig
from opguard.flags.errors import FlagsError
from opguard.flags.guarded import GuardedTensor

__all__ = ["AND", "HAS", "IF", "IS", "NOT", "OR"]

T = TypeVar("T")


def _condition(cond: Any, name: str) -> Tensor:
    if not isinstance(cond, Tensor):
        raise TypeError(f"expected {name} to be a 0-d bool tensor, got {type(cond).__name__}")
    if cond.dtype is not torch.bool:
        raise TypeError(
            f"expected {name} to be a 0-d bool tensor, got one of {cond.dtype}; compare first, or"
            " use HAS or IS"
        )
    if cond.dim() != 0:
        raise ValueError(
            f"expected {name} to be a 0-d bool tensor, got shape {tuple(cond.shape)}; reduce it"
            " with .any() or .all()"
        )
    return data_of(cond)  # type: ignore[no-any-return]


def HAS(flags: Tensor) -> Tensor:
    """0-d bool: some sample has errors."""
    return _engine.is_err(flags).any()


def IS(code: int, flags: Tensor, *, config: ErrorConfig | None = None) -> Tensor:
    """0-d bool: some sample has an error of this code."""
    return err.find(code, flags).any()


def OR(*conds: Tensor) -> Tensor:
    """0-d bool: one of the conditions holds. All are evaluated."""
    if not conds:
        raise ValueError("expected OR to get at least one condition, got none")
    result = _condition(conds[0], "OR's condition")
    for cond in conds[1:]:
        result = result | _condition(cond, "OR's condition")
    return result


def AND(*conds: Tensor) -> Tensor:
    """0-d bool: all conditions hold. All are evaluated."""
    if not conds:
        raise ValueError("expected AND to get at least one condition, got none")
    result = _condition(conds[0], "AND's condition")
    for cond in conds[1:]:
        result = result & _condition(cond, "AND's condition")
    return result


def NOT(cond: Tensor) -> Tensor:
    """0-d bool: the condition does not hold."""
    return ~_condition(cond, "NOT's condition")


# --- what a branch returns, apart and together again ----------------------------------------------


def _skeleton(value: Any) -> Any:
    """The dicts, tuples and lists of a branch's result alone."""
    if isinstance(value, dict):
        return {name: _skeleton(part) for name, part in value.items()}
    return [_skeleton(part) for part in value] if isinstance(value, tuple | list) else None


def _tensors(value: Any, skeleton: Any) -> list[Tensor]:
    """The tensors in a branch's result, in the order of the skeleton, which is another branch's."""
    if isinstance(value, GuardedTensor):
        return [value.unwrap(), value.flags]
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, dict):
        for name, part in skeleton.items():
            found += _tensors(value[name], part)
    elif isinstance(value, tuple | list):
        for part, shape in zip(value, skeleton, strict=True):
            found += _tensors(part, shape)
    return found


def _rebuilt(value: Any, tensors: list[Tensor]) -> Any:
    """value with its tensors replaced by the next of ``tensors``, which are taken out."""
    if isinstance(value, GuardedTensor):
        return ATTACH(tensors.pop(0), value).with_flags(tensors.pop(0))
    if isinstance(value, Tensor):
        return tensors.pop(0)
    if isinstance(value, dict):
        return {name: _rebuilt(part, tensors) for name, part in value.items()}
    if isinstance(value, list):
        return [_rebuilt(part, tensors) for part in value]
    if isinstance(value, tuple):
        parts = [_rebuilt(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _same(a: Any, b: Any, where: str) -> None:
    """Raises unless two branches' results differ in the values of their tensors alone."""
    if type(a) is not type(b):
        raise FlagsError(
            f"expected every branch of IF to return the same structure, got {type(a).__name__} and"
            f" {type(b).__name__} at {where}"
        )
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype is not b.dtype:
            raise FlagsError(
                "expected every branch of IF to return tensors of one shape and dtype, got"
                f" {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype} at {where}"
            )
        if isinstance(a, GuardedTensor):
            _same(a.flags, b.flags, f"{where}.flags")
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            raise FlagsError(
                f"expected every branch of IF to return the same keys, got {list(a)} and {list(b)}"
                f" at {where}"
            )
        for name in a:
            _same(a[name], b[name], f"{where}[{name!r}]")
    elif isinstance(a, tuple | list):
        if len(a) != len(b):
            raise FlagsError(
                f"expected every branch of IF to return as many values, got {len(a)} and {len(b)}"
                f" at {where}"
            )
        for i in range(len(a)):
            _same(a[i], b[i], f"{where}[{i}]")
    elif a is not b and a != b:
        raise FlagsError(
            "expected every branch of IF to return the same in place of a tensor, since a compiled"
            f" graph holds one value, got {a!r} and {b!r} at {where}; return a tensor instead"
        )


# --- while compiling ------------------------------------------------------------------------------

_FLOAT_OF_WIDTH = {
    torch.int64: torch.float64,
    torch.int32: torch.float32,
    torch.uint64: torch.float64,
    torch.uint32: torch.float32,
    torch.int16: torch.float32,
    torch.uint16: torch.float32,
    torch.int8: torch.float32,
    torch.uint8: torch.float32,
    torch.bool: torch.float32,
}
_VIEWED = (torch.int64, torch.int32, torch.uint64, torch.uint32)


def _encoded(tensor: Tensor) -> Tensor:
    """A new tensor of a floating dtype with the same bits or values.

    torch.cond (2.13) cannot differentiate branches that also return integers, and flags are.
    """
    carrier = _FLOAT_OF_WIDTH.get(tensor.dtype)
    if carrier is None:
        return tensor.clone()
    return tensor.clone().view(carrier) if tensor.dtype in _VIEWED else tensor.to(carrier)


def _decoded(tensor: Tensor, dtype: torch.dtype, with_grad: bool) -> Tensor:
    if not with_grad:
        tensor = tensor.detach()
    if dtype not in _FLOAT_OF_WIDTH:
        return tensor
    return tensor.view(dtype) if dtype in _VIEWED else tensor.to(dtype)


def _where(conds: list[Tensor], column: Sequence[Tensor]) -> Tensor:
    """The tensor of the first condition that holds; the last for none."""
    value = column[-1]
    for cond, tensor in zip(reversed(conds), reversed(column[:-1]), strict=True):
        value = torch.where(cond, tensor, value)
    return value


def _selected(conds: list[Tensor], column: Sequence[Tensor], with_grad: bool) -> Tensor:
    """:func:`_where`; words that may be flags are moved as integers."""
    dtype = column[0].dtype
    words = {torch.float32: torch.int32, torch.float64: torch.int64}.get(dtype)
    if words is None or (with_grad and torch.is_grad_enabled()):
        return _where(conds, column)
    return _where(conds, [tensor.view(words) for tensor in column]).view(dtype)


def _run_taken(conds: list[Tensor], fns: list[Callable[[], Any]], skeleton: Any) -> list[Tensor]:
    """What the branch taken returns, encoded; there is one function more than conditions."""

    def then() -> list[Tensor]:
        return [_encoded(tensor).contiguous() for tensor in _tensors(fns[0](), skeleton)]

    def otherwise() -> list[Tensor]:
        return _run_taken(conds[1:], fns[1:], skeleton)

    return list(torch.cond(conds[0], then, otherwise, ())) if conds else then()


def _compiled(conds: list[Tensor], fns: list[Callable[[], Any]]) -> Any:
    begin = traced_so_far()
    results = [fn() for fn in fns]
    random = draws_since(begin)
    for result in results[1:]:
        _same(results[0], result, "its result")
    skeleton = _skeleton(results[0])
    columns = list(zip(*(_tensors(result, skeleton) for result in results), strict=True))
    with_grad = [any(tensor.requires_grad for tensor in column) for column in columns]
    if torch.is_grad_enabled() and any(with_grad) and not random:
        # Of the results above only shapes and dtypes are used, so the compiler drops their values.
        taken = _run_taken(conds, fns, skeleton)
        tensors = [
            _decoded(tensor, column[0].dtype, grad)
            for tensor, column, grad in zip(taken, columns, with_grad, strict=True)
        ]
    else:
        pairs = zip(columns, with_grad, strict=True)
        tensors = [_selected(conds, column, grad) for column, grad in pairs]
    return _rebuilt(results[0], tensors)


class _IfChain(Generic[T]):
    """IF and the ELIFs so far; nothing has run yet."""

    def __init__(self, cond: Tensor, fn: Callable[[], T]) -> None:
        self._conds = [cond]
        self._fns = [fn]

    def ELIF(self, cond: Tensor, fn: Callable[[], T]) -> _IfChain[T]:
        """``fn`` runs where no condition before holds and this one does."""
        self._conds.append(_condition(cond, "ELIF's condition"))
        self._fns.append(fn)
        return self

    def ELSE(self, fn: Callable[[], T]) -> T:
        """The result of the first branch whose condition holds, of ``fn`` if none does.

        All branches must return the same structure; while compiling, that is checked, and what is
        no tensor in it must be equal in all.
        """
        if torch.compiler.is_compiling():
            return _compiled(self._conds, [*self._fns, fn])  # type: ignore[no-any-return]
        for cond, branch in zip(self._conds, self._fns, strict=True):
            if cond.item():
                return branch()
        return fn()


def IF(cond: Tensor, then_fn: Callable[[], T]) -> _IfChain[T]:
    """Begins ``IF(cond, fn).ELIF(cond, fn).ELSE(fn)``; conditions are 0-d bool tensors.

    Branches take no arguments and should have no side effects: compiled code traces all of them.
    """
    return _IfChain(_condition(cond, "IF's condition"), then_fn)
