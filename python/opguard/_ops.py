"""torch.ops.opguard.* seen from Python: the ops, and what they do to fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from opguard import _flag_ops as _flag_ops  # what fake tensors need of the flag ops

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


@torch.library.register_fake("opguard::pack")  # type: ignore[untyped-decorator]
def _(leaves: list[torch.Tensor]) -> torch.Tensor:
    size = sum(-(-leaf.numel() * leaf.element_size() // ALIGNMENT) * ALIGNMENT for leaf in leaves)
    device = leaves[0].device if leaves else "cpu"
    return torch.empty(size, dtype=torch.uint8, device=device)


@torch.library.register_fake("opguard::unpack")  # type: ignore[untyped-decorator]
def _(packed: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    return [
        torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")
        for leaf in like
    ]
