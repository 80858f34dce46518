"""A model that passes its input through: nothing but the guard itself; for profiling it."""

import pytest
import torch

import opguard


class PassThrough(opguard.OpGuardBase):
    """Loads nothing, computes nothing."""

    NAME = "pass-through"
    MODEL_ID = "."
    DETECTOR_TYPE = torch.nn.Identity


@pytest.mark.smoke
@pytest.mark.trivial
def test_trivial():
    x = torch.ones(2, 3)
    with PassThrough(device_override="cpu") as model:
        for _ in range(100):
            out = model(input_raw=x)
    assert torch.equal(out, x)
    assert not model.is_loaded
