"""Devices and dtypes under one set of names: cuda, mps, xpu and cpu alike.

Everything goes through `torch.accelerator`; a backend's own module is asked only where that has no
answer. Functions that take devices accept one device or several, in any spelling that
`normalize_device` takes. Nothing here initialises an accelerator that has not been used: waiting
for, emptying or measuring one that holds nothing yet does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias, cast

import torch

__all__ = [
    "DTYPE_NAMES",
    "DeviceLike",
    "DtypeLike",
    "MemoryUse",
    "best_device",
    "device_supports_bfloat16",
    "device_supports_dtype",
    "empty_cache",
    "list_devices",
    "memory_cached",
    "memory_now",
    "memory_peak",
    "normalize_device",
    "normalize_devices",
    "normalize_dtype",
    "reset_memory_peak",
    "synchronize",
]

DeviceLike: TypeAlias = torch.device | str | int
DtypeLike: TypeAlias = torch.dtype | str
DevicesLike: TypeAlias = DeviceLike | Iterable[DeviceLike] | None

DTYPE_NAMES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "f64": torch.float64,
    "fp32": torch.float32,
    "f32": torch.float32,
    "fp16": torch.float16,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
}

CPU = torch.device("cpu")
_page = os.sysconf("SC_PAGE_SIZE")


class MemoryUse(NamedTuple):
    """Bytes a device held before, at most during, and after a guarded block.

    cpu: the process's resident size, and its high-water mark since the process began.
    """

    before: int
    peak: int
    after: int


def _accelerator_type() -> str | None:
    """Returns the type of this machine's accelerator, or None where there is none."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None else found.type


def list_devices() -> list[torch.device]:
    """Returns every device of this machine: its accelerators in order, then the cpu."""
    kind = _accelerator_type()
    count = torch.accelerator.device_count() if kind else 0
    return [torch.device(kind, index) for index in range(count) if kind] + [CPU]


def best_device() -> torch.device:
    """Returns the current accelerator with its index, or the cpu where there is none."""
    kind = _accelerator_type()
    return CPU if kind is None else torch.device(kind, torch.accelerator.current_device_index())


def normalize_device(device: DeviceLike | None = None) -> torch.device:
    """Returns `device` as a `torch.device` that carries its index where its type has one.

    None is the best device there is; an int is that accelerator of this machine; "cuda" without an
    index is the current one (0 where none can be used). Whether the device exists is not looked at.

    Raises ValueError for a name torch does not know, TypeError for another type.
    """
    if device is None:
        return best_device()
    given = cast(object, device)
    if isinstance(given, bool) or not isinstance(given, str | int | torch.device):
        raise TypeError(
            "device: expected a torch.device, a name such as 'cuda:0' or 'cpu', or an index, "
            f"got {type(device).__name__}"
        )
    if isinstance(device, int):
        if device < 0:
            raise ValueError(f"device: expected an index from 0 up, got {device}")
        return torch.device(_accelerator_type() or "cuda", device)
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device: expected a device torch knows, such as 'cpu', 'cuda:0', 'mps' or 'xpu', "
            f"got {device!r:.80}"
        ) from None
    if cast("int | None", found.index) is not None or found.type in ("cpu", "meta"):
        return CPU if found.type == "cpu" else found
    if found.type == _accelerator_type():
        return torch.device(found.type, torch.accelerator.current_device_index())
    return torch.device(found.type, 0)


def normalize_devices(devices: DevicesLike = None) -> list[torch.device]:
    """Returns the devices meant, each once, in order; None is every device of this machine."""
    if devices is None:
        return list_devices()
    if isinstance(devices, str | int | torch.device):
        return [normalize_device(devices)]
    if not isinstance(cast(object, devices), Iterable):
        raise TypeError(
            f"devices: expected a device or several of them, got {type(devices).__name__}"
        )
    return list(dict.fromkeys(normalize_device(device) for device in devices))


def normalize_dtype(dtype: DtypeLike) -> torch.dtype:
    """Returns `dtype` as a `torch.dtype`.

    Takes torch's own names ("float16", "torch.half") and the short ones of `DTYPE_NAMES` ("fp16",
    "bf16", "i8", which is int8).

    Raises ValueError for an unknown name, TypeError for another type.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str):
        raise TypeError(
            "dtype: expected a torch.dtype or a name such as 'fp16' or 'float32', "
            f"got {type(dtype).__name__}"
        )
    name = dtype.strip().lower().removeprefix("torch.")
    found = DTYPE_NAMES.get(name, getattr(torch, name, None))
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"dtype: expected one of torch's dtypes or {', '.join(DTYPE_NAMES)}, got {dtype!r:.80}"
        )
    return found


def device_supports_bfloat16(device: DeviceLike | None = None) -> bool:
    """Returns whether `device` computes in bfloat16 itself, without emulating it.

    The cpu does. False for a device this machine does not have.
    """
    wanted = normalize_device(device)
    if wanted.type in ("cpu", "meta"):
        return True
    if wanted not in list_devices():
        return False
    if wanted.type == "cuda":
        if torch.version.hip is not None:
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return torch.cuda.get_device_capability(wanted)[0] >= 8
    try:
        torch.zeros(1, dtype=torch.bfloat16, device=wanted).add_(1)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def device_supports_dtype(device: DeviceLike | None, dtype: DtypeLike) -> bool:
    """Returns whether `device` computes in `dtype`: mps has no float64, old gpus no bfloat16."""
    wanted, kind = normalize_device(device), normalize_dtype(dtype)
    if kind is torch.bfloat16:
        return device_supports_bfloat16(wanted)
    return not (wanted.type == "mps" and kind in (torch.float64, torch.complex128))


def _in_use(device: torch.device) -> bool:
    """Returns whether `device` is an accelerator of this machine that has been started."""
    if device.type in ("cpu", "meta") or device.type != _accelerator_type():
        return False
    if (device.index or 0) >= torch.accelerator.device_count():
        return False
    module = getattr(torch, device.type, None)
    started = getattr(module, "is_initialized", None)
    return bool(started()) if callable(started) else True


def synchronize(devices: DevicesLike = None) -> None:
    """Waits until each of `devices` (None: all) has finished what was queued on it.

    Errors of queued work surface here. The cpu, and accelerators not in use, have nothing to wait
    for.
    """
    for device in normalize_devices(devices):
        if _in_use(device):
            torch.accelerator.synchronize(device)


def empty_cache(devices: DevicesLike = None) -> None:
    """Gives the allocator's unused cached memory of each of `devices` back to the system.

    It costs everybody who allocates next, so call it only after something was released.
    """
    for device in normalize_devices(devices):
        if not _in_use(device):
            continue
        if device.type == "mps":
            torch.mps.empty_cache()
            continue
        # The call is for the current device only, so it is made current for its duration.
        with _current(device):
            torch.accelerator.empty_cache()


class _current:
    """Makes an accelerator the current one for a block."""

    def __init__(self, device: torch.device) -> None:
        self._index = device.index or 0
        self._before = -1

    def __enter__(self) -> None:
        self._before = torch.accelerator.current_device_index()
        if self._before != self._index:
            torch.accelerator.set_device_index(self._index)

    def __exit__(self, *_: object) -> None:
        if self._before != self._index:
            torch.accelerator.set_device_index(self._before)


# (process, descriptor of its statm): kept open, for opening costs ten times what reading does.
_statm = (-1, -1)


def _resident() -> int:
    global _statm  # noqa: PLW0603
    try:
        process = os.getpid()
        if _statm[0] != process:  # a child has its parent's descriptor, which tells of the parent
            _statm = (process, os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC))
        return int(os.pread(_statm[1], 128, 0).split()[1]) * _page
    except OSError:
        return _resident_peak()


def _resident_peak() -> int:
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _ask(device: torch.device, name: str) -> int | None:
    """Returns what torch.accelerator's memory function `name` says, None where it cannot."""
    function = cast("Callable[[Any], int] | None", getattr(torch.accelerator, name, None))
    if function is None:
        return None
    try:
        return int(function(device))
    except (RuntimeError, NotImplementedError):
        return None


def memory_now(device: DeviceLike | None = None) -> int:
    """Returns the bytes tensors hold on `device` now; cpu: the process's resident size.

    0 for an accelerator that is not there or not in use.
    """
    where = CPU if device == CPU else normalize_device(device)
    if where.type == "cpu":
        return _resident()
    if not _in_use(where):
        return 0
    if where.type == "mps":
        return int(torch.mps.current_allocated_memory())
    return _ask(where, "memory_allocated") or 0


def memory_cached(device: DeviceLike | None = None) -> int:
    """Returns the bytes `device`'s allocator holds that no tensor uses; cpu: 0."""
    where = normalize_device(device)
    if where.type == "cpu" or not _in_use(where):
        return 0
    if where.type == "mps":
        held = int(torch.mps.driver_allocated_memory())
    else:
        held = _ask(where, "memory_reserved") or 0
    return max(0, held - memory_now(where))


def memory_peak(device: DeviceLike | None = None) -> int:
    """Returns the most bytes `device` has held since `reset_memory_peak`; cpu: since the start.

    A backend that keeps no high-water mark answers with what it holds now.
    """
    where = CPU if device == CPU else normalize_device(device)
    if where.type == "cpu":
        return max(_resident_peak(), _resident())
    if not _in_use(where):
        return 0
    peak = None if where.type == "mps" else _ask(where, "max_memory_allocated")
    return memory_now(where) if peak is None else peak


def reset_memory_peak(devices: DevicesLike = None) -> None:
    """Starts the high-water mark of each of `devices` anew, where the backend keeps one."""
    for device in normalize_devices(devices):
        if _in_use(device) and device.type != "mps":
            try:
                torch.accelerator.reset_peak_memory_stats(device)
            except (RuntimeError, NotImplementedError):
                continue
