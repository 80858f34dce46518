"""Out of memory: the least valuable models make room, and the call is tried again."""

from __future__ import annotations

import re

import torch

from opguard.pools._budgets import UNITS

__all__ = ["make_room"]

# torch's own words: "Tried to allocate 20.00 MiB", "you tried to allocate 123 bytes".
WANTED = re.compile(r"tried to allocate ([\d.]+) ?([A-Za-z]+)", re.IGNORECASE)
DEVICE = re.compile(r"\b(?:GPU|XPU|cuda:|xpu:) ?(\d+)")


def make_room(error: BaseException) -> bool:
    """Frees idle models of the pools where ``error`` says that memory ran out.

    The models that the policy values least go first, until one and a half times the bytes that the
    message names are free: an allocator rounds up, and memory is in pieces. A model that somebody
    uses stays.

    Returns:
        Whether anything was freed, so that trying again may help. False where no pool was set up
        for that memory.
    """
    from opguard.pools.management import current_management

    management = current_management()
    if management is None:
        return False
    text = str(error)
    device = _device(error, text)
    try:
        pool = management.pool(device)
    except KeyError:
        return False
    return management.free(pool.name, _wanted(text)) > 0


def _wanted(text: str) -> int | None:
    """Bytes to free, None for all that can be."""
    found = WANTED.search(text)
    if found is None:
        return None
    unit = "b" if found[2].lower().startswith("byte") else found[2].lower()
    if unit not in UNITS:
        return None
    return int(float(found[1]) * UNITS[unit] * 1.5)


def _device(error: BaseException, text: str) -> torch.device:
    if not isinstance(error, torch.OutOfMemoryError):
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return torch.device("cpu")
    found = DEVICE.search(text)
    return torch.device(kind.type, int(found[1]) if found else 0)
