"""Inputs of a call, moved to where the model runs."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Mover", "input_mover", "move_inputs"]

Mover = Callable[
    [tuple[Any, ...], dict[str, Any] | None], tuple[tuple[Any, ...], dict[str, Any] | None]
]

PLAIN = frozenset({type(None), bool, int, float, str})


def input_mover(device: torch.device) -> Mover | None:
    """What moves inputs to ``device``; None on machines where they can be in one place only."""
    if device.type == "cpu" and not torch.accelerator.is_available():
        return None

    def move(
        args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
        if _are_here(args, device) and (not kwargs or _are_here(kwargs.values(), device)):
            return args, kwargs
        memo: dict[int, Any] = {}
        return _move(args, device, memo), _move(kwargs, device, memo)

    return move


def move_inputs(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``, at any depth of tuples, lists, dicts, dataclasses.

    What holds no tensor that is elsewhere is given back itself; nothing of the caller's is
    changed. One object that is in several places is one in the result too.
    """
    return _move(value, device, {})


def _are_here(values: Iterable[Any], device: torch.device) -> bool:
    """Whether these are tensors there and plain values alone, as in most calls."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if not _is_on(value, device):
                return False
        elif type(value) not in PLAIN:
            return False
    return True


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """A device without an index is any of its type."""
    here = tensor.device
    return here == device or (here.type == device.type and device.index in (None, here.index))


def _move(value: Any, device: torch.device, memo: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        if _is_on(value, device):
            return value
    elif not isinstance(value, (tuple, list, Mapping)) and not _is_record(value):
        return value
    found = memo.get(id(value), memo)
    if found is memo:
        memo[id(value)] = value  # a ring goes as it is
        found = memo[id(value)] = _moved(value, device, memo)
    return found


def _is_record(value: Any) -> bool:
    if not dataclasses.is_dataclass(type(value)) or isinstance(value, nn.Module):
        return False
    return hasattr(value, "__dict__")


def _moved(value: Any, device: torch.device, memo: dict[int, Any]) -> Any:
    if isinstance(value, (torch.Tensor, PackedSequence)):
        move: Callable[..., Any] = value.to
        return move(device)
    if isinstance(value, (tuple, list)):
        items = [_move(item, device, memo) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else _rebuilt(value, items)
    parts = value if isinstance(value, Mapping) else vars(value)
    moved = {key: _move(part, device, memo) for key, part in parts.items()}
    if all(moved[key] is part for key, part in parts.items()):
        return value
    if isinstance(value, Mapping):
        return _remapped(value, moved)
    made = copy.copy(value)
    vars(made).update(moved)
    return made


def _rebuilt(value: Any, items: list[Any]) -> Any:
    """A sequence like ``value`` of ``items``: plain, named, torch.Size's kin, or a subclass."""
    if isinstance(value, tuple):
        make = getattr(type(value), "_make", None)
        return tuple(items) if type(value) is tuple else (make or type(value))(items)
    if type(value) is list:
        return items
    made = copy.copy(value)
    made[:] = items
    return made


def _remapped(value: Mapping[Any, Any], pairs: dict[Any, Any]) -> Any:
    """A mapping like ``value`` of ``pairs``; kinds that nobody knows how to copy go as they are."""
    if type(value) in (dict, MappingProxyType):
        return pairs
    if not isinstance(value, (dict, UserDict)):
        return value
    made = copy.copy(value)
    for key, item in pairs.items():
        made[key] = item
    return made
