"""torch.ops.opguard.pack, unpack and add_low_rank seen from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from opguard import _flag_ops

__all__ = ["add_low_rank", "pack", "unpack"]

# Leaves start at multiples of this, as csrc/core/layout.h has it.
ALIGNMENT = 64


def pack(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """One uint8 tensor (bytes,) on the leaves' device: their elements, one leaf after another.

    Each leaf's elements must fill one block of memory, and all leaves be on one device.
    """
    return cast(torch.Tensor, torch.ops.opguard.pack.default(leaves))


def unpack(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves again, in host memory, with the shapes, strides and dtypes of ``like``.

    ``packed`` is what :func:`pack` made of tensors like these, in host memory.
    """
    return cast("list[torch.Tensor]", torch.ops.opguard.unpack.default(packed, like))


def add_low_rank(
    base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor
) -> None:
    """``out = base + left @ right``, summed in float32 and rounded once, in one pass over memory.

    In host memory; base and out (n, m) of float32, bfloat16 or float16, left (n, r) and right
    (r, m) of float32, r at most 256, the elements of a row side by side. ``out`` may be ``base``.
    The bits do not depend on the number of threads.
    """
    torch.ops.opguard.add_low_rank.default(base, left, right, out)


def _add_low_rank_meta(
    base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor
) -> None:
    rows, columns = base.shape
    if (
        out.shape != base.shape
        or tuple(left.shape) != (rows, right.shape[0])
        or right.shape[1] != columns
    ):
        raise ValueError(
            f"expected base and out (n, m), left (n, r), right (r, m), got {tuple(base.shape)}, "
            f"{tuple(left.shape)}, {tuple(right.shape)} and out {tuple(out.shape)}"
        )


def _pack_meta(leaves: list[torch.Tensor]) -> torch.Tensor:
    size = sum(-(-leaf.numel() * leaf.element_size() // ALIGNMENT) * ALIGNMENT for leaf in leaves)
    device = leaves[0].device if leaves else "cpu"
    return torch.empty(size, dtype=torch.uint8, device=device)


def _unpack_meta(packed: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    return [
        torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=packed.device)
        for leaf in like
    ]


# register_fake looks for the caller's source, which takes a tenth of all that importing may take.
_flag_ops.LIBRARY.impl("pack", _pack_meta, "Meta")
_flag_ops.LIBRARY.impl("unpack", _unpack_meta, "Meta")
_flag_ops.LIBRARY.impl("add_low_rank", _add_low_rank_meta, "Meta")
