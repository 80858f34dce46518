"""What rows carry: error flags, or the numbers of the samples that their elements came from.

Every method takes ``sizes``, the sizes of the axes in row-major order, and axes by their number
``k``. Payloads are immutable; a method that changes nothing returns the payload itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from opguard.flags import _engine
from opguard.flags._rows.axes import product, same
from opguard.flags.config import CARRIERS

__all__ = ["IDENTITY", "MIXED", "NO_SAMPLE", "FlagPayload", "Payload", "SamplePayload"]

Sizes = Sequence[Any]
P = TypeVar("P", bound="Payload")


class Payload(Protocol):
    """See the module; ``rows`` is the product of the axes' sizes."""

    #: Whether two equal copies in one new dimension stay one row each (and not twice as many).
    copies_share: bool

    @property
    def rows(self) -> Any: ...
    def select(self: P, sizes: Sizes, k: int, i: Any) -> P: ...
    def slice(self: P, sizes: Sizes, k: int, start: Any, end: Any, step: Any) -> P: ...
    def take(self: P, sizes: Sizes, k: int, index: Tensor) -> P: ...
    def flip(self: P, sizes: Sizes, ks: Sequence[int]) -> P: ...
    def roll(self: P, sizes: Sizes, k: int, shift: Any) -> P: ...
    def permute(self: P, sizes: Sizes, order: Sequence[int]) -> P: ...
    def spread(self: P, sizes: Sizes, k: int, count: Any) -> P: ...
    def fold(self: P, sizes: Sizes, ks: Sequence[int]) -> P: ...
    def pad(self: P, sizes: Sizes, k: int, before: Any, after: Any) -> P: ...
    def cat(self: P, k: int, parts: Sequence[tuple[P | None, Sizes]]) -> P: ...
    def merge(self: P, *others: P) -> P: ...
    def gather(self: P, index: Tensor) -> P: ...
    def one(self: P) -> P: ...


_SLOT_BITS: Final = 0xFFFF  # of a key: how many slots, slots.h


def _slots(flags: Tensor) -> int:
    return int(flags.shape[1]) * CARRIERS[flags.dtype][2]


class FlagPayload:
    """Flags (rows, words) and the ``key`` of the configuration by which they merge."""

    __slots__ = ("flags", "key")
    copies_share = False

    def __init__(self, flags: Tensor, key: int) -> None:
        self.flags = flags
        self.key = key

    @property
    def rows(self) -> Any:
        """How many; an int or a SymInt."""
        return self.flags.shape[0]

    def __repr__(self) -> str:
        return f"FlagPayload({self.flags!r}, {self.key})"

    def _in(self, sizes: Sizes) -> Tensor:
        if len(sizes) == 1:
            return self.flags
        return self.flags.reshape(*sizes, self.flags.shape[-1])

    def _of(self, flags: Tensor) -> FlagPayload:
        if flags.dim() != 2:
            flags = flags.reshape(product(flags.shape[:-1]), flags.shape[-1])
        return FlagPayload(flags, self.key)

    def select(self, sizes: Sizes, k: int, i: Any) -> FlagPayload:
        """The rows whose coordinate ``k`` is ``i``."""
        return self._of(self._in(sizes).select(k, i).reshape(-1, self.flags.shape[-1]))

    def slice(self, sizes: Sizes, k: int, start: Any, end: Any, step: Any) -> FlagPayload:
        """The rows whose coordinate ``k`` lies in start, start + step, ... below end."""
        return self._of(torch.ops.aten.slice.Tensor(self._in(sizes), k, start, end, step))

    def take(self, sizes: Sizes, k: int, index: Tensor) -> FlagPayload:
        """Along ``k`` the rows that ``index`` (1-D) names."""
        return self._of(self._in(sizes).index_select(k, _near(index, self.flags)))

    def flip(self, sizes: Sizes, ks: Sequence[int]) -> FlagPayload:
        """Coordinates ``ks`` run backwards."""
        return self._of(self._in(sizes).flip(*ks))

    def roll(self, sizes: Sizes, k: int, shift: Any) -> FlagPayload:
        """Coordinate ``k`` goes up by ``shift``, around the end."""
        return self._of(self._in(sizes).roll(shift, k))

    def permute(self, sizes: Sizes, order: Sequence[int]) -> FlagPayload:
        """Axis ``order[i]`` becomes axis ``i``."""
        if list(order) == list(range(len(order))):
            return self
        return self._of(self._in(sizes).permute(*order, len(order)))

    def spread(self, sizes: Sizes, k: int, count: Any) -> FlagPayload:
        """A new axis of ``count`` equal copies before axis ``k``."""
        if same(count, 1):
            return self
        words = self.flags.shape[-1]
        new = self._in(sizes) if sizes else self.flags.reshape(words)
        new = new.unsqueeze(k).expand(*sizes[:k], count, *sizes[k:], words)
        return self._of(new.contiguous())  # each row in memory of its own: flags are written into

    def fold(self, sizes: Sizes, ks: Sequence[int]) -> FlagPayload:
        """All rows along ``ks`` merged, in row-major order of ``ks``; these axes go."""
        count = product(sizes[k] for k in ks)
        if same(count, 1):
            return self
        numbers = torch.arange(self.rows, device=self.flags.device)
        if len(ks) == len(sizes):
            return self.gather(numbers.unsqueeze(0))
        left = [k for k in range(len(sizes)) if k not in ks]
        rows = product(sizes[k] for k in left)
        return self.gather(numbers.view(*sizes).permute(*left, *ks).reshape(rows, count))

    def pad(self, sizes: Sizes, k: int, before: Any, after: Any) -> FlagPayload:
        """Rows without flags before and after along ``k``; negative: so many rows fewer."""
        around = [0] * (2 * (len(sizes) - k)) + [before, after]
        return self._of(torch.ops.aten.constant_pad_nd.default(self._in(sizes), around, 0))

    def cat(self, k: int, parts: Sequence[tuple[FlagPayload | None, Sizes]]) -> FlagPayload:
        """The parts one after the other along ``k``; None: rows without flags."""
        like = self.flags
        words, dtype, device = like.shape[1], like.dtype, like.device
        given = [part.flags for part, _ in parts if part is not None]
        if not all(
            f.dtype == dtype and f.device == device and same(f.shape[1], words) for f in given
        ):
            words = -(-_most_slots(given) // CARRIERS[dtype][2])
        tensors = []
        for part, sizes in parts:
            if part is None:
                tensors.append(like.new_zeros(*sizes, words))
            else:
                fitting = _in_words(_near(part.flags, like), like, words)
                tensors.append(fitting if len(sizes) == 1 else fitting.reshape(*sizes, words))
        return self._of(torch.cat(tensors, k))

    def merge(self, *others: FlagPayload) -> FlagPayload:
        """Row by row what all hold, in this order; nothing of it is lost for want of slots."""
        kept = [self.flags]
        for other in others:
            if all(other.flags is not one for one in kept):
                kept.append(_near(other.flags, self.flags))
        if len(kept) == 1:
            return self
        words, dtype = kept[0].shape[1], kept[0].dtype
        if not all(f.dtype == dtype and same(f.shape[1], words) for f in kept):
            most = _most_slots(kept)
            kept = [_widened(flags, most) for flags in kept]
        return FlagPayload(_engine.merge(kept, self._wide_key(kept[0])), self.key)

    def _wide_key(self, flags: Tensor) -> int:
        return (self.key & ~_SLOT_BITS) | _slots(flags)

    def gather(self, index: Tensor) -> FlagPayload:
        """Row m: the fold of the rows ``index[m]`` names, -1 names none. ``index`` (M, K) int64."""
        return FlagPayload(
            _engine.gather(self.flags, _near(index, self.flags), self._wide_key(self.flags)),
            self.key,
        )

    def one(self) -> FlagPayload:
        """All rows merged into one."""
        return self.fold((self.rows,), (0,))


def _near(tensor: Tensor, like: Tensor) -> Tensor:
    """On the device of ``like``: a number on the CPU goes with tensors of any device."""
    return tensor if tensor.device == like.device else tensor.to(like.device)


def _most_slots(all_flags: Sequence[Tensor]) -> int:
    """The largest capacity, and a whole number of words of either width if there are both."""
    most = max(_slots(flags) for flags in all_flags)
    return most if len({flags.dtype for flags in all_flags}) == 1 else -(-most // 4) * 4


def _widened(flags: Tensor, slots: int) -> Tensor:
    words = -(-slots // CARRIERS[flags.dtype][2])
    if words == flags.shape[1]:
        return flags
    return torch.cat([flags, flags.new_zeros(flags.shape[0], words - flags.shape[1])], 1)


def _in_words(flags: Tensor, like: Tensor, words: int) -> Tensor:
    """``flags`` in the dtype of ``like``, ``words`` wide."""
    if flags.dtype == like.dtype and same(flags.shape[1], words):
        return flags
    wide = _widened(flags, words * CARRIERS[like.dtype][2])
    if wide.dtype == like.dtype:
        return wide
    empty = like.new_zeros(wide.shape[0], words)
    key = words * CARRIERS[like.dtype][2] | CARRIERS[like.dtype][0] << 21
    return _engine.merge([empty, wide], key)


@cache
def _numpy() -> Any:
    import numpy

    return numpy


IDENTITY: Final = "identity"  # row i is sample i
MIXED: Final = -2  # of more than one sample, or not proven
NO_SAMPLE: Final = -1  # padding: of no sample at all


class SamplePayload:
    """Sample numbers, known without a look at any device.

    ``ids``: IDENTITY, an int64 array with a number, MIXED or NO_SAMPLE for each row, or None: all
    rows are MIXED. ``rows`` may be a SymInt where ``ids`` is no array.
    """

    __slots__ = ("_ids", "_rows")
    copies_share = True

    def __init__(self, rows: Any, ids: Any = IDENTITY) -> None:
        self._rows = rows
        self._ids = ids

    @property
    def rows(self) -> Any:
        """How many; an int or a SymInt."""
        return self._rows

    @property
    def identity(self) -> bool:
        """Whether row i is sample i."""
        return isinstance(self._ids, str)

    @property
    def mixed(self) -> bool:
        """Whether no row is proven to be of one sample."""
        return self._ids is None or (not self.identity and bool((self._ids == MIXED).all()))

    def __repr__(self) -> str:
        return f"SamplePayload({self._rows}, {self._ids})"

    def ids(self) -> Any:
        """(rows,) int64 numpy array of sample numbers, MIXED and NO_SAMPLE among them.

        None where the number of rows is symbolic, or all are MIXED.
        """
        if self._ids is None or not isinstance(self._rows, int):
            return None
        return _numpy().arange(self._rows) if self.identity else self._ids

    def _with(self, sizes: Sizes, change: Any, new: Sizes) -> SamplePayload:
        ids = self.ids()
        if ids is None or not all(isinstance(size, int) for size in new):
            return SamplePayload(product(new), None)
        return _samples(change(ids.reshape(tuple(sizes))).reshape(-1))

    def select(self, sizes: Sizes, k: int, i: Any) -> SamplePayload:
        """See :class:`FlagPayload`; likewise below."""
        new = [*sizes[:k], *sizes[k + 1 :]]
        if not isinstance(i, int):
            return SamplePayload(product(new), None)
        return self._with(sizes, lambda ids: ids.take(i, k), new)

    def slice(self, sizes: Sizes, k: int, start: Any, end: Any, step: Any) -> SamplePayload:
        count = (end - start + step - 1) // step
        new = [*sizes[:k], count, *sizes[k + 1 :]]
        if not all(isinstance(number, int) for number in (start, end, step)):
            return SamplePayload(product(new), None)
        at = (slice(None),) * k + (slice(start, end, step),)
        return self._with(sizes, lambda ids: ids[at], new)

    def take(self, sizes: Sizes, k: int, index: Tensor) -> SamplePayload:
        new = [*sizes[:k], index.shape[0], *sizes[k + 1 :]]
        at = _read(index)
        if at is None:
            return SamplePayload(product(new), None)
        return self._with(sizes, lambda ids: ids.take(at, k, mode="wrap"), new)

    def flip(self, sizes: Sizes, ks: Sequence[int]) -> SamplePayload:
        return self._with(sizes, lambda ids: _numpy().flip(ids, tuple(ks)), sizes)

    def roll(self, sizes: Sizes, k: int, shift: Any) -> SamplePayload:
        if not isinstance(shift, int):
            return SamplePayload(self._rows, None)
        return self._with(sizes, lambda ids: _numpy().roll(ids, shift, k), sizes)

    def permute(self, sizes: Sizes, order: Sequence[int]) -> SamplePayload:
        if list(order) == list(range(len(order))):
            return self
        new = [sizes[k] for k in order]
        return self._with(sizes, lambda ids: ids.transpose(tuple(order)), new)

    def spread(self, sizes: Sizes, k: int, count: Any) -> SamplePayload:
        if same(count, 1):
            return self
        new = [*sizes[:k], count, *sizes[k:]]
        return self._with(
            sizes, lambda ids: _numpy().broadcast_to(_numpy().expand_dims(ids, k), new), new
        )

    def fold(self, sizes: Sizes, ks: Sequence[int]) -> SamplePayload:
        if same(product(sizes[k] for k in ks), 1):
            return self
        left = [k for k in range(len(sizes)) if k not in ks]
        new = [sizes[k] for k in left]
        rows = product(new)

        def change(ids: Any) -> Any:
            return _folded(ids.transpose((*left, *ks)).reshape(rows, -1 if rows else 0))

        return self._with(sizes, change, new)

    def pad(self, sizes: Sizes, k: int, before: Any, after: Any) -> SamplePayload:
        new = [*sizes[:k], sizes[k] + before + after, *sizes[k + 1 :]]

        def change(ids: Any) -> Any:
            ids = ids[(slice(None),) * k + (slice(max(-before, 0), sizes[k] + min(after, 0)),)]
            around = [(0, 0)] * len(sizes)
            around[k] = (max(before, 0), max(after, 0))
            return _numpy().pad(ids, around, constant_values=NO_SAMPLE)

        return self._with(sizes, change, new)

    def cat(self, k: int, parts: Sequence[tuple[SamplePayload | None, Sizes]]) -> SamplePayload:
        rows = sum(product(sizes) for _, sizes in parts)
        arrays = []
        for part, sizes in parts:
            if not all(isinstance(size, int) for size in sizes):
                return SamplePayload(rows, None)
            if part is None:
                arrays.append(_numpy().full(tuple(sizes), NO_SAMPLE))
            else:
                ids = part.ids()
                whole = _numpy().full(part.rows, MIXED) if ids is None else ids
                arrays.append(whole.reshape(tuple(sizes)))
        return _samples(_numpy().concatenate(arrays, k).reshape(-1))

    def merge(self, *others: SamplePayload) -> SamplePayload:
        """Rows of one sample in all are of that sample; others are MIXED."""
        if all(other is self or (other.identity and self.identity) for other in others):
            return self
        arrays = [payload.ids() for payload in (self, *others)]
        if any(ids is None for ids in arrays):
            return SamplePayload(self._rows, None)
        return _samples(reduce(_both, arrays))

    def gather(self, index: Tensor) -> SamplePayload:
        at, ids = _read(index), self.ids()
        if at is None or ids is None:
            return SamplePayload(index.shape[0], None)
        return _samples(_folded(_numpy().append(ids, NO_SAMPLE)[at]))

    def one(self) -> SamplePayload:
        return self.fold((self._rows,), (0,))


def _samples(ids: Any) -> SamplePayload:
    return SamplePayload(len(ids), _numpy().ascontiguousarray(ids))


def _both(a: Any, b: Any) -> Any:
    either = _numpy().where(a == b, a, MIXED)
    return _numpy().where(a == NO_SAMPLE, b, _numpy().where(b == NO_SAMPLE, a, either))


def _folded(ids: Any) -> Any:
    """(M, K) -> (M,): the one sample of each row, if it is one."""
    if ids.shape[1] == 0:
        return _numpy().full(ids.shape[0], NO_SAMPLE)
    highest = ids.max(1)
    others = (ids != highest[:, None]) & (ids != NO_SAMPLE)
    return _numpy().where(others.any(1) | (ids == MIXED).any(1), MIXED, highest)


def _read(index: Tensor) -> Any:
    """The numbers in a real CPU tensor, or None."""
    if type(index) is not Tensor or index.device.type != "cpu":
        return None
    try:
        return index.numpy()
    except RuntimeError:  # a view by vmap or functionalization, which holds no numbers
        return None
