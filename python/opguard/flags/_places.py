"""The location ids of a model's leaves, without a trace of them on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from opguard.flags._leaves import Leaf
from opguard.flags.locations import (
    ErrorLocation,
    _id_of_member,
    _id_of_name,
    _registry,
    claim,
    resolve_location,
)
from opguard.flags.tracked import _pruned

__all__ = ["places_of"]


def places_of(root: nn.Module, prefix: str, leaves: Mapping[str, Leaf]) -> tuple[int, list[int]]:
    """The id of ``root`` and those of its leaves, by their qualified names.

    A tracked model has its own names; another gets names that are its as long as it lives.
    """
    if "_opguard_location" in root.__dict__:
        own = resolve_location(root)
        return own, [
            resolve_location(leaf.module)
            if "_opguard_location" in leaf.module.__dict__
            else _id_of_name(name)  # nobody's own name: the hook keeps the id
            for name, leaf in leaves.items()
        ]
    with _registry.lock:
        others = [owner for owner in _registry.living() if owner.model() is not root]
        paths = [name for name in leaves if name]
        before, names = claim(root, [prefix, *paths] if prefix else paths, _prune)
        # What claim takes for part of this model now may be tracked by itself.
        _registry.owners += [owner for owner in others if owner not in _registry.owners]
        name = before + prefix if prefix else before.removesuffix(".") or type(root).__name__
        own = _id_of_member(name)
    return own, [ErrorLocation.get(names.get(name, "")) if name else own for name in leaves]


def _prune(paths: Sequence[str], room: int) -> dict[str, str | None]:
    return _pruned(paths, room, {})
