"""Makes a block repeatable: seeds and deterministic algorithms, both put back on exit.

Generators and torch's switches belong to the process: other threads see them while a block runs.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from opguard import devices
from opguard.devices import DeviceLike
from opguard.guards._base import Guard

__all__ = ["deterministic_guard", "seed_guard"]

# torch makes this module's attribute a property at run time, which type checkers do not see.
_filling: Any = torch.utils.deterministic
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


class _Generator(NamedTuple):
    """One source of random numbers: how to seed it, and how to take and put back its state."""

    seed: Callable[[int], Any]
    take: Callable[[], Any]
    put: Callable[[Any], Any]


def _accelerator_generator(device: torch.device) -> _Generator:
    module = torch.get_device_module(device)
    if device.type == "mps":
        return _Generator(module.manual_seed, module.get_rng_state, module.set_rng_state)

    def seed(value: int) -> None:
        with module.device(device):
            module.manual_seed(value)

    return _Generator(
        seed,
        lambda: module.get_rng_state(device),
        lambda state: module.set_rng_state(state, device),
    )


def _generators(device_list: Iterable[DeviceLike] | None) -> list[_Generator]:
    # Not torch.manual_seed: it queues the seed for accelerators that are started later, perhaps
    # after the block, and nothing could take that back.
    found = [
        _Generator(random.seed, random.getstate, random.setstate),
        _Generator(torch.default_generator.manual_seed, torch.get_rng_state, torch.set_rng_state),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        draw = numpy.random
        found.append(
            _Generator(lambda seed: draw.seed(seed & 0xFFFFFFFF), draw.get_state, draw.set_state)
        )
    for device in devices.normalize_devices(device_list):
        if device.type not in ("cpu", "meta"):
            found.append(_accelerator_generator(device))
    return found


class seed_guard(Guard):
    """Seeds every generator inside the block and puts all of their states back after it.

    Python's `random`, numpy's global one where numpy is imported, torch's for the cpu, and that of
    each accelerator of `device_list` (None: all, which starts them; ["cpu"]: none).

    seed: an int from 0 up to 2**64 - 1; numpy gets its low 32 bits.
    """

    def __init__(self, *, seed: int = 0, device_list: Iterable[DeviceLike] | None = None) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: expected 0 up to 2**64 - 1, got {seed}")
        self.seed = seed
        self._device_list = device_list
        self._generators: list[_Generator] = []
        self._others: list[Any] = []

    def _enter(self) -> seed_guard:
        self._generators = _generators(self._device_list)
        self._others = [generator.take() for generator in self._generators]
        for generator in self._generators:
            generator.seed(self.seed)
        return self

    def _exit(self, error: BaseException | None) -> None:
        for generator, state in zip(self._generators, self._others, strict=True):
            generator.put(state)

    def _swap(self) -> None:
        """Exchanges the block's states with those outside it."""
        current = [generator.take() for generator in self._generators]
        self._exit(None)
        self._others = current

    def suspend(self) -> None:
        """Puts the states outside back while a decorated generator or coroutine is suspended."""
        self.__dict__["_entries"][-1][1]._swap()

    def resume(self) -> None:
        """Goes on with the block's states where `suspend` left them."""
        self._moved()._swap()


class deterministic_guard(Guard):
    """Lets torch use deterministic algorithms alone inside the block; all switches are put back.

    enabled=False allows the others for the block. warn_only: an operation without a deterministic
    algorithm warns instead of raising. fill_uninitialized_memory: whether `torch.empty` is filled
    with a known value meanwhile (None: as it is). cuDNN stops benchmarking. On a cuda machine
    CUBLAS_WORKSPACE_CONFIG is set for the block where it is unset; cuBLAS reads it at its first use
    in the process only.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        warn_only: bool = False,
        fill_uninitialized_memory: bool | None = None,
    ) -> None:
        self.enabled = bool(enabled)
        self.warn_only = bool(warn_only)
        self.fill_uninitialized_memory = fill_uninitialized_memory
        self._before: tuple[bool, bool, bool, bool, bool] | None = None
        self._workspace_set = False

    def _enter(self) -> deterministic_guard:
        cudnn = torch.backends.cudnn
        self._before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            _filling.fill_uninitialized_memory,
            cudnn.deterministic,
            cudnn.benchmark,
        )
        if self.enabled and torch.cuda.is_available() and _CUBLAS not in os.environ:
            os.environ[_CUBLAS] = ":4096:8"
            self._workspace_set = True
        torch.use_deterministic_algorithms(self.enabled, warn_only=self.warn_only)
        if self.fill_uninitialized_memory is not None:
            _filling.fill_uninitialized_memory = self.fill_uninitialized_memory
        cudnn.deterministic = self.enabled
        if self.enabled:
            cudnn.benchmark = False
        return self

    def _exit(self, error: BaseException | None) -> None:
        if self._before is None:
            return
        on, warn_only, fill, deterministic, benchmark = self._before
        self._before = None
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
        _filling.fill_uninitialized_memory = fill
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = benchmark
        if self._workspace_set:
            os.environ.pop(_CUBLAS, None)
            self._workspace_set = False
