"""What an op does to GuardedTensors: it runs on the data, and its rule says where the rows go.

The rule is asked before the op runs, so that a refusal leaves what an op would have written into
as it was. In a backward pass results are plain tensors: gradients carry no flags.

Most calls only hand the rows of an input on. Where a rule has said so once, it is not asked again
for the same op on the same shapes: what it may look at is all in the key of :data:`_handed_on`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opguard.flags import _guarded_wrap
from opguard.flags._guarded_strided import follow
from opguard.flags._guarded_wrap import (
    SPECIAL,
    as_view,
    beside,
    in_backward,
    reshaped,
    resize,
    rows_now,
    same_flags,
    set_rows,
    turned,
    wrap,
)
from opguard.flags._rows.numbering import cleared
from opguard.flags._rows.rows import Rows
from opguard.flags.errors import RowsLost

__all__ = ["dispatch"]

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
    "aten::embedding_renorm_",  # the table is the layer's, scaled where it has to be
    "aten::rrelu_with_noise",  # the noise is drawn, not computed
    "aten::rrelu_with_noise_",
}
_CHANGES_DEVICE = {"aten::_to_copy", "aten::copy_", "aten::copy", "aten::to", "aten::_pin_memory"}
_READS_STRIDES = {
    "aten::as_strided",
    "aten::as_strided_",
    "aten::as_strided_copy",
    "aten::as_strided_scatter",
}
_PUTS_OFF = {"aten::_conj", "aten::_neg_view"}
_PLAIN = (
    int,
    float,
    bool,
    type(None),
    str,
    complex,
    torch.dtype,
    torch.device,
    torch.memory_format,
)
_BY_NUMBERS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_REMEMBERED = 4096
_RECURRENT = torch.nn.RNN.forward.__code__.co_filename


class _Op(NamedTuple):
    """What is asked of an op at every call, found once."""

    data_only: bool  # neither gives tensors nor writes into any, or is one of opguard's own
    writes: tuple[tuple[int, str], ...]  # arguments written into: position and name
    written: tuple[tuple[int, str] | None, ...]  # the argument that each output is, if any
    outs: frozenset[tuple[int, str]]  # of those written into, which are not read
    view: bool
    reshapes_itself: bool
    composite: bool
    keeps_statistics: bool
    changes_device: bool
    puts_off: bool  # only marks its result: a wrapper would not pass the mark on
    by_shapes: bool  # its rule looks at nothing but shapes, numbers and index tensors


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
        data_only=func.namespace == "opguard" or not (tensors or schema.is_mutable),
        # Lists that are written into have no mark of their own, and are returned by no op.
        writes=tuple(writes.values()) or (((0, "self"),) if schema.is_mutable else ()),
        written=tuple(written),
        outs=frozenset((at, name) for at, name in writes.values() if schema.arguments[at].is_out),
        view=views and not writes and schema.name not in _PUTS_OFF,
        reshapes_itself=torch.Tag.inplace_view in func.tags,
        composite=func._can_decompose(),
        keeps_statistics=schema.name in _KEEPS_STATISTICS,
        changes_device=schema.name in _CHANGES_DEVICE,
        puts_off=schema.name in _PUTS_OFF,
        by_shapes=schema.name not in _READS_STRIDES | _CHANGES_DEVICE | _PUTS_OFF
        and not writes
        and func._overloadname != "dtype"  # view by the size of an element
        and _BY_NUMBERS.isdisjoint(func.tags),
    )
    _described[func] = op
    return op


class _HandedOn(NamedTuple):
    """Of one output: which input's payload it has, where its rows lie, and its shape."""

    source: int
    axes: Any
    shape: tuple[int, ...]


_handed_on: dict[Any, tuple[_HandedOn, ...]] = {}


class _Read:
    """The arguments of a call: the data in them, the GuardedTensors, and a key of what they are."""

    __slots__ = ("found", "key", "named", "plain")

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.found: list[Any] = []
        self.key: list[Any] | None = [func]
        self.plain = self._read(args)
        self.named = kwargs
        if kwargs:
            names = tuple(kwargs)
            self.named = dict(zip(names, self._read(tuple(kwargs.values())), strict=True))
            if self.key is not None:
                self.key.append(names)

    def _read(self, values: Sequence[Any]) -> list[Any]:
        result: list[Any] = []
        for value in values:
            kind = type(value)
            if kind is _guarded_wrap.wrapper:
                result.append(self._guarded(value))
                continue
            if kind is list or kind is tuple:
                if self.key is not None:
                    self.key.append(len(value))
                result.append(kind(self._read(value)))
                continue
            result.append(value)
            if self.key is None:
                continue
            if kind in _PLAIN:
                self.key.append(value)
            elif (kind is Tensor or kind is torch.nn.Parameter) and value.is_floating_point():
                self.key.append(value.shape)
            else:  # perhaps an index, whose numbers decide
                self.key = None
        return result

    def _guarded(self, g: Any) -> Tensor:
        found, key, data = self.found, self.key, g._data
        rows = g._rows if g._cell is None else rows_now(g)
        if key is not None:
            if type(data) is Tensor and data.is_floating_point():
                key.append(rows.shape)
                key.append(rows.axes)
                if found:  # the first that has the same flags
                    payload: Any = rows.payload
                    key.append(_place(payload.flags, found))
            else:  # traced: sizes may be symbols; integers: perhaps an index
                self.key = None
        found.append(g)
        return data  # type: ignore[no-any-return]


def _place(flags: Tensor, found: list[Any]) -> int:
    for place, g in enumerate(found):
        if g._rows.payload.flags is flags:
            return place
    return len(found)


def _rows_of(tensor: Any) -> Rows | None:
    return rows_now(tensor) if type(tensor) is _guarded_wrap.wrapper else None


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on the data of the GuardedTensors among its arguments, their rows on its results."""
    special = SPECIAL.get(func)
    if special is not None:
        return special(*args, **kwargs)
    op = _described.get(func) or _describe(func)
    read = _Read(func, args, kwargs)
    found = read.found
    if op.data_only or in_backward():
        out = func(*read.plain, **read.named)
        if found and found[0]._gradient and func is _aten.clone.default:  # to the strides expected
            return wrap(out, found[0]._rows)
        return out
    key = tuple(read.key) if read.key is not None and op.by_shapes else None
    moves = None if key is None else _handed_on.get(key)
    if moves is None:
        return _by_rule(op, (func, args, kwargs), read, key)
    out = func(*read.plain, **read.named)
    merges = found[0]._merges or (len(found) > 1 and any(g._merges for g in found))
    if len(moves) == 1 and isinstance(out, Tensor):
        result = _handed(out, moves[0], found, merges)
    else:
        result = type(out)(
            [_handed(one, move, found, merges) for one, move in zip(out, moves, strict=True)]
        )
    return as_view((func, args, kwargs), read.plain, read.named, result) if op.view else result


def _handed(out: Any, move: _HandedOn, found: list[Any], merges: bool) -> Any:
    source, axes, shape = move
    if source < 0:
        return out
    rows = found[source]._rows
    return wrap(out, rows if axes is None else Rows(shape, axes, rows.payload), merges)


def _by_rule(op: _Op, call: tuple[Any, Any, Any], read: _Read, key: Any) -> Any:
    func, args, kwargs = call
    merges = any(g._merges for g in read.found)
    if op.writes:
        _may_write(op, call)
    try:
        finish = follow(func, args, kwargs, _rows_of)
    except RowsLost:
        if op.composite:
            return func.decompose(*args, **kwargs)
        if not merges:
            raise
        finish = _merged(read.found)
    step = turned(call, read.plain, read.named) if op.reshapes_itself else None
    out = func(*read.plain, **read.named)
    if op.puts_off:
        out = out.resolve_conj().resolve_neg()
    try:
        rows = finish(out)
    except RowsLost:  # by a rule that had to see the outputs
        rows = _of_all(op, call, out, read.found)
        if not merges:
            raise
    if op.changes_device:
        rows = [None if one is None else beside(out, one) for one in rows]
    if op.reshapes_itself:
        return reshaped(call, rows[0], step)
    if op.writes:
        return _written(op, call, out, rows)
    if key is not None and not merges:
        _remember(key, out, rows, read.found)
    result = _wrapped(out, iter(rows), merges)
    if op.puts_off:
        result._apart = True
    return as_view(call, read.plain, read.named, result) if op.view else result


def _remember(key: Any, out: Any, rows: list[Rows | None], found: list[Any]) -> None:
    """Keeps what the rule said if it was to hand rows on as they are."""
    outs = (out,) if isinstance(out, Tensor) else out
    if len(outs) != len(rows):
        return
    moves = []
    for one in rows:
        source, axes = -1, None
        if one is not None:
            source = next((i for i, g in enumerate(found) if same_flags(g._rows, one)), -1)
            if source < 0:
                return
            given = found[source]._rows
            axes = None if one is given else one.axes
        moves.append(_HandedOn(source, axes, () if one is None else one.shape))
    if len(_handed_on) >= _REMEMBERED:
        _handed_on.clear()
    _handed_on[key] = tuple(moves)


def _wrapped(out: Any, rows: Iterator[Rows | None], merges: bool) -> Any:
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


def _of_all(op: _Op, call: tuple[Any, Any, Any], out: Any, found: list[Any]) -> list[Rows | None]:
    """All rows merged, for what an op has done; known also to what it has written into."""
    rows: list[Rows | None] = _merged(found)(out)
    if op.writes and not op.reshapes_itself:
        _written(op, call, out, rows)
    return rows


def _argument(at: tuple[int, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    position, name = at
    return args[position] if position < len(args) else kwargs.get(name)


def _way_out(name: str) -> str:
    """What to do instead of writing into a plain tensor."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _RECURRENT:
        frame = frame.f_back
    if frame is not None:
        return (
            "torch writes into the initial state, so pass one to the recurrent layer, guard(h0) or"
            " (guard(h0), guard(c0))"
        )
    return f"write into opguard.flags.guard({name}), or leave the flags out by .unwrap()"


def _may_write(op: _Op, call: tuple[Any, Any, Any]) -> None:
    """Refuses to write what has flags into a tensor that cannot hold them."""
    if op.keeps_statistics:
        return
    func, args, kwargs = call
    for at in op.writes:
        target = _argument(at, args, kwargs)
        if isinstance(target, Tensor) and type(target) is not _guarded_wrap.wrapper:
            raise RowsLost(
                f"expected {at[1]} of {func} to be a GuardedTensor, since what is written into it"
                f" has flags, got {type(target).__name__}; {_way_out(at[1])}"
            )
        if getattr(target, "_apart", False):
            raise RowsLost(
                f"expected {at[1]} of {func} to share its memory, got a conjugate or negative,"
                " which a GuardedTensor makes by a copy; write into the tensor it was made of"
            )
        if target is not None and at not in op.written:
            raise RowsLost(
                f"expected an op that returns what it writes, got {func}, which writes into"
                f" {at[1]} and says nothing of it; call the op for single tensors, or .unwrap()"
            )


def _written(op: _Op, call: tuple[Any, Any, Any], out: Any, rows: list[Rows | None]) -> Any:
    _, args, kwargs = call
    outs = (out,) if len(op.written) == 1 else out
    results = []
    left = iter(rows)
    for at, each in zip(op.written, outs or (), strict=False):
        target: Any = None if at is None else _argument(at, args, kwargs)
        if type(target) is _guarded_wrap.wrapper:
            new = next(left)
            if new is None and at in op.outs:  # all of it is new, and of no row
                new = cleared(rows_now(target), target._data.shape)
            if new is not None:
                resize(target)
                set_rows(target, new)
            results.append(target)
        elif at is not None:
            next(left, None)
            results.append(target)
        else:
            results.append(_wrapped(each, left, False))
    return results[0] if len(op.written) == 1 else tuple(results)
