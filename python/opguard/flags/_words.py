"""Flags seen as integers: nothing else here may look at a flag word."""

from __future__ import annotations

import torch

from opguard.flags.config import CARRIERS
from opguard.flags.errors import FlagsLayoutError

__all__ = ["as_words"]

_INTEGERS = {dtype: integers for dtype, (_, integers, _) in CARRIERS.items()}


def as_words(f: torch.Tensor) -> torch.Tensor:
    """Flags (N, W) viewed as integers of their width.

    Moving float words about as floats may quiet a NaN pattern or flush a denormal; integers keep
    every bit.
    """
    dtype = _INTEGERS.get(f.dtype)
    if dtype is None or f.dim() != 2 or f.shape[1] == 0:
        raise FlagsLayoutError(
            "expected flags of shape (N, words) in int64, int32, float64 or float32, got shape"
            f" {tuple(f.shape)} of {f.dtype}"
        )
    return f if f.dtype is dtype else f.view(dtype)
