"""torch.ops.opguard.pack and unpack seen from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from opguard import _flag_ops

__all__ = ["pack", "unpack"]

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
