"""What a task says of values it cannot mean, and of answers that are broken."""

from __future__ import annotations

import logging
import math
from operator import index
from typing import Any

import torch

__all__ = ["broken", "count", "number", "pictures", "warn_broken"]

logger = logging.getLogger("opguard")


def count(owner: str, name: str, given: Any, least: int) -> int:
    """Returns ``given`` as an integer; ValueError where it is none, or less than ``least``."""
    try:
        found = index(given)
    except TypeError:
        raise ValueError(
            f"{owner}: expected {name}= a whole number, got {given!r:.80}; give {least} or more"
        ) from None
    if found < least:
        raise ValueError(
            f"{owner}: expected {name}= at least {least}, got {found}; give more, or leave it out "
            "for the default"
        )
    return found


def number(owner: str, name: str, given: Any) -> float:
    """Returns ``given`` as a float; ValueError where it is none, NaN or infinite."""
    try:
        found = float(given)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(
            f"{owner}: expected {name}= a finite number, got {given!r:.80}; leave it out for the "
            "default"
        )
    return found


def pictures(owner: str, name: str, given: list[Any]) -> None:
    """Raises ValueError for the first that is no PIL picture."""
    from PIL.Image import Image

    for at, each in enumerate(given):
        if not isinstance(each, Image):
            raise ValueError(
                f"{owner}: expected {name}= PIL pictures, got {type(each).__name__} as number "
                f"{at}; make an array of bytes a picture with PIL.Image.fromarray"
            )


def broken(values: torch.Tensor) -> list[int]:
    """Returns which of ``values``, along its first dimension, hold NaN or infinite numbers."""
    sound = values.isfinite().flatten(1).all(1)
    return [at for at, fine in enumerate(sound.tolist()) if not fine]


def warn_broken(owner: str, values: torch.Tensor) -> None:
    """Says which pictures of a batch of answers are not finite."""
    if found := broken(values):
        logger.warning(
            "%s: %d of %d pictures came out broken, their numbers are not finite: %s; the others "
            "are complete; try another dtype_override=, float16 overflows first",
            owner,
            len(found),
            len(values),
            ", ".join(f"picture {at}" for at in found),
        )
