"""A model of two files that says which generation it is, exported by the engine itself.

Light on purpose: a process that is killed a hundred times has no time for a library to load.
"""

from __future__ import annotations

from pathlib import Path

import torch

from opguard.exports import matching, store

PARTS = ("first.safetensors", "part/second.safetensors")


def model(generation: int, size: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((size,), float(generation)) for name in PARTS}


def save(parts: dict[str, torch.Tensor], folder: Path) -> bool:
    from safetensors.torch import save_file

    for name, tensor in parts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({"weight": tensor}, folder / name)
    return True


def load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: load_file(folder / name)["weight"] for name in PARTS}


def generation_of(parts: dict[str, torch.Tensor]) -> int:
    """The generation that every number of the model says; an error where two of them differ."""
    values = torch.cat(list(parts.values())).unique().tolist()
    assert len(values) == 1, f"a torn export: {values}"
    return int(values[0])


def get(folder: Path, generation: int, *, size: int = 1000, **settings) -> dict[str, torch.Tensor]:
    """Loads that generation: from the export, or from a source that has always the one asked."""
    return matching.load_or_refresh(
        folder=folder,
        describe=lambda network: {"generation": generation},
        from_source=lambda: model(generation, size),
        from_export=load,
        save=save,
        settings=matching.Settings(**settings),
    )


def stands(folder: Path) -> int:
    """The generation of the export in the folder: its metadata, digests and numbers agree."""
    while True:
        before = store.stamp(folder)
        try:
            metadata = store.read(folder)
            store.verify(folder, metadata)
            found = generation_of(load(folder))
        except Exception:
            if store.stamp(folder) != before:
                continue  # exchanged while it was read
            raise
        if store.stamp(folder) == before:
            assert metadata["made_from"] == {"generation": found}
            return found
