"""Which modules an object is made of, without importing the libraries it may be from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from opguard._loaded import loaded
from opguard.pools.errors import Unmanageable

__all__ = ["find_parts", "refuse_offloaded"]

# Longer containers hold data, not modules.
MOST_ITEMS = 1000
DEEPEST = 3


def find_parts(obj: object) -> dict[str, nn.Module]:
    """The modules that ``obj`` is made of by name: ``unet``, ``controlnets.0``; each once.

    Looks into mappings, lists, tuples and the attributes of objects; a module inside another one
    that was found is part of that one.

    Raises:
        Unmanageable: where an ``OpGuardBase`` is not loaded.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in _modules(_opened(obj), "", 0, set()):
        found.setdefault(id(module), (name, module))
    inside = {
        id(child)
        for _, module in found.values()
        for child in module.modules()
        if child is not module
    }
    return {name: module for key, (name, module) in found.items() if key not in inside}


def _opened(obj: Any) -> Any:
    """The detector of a guarded model; anything else as it is."""
    if not isinstance(obj, loaded("opguard.base", "OpGuardBase")):
        return obj
    if not obj.is_loaded:
        raise Unmanageable(
            f"expected a {type(obj).__name__} that is loaded, it has no model now; "
            "manage it inside `with` it, or make it with keep_warm=True"
        )
    return _opened(obj.detector)


def _modules(
    value: Any, name: str, depth: int, around: set[int]
) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, value
        return
    if depth > DEEPEST or id(value) in around:
        return
    for key, item in _items(value, depth):
        yield from _modules(
            item, f"{name}.{key}" if name else str(key), depth + 1, around | {id(value)}
        )


def _items(value: Any, depth: int) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items()) if len(value) <= MOST_ITEMS else []
    if isinstance(value, list | tuple):
        return list(enumerate(value)) if len(value) <= MOST_ITEMS else []
    # Attributes of the object itself only: what those refer to may refer to anything.
    attributes = getattr(value, "__dict__", None) if depth == 0 else None
    return list(attributes.items()) if isinstance(attributes, dict) else []


def refuse_offloaded(parts: Mapping[str, nn.Module], what: str, *, deep: bool = True) -> None:
    """Refuse parts that another library moves already: two movers undo each other.

    Args:
        parts: by name.
        what: is made of them, for the message.
        deep: look into their submodules as well.

    Raises:
        Unmanageable: names the first such part and how its hooks come off.
    """
    for name, module in parts.items():
        for each in module.modules() if deep else (module,):
            hook = each.__dict__.get("_hf_hook")
            if hook is not None and _offloads(hook):
                raise Unmanageable(
                    f"expected {what} without offload hooks, its {name!r} has accelerate's "
                    f"{type(hook).__name__}, which would move it too; call "
                    "pipe.remove_all_hooks(), or load it without device_map"
                )
            if _has_group_offload(each):
                raise Unmanageable(
                    f"expected {what} without offload hooks, its {name!r} has diffusers' group "
                    "offload, which would move it too; load it again without it"
                )


def _offloads(hook: Any) -> bool:
    # accelerate puts hooks also where it only moves inputs; those may stay.
    chained = getattr(hook, "hooks", ())
    offload = getattr(hook, "offload", False) is True
    return offload or type(hook).__name__ == "CpuOffload" or any(map(_offloads, chained))


def _has_group_offload(module: nn.Module) -> bool:
    registry = module.__dict__.get("_diffusers_hook")
    hooks = getattr(registry, "hooks", None)
    return isinstance(hooks, dict) and any("offload" in name for name in hooks)
