"""Whether a loader makes of an export the model that was exported.

A loader of the user's own may do to the export what it did to the source, such as fusing an adapter
or scaling a weight, a second time. Its first load of an export is compared with what was saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opguard.exports import store

if TYPE_CHECKING:
    import torch

__all__ = ["NOTES", "note", "notes_of", "prove"]

NOTES = "opguard.json"

# Folder -> what stood in it when a load from it gave the weights that were saved.
_proven: dict[Path, tuple[int, bytes]] = {}


def _digests(modules: Iterable[torch.nn.Module]) -> dict[str, str]:
    """SHA-256 of each weight by its name."""
    import torch

    found = {}
    parts = list(modules)
    for index, module in enumerate(parts):
        part = f"{index}." if len(parts) > 1 else ""
        for name, value in module.state_dict().items():
            if isinstance(value, torch.Tensor):
                data = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
                digest = hashlib.sha256(data.numpy().data if data.numel() else b"")
                found[part + name] = f"{digest.hexdigest()} {value.dtype}"
    return found


def note(folder: Path, modules: Iterable[torch.nn.Module] | None, **notes: Any) -> None:
    """Writes into an export being made what `prove` compares; no modules: nothing to compare."""
    notes["weights"] = None if modules is None else _digests(modules)
    (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def notes_of(folder: Path) -> dict[str, Any]:
    """Returns what `note` wrote."""
    found: dict[str, Any] = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    return found


def prove(
    folder: Path, saved: Mapping[str, str] | None, modules: Iterable[torch.nn.Module]
) -> str | None:
    """Returns how a model loaded from an export differs from the one that was saved; None: it does
    not. Read once a process for what stands in the folder.
    """
    stands = store.stamp(folder)
    if saved is None or (stands is not None and _proven.get(folder) == stands):
        return None
    found = _digests(modules)
    wrong = sorted(name for name in found.keys() | saved if found.get(name) != saved.get(name))
    if wrong:
        return f"{len(wrong)} of its weights differ, such as {wrong[0]}"
    if stands is not None:
        _proven[folder] = stands
    return None
