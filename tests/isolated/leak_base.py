"""Whether OpGuardBase leaks: blocks kept per life, call and failure, by slope."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from slope import report

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


if __name__ == "__main__":
    sys.exit(report(100, 400, life, lazy, warm, fails, refused))
