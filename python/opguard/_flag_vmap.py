"""The flag ops under torch.vmap: they work sample by sample, so a batch of batches is one batch.

Imported when the first flag op is called under vmap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch.autograd_function import custom_function_call_vmap_helper
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

__all__ = ["run"]


def run(name: str, args: tuple[Any, ...]) -> Any:
    """Calls ``torch.ops.opguard.<name>`` one level of vmap further down."""
    if name.endswith("_"):
        raise RuntimeError(
            f"expected opguard::{name} outside of vmap, which cannot write into the flags of its "
            f"caller; use opguard::{name[:-1]}, which returns new ones"
        )
    op = getattr(torch.ops.opguard, name).default

    as_one = _gather_as_one_batch if name == "flags_gather" else _as_one_batch

    def rule(info: Any, in_dims: tuple[Any, ...], *inside: Any) -> tuple[Any, Any]:
        return as_one(op, info.batch_size, in_dims, inside)

    interpreter: Any = retrieve_current_functorch_interpreter()
    return custom_function_call_vmap_helper(interpreter, rule, op, *args)


def _flat(tensor: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """(size, N, ...) as (size * N, ...), wherever vmap's dimension is; without N there is one."""
    if dim is None:
        tensor = tensor.unsqueeze(0).expand(size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor if tensor.dim() == 1 else tensor.flatten(0, 1)


def _apart(tensor: torch.Tensor, size: int, samples: int) -> torch.Tensor:
    return tensor.reshape(size, samples, *tensor.shape[1:])


def _samples(tensor: torch.Tensor, dim: int | None) -> int:
    """N of each in vmap's batch, also when that is empty."""
    sizes = [size for i, size in enumerate(tensor.shape) if i != dim]
    return sizes[0] if sizes else 1


def _gather_as_one_batch(
    op: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Rows are named within their own batch, so that the numbers of the others are moved on."""
    flags, index, key = args
    rows = _samples(flags, in_dims[0])
    picked = _samples(index, in_dims[1])
    if in_dims[1] is None:
        index = index.unsqueeze(0).expand(size, *index.shape)
    else:
        index = index.movedim(in_dims[1], 0)
    if in_dims[0] is not None:
        first = torch.arange(size, device=index.device) * rows
        first = first.reshape(size, *[1] * (index.dim() - 1))
        # What is no row stays none, and no row of another batch.
        wrong = torch.where(index == -1, -1, size * rows)
        index = torch.where((index >= 0) & (index < rows), index + first, wrong)
        flags = _flat(flags, in_dims[0], size)
    return _apart(op(flags, index.flatten(0, 1), key), size, picked), 0


def _as_one_batch(
    op: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    flat: list[Any] = []
    samples = 1
    has_samples = True  # as the last tensor has: only ids and x may be 0-d, and come last
    for dims, arg in zip(in_dims, args, strict=True):
        if isinstance(arg, torch.Tensor):
            has_samples = arg.dim() > (dims is not None)
            samples = _samples(arg, dims)
            flat.append(_flat(arg, dims, size))
        elif isinstance(arg, list):
            samples = _samples(arg[0], dims[0])
            flat.append([_flat(one, d, size) for one, d in zip(arg, dims, strict=True)])
        else:
            flat.append(arg)
    out = op(*flat)
    if isinstance(out, torch.Tensor):
        return _apart(out, size, samples), 0
    flags, ids = out
    if has_samples:
        ids = _apart(ids, size, samples)
    return (_apart(flags, size, samples), ids), (0, 0)
