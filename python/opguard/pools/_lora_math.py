"""Low-rank products added to weights: what one LoRA does to one weight.

Each is called with the weight in fp32 (fp64 for fp64) and never keeps it. In host memory one kernel
of ours adds the product, in one pass, and rounds to narrower dtypes itself: all products of one
weight together (`together`). Elsewhere it is made tile by tile, so that besides the result nothing
of the weight's size is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opguard import _C, _ops

__all__ = ["Added", "LowRank", "Whole", "together"]

# Elements of one tile a thread: the weight is copied from the base into the result and the product
# added there, so a tile should still be in the second-level cache then. Tiles are whole blocks of
# rows, so that each element is computed alike however many threads there are at that moment.
TILE = 1 << 18
BLOCK = 64

# What the kernel takes.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_RANK = 256
# Where it is made of vectors; elsewhere torch.addmm is faster.
KERNEL_HERE = _C.ops_info()["isa"] in ("avx2", "avx512")


def _matrix(tensor: Tensor) -> Tensor | None:
    """The same memory as rows and columns: a vector is one column, a filter one row.

    None where the strides do not allow it (a kernel in channels_last).
    """
    if tensor.dim() == 1:
        return tensor.unsqueeze(1)
    if tensor.dim() == 2:
        return tensor
    return tensor.view(tensor.shape[0], -1) if tensor.is_contiguous() else None


def _lies_in_rows(matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    step, side = matrix.stride()
    return (side == 1 or columns == 1) and (step >= columns or rows == 1)


def _kernel_fits(source: Tensor, out: Tensor, rank: int) -> bool:
    """Whether the kernel can add a product of this rank to these matrices."""
    return (
        KERNEL_HERE
        and type(source) in (Tensor, torch.nn.Parameter)
        and type(out) in (Tensor, torch.nn.Parameter)
        and source.device.type == out.device.type == "cpu"
        and source.dtype is out.dtype
        and source.dtype in KERNEL_DTYPES
        and 0 < rank <= KERNEL_RANK
        and source.numel() > 0
        and _lies_in_rows(source)
        and _lies_in_rows(out)
        and (
            (source.data_ptr() == out.data_ptr() and source.stride() == out.stride())
            or source.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
        )
    )


def _for_kernel(factor: Tensor) -> Tensor:
    return factor.to("cpu", torch.float32).contiguous()


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
        flat, target = _matrix(source), _matrix(out)
        if (
            flat is not None
            and target is not None
            and _kernel_fits(flat, target, self.left.shape[1])
        ):
            _ops.add_low_rank(flat, _for_kernel(self.left), _for_kernel(self.right), target)
            return
        left = self.left.to(source.device, source.dtype)
        right = self.right.to(source.device, source.dtype)
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


def together(source: Tensor, deltas: Sequence[object], out: Tensor) -> LowRank | None:
    """All of them as one product that `LowRank` adds to ``source`` in one pass, rounding once.

    ``source`` and ``out`` may be narrow then. None where something else than products is among
    them, or the kernel does not take this weight.
    """
    parts: list[LowRank] = []
    for delta in deltas:
        for part in delta.parts if isinstance(delta, Added) else (delta,):
            if not isinstance(part, LowRank):
                return None
            parts.append(part)
    flat, target = _matrix(source), _matrix(out)
    rank = sum(part.left.shape[1] for part in parts)
    if flat is None or target is None or not _kernel_fits(flat, target, rank):
        return None
    if len(parts) == 1:
        return parts[0]
    return LowRank(
        torch.cat([_for_kernel(part.left) for part in parts], 1),
        torch.cat([_for_kernel(part.right) for part in parts], 0),
    )
