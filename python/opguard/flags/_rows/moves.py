"""The rows of one tensor: its shape, where its rows lie, and what they carry.

Every method gives new :class:`Rows` for the tensor that the op of the same meaning gives. Where an
op puts elements of several rows where one row lies, those rows merge: a row of the result is never
without what an element of it came with. Dimensions may be negative, sizes may be ``SymInt``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opguard.flags._rows.axes import (
    Axis,
    bounds,
    by_digits,
    divides,
    is_whole,
    product,
    same,
    same_shape,
    strides,
)
from opguard.flags._rows.digits import (
    axes_of,
    few_enough,
    marks_of,
    refined,
    runs_of,
    without_needless_marks,
)
from opguard.flags._rows.payloads import Payload

__all__ = ["Rows"]


class Rows:
    """Immutable. ``shape`` of the tensor, ``axes`` in row-major order, ``payload`` of the rows.

    No axes: one row for the whole tensor.
    """

    __slots__ = ("axes", "payload", "shape")

    def __init__(self, shape: Sequence[Any], axes: tuple[Axis, ...], payload: Payload) -> None:
        self.shape = shape if type(shape) is tuple else tuple(shape)
        self.axes = axes
        self.payload = payload

    @classmethod
    def of_batch(cls, shape: Sequence[Any], payload: Payload) -> Rows:
        """A row for each index of dimension 0."""
        return cls(shape, (Axis(0, 1, shape[0]),), payload)

    def __repr__(self) -> str:
        return f"Rows({self.shape}, {[tuple(axis) for axis in self.axes]}, {self.payload!r})"

    @property
    def sizes(self) -> list[Any]:
        """The sizes of the axes; their product is ``payload.rows``."""
        return [axis.size for axis in self.axes]

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions the axes lie in, in row-major order of the rows."""
        return tuple(dict.fromkeys(axis.dim for axis in self.axes))

    def dim_of(self, dim: int) -> int:
        """``dim`` counted from the front."""
        return dim + len(self.shape) if dim < 0 else dim

    def on(self, dim: int) -> list[int]:
        """The numbers of the axes in dimension ``dim``."""
        return [k for k, axis in enumerate(self.axes) if axis.dim == dim]

    # --- whole dimensions -------------------------------------------------------------------------

    def made_whole(self, dim: int) -> Rows:
        """Each index of ``dim`` a coordinate of its own, if an axis lies there."""
        on = self.on(dim)
        size = self.shape[dim]
        if not on or (len(on) == 1 and is_whole(self.axes[on[0]], size)):
            return self
        if same(size, 0):
            rows = self.mixed((dim,))
            k = rows.on(dim)[0]
            payload = rows.payload.spread(rows.sizes[:k] + rows.sizes[k + 1 :], k, 0)
            return Rows(
                self.shape, (*rows.axes[:k], Axis(dim, 1, size), *rows.axes[k + 1 :]), payload
            )
        rows = self._by_digits(on)
        on = rows.on(dim)
        axes, payload, k = list(rows.axes), rows.payload, on[0]
        sizes = rows.sizes
        at, above = k, size
        for axis in axes[k : k + len(on)]:
            gap = above // (axis.inner * axis.size)
            payload = _between(payload, sizes, at, (gap, 1))
            if not same(gap, 1):
                sizes.insert(at, gap)
                at += 1
            at, above = at + 1, axis.inner
        payload = _between(payload, sizes, at - 1, (1, above))
        axes[k : k + len(on)] = [Axis(dim, 1, size)]
        return Rows(self.shape, tuple(axes), payload)

    def _by_digits(self, on: list[int]) -> Rows:
        """The axes ``on`` of one dimension side by side, the highest digits first."""
        order = by_digits(on, self.axes)
        if order == on and on[-1] - on[0] == len(on) - 1:
            return self
        first = on[0]
        left = [k for k in range(len(self.axes)) if k not in on]
        new = [*left[:first], *order, *left[first:]]
        payload = self.payload.permute(self.sizes, new)
        return Rows(self.shape, tuple(self.axes[k] for k in new), payload)

    def aligned(self) -> Rows:
        """Whole dimensions only: the rows as they are public."""
        axes = self.axes
        if len(axes) == 1 and is_whole(axes[0], self.shape[axes[0].dim]):
            return self
        rows = self
        for dim in self.dims:
            rows = rows.made_whole(dim)
        return rows

    # --- merging ----------------------------------------------------------------------------------

    def _folded(self, ks: Sequence[int]) -> Rows:
        """Without the axes ``ks``."""
        if not ks:
            return self
        payload = self.payload.fold(self.sizes, ks)
        axes = tuple(axis for k, axis in enumerate(self.axes) if k not in ks)
        return Rows(self.shape, axes, payload)

    def mixed(self, dims: Sequence[int]) -> Rows:
        """The same shape, all along ``dims`` merged: every index of them has the same row."""
        found = {self.dim_of(dim) for dim in dims}
        ks = [k for k, axis in enumerate(self.axes) if axis.dim in found]
        if all(same(self.axes[k].size, 1) for k in ks):
            return self
        rows = self._folded(ks)
        marks = {axis.dim: Axis(axis.dim, 1, 1) for axis in self.axes if axis.dim in found}
        axes = [marks.pop(axis.dim, None) if axis.dim in found else axis for axis in self.axes]
        return Rows(self.shape, tuple(axis for axis in axes if axis is not None), rows.payload)

    def whole(self, shape: Sequence[Any]) -> Rows:
        """A tensor of ``shape`` that is one row, of all merged."""
        return Rows(shape, (), self.payload.one() if self.axes else self.payload)

    def reduced(self, dims: Sequence[int], keepdim: bool = False) -> Rows:
        """Dimensions ``dims`` reduced to one element each, which stays where ``keepdim``."""
        found = {self.dim_of(dim) for dim in dims}
        rows = self._folded([k for k, axis in enumerate(self.axes) if axis.dim in found])
        if keepdim:
            shape = [1 if dim in found else size for dim, size in enumerate(self.shape)]
            return Rows(shape, rows.axes, rows.payload)
        return rows._dropped(found)

    def resized(self, dim: int, size: Any) -> Rows:
        """``dim`` has another size, every index of it the same row, of all along it merged."""
        return self.mixed((dim,))._with_size(self.dim_of(dim), size)

    def _with_size(self, dim: int, size: Any) -> Rows:
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        return Rows(shape, self.axes, self.payload)

    def _dropped(self, dims: set[int]) -> Rows:
        """Without dimensions ``dims``, in which no axis lies."""
        new: dict[int, int] = {}
        for dim in range(len(self.shape)):
            if dim not in dims:
                new[dim] = len(new)
        axes = tuple(axis._replace(dim=new[axis.dim]) for axis in self.axes)
        return Rows([self.shape[dim] for dim in new], axes, self.payload)

    # --- dimensions -------------------------------------------------------------------------------

    def permuted(self, dims: Sequence[int]) -> Rows:
        """Dimension ``dims[i]`` becomes dimension ``i``."""
        order = [self.dim_of(dim) for dim in dims]
        axes = tuple(axis._replace(dim=order.index(axis.dim)) for axis in self.axes)
        return Rows([self.shape[dim] for dim in order], axes, self.payload)

    def expanded(self, shape: Sequence[Any]) -> Rows:
        """Broadcast to ``shape``; -1 keeps a size. New dimensions come first."""
        new = len(shape) - len(self.shape)
        sizes = tuple(
            self.shape[dim - new] if type(size) is int and size == -1 and dim >= new else size
            for dim, size in enumerate(shape)
        )
        return Rows(sizes, self._shifted(new), self.payload)

    def _shifted(self, by: int) -> tuple[Axis, ...]:
        if by == 0:
            return self.axes
        return tuple(Axis(axis.dim + by, axis.inner, axis.size) for axis in self.axes)

    def unsqueezed(self, dim: int) -> Rows:
        """A new dimension of size 1 at ``dim``."""
        dim = dim + len(self.shape) + 1 if dim < 0 else dim
        axes = tuple(
            axis._replace(dim=axis.dim + 1) if axis.dim >= dim else axis for axis in self.axes
        )
        return Rows((*self.shape[:dim], 1, *self.shape[dim:]), axes, self.payload)

    def squeezed(self, dims: Sequence[int] | None = None) -> Rows:
        """Without those of ``dims`` (None: of all) that have size 1."""
        among = range(len(self.shape)) if dims is None else map(self.dim_of, dims)
        found = {dim for dim in among if same(self.shape[dim], 1)}
        if not found:
            return self
        return self._folded([k for k, axis in enumerate(self.axes) if axis.dim in found])._dropped(
            found
        )

    def reshaped(self, shape: Sequence[Any]) -> Rows:
        """The same elements in ``shape``, without -1.

        Axes go along digit by digit. Where the new sizes cut the digits of one apart there are more
        rows than before, or, if they would be very many, it is merged.
        """
        shape = tuple(shape)
        if not self.axes or same_shape(shape, self.shape):
            return Rows(shape, self.axes, self.payload)
        common = 0
        while common < min(len(shape), len(self.shape)):
            if not same(shape[common], self.shape[common]):
                break
            common += 1
        if all(axis.dim < common for axis in self.axes):
            return Rows(shape, self.axes, self.payload)
        if any(same(size, 0) for size in shape):
            kept = self._folded([k for k, axis in enumerate(self.axes) if axis.dim >= common])
            return Rows(shape, kept.axes, kept.payload)
        return self._by_runs(shape)

    def _by_runs(self, shape: tuple[Any, ...]) -> Rows:
        runs = runs_of(self.axes, self.shape)
        payload, sizes, axes, at = self.payload, [run.size for run in runs], [], 0
        for run in runs:
            found = axes_of(run, shape)
            if found is None:
                longer = refined(run, runs, shape)
                if longer is None and few_enough(shape):
                    flat = self._by_runs((product(shape),))  # no size cuts there
                    return flat.made_whole(0)._by_runs(shape)
                if longer is None:
                    payload = payload.fold(sizes, (at,))
                    del sizes[at]
                    axes += marks_of(run, shape)
                    continue
                gaps = (longer.high // run.high, run.low // longer.low)
                payload = _between(payload, sizes, at, gaps)
                sizes[at] = longer.size
                found = axes_of(longer, shape) or []
            axes += found
            at += 1
        return Rows(shape, without_needless_marks(axes), payload)

    # --- along one dimension ----------------------------------------------------------------------

    def selected(self, dim: int, i: Any) -> Rows:
        """Index ``i`` of ``dim``, which goes."""
        dim = self.dim_of(dim)
        rows = self
        i = i + self.shape[dim] if type(i) is int and i < 0 else i
        for k in reversed(self.on(dim)):
            axis = rows.axes[k]
            payload = rows.payload.select(rows.sizes, k, i // axis.inner % axis.size)
            rows = Rows(rows.shape, (*rows.axes[:k], *rows.axes[k + 1 :]), payload)
        return rows._dropped({dim})

    def sliced(self, dim: int, start: Any, end: Any, step: Any = 1) -> Rows:
        """start, start + step, ... below end; None, negative and large numbers as in Python."""
        dim = self.dim_of(dim)
        size = self.shape[dim]
        start, end = bounds(start, end, size)
        count = end - start if same(step, 1) else (end - start + step - 1) // step
        if same(count, size):
            return self
        on = self.on(dim)
        axis = self.axes[on[0]] if on else None
        if axis is None or (len(on) == 1 and same(axis.size, 1)):
            return self._with_size(dim, count)
        if len(on) == 1 and same(step, 1) and same(axis.inner * axis.size, size):
            inner = axis.inner  # the highest digits: runs of `inner` stay together
            if divides(inner, start) and divides(inner, end):
                return self._sliced(on[0], start // inner, end // inner, 1, count)
        whole = self.made_whole(dim)
        return whole._sliced(whole.on(dim)[0], start, end, step, count)

    def _sliced(self, k: int, start: Any, end: Any, step: Any, count: Any) -> Rows:
        axis = self.axes[k]
        payload = self.payload.slice(self.sizes, k, start, end, step)
        axes = (*self.axes[:k], axis._replace(size=count // axis.inner), *self.axes[k + 1 :])
        return Rows(self.shape, axes, payload)._with_size(axis.dim, count)

    def taken(self, dim: int, index: Tensor) -> Rows:
        """The indices of ``dim`` that ``index`` (1-D) names."""
        dim = self.dim_of(dim)
        count = index.shape[0]
        if all(same(self.axes[k].size, 1) for k in self.on(dim)):
            return self._with_size(dim, count)
        rows = self.made_whole(dim)
        k = rows.on(dim)[0]
        payload = rows.payload.take(rows.sizes, k, index)
        axes = (*rows.axes[:k], Axis(dim, 1, count), *rows.axes[k + 1 :])
        return Rows(rows.shape, axes, payload)._with_size(dim, count)

    def flipped(self, dims: Sequence[int]) -> Rows:
        """Dimensions ``dims`` run backwards."""
        found = {self.dim_of(dim) for dim in dims}
        ks = [k for k, a in enumerate(self.axes) if a.dim in found and not same(a.size, 1)]
        if not ks:
            return self
        return Rows(self.shape, self.axes, self.payload.flip(self.sizes, ks))

    def rolled(self, dim: int, shift: Any) -> Rows:
        """Index ``i`` of ``dim`` goes to ``i + shift``, around the end."""
        dim = self.dim_of(dim)
        rows = self
        if not all(divides(self.axes[k].inner, shift) for k in self.on(dim)) or (
            len(self.on(dim)) > 1
        ):
            rows = self.made_whole(dim)
        for k in rows.on(dim):
            axis = rows.axes[k]
            if not same(axis.size, 1):
                payload = rows.payload.roll(rows.sizes, k, shift // axis.inner)
                rows = Rows(rows.shape, rows.axes, payload)
        return rows

    def repeated(self, repeats: Sequence[Any]) -> Rows:
        """Tiled as ``Tensor.repeat`` tiles; new dimensions come first."""
        new = len(repeats) - len(self.shape)
        old = (*(1,) * new, *self.shape)
        shape = [size * count for size, count in zip(old, repeats, strict=True)]
        return Rows(shape, self._shifted(new), self.payload)

    def padded(self, dim: int, before: Any, after: Any) -> Rows:
        """Elements of no row around ``dim``; negative numbers take elements away."""
        dim = self.dim_of(dim)
        count = self.shape[dim] + before + after
        if not self.on(dim):
            return self._with_size(dim, count)
        rows = self.made_whole(dim)
        k = rows.on(dim)[0]
        payload = rows.payload.pad(rows.sizes, k, before, after)
        axes = (*rows.axes[:k], Axis(dim, 1, count), *rows.axes[k + 1 :])
        return Rows(rows.shape, axes, payload)._with_size(dim, count)

    def reordered_by(self, index: Tensor, dim: int) -> Rows:
        """``gather``: element ``[.., i, ..]`` comes from ``index[.., i, ..]`` of ``dim``.

        ``index`` has the result's shape, and where smaller than this one in other dimensions it
        takes their first elements. A row of the result is all rows that its elements came from.
        """
        if not self.shape:
            return self
        dim = self.dim_of(dim)
        rows = self
        for other, size in enumerate(index.shape):
            if other != dim:
                rows = rows.sliced(other, 0, size)
        if all(same(rows.axes[k].size, 1) for k in rows.on(dim)):
            return rows._with_size(dim, index.shape[dim])
        rows = rows.aligned()
        dims = [axis.dim for axis in rows.axes]
        steps = strides(rows.sizes)
        # The row of each element: its coordinates in the other axes and its index along `dim`.
        number = index * steps[dims.index(dim)]
        for axis, step in zip(rows.axes, steps, strict=True):
            if axis.dim != dim:
                at = torch.arange(axis.size, device=index.device) * step
                around = [1] * len(index.shape)
                around[axis.dim] = axis.size
                number = number + at.view(around)
        others = [other for other in range(len(rows.shape)) if other not in dims]
        count = product(index.shape[d] for d in dims)
        each = product(index.shape[d] for d in others)
        flat = number.permute(*dims, *others).reshape(count, each)
        axes = tuple(Axis(d, 1, index.shape[d]) for d in dims)
        return Rows(index.shape, axes, rows.payload.gather(flat))


def _between(payload: Payload, sizes: list[Any], k: int, gaps: tuple[Any, Any]) -> Payload:
    """Axis ``k`` in the middle of ``gaps[0]`` copies outside and ``gaps[1]`` inside of it."""
    above, under = gaps
    if not same(under, 1):
        payload = payload.spread(sizes, k + 1, under)
        sizes = [*sizes[: k + 1], under, *sizes[k + 1 :]]
    return payload if same(above, 1) else payload.spread(sizes, k, above)
