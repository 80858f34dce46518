"""Tensors over other bytes: making them, and pointing a module's own at them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bytes_of", "point", "shown", "version_of"]


def bytes_of(tensor: Tensor, start: int, nbytes: int) -> Tensor:
    """``nbytes`` of the tensor's storage from byte ``start`` on, as a flat tensor of uint8."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), start, (nbytes,), (1,))


def shown(like: Tensor, flat: Tensor, begin: int = 0) -> Tensor:
    """A tensor like this one over other bytes.

    Args:
        like: shape, strides, dtype and place in its storage.
        flat: the other bytes, of uint8.
        begin: which byte of the storage of ``like`` the first of ``flat`` stands for.
    """
    size = like.element_size()
    offset = flat.storage_offset() // size + (like.storage_offset() * size - begin) // size
    # Pointed at another kind, an inference tensor would become half of each.
    with torch.inference_mode(like.is_inference()), torch._C.DisableTorchFunctionSubclass():
        made: Tensor = torch.empty(0, dtype=like.dtype, device=flat.device)
        made.set_(flat.untyped_storage(), offset, like.shape, like.stride())
        if like.is_conj():
            made = made.conj()
        if like.is_neg():
            made = torch._neg_view(made)
    return made


def point(tensor: Tensor, at: Tensor) -> None:
    """Lets a tensor have the memory of another; it stays the same object."""
    with torch.inference_mode(tensor.is_inference()), torch._C.DisableTorchFunctionSubclass():
        tensor.data = at


def version_of(tensor: Tensor) -> int | None:
    """How often it was written in place; None for inference tensors, which do not count."""
    try:
        return tensor._version
    except RuntimeError:
        return None
