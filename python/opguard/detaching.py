"""Detaching what a model returns and bringing it to host memory, whatever it is wrapped in.

The walk is in C (csrc/py/detach*.c); here is what it asks Python for: the types of libraries
that need a library's own functions, and the way over from an accelerator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch.utils import _pytree as pytree

from opguard import _C, _ops

__all__ = ["detach_to_cpu", "register_detach"]

T = TypeVar("T")

# What `resolve` gives: taking apart, building again, and an empty one for rings (or None).
Handler = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any] | None]

# Bytes from which a leaf is copied on its own: the gain of packing is in the small ones.
LARGE = 1 << 20

register_detach = _C.register_detach


def detach_to_cpu(
    value: T, *, copy: bool = False, models: torch.nn.Module | Iterable[torch.nn.Module] = ()
) -> T:
    """Return ``value`` with every tensor in it detached and in host memory.

    Containers and objects at any depth are walked: list, tuple, namedtuple, dict (keys too), set,
    deque, their subclasses, dataclasses, attrs classes, ``SimpleNamespace``, outputs and caches
    of transformers and diffusers, numpy object arrays, distributions, pytree's and
    ``register_detach``'s types. They come out as the same types, made without their
    constructors; the same object twice comes out as the same object twice, and rings as rings.
    Nothing in ``value`` is changed, and no mutable container of it is in the result. Immutable
    containers with nothing to detach, and objects of other types, are returned themselves.

    A tensor in host memory that fills its storage and is no parameter, view, inference tensor or
    part of ``models`` is detached and shares its memory with the result; one that needs no
    detaching is returned itself. Every other tensor is copied, without the rest of its storage.
    A ``Parameter`` comes out as a ``Parameter`` with ``requires_grad`` False; a tensor subclass
    keeps its attributes. Results are ordinary tensors, also inside ``torch.inference_mode()``.
    Meta tensors have no data and stay on meta.

    Args:
        value: anything.
        copy: copy every tensor, so that nothing is shared with ``value``.
        models: a module or modules whose parameters and buffers, and tensors that share their
            memory, are copied.

    Raises:
        TypeError: a container that cannot be taken apart or built again; the message says where.
    """
    if torch.compiler.is_compiling():
        traced: T = pytree.tree_map_only(torch.Tensor, _traced, value)
        return traced
    if type(models) is not tuple:
        models = (models,) if isinstance(models, torch.nn.Module) else _several(models)
    detached: T = _C.detach(value, copy, models)
    return detached


def _several(models: Iterable[torch.nn.Module]) -> tuple[torch.nn.Module, ...]:
    try:
        return tuple(models)
    except TypeError:
        raise TypeError(
            f"expected models to be a module or several, got {type(models).__name__}; "
            "pass models=model or models=(a, b)"
        ) from None


def _traced(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


# --- types that need a library's own functions -------------------------------------------------


def resolve(kind: type) -> Handler | None:
    """How values of ``kind`` are taken apart, when it is numpy's or pytree knows it."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.ndarray):
        return (_expand_array, _build_array, _empty_array)
    if kind in pytree.SUPPORTED_NODES:
        return (_expand_pytree, _build_pytree, None)
    return None


def _expand_array(value: Any) -> tuple[list[Any], None] | None:
    return (value.ravel().tolist(), None) if value.dtype.hasobject else None


def _empty_array(value: Any, context: None) -> Any:
    import numpy

    return numpy.empty_like(value)


def _build_array(value: Any, context: None, children: list[Any], early: Any) -> Any:
    import numpy

    flat = numpy.empty(len(children), dtype=object)
    flat[:] = children
    made = _empty_array(value, context) if early is None else early
    made[...] = flat.reshape(value.shape)
    return made


def _expand_pytree(value: Any) -> tuple[Iterable[Any], Any]:
    return pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)


def _build_pytree(value: Any, context: Any, children: list[Any], early: None) -> Any:
    return pytree.SUPPORTED_NODES[type(value)].unflatten_fn(children, context)


# --- from an accelerator -----------------------------------------------------------------------


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.nbytes < LARGE and not tensor.is_quantized


def _block(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, as elements that fill one block of memory."""
    tensor = tensor.resolve_conj().resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.clone()


def _start(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Start bringing small tensors of one device over; call the result after synchronising."""
    blocks = [_block(t) for t in tensors]
    packed = _ops.pack(blocks)
    pinned = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=packed.is_cuda)
    pinned.copy_(packed, non_blocking=True)
    return lambda: list(_ops.unpack(pinned, blocks))


def fetch(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors in host memory: one copy and one wait for all small ones of a device."""
    result: list[torch.Tensor | None] = [None] * len(tensors)
    groups: dict[torch.device, list[int]] = {}
    accelerator = torch.accelerator.current_accelerator()
    kind = None if accelerator is None else accelerator.type  # the one kind that can be waited for
    # Packing has kernels for host memory (which tests take for a device's) and, where they were
    # built, for CUDA; without them each tensor is copied on its own, and waited for together.
    packs = ("cpu",) if _C.ops_info()["cuda"] else ("cpu", "cuda")
    for i, tensor in enumerate(tensors):
        if tensor.device.type in packs and _is_small(tensor):
            groups.setdefault(tensor.device, []).append(i)
        else:
            waited = tensor.device.type == kind
            result[i] = tensor.to("cpu", non_blocking=waited, copy=True)
    started = [(group, _start([tensors[i] for i in group])) for group in groups.values()]
    for device in {t.device for t in tensors if t.device.type == kind}:
        torch.accelerator.synchronize(device)
    for group, split in started:
        for i, tensor in zip(group, split(), strict=True):
            result[i] = tensor
    return cast("list[torch.Tensor]", result)


_C.detach_bind(
    resolve,
    fetch,
    torch._C._InferenceMode,
    torch._C._set_grad_enabled,
    torch.Tensor._make_subclass,
    pytree.SUPPORTED_NODES,
)
