"""A call of an OpGuardBase kept warm, against the bare forward under inference_mode."""

from __future__ import annotations

import torch
from harness import Row

from opguard.base import OpGuardBase


class Tiny(OpGuardBase):
    NAME = "tiny"
    MODEL_ID = "."
    DETECTOR_TYPE = staticmethod(lambda model_id: torch.nn.Linear(4, 4))


def rows() -> list[Row]:
    model, x = Tiny(device_override="cpu", keep_warm=True), torch.ones(1, 4)
    layer = model.detector

    def ours() -> object:
        return model(input_raw=x)

    def theirs() -> object:
        with torch.inference_mode():
            return layer(x)

    return [Row("OpGuardBase call, tiny Linear, kept warm", ours, theirs, extra_us=12)]
