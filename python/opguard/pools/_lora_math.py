"""Low-rank products added to weights: what one LoRA does to one weight.

Each is called with the weight in fp32 (fp64 for fp64) and never keeps it. The product is made tile
by tile, so that besides the result nothing of the weight's size is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Added", "LowRank", "Whole"]

# Elements of one tile a thread: the weight is copied from the base into the result and the product
# added there, so a tile should still be in the second-level cache then. Tiles are whole blocks of
# rows, so that each element is computed alike however many threads there are at that moment.
TILE = 1 << 18
BLOCK = 64


def _matrix(tensor: Tensor) -> Tensor | None:
    """The same memory as rows and columns: a vector is one column, a filter one row.

    None where the strides do not allow it (a kernel in channels_last).
    """
    if tensor.dim() == 1:
        return tensor.unsqueeze(1)
    if tensor.dim() == 2:
        return tensor
    return tensor.view(tensor.shape[0], -1) if tensor.is_contiguous() else None


def _add_product(source: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out = source + left @ right`` over matrices."""
    rows, columns = source.shape
    step = TILE * torch.get_num_threads() // max(columns, 1)
    step = max(BLOCK, step - step % BLOCK)
    if rows <= step:
        torch.addmm(source, left, right, out=out)
        return
    for begin in range(0, rows, step):
        tile = slice(begin, begin + step)
        torch.addmm(source[tile], left[tile], right, out=out[tile])


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Adds ``left @ right`` to a weight seen as rows and columns.

    Attributes:
        left: [rows, r]; scaled already.
        right: [r, columns]; both of one float dtype, on any device.
    """

    left: Tensor
    right: Tensor

    def __call__(self, source: Tensor, out: Tensor) -> None:
        left = self.left.to(source.device, source.dtype)
        right = self.right.to(source.device, source.dtype)
        flat, target = _matrix(source), _matrix(out)
        if flat is not None and target is not None:
            _add_product(flat, left, right, target)
        else:
            torch.add(source, (left @ right).view(source.shape), out=out)

    def rows(self, start: int, stop: int) -> LowRank:
        return LowRank(self.left[start:stop], self.right)


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """Replaces a weight by one of the same shape; what is later in the stack is added to that."""

    tensor: Tensor

    def __call__(self, source: Tensor, out: Tensor) -> None:
        out.copy_(self.tensor)

    def rows(self, start: int, stop: int) -> Whole:
        return Whole(self.tensor[start:stop])


@dataclass(frozen=True, slots=True, eq=False)
class Added:
    """Several one after the other, all by one file."""

    parts: tuple[LowRank | Whole, ...]

    def __call__(self, source: Tensor, out: Tensor) -> None:
        for part in self.parts:
            part(source, out)
            source = out

    def rows(self, start: int, stop: int) -> Added:
        return Added(tuple(part.rows(start, stop) for part in self.parts))

    @classmethod
    def of(cls, parts: Sequence[LowRank | Whole]) -> Added | LowRank | Whole:
        return parts[0] if len(parts) == 1 else cls(tuple(parts))
