"""Where rows go in ops that give an element another place, or another shape around it.

Nothing here looks at data: what moves where is known from the shapes and the arguments. New
elements (padding, the zeros of ``diag_embed``) have no rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opguard.flags._rows.axes import product, same
from opguard.flags._rows.numbering import ramp, unflagged
from opguard.flags._rows.rows import Rows
from opguard.flags._rows.rules import rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from opguard.flags._rows.rules import Call

__all__: list[str] = []


def _wrapped(dim: int, ndim: int) -> int:
    """``dim`` counted from the front; a 0-d tensor takes 0 and -1 as torch does."""
    return dim % max(ndim, 1)


@rule(
    "aten::alias",
    "aten::alias_copy",
    "aten::detach",
    "aten::detach_copy",
    "aten::lift",
    "aten::lift_fresh",
    "aten::lift_fresh_copy",
    "aten::clone",
    "aten::_lazy_clone",
    "aten::_to_copy",
    "aten::_pin_memory",
    "aten::_conj",
    "aten::_conj_copy",
    "aten::_neg_view",
    "aten::_neg_view_copy",
    "aten::_fw_primal",
    "aten::_fw_primal_copy",
    "aten::tril",
    "aten::triu",
)
def _same(call: Call) -> Rows | None:
    return call.rows("self")


@rule(
    "aten::view",
    "aten::view_copy",
    "aten::_unsafe_view",
    "aten::reshape",
    "aten::_reshape_copy",
    "aten::_reshape_alias",
    "aten::_reshape_alias_copy",
)
def _view(call: Call) -> Any:
    rows = call.rows("self")
    if rows is None:
        return None
    if "dtype" in call:
        return _view_dtype(call, rows)
    # The output's shape is the argument's with -1 worked out.
    return lambda out: rows.reshaped(tuple(out.shape))


def _view_dtype(call: Call, rows: Rows) -> Rows:
    old, new = call["self"].dtype.itemsize, call["dtype"].itemsize
    if old == new:
        return rows
    *lead, last = rows.shape
    if old > new:
        parts = old // new
        split = rows.unsqueezed(-1).expanded((*rows.shape, parts))
        return split.reshaped((*lead, last * parts))
    parts = new // old
    return rows.reshaped((*lead, last // parts, parts)).reduced((-1,), False)


@rule("aten::view_as_real", "aten::view_as_real_copy")
def _view_as_real(call: Call) -> Rows | None:
    rows = call.rows("self")
    return None if rows is None else rows.unsqueezed(-1).expanded((*rows.shape, 2))


@rule("aten::view_as_complex", "aten::view_as_complex_copy")
def _view_as_complex(call: Call) -> Rows | None:
    rows = call.rows("self")
    return None if rows is None else rows.reduced((-1,), False)


@rule("aten::expand", "aten::expand_copy")
def _expand(call: Call) -> Any:
    rows = call.rows("self")
    return None if rows is None else lambda out: rows.expanded(tuple(out.shape))


@rule("aten::permute", "aten::permute_copy")
def _permute(call: Call) -> Rows | None:
    rows = call.rows("self")
    return None if rows is None else rows.permuted(tuple(call["dims"]))


def _swapped(rows: Rows, one: int, other: int) -> Rows:
    order = list(range(len(rows.shape)))
    if len(order) > 1:
        order[one], order[other] = order[other], order[one]
    return rows.permuted(tuple(order))


@rule("aten::transpose", "aten::transpose_copy", "aten::swapdims", "aten::swapaxes")
def _transpose(call: Call) -> Rows | None:
    rows = call.rows("self")
    if rows is None:
        return None
    names = ("dim0", "dim1") if "dim0" in call else ("axis0", "axis1")
    return _swapped(rows, *(_wrapped(call[name], len(rows.shape)) for name in names))


@rule("aten::t", "aten::t_copy")
def _t(call: Call) -> Rows | None:
    rows = call.rows("self")
    return None if rows is None else _swapped(rows, 0, len(rows.shape) - 1)


@rule("aten::unsqueeze", "aten::unsqueeze_copy")
def _unsqueeze(call: Call) -> Rows | None:
    rows = call.rows("self")
    return None if rows is None else rows.unsqueezed(call["dim"])


@rule("aten::squeeze", "aten::squeeze_copy")
def _squeeze(call: Call) -> Rows | None:
    rows = call.rows("self")
    if rows is None:
        return None
    ndim = len(rows.shape)
    dims: Sequence[int] = range(ndim)
    if "dim" in call:
        dims = call["dim"] if isinstance(call["dim"], (list, tuple)) else [call["dim"]]
    gone = {_wrapped(dim, ndim) for dim in dims} if ndim else set()
    return rows.squeezed(tuple(sorted(dim for dim in gone if rows.shape[dim] == 1)))


@rule("aten::select", "aten::select_copy")
def _select(call: Call) -> Rows | None:
    rows = call.rows("self")
    return None if rows is None else rows.selected(call["dim"], call["index"])


@rule("aten::slice", "aten::slice_copy")
def _slice(call: Call) -> Rows | None:
    rows = call.rows("self")
    if rows is None:
        return None
    return rows.sliced(call["dim"], call["start"], call["end"], call["step"])


@rule("aten::narrow_copy")
def _narrow(call: Call) -> Rows | None:
    rows = call.rows("self")
    if rows is None:
        return None
    dim = call["dim"]
    start = call["start"]
    if start < 0:
        start = start + rows.shape[dim]
    return rows.sliced(dim, start, start + call["length"], 1)


@rule(
    "aten::split",
    "aten::split_copy",
    "aten::split_with_sizes",
    "aten::split_with_sizes_copy",
    "aten::unsafe_split",
    "aten::unsafe_split_with_sizes",
)
def _split(call: Call) -> Any:
    rows, dim = call.rows("self"), call["dim"]
    if rows is None:
        return None

    def parts(outs: Sequence[Tensor]) -> list[Rows | None]:
        found: list[Rows | None] = []
        start: Any = 0
        for out in outs:
            found.append(rows.sliced(dim, start, start + out.shape[dim], 1))
            start = start + out.shape[dim]
        return found

    return parts


@rule("aten::unbind", "aten::unbind_copy")
def _unbind(call: Call) -> Any:
    rows, dim = call.rows("self"), call["dim"]
    return None if rows is None else lambda outs: [rows.selected(dim, i) for i in range(len(outs))]


@rule("aten::flip")
def _flip(call: Call) -> Rows | None:
    rows = call.rows("self")
    return None if rows is None else rows.flipped(tuple(call["dims"]))


@rule("aten::roll")
def _roll(call: Call) -> Rows | None:
    rows = call.rows("self")
    if rows is None:
        return None
    dims = call["dims"]
    if not dims:
        return (
            rows.reshaped((product(rows.shape),)).rolled(0, call["shifts"][0]).reshaped(rows.shape)
        )
    for dim, shift in zip(dims, call["shifts"], strict=True):
        rows = rows.rolled(dim, shift)
    return rows


@rule("aten::rot90")
def _rot90(call: Call) -> Rows | None:
    rows = call.rows("self")
    if rows is None:
        return None
    one, other = (_wrapped(dim, len(rows.shape)) for dim in call["dims"])
    turns = call["k"] % 4
    if turns == 1:
        return _swapped(rows.flipped((other,)), one, other)
    if turns == 2:
        return rows.flipped((one, other))
    if turns == 3:
        return _swapped(rows.flipped((one,)), one, other)
    return rows


@rule("aten::repeat")
def _repeat(call: Call) -> Rows | None:
    rows = call.rows("self")
    return None if rows is None else rows.repeated(tuple(call["repeats"]))


@rule("aten::unfold", "aten::unfold_copy")
def _unfold(call: Call) -> Any:
    rows, size, step = call.rows("self"), call["size"], call["step"]
    if rows is None:
        return None
    if not rows.shape:
        return rows.unsqueezed(0).expanded((size,))
    dim = _wrapped(call["dimension"], len(rows.shape))

    def windows(out: Tensor) -> Rows:
        count = out.shape[dim]
        index = (ramp(rows, count)[:, None] * step + ramp(rows, size)).reshape(-1)
        split = (*rows.shape[:dim], count, size, *rows.shape[dim + 1 :])
        order = [d for d in range(len(split)) if d != dim + 1]
        found = rows.taken(dim, index) if rows.on(dim) else rows.resized(dim, count * size)
        return found.reshaped(split).permuted((*order, dim + 1))

    return windows


@rule("aten::unfold_backward")
def _folded_windows(call: Call) -> Rows | None:
    """Windows laid over each other again, as ``torch.istft`` does with its frames."""
    rows, sizes = call.rows("grad_in"), call["input_sizes"]
    if rows is None:
        return None
    dim = _wrapped(call["dim"], len(sizes))
    return rows.reduced((-1,)).resized(dim, sizes[dim])


@rule("aten::diagonal", "aten::diagonal_copy")
def _diagonal(call: Call) -> Any:
    rows = call.rows("self")
    if rows is None:
        return None
    ndim = len(rows.shape)
    one, other = _wrapped(call["dim1"], ndim), _wrapped(call["dim2"], ndim)
    down, right = max(-call["offset"], 0), max(call["offset"], 0)
    lead = [d for d in range(ndim) if d not in (one, other)]

    def picked(out: Tensor) -> Rows:
        size = out.shape[-1]
        found = rows.sliced(one, down, down + size, 1).sliced(other, right, right + size, 1)
        found = found.permuted((*lead, one, other))
        for d in (ndim - 1, ndim - 2):
            if not found.on(d):
                return found.resized(d, 1).squeezed((d,))
        found = found.reshaped((*found.shape[:-2], size * size))
        return found.taken(-1, ramp(rows, size) * (size + 1))

    return picked


@rule("aten::diag_embed")
def _diag_embed(call: Call) -> Rows | None:
    rows = call.rows("self")
    if rows is None:
        return None
    ndim = len(rows.shape) + 1
    one, other = _wrapped(call["dim1"], ndim), _wrapped(call["dim2"], ndim)
    down, right = max(-call["offset"], 0), max(call["offset"], 0)
    # Row k of the matrix has element k - down, its other elements are zeros.
    found = rows.padded(-1, down, right).unsqueezed(-1)
    side = found.shape[-2]
    found = found.expanded((*found.shape[:-1], side))
    lead = [d for d in range(ndim) if d not in (one, other)]
    order = [lead.index(d) if d in lead else ndim - 2 + (d == other) for d in range(ndim)]
    return found.permuted(tuple(order))


def _padded(rows: Rows, dim: int, before: Any, after: Any) -> Rows:
    """``dim`` grown by elements without rows, or cut where a number is negative."""
    if before < 0 or after < 0:
        size = rows.shape[dim]
        rows = rows.sliced(dim, max(-before, 0), size - max(-after, 0), 1)
    return rows.padded(dim, max(before, 0), max(after, 0))


@rule("aten::constant_pad_nd")
def _constant_pad(call: Call) -> Rows | None:
    rows, pad = call.rows("self"), call["pad"]
    if rows is None:
        return None
    for k in range(len(pad) // 2):
        if pad[2 * k] != 0 or pad[2 * k + 1] != 0:
            rows = _padded(rows, -1 - k, pad[2 * k], pad[2 * k + 1])
    return rows


def _bordered(call: Call, source: Callable[[Tensor, Any], Tensor]) -> Any:
    """Padding with copies: ``source`` says which element stands at a place, given the size."""
    rows, pad = call.rows("self"), call["padding"]
    if rows is None:
        return None

    def found(out: Tensor) -> Rows:
        moved = rows
        for k in range(len(pad) // 2):
            dim = len(rows.shape) - 1 - k
            size = rows.shape[dim]
            if moved.on(dim):
                place = ramp(rows, -pad[2 * k], size + pad[2 * k + 1])
                moved = moved.taken(dim, source(place, size))
            else:
                moved = moved.resized(dim, out.shape[dim])
        return moved

    return found


@rule("aten::reflection_pad1d", "aten::reflection_pad2d", "aten::reflection_pad3d")
def _reflection_pad(call: Call) -> Any:
    return _bordered(call, lambda place, size: (size - 1) - ((size - 1) - place.abs()).abs())


@rule("aten::replication_pad1d", "aten::replication_pad2d", "aten::replication_pad3d")
def _replication_pad(call: Call) -> Any:
    return _bordered(call, lambda place, size: place.clamp(0, size - 1))


@rule("aten::pixel_shuffle")
def _pixel_shuffle(call: Call) -> Rows | None:
    rows, r = call.rows("self"), call["upscale_factor"]
    if rows is None:
        return None
    *lead, c, h, w = rows.shape
    n = len(lead)
    found = rows.reshaped((*lead, c // (r * r), r, r, h, w))
    found = found.permuted((*range(n), n, n + 3, n + 1, n + 4, n + 2))
    return found.reshaped((*lead, c // (r * r), h * r, w * r))


@rule("aten::pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Rows | None:
    rows, r = call.rows("self"), call["downscale_factor"]
    if rows is None:
        return None
    *lead, c, h, w = rows.shape
    n = len(lead)
    found = rows.reshaped((*lead, c, h // r, r, w // r, r))
    found = found.permuted((*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return found.reshaped((*lead, c * r * r, h // r, w // r))


@rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def _channel_shuffle(call: Call) -> Rows | None:
    rows, groups = call.rows("self"), call["groups"]
    if rows is None:
        return None
    n, c, *rest = rows.shape
    found = rows.reshaped((n, groups, c // groups, *rest))
    return _swapped(found, 1, 2).reshaped(rows.shape)


@rule(
    "aten::empty_like",
    "aten::zeros_like",
    "aten::ones_like",
    "aten::full_like",
    "aten::rand_like",
    "aten::randn_like",
    "aten::randint_like",
)
def _created_like(call: Call) -> Rows | None:
    # No flags come from a shape, but what is written into it later has rows to lie in.
    rows = call.rows("self")
    return None if rows is None else unflagged(rows)


@rule(
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::new_full",
    "aten::new_ones",
    "aten::new_zeros",
    "aten::_new_zeros_with_same_feature_meta",
)
def _created(call: Call) -> Any:
    rows = call.rows("self")
    if rows is None:
        return None

    def found(out: Tensor) -> Rows | None:
        shape = tuple(out.shape)
        for d in rows.dims:
            if d >= len(shape) or not same(shape[d], rows.shape[d]):
                return None  # another shape altogether: there is no telling where its rows lie
        return unflagged(Rows(shape, rows.axes, rows.payload))

    return found
