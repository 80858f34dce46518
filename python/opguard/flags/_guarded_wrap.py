"""GuardedTensors of their parts, and the ops that only take them apart or put them together.

Everything here is under autograd: it gives and takes data without gradients.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils import _python_dispatch
from torch.utils._mode_utils import no_dispatch

from opguard.flags import _guarded_ops as ops
from opguard.flags._guarded_cells import Cell, Linked, Step
from opguard.flags._rows.axes import Axis
from opguard.flags._rows.payloads import FlagPayload
from opguard.flags._rows.rows import Rows
from opguard.flags.errors import BatchMismatchError, RowsLost

__all__ = [
    "SPECIAL",
    "as_view",
    "beside",
    "build",
    "in_backward",
    "public_rows",
    "reshaped",
    "resize",
    "rows_now",
    "same_flags",
    "set_rows",
    "turned",
    "with_other_flags",
    "wrap",
]

wrapper: Any = None  # GuardedTensor, named by its module

_make = torch.Tensor._make_wrapper_subclass
_in_inference = torch.is_inference_mode_enabled
_inference = torch._C._InferenceMode
_task = torch._C._current_graph_task_id
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_same_memory: Any = _python_dispatch.return_and_correct_aliasing
_aten = torch.ops.aten


def rows_now(g: Any) -> Rows:
    """The rows of a GuardedTensor, what was written into its memory through others among them."""
    cell = g._cell
    if cell is not None and g._seen != cell.version:
        _tell(g, cell.seen_by(g._step))
        g._seen = cell.version
    return g._rows  # type: ignore[no-any-return]


def _tell(g: Any, rows: Rows) -> None:
    """``rows`` are those of ``g``.

    What is traced is taken apart when the trace is over, too late to compute anything: its public
    rows are found now, and cost nothing where nobody asks for them.
    """
    g._rows = rows
    if type(g._data) is not Tensor:
        g._public = rows.aligned()


def public_rows(g: Any) -> tuple[tuple[int, ...], FlagPayload]:
    """The batch dimensions, and the flags of their rows in row-major order."""
    rows = rows_now(g)
    rows = rows.aligned() if g._public is None else g._public
    payload: Any = rows.payload
    return tuple(axis.dim for axis in rows.axes), payload


def _rows_of(tensor: Any) -> Rows | None:
    return rows_now(tensor) if type(tensor) is wrapper else None


def wrap(data: Tensor, rows: Rows, merges: bool = False) -> Any:
    """A GuardedTensor around ``data``."""
    if _in_inference() and not data.is_inference():  # a view of what was made outside of it
        with _inference(False):
            return wrap(data, rows, merges)
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
    if type(data) is not Tensor:
        _tell(made, rows)
    if merges:
        made._merges = True
    return made


def beside(data: Tensor, rows: Rows) -> Rows:
    """``rows`` with their flags on the device of ``data``."""
    payload: Any = rows.payload
    if payload.flags.device == data.device:
        return rows
    payload = FlagPayload(payload.flags.to(data.device), payload.key)
    return Rows(rows.shape, rows.axes, payload)


def build(data: Tensor, flags: Tensor, context: Any) -> Any:
    """A GuardedTensor of its parts; ``context``: batch dims, key, whether lost rows merge."""
    dims, key, merges = context
    shape = data.shape
    axes = tuple(Axis(dim, 1, shape[dim]) for dim in dims)
    made = wrap(data, Rows(shape, axes, FlagPayload(flags, key)), merges)
    if type(data) is not Tensor:
        made._given = True
    return made


def in_backward() -> bool:
    """Whether this is a backward pass; what checkpointing computes again in one is none."""
    return _task() != -1 and not (torch.is_grad_enabled() and _recomputes())


def _recomputes() -> bool:
    """Whether checkpointing computes again: told by whose hook then keeps tensors for backward."""
    hooks = None if _top_hooks is None else _top_hooks(True)
    return hooks is not None and "recomputation" in getattr(hooks[0], "__qualname__", "")


def same_flags(given: Any, rows: Any) -> bool:
    """Whether both have the very same flags, in whatever places."""
    old, new = given.payload, rows.payload
    return old is new or (old.flags is new.flags and old.key == new.key)


def set_rows(g: Any, rows: Rows) -> None:
    """``rows`` are those of ``g`` after a write into it."""
    cell = g._cell
    same = same_flags(rows, g._rows)
    if same and rows.axes == g._rows.axes and rows.shape == g._rows.shape:
        return
    given = g._given if cell is None else cell.given
    if given and not same:
        raise RowsLost(
            "expected a compiled region to leave the flags of what it is given as they are, got a"
            " write that changes those of an input; write into a copy (g * 1) and return it"
        )
    _tell(g, rows)
    if cell is None:
        return
    cell.write(g._step, rows)
    g._seen = cell.version
    for member in cell.members:
        other = member()
        if other is not None:
            rows_now(other)


def _join(cell: Cell, *members: Any) -> None:
    """Has what is traced over one memory told of every write at once."""
    for member in members:
        if type(member._data) is not Tensor:
            cell.members.append(ref(member))


def cell_of(g: Any) -> Cell:
    """What ``g`` shares with its views."""
    cell: Cell | None = g._cell
    if cell is None:
        cell = g._cell = Cell(g._rows, g._given)
        _join(cell, g)
    return cell


def as_view(call: tuple[Any, Any, Any], plain: list[Any], named: Any, result: Any) -> Any:
    """``result``, what a view op gave, as views of its first argument."""
    func, args, kwargs = call
    base = args[0]
    if type(base) is not wrapper:
        return result
    cell = cell_of(base)
    for output, view in enumerate((result,) if isinstance(result, Tensor) else result):
        if type(view) is wrapper:
            view._cell = cell
            view._seen = cell.version
            view._step = Step(base._step, func, tuple(plain), named, base._data, output)
            _join(cell, view)
    if type(base._data) is not Tensor:  # traced: what shares memory has to be seen by its storage
        return _same_memory(func, args, kwargs, result)
    return result


def turned(call: tuple[Any, Any, Any], plain: list[Any], named: Any) -> Step | None:
    """What an op that changes sizes in place does, as a step of a view; before it runs."""
    func, (g, *_), _ = call
    if g._cell is None:
        return None
    packet = getattr(_aten, func._overloadpacket.__name__.removesuffix("_"))
    before = g._data  # which the steps of its views hold as it is
    g._data = plain[0] = _aten.alias.default(before)
    named_so = func._overloadname in packet.overloads()
    view = getattr(packet, func._overloadname if named_so else "int")  # of transpose_ alone
    return Step(g._step, view, (before, *plain[1:]), named, before, 0)


def reshaped(call: tuple[Any, Any, Any], rows: Any, step: Step | None) -> Any:
    """The tensor after an op that changed the sizes of its data in place, and nothing else."""
    func, args, kwargs = call
    g = args[0]
    _same_memory(func, args, kwargs, g)
    _tell(g, rows)
    if step is not None:
        g._step = step
    return g


def resize(g: Any) -> None:
    """The wrapper's sizes after an op that resized the ``out`` it was given."""
    if g.shape == g._data.shape:
        return
    if g._cell is not None:
        g._cell = g._step = None  # its views look at memory that it may have left
    with no_dispatch():
        inside = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            g.resize_(g._data.shape)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(inside)


def _attach(x: Any, carrier: Any) -> Any:
    return wrap(_aten.alias.default(x), rows_now(carrier), carrier._merges)


def _unwrap(g: Any) -> Any:
    return _aten.alias.default(g._data)


def with_other_flags(g: Any, flags: Any) -> Any:
    """The data of ``g`` with other flags, for tensors outside of autograd's graph."""
    rows = rows_now(g).aligned()
    old: Any = rows.payload
    if not isinstance(flags, Tensor):
        raise TypeError(f"expected flags (n, words) as a tensor, got {type(flags).__name__}")
    if flags.shape[0] != old.rows:
        raise BatchMismatchError(
            f"expected flags of the {old.rows} rows of the tensor, got flags"
            f" of {flags.shape[0]}; make flags for this batch"
        )
    if isinstance(flags, wrapper):
        flags = flags._data
    changed = Rows(rows.shape, rows.axes, FlagPayload(flags, old.key))
    result = wrap(_aten.alias.default(g._data), changed, g._merges)
    result._cell = cell = Linked(changed, cell_of(g), g._step)
    result._seen = cell.version
    return result


def _detach(g: Any) -> Any:
    return _same(_aten.detach.default, g)


def _alias(g: Any) -> Any:
    return _same(_aten.alias.default, g)


def _same(func: Any, g: Any) -> Any:
    """All of the tensor again: the same rows, and what is written into one is in the other."""
    data = func(g._data)
    if in_backward():
        return data
    result = wrap(data, rows_now(g), g._merges)
    result._cell = cell = cell_of(g)
    result._seen = cell.version
    result._step = g._step
    _join(cell, result)
    if type(data) is not Tensor:
        return _same_memory(func, (g,), {}, result)
    return result


SPECIAL: dict[Any, Any] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _alias,
    ops.ATTACH: _attach,
    ops.UNWRAP: _unwrap,
    ops.WITH_FLAGS: with_other_flags,
}
