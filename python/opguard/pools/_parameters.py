"""Whether parameters can be pointed at another tensor, who shares their memory, and doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opguard.pools._views import point, version_of

__all__ = ["groups_of", "is_at", "point_all", "roots_of", "tensors_of"]

# How many have the tensor beside its Python object: newer torch tells. Where it does not, a patch
# is not refused under a live graph, and its backward raises.
_use_count: Callable[[Tensor], int] | None = getattr(Tensor, "_use_count", None)


def point_all(moves: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Points each parameter from one tensor at another: all of them or none."""
    done = 0
    try:
        for parameter, _, there in moves:
            _point(parameter, there)
            done += 1
    except BaseException:
        for parameter, back, _ in moves[: done + 1]:
            _point(parameter, back)
        raise


def _point(parameter: Tensor, at: Tensor) -> None:
    if held(parameter) and version_of(parameter) is not None:
        # A backward that needs what the parameter was would silently read the other tensor.
        torch.autograd.graph.increment_version(parameter)
    point(parameter, at)


def held(parameter: Tensor) -> bool:
    """Whether a live graph, or a view, has this parameter; where torch does not say: perhaps."""
    return _use_count is None or _use_count(parameter) > 1


def is_at(parameter: Tensor, tensor: Tensor) -> bool:
    same = parameter.data_ptr() == tensor.data_ptr() and parameter.shape == tensor.shape
    return same and parameter.dtype == tensor.dtype and parameter.device == tensor.device


def roots_of(obj: Any) -> Iterator[tuple[str, nn.Module]]:
    """The module itself, or the modules among an object's attributes, with their names."""
    if isinstance(obj, nn.Module):
        yield "", obj
        return
    for name, value in list(vars(obj).items()) if hasattr(obj, "__dict__") else ():
        if isinstance(value, nn.Module):
            yield name, value


def tensors_of(obj: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with their names; tied ones once a name."""
    for prefix, root in roots_of(obj):
        for path, module in root.named_modules(prefix=prefix):
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        yield f"{path}.{name}" if path else name, tensor


def groups_of(obj: Any, deltas: Mapping[Tensor, Any]) -> list[list[Tensor]]:
    """For each parameter, itself and the others that are the same memory, after all checks."""
    names = {}
    ranges: list[_Range] = []
    for name, tensor in tensors_of(obj):
        if id(tensor) not in names:
            names[id(tensor)] = name
            if type(tensor.data) is Tensor and tensor.layout is torch.strided:
                ranges.append((*_range(tensor), tensor))
    for parameter in deltas:
        if id(parameter) not in names and isinstance(parameter, Tensor):
            names[id(parameter)] = f"a tensor of shape {tuple(parameter.shape)}"
            ranges.append((*_range(parameter), parameter))
        _check(parameter, names)
    shared = _clusters(ranges)
    return [_sharing(parameter, shared, names, deltas) for parameter in deltas]


_Range = tuple[int, int, Tensor]


def _clusters(ranges: list[_Range]) -> dict[int, list[_Range]]:
    """For the id of each tensor that shares memory, all that overlap, also through others."""
    shared: dict[int, list[_Range]] = {}
    cluster: list[_Range] = []
    end = 0
    for one in sorted(ranges, key=lambda one: (one[2].device.index or 0, one[:2])):
        if one[0] == one[1]:
            continue
        if cluster and (one[0] >= end or one[2].device != cluster[0][2].device):
            cluster = []
        cluster.append(one)
        end = max(end, one[1]) if len(cluster) > 1 else one[1]
        if len(cluster) > 1:
            shared.update((id(member[2]), cluster) for member in cluster)
    return shared


def _range(tensor: Tensor) -> tuple[int, int]:
    if tensor.is_meta or not tensor.numel():
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _check(parameter: Tensor, names: Mapping[int, str]) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"expected a parameter for each delta, got {type(parameter).__name__}")
    name = names[id(parameter)]
    kind = parameter.data
    if type(kind) is not Tensor or kind.layout is not torch.strided or kind.is_meta:
        what = "a meta tensor" if kind.is_meta else f"{type(kind).__name__} ({kind.layout})"
        raise TypeError(
            f"expected {name} to be a plain tensor, got {what}: patch such a layer with a forward "
            "hook"
        )
    if not (kind.is_floating_point() or kind.is_complex()):
        raise TypeError(f"expected {name} to be of a floating dtype, got {kind.dtype}")
    if _use_count is not None and held(parameter):
        raise ValueError(
            f"expected {name} to be in no autograd graph, and a live graph or a view holds it, "
            "whose backward would read the patched weights: run backward or drop its output first"
        )


def _sharing(
    parameter: Tensor,
    shared: Mapping[int, list[_Range]],
    names: Mapping[int, str],
    deltas: Mapping[Tensor, Any],
) -> list[Tensor]:
    group = [parameter]
    mine = (*_range(parameter), parameter.shape, parameter.stride(), parameter.dtype)
    for start, end, other in shared.get(id(parameter), ()):
        if other is parameter:
            continue
        same = (start, end, other.shape, other.stride(), other.dtype) == mine
        if not same or other in deltas:
            what = "and both have a delta" if same else "in part"
            raise ValueError(
                f"{names[id(parameter)]} and {names[id(other)]} share memory {what}: tied weights "
                "take one delta for all of them, and views cannot be patched"
            )
        group.append(other)
    return group
