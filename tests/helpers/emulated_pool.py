"""An accelerator on a machine without one: torch's CPU tensors over the emulated CUDA driver."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "torchfree"))

from emulated import OUT_OF_MEMORY as OUT_OF_MEMORY
from emulated import Emulated as Emulated

from opguard import _C
from opguard.pools._accelerators import Accelerator, DriverAccelerator
from opguard.pools.resource_pools import ResourcePool

UNIT = 1 << 16
RING = 1 << 16


def emulated_accelerator(emulated: Emulated, *streams: int) -> DriverAccelerator:
    """Kernels of this accelerator are torch's CPU kernels, run at once by the calling thread.

    Graphs are captured on ``streams`` or not at all.
    """
    driver = _C.DeviceDriver(emulated.path, ring=RING, streams=streams)
    return DriverAccelerator(torch.device("cpu"), driver, kind=1)


class EmulatedPool(ResourcePool):
    """The memory of an emulated accelerator, which modules run on."""

    executes = True

    def __init__(self, accelerator: Accelerator, nbytes: int, name: str = "gpu:0") -> None:
        super().__init__(name, accelerator.device)
        self._accelerator = accelerator
        self._nbytes = nbytes

    def capacity(self) -> int:
        return self._nbytes

    @property
    def accelerator(self) -> Accelerator:
        return self._accelerator
