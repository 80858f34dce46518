"""Bytes from what people write ("256MiB", "50%"), and what a device has of them."""

from __future__ import annotations

import os
import re
from operator import index
from pathlib import Path
from typing import SupportsIndex

import torch

__all__ = ["device_capacity", "host_capacity", "parse_bytes"]

UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 1000**2,
    "mb": 1000**2,
    "g": 1000**3,
    "gb": 1000**3,
    "t": 1000**4,
    "tb": 1000**4,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
TEXT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*|%)\s*")
# What the ledger counts in one pool.
MOST = 1 << 60
# cgroup v1 says "no limit" by a number near 2**63.
NO_LIMIT = 1 << 60


def parse_bytes(
    value: SupportsIndex | str, whole: int | None = None, *, what: str = "a budget"
) -> int:
    """Bytes of ``value``: a number of bytes, text with a unit, or a share of ``whole``.

    Args:
        value: 268435456, ``"256MiB"``, ``"1.5 GB"`` or, where ``whole`` is given, ``"50%"``.
        whole: what a percentage is of, in bytes.
        what: what the bytes are for, in messages.

    Raises:
        TypeError: for anything that is neither an int nor text.
        ValueError: for text that names no number of bytes, for less than none and beyond 2**60.
    """
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value, "__index__")):
        raise TypeError(
            f"expected {what} as int bytes or text like '256MiB', got {type(value).__name__}"
        )
    nbytes = _from_text(value, whole, what) if isinstance(value, str) else float(index(value))
    if not 0 <= nbytes <= MOST:
        raise ValueError(f"expected {what} of 0 to 2**60 bytes, got {value!s:.40}")
    return int(nbytes) if isinstance(value, str) else index(value)


def _from_text(value: str, whole: int | None, what: str) -> float:
    found = TEXT.fullmatch(value)
    if found and found[2] == "%":
        if whole is None:
            raise ValueError(
                f"expected {what} like 268435456 or '256MiB', not as a share, got {value!r:.80}"
            )
        if float(found[1]) > 100:
            raise ValueError(
                f"expected {what} as a share of at most 100 % of a device, got {value!r:.80}"
            )
        return whole * float(found[1]) / 100
    if not found or found[2].lower() not in UNITS:
        raise ValueError(
            f"expected {what} like 268435456, '256MiB', '1.5 GB' or '50%', got {value!r:.80}"
        )
    return float(found[1]) * UNITS[found[2].lower()]


def host_capacity() -> int:
    """Bytes of memory this process may use: the machine's, or its cgroup's where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_cgroup_limits()])


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The limits of the cgroup this process is in and of those around it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        # Inside a container the path is that of the outside: what is mounted here is then its root.
        own = base / path.lstrip("/")
        files += [folder / name for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return [limit for file in files if (limit := _limit(file)) is not None]


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < NO_LIMIT else None


def device_capacity(device: torch.device) -> int:
    """Bytes of memory of a device, all of it."""
    if device.type == "cpu":
        return host_capacity()
    module = torch.get_device_module(device)
    return int(module.get_device_properties(device).total_memory)
