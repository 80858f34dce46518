"""How each device is spoken to: by the CUDA driver where that can map memory, else by torch."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from opguard import _C
from opguard.pools._transfers import ArenaPlace, Place, TorchPlace

# More than torch has of one priority: where it stopped handing them out in turn, this ends it.
MOST_STREAMS = 256

__all__ = [
    "Accelerator",
    "DriverAccelerator",
    "TorchAccelerator",
    "accelerator_for",
    "streams_of",
]


class Accelerator(ABC):
    """A device that modules are brought to.

    Attributes:
        device: what torch calls it.
        host_computes: its kernels run in the calling thread, so that no stream can wait for a copy.
    """

    device: torch.device
    host_computes = False

    @abstractmethod
    def place(self, sizes: Sequence[int]) -> Place:
        """Room for a module of segments of so many bytes."""

    def mark(self) -> _C.DeviceEvent | None:
        """The end of what is queued now, on every stream; None where that cannot be had."""
        return None


class DriverAccelerator(Accelerator):
    """A GPU whose memory is mapped through the CUDA driver.

    Args:
        device: what torch calls it.
        driver: the same GPU, opened.
        kind: DLPack's number of the device; 2 is CUDA.
    """

    def __init__(self, device: torch.device, driver: _C.DeviceDriver, kind: int = 2) -> None:
        self.device = device
        self.driver = driver
        self.kind = kind
        self.host_computes = device.type == "cpu"

    def place(self, sizes: Sequence[int]) -> Place:
        return ArenaPlace(self.driver, self.device, sizes, self.kind)

    def mark(self) -> _C.DeviceEvent | None:
        return None if self.driver.capturing() else self.driver.work()


class TorchAccelerator(Accelerator):
    """Any device of torch's, by torch's own allocations and copies."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def place(self, sizes: Sequence[int]) -> Place:
        return TorchPlace(self.device, sizes)


_known: dict[torch.device, Accelerator] = {}
_lock = threading.Lock()


def accelerator_for(device: torch.device) -> Accelerator:
    """The one accelerator of a device, opened at the first call."""
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    with _lock:
        if device not in _known:
            _known[device] = _open(device)
        return _known[device]


def _open(device: torch.device) -> Accelerator:
    if device.type == "cuda" and torch.version.cuda is not None:
        # torch's number of a GPU is the driver's: both follow CUDA_VISIBLE_DEVICES.
        with contextlib.suppress(OSError, RuntimeError):
            torch.cuda.init()  # type: ignore[no-untyped-call]
            driver = _C.DeviceDriver(None, device.index, streams=streams_of(device))
            if driver.granularity:
                return DriverAccelerator(device, driver)
    return TorchAccelerator(device)


def streams_of(device: torch.device) -> list[int]:
    """Every stream that torch has of a GPU but the default one, which no graph is captured on.

    Torch hands out its streams in turn, a round for each priority, and has no list of them.
    """
    found: dict[int, None] = {}
    one = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    least, greatest = one.priority_range()
    for priority in range(greatest, least + 1):
        for _ in range(MOST_STREAMS):
            one = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
            if one.cuda_stream in found:
                break
            found[one.cuda_stream] = None
    return list(found)
