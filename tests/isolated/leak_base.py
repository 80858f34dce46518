"""Whether OpGuardBase leaks: blocks kept per life, call and failure, by slope."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch

from opguard.base import OpGuardBase

X = torch.ones(1, 2)


class Tiny(OpGuardBase):
    NAME = "tiny"
    MODEL_ID = "."
    DETECTOR_TYPE = staticmethod(lambda model_id: torch.nn.Linear(2, 2))

    def _predict(self, *, input_proc: Any, fail: bool = False) -> Any:
        if fail:
            raise ValueError(input_proc)
        return self.detector(input_proc)


WARM = Tiny(device_override="cpu", keep_warm=True)


def life() -> None:
    with Tiny(device_override="cpu") as model, model:
        model(input_raw=X)


def lazy() -> None:
    Tiny(device_override="cpu")(input_raw=X, fail=False)


def warm() -> None:
    WARM(input_raw=X)


def fails() -> None:
    with contextlib.suppress(ValueError):
        WARM(input_raw=X, fail=True)


def refused() -> None:
    with contextlib.suppress(TypeError):
        Tiny(devise_override="cpu")
    with contextlib.suppress(TypeError):
        WARM(input_raw=X, fial=True)


def slope(function: Callable[[], None], small: int = 100, large: int = 400) -> float:
    """Blocks kept per call, from two sizes, so that what is kept once does not count."""
    for _ in range(small):
        function()
    kept = []
    for count in (small, large):
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(count):
            function()
        gc.collect()
        kept.append(sys.getallocatedblocks() - before)
    return (kept[1] - kept[0]) / (large - small)


def main() -> int:
    found = {f.__name__: slope(f) for f in (life, lazy, warm, fails, refused)}
    for name, each in found.items():
        print(f"{name}: {each:+.3f} blocks a call")
    return 1 if any(each > 0.1 for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
