"""What an op does to GuardedTensors: it runs on the data, and its rule says where the rows go.

The rule is asked before the op runs, so that a refusal leaves what an op would have written into
as it was. In a backward pass results are plain tensors: gradients carry no flags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from opguard.flags import _guarded_ops as ops
from opguard.flags._guarded_cells import Cell, Step
from opguard.flags._rows.axes import Axis
from opguard.flags._rows.payloads import FlagPayload
from opguard.flags._rows.rows import Rows
from opguard.flags._rows.rules import plan
from opguard.flags.errors import BatchMismatchError, RowsLost

__all__ = ["build", "dispatch", "public_rows", "rows_now", "wrap"]

wrapper: Any = None  # GuardedTensor, named by its module

_make = torch.Tensor._make_wrapper_subclass
_task = torch._C._current_graph_task_id
_same_memory: Any = _python_dispatch.return_and_correct_aliasing
_aten = torch.ops.aten

# Statistics that a module keeps of the batches it saw: they are its own, and carry no flags.
_KEEPS_STATISTICS = {
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::_batch_norm_with_update",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
    "aten::_batch_norm_impl_index",
    "aten::batch_norm",
}


class _Op(NamedTuple):
    """What is asked of an op at every call, found once."""

    data_only: bool  # neither gives tensors nor writes into any
    writes: tuple[tuple[int, str], ...]  # arguments written into: position and name
    written: tuple[tuple[int, str] | None, ...]  # the argument that each output is, if any
    view: bool
    reshapes_itself: bool
    composite: bool
    keeps_statistics: bool


_described: dict[Any, _Op] = {}


def _describe(func: Any) -> _Op:
    schema = func._schema
    writes = {}
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for name in argument.alias_info.before_set:
                writes[name] = (position, argument.name)
    written = []
    views = False
    for returned in schema.returns:
        info = returned.alias_info
        named = None
        if info is not None:
            named = next((writes[name] for name in info.before_set if name in writes), None)
            views = views or named is None
        written.append(named)
    tensors = any("Tensor" in str(returned.type) for returned in schema.returns)
    op = _Op(
        data_only=not tensors and not writes,
        writes=tuple(writes.values()),
        written=tuple(written),
        view=views and not writes,
        reshapes_itself=torch.Tag.inplace_view in func.tags,
        composite=func._can_decompose(),
        keeps_statistics=schema.name in _KEEPS_STATISTICS,
    )
    _described[func] = op
    return op


def rows_now(g: Any) -> Rows:
    """The rows of a GuardedTensor, what was written into its memory through others among them."""
    cell = g._cell
    if cell is not None and g._seen != cell.version:
        g._rows = cell.seen_by(g._step)
        g._seen = cell.version
    return g._rows  # type: ignore[no-any-return]


def public_rows(g: Any) -> tuple[tuple[int, ...], FlagPayload]:
    """The batch dimensions, and the flags of their rows in row-major order."""
    rows = rows_now(g).aligned()
    payload: Any = rows.payload
    return tuple(axis.dim for axis in rows.axes), payload


def _rows_of(tensor: Any) -> Rows | None:
    return rows_now(tensor) if type(tensor) is wrapper else None


def wrap(data: Tensor, rows: Rows, merges: bool = False) -> Any:
    """A GuardedTensor around ``data``."""
    payload: Any = rows.payload
    if payload.flags.device != data.device:
        payload = FlagPayload(payload.flags.to(data.device), payload.key)
        rows = Rows(rows.shape, rows.axes, payload)
    made = _make(
        wrapper,
        data.shape,
        data.stride(),
        data.storage_offset(),
        None,
        data.dtype,
        data.layout,
        data.device,
        False,
        data.requires_grad,
    )
    made._data = data
    made._rows = rows
    if merges:
        made._merges = True
    return made


def build(data: Tensor, flags: Tensor, context: Any) -> Any:
    """A GuardedTensor of its parts; ``context``: batch dims, key, whether lost rows merge."""
    dims, key, merges = context
    shape = data.shape
    axes = tuple(Axis(dim, 1, shape[dim]) for dim in dims)
    return wrap(data, Rows(shape, axes, FlagPayload(flags, key)), merges)


def plain_results() -> bool:
    """Whether this is a backward pass; what checkpointing computes again in one is none."""
    if _task() == -1:
        return False
    if not torch.is_grad_enabled():
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _strip(values: Sequence[Any], found: list[Any]) -> list[Any]:
    result = []
    for value in values:
        kind = type(value)
        if kind is wrapper:
            found.append(value)
            result.append(value._data)
        elif kind is list or kind is tuple:
            result.append(kind(_strip(value, found)))
        else:
            result.append(value)
    return result


def _attach(x: Any, carrier: Any) -> Any:
    return wrap(_aten.alias.default(x), rows_now(carrier), carrier._merges)


def _unwrap(g: Any) -> Any:
    return _aten.alias.default(g._data)


def _with_flags(g: Any, flags: Any) -> Any:
    rows = rows_now(g).aligned()
    old: Any = rows.payload
    if flags.shape[0] != old.rows:
        raise BatchMismatchError(
            f"expected flags of the {old.rows} rows of the tensor, got flags"
            f" of {flags.shape[0]}; make flags for this batch"
        )
    if isinstance(flags, wrapper):
        flags = flags._data
    payload = FlagPayload(flags, old.key)
    return wrap(_aten.alias.default(g._data), Rows(rows.shape, rows.axes, payload), g._merges)


def _detach(g: Any) -> Any:
    return _same(_aten.detach.default, g)


def _alias(g: Any) -> Any:
    return _same(_aten.alias.default, g)


def _same(func: Any, g: Any) -> Any:
    """All of the tensor again: the same rows, and what is written into one is in the other."""
    data = func(g._data)
    if plain_results():
        return data
    result = wrap(data, rows_now(g), g._merges)
    cell = g._cell
    if cell is None:
        cell = g._cell = Cell(g._rows)
    result._cell = cell
    result._seen = cell.version
    result._step = g._step
    if type(data) is not Tensor:
        return _same_memory(func, (g,), {}, result)
    return result


_SPECIAL: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _alias,
    ops.ATTACH: _attach,
    ops.UNWRAP: _unwrap,
    ops.WITH_FLAGS: _with_flags,
}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on the data of the GuardedTensors among its arguments, their rows on its results."""
    special = _SPECIAL.get(func)
    if special is not None:
        return special(*args, **kwargs)
    found: list[Any] = []
    plain = _strip(args, found)
    named = dict(zip(kwargs, _strip(tuple(kwargs.values()), found), strict=True)) if kwargs else {}
    op = _described.get(func) or _describe(func)
    if op.data_only or func.namespace == "opguard" or plain_results():
        out = func(*plain, **named)
        if found[0]._gradient and func is _aten.clone.default:  # brought into the strides expected
            return wrap(out, found[0]._rows)
        return out
    merges = any(g._merges for g in found)
    if op.writes:
        _may_write(func, op, args, kwargs)
    try:
        finish = plan(func, args, kwargs, _rows_of)
    except RowsLost:
        if op.composite:
            return func.decompose(*args, **kwargs)
        if not merges:
            raise
        finish = _merged(found)
    out = func(*plain, **named)
    rows = finish(out)
    if op.writes:
        return _written(op, (func, args, kwargs), out, rows)
    result = _wrapped(out, iter(rows), merges)
    return _as_view((func, args, kwargs), plain, named, result) if op.view else result


def _wrapped(out: Any, rows: Any, merges: bool) -> Any:
    if isinstance(out, Tensor):
        each = next(rows)
        return out if each is None else wrap(out, each, merges)
    if isinstance(out, list | tuple):
        return type(out)([_wrapped(one, rows, merges) for one in out])
    return out


def _merged(found: list[Any]) -> Callable[[Any], Any]:
    """All rows of all inputs as the one row of every output."""
    one = [rows_now(g).payload.one() for g in found]
    payload = one[0].merge(*one[1:])

    def finish(out: Any) -> list[Rows | None]:
        if isinstance(out, Tensor):
            return [Rows(out.shape, (), payload)]
        if isinstance(out, list | tuple):
            return [rows for each in out for rows in finish(each)]
        return []

    return finish


def _argument(at: tuple[int, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    position, name = at
    return args[position] if position < len(args) else kwargs.get(name)


def _may_write(func: Any, op: _Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses to write what has flags into a tensor that cannot hold them."""
    if op.keeps_statistics:
        return
    for at in op.writes:
        target = _argument(at, args, kwargs)
        if isinstance(target, Tensor) and type(target) is not wrapper:
            raise RowsLost(
                f"expected {at[1]} of {func} to be a GuardedTensor, since what is written into it"
                f" has flags, got {type(target).__name__}; write into opguard.flags.guard({at[1]}),"
                " or leave the flags out by .unwrap()"
            )


def _written(op: _Op, call: tuple[Any, Any, Any], out: Any, rows: Any) -> Any:
    func, args, kwargs = call
    if op.reshapes_itself:
        _same_memory(func, args, kwargs, args[0])
    outs = (out,) if len(op.written) == 1 else out
    results = []
    left = iter(rows)
    for at, each in zip(op.written, outs or (), strict=False):
        target = None if at is None else _argument(at, args, kwargs)
        if type(target) is wrapper:
            _set_rows(target, next(left))
            results.append(target)
        elif at is not None:
            next(left, None)
            results.append(target)
        else:
            results.append(_wrapped(each, left, False))
    return results[0] if len(op.written) == 1 else tuple(results)


def _set_rows(g: Any, rows: Rows) -> None:
    g._rows = rows
    if g._cell is not None:
        g._cell.write(g._step, rows)
        g._seen = g._cell.version


def _as_view(
    call: tuple[Any, Any, Any], plain: list[Any], named: dict[str, Any], result: Any
) -> Any:
    func, args, kwargs = call
    base = args[0]
    if type(base) is not wrapper:
        return result
    cell = base._cell
    if cell is None:
        cell = base._cell = Cell(base._rows)
    many = not isinstance(result, Tensor)
    for output, view in enumerate(result if many else (result,)):
        if type(view) is wrapper:
            view._cell = cell
            view._seen = cell.version
            view._step = Step(base._step, func, tuple(plain), named, base._data, output)
    if type(base._data) is not Tensor:  # traced: what shares memory has to be seen by its storage
        return _same_memory(func, args, kwargs, result)
    return result
