"""Look-ups that cannot be killed by a bad index: flag it, clamp it, go on.

On a GPU an index outside its table ends the process with a device-side assert, long after the call
that was wrong. These functions record OUT_OF_BOUNDS (ERROR) for the sample and look up the nearest
row that exists, in one pass over the indices and without a device sync.

What comes out where an index was bad is the row it was clamped to, or ``fill``; either way no
gradient flows back from there. ``module`` says where, as everywhere in ``opguard.flags``: an
``nn.Module``, a name, an id 0..1023, or None for "Unknown". Of GuardedTensors what comes out is one
GuardedTensor that says it too, or the pair of it and its flags where ``f`` was given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from opguard.flags import _engine
from opguard.flags.combinators import _filled as filled
from opguard.flags.config import get_config
from opguard.flags.errors import FlagsError
from opguard.flags.guarded import GuardedTensor, guard

if TYPE_CHECKING:
    from torch import Tensor

    from opguard.flags.config import ErrorConfig

__all__ = ["guarded_embedding", "guarded_gather", "guarded_index_select"]


def _clamped(
    ids: Tensor,
    size: int,
    module: int | str | nn.Module | None,
    f: Tensor | None,
    config: ErrorConfig | None,
) -> tuple[Tensor, Tensor]:
    """Flags, and ids that exist in a dtype torch's look-ups take."""
    key = (get_config() if config is None else config).key
    f, clamped = _engine.index_clamp(ids, size, module, f, key)
    if clamped.dtype not in (torch.int64, torch.int32):
        clamped = clamped.long()
    return f, clamped


def _settle(out: Tensor, good: Tensor, fill: float | None) -> Tensor:
    """``out`` as it is to be at bad indices; ``good`` broadcasts to its shape."""
    if fill is not None:
        return filled(out, ~good, fill, "fill")
    # The row that stood in for a missing one was not meant: it learns nothing from that.
    return torch.where(good, out, out.detach()) if out.requires_grad else out


def guarded_embedding(
    ids: Tensor,
    weight: Tensor | nn.Module,
    f: Tensor | None = None,
    *,
    module: int | str | nn.Module | None = None,
    fill: float | None = None,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    config: ErrorConfig | None = None,
) -> Any:
    """``F.embedding(ids, weight, ...)`` and flags, for ids that may lie outside the table.

    Args:
        ids: (N, ...) of any integer dtype; 0-d is one sample. ``-1`` is outside, as in torch.
        weight: the table (V, D) with V > 0, or the module that has it, which is then called with
            the clamped ids: its padding_idx, max_norm, sparse and hooks are its own.
        f: flags (N, W) to record in; None makes new ones.
        module: where; None is ``weight`` itself when that is a module.
        fill: the value of the output where an id was bad; None: the row it was clamped to.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: of ``F.embedding``, for a
            table. The row that an id was clamped to counts as looked up: for the frequency, and
            for max_norm.

    Returns:
        (ids.shape + (D,), flags (N, W)).

    Raises:
        FlagsError: the table is empty, ids are not integers, options came with a module, or the
            table's dtype does not hold ``fill``.
    """
    size = _table_size(weight)
    if module is None and isinstance(weight, nn.Module):
        module = weight
    with_f = f is not None
    f, clamped = _clamped(ids, size, module, f, config)
    if isinstance(weight, nn.Module):
        if padding_idx is not None or max_norm is not None or scale_grad_by_freq or sparse:
            raise FlagsError(
                f"expected no options of F.embedding beside a {type(weight).__name__}, which has "
                "its own; pass its weight instead"
            )
        out = weight(clamped)
        if out.shape[:-1] != ids.shape:
            raise FlagsError(
                f"expected {type(weight).__name__} to give one row an id, {tuple(ids.shape)} ids "
                f"gave {tuple(out.shape)}; flag_oob_indices flags without looking up"
            )
    else:
        out = F.embedding(
            clamped, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    return _given(_settle(out, (ids == clamped).unsqueeze(-1), fill), f, with_f)


def _given(out: Tensor, f: Tensor, with_f: bool) -> Any:
    """What a look-up returns: values and flags, or the GuardedTensor that has both."""
    if not isinstance(out, GuardedTensor):
        return out, f
    return (out, out.flags) if with_f else out


def _table_size(weight: Tensor | nn.Module) -> int:
    table = weight if isinstance(weight, torch.Tensor) else getattr(weight, "weight", None)
    if not isinstance(table, torch.Tensor) or table.dim() != 2:
        raise FlagsError(
            f"expected a table of shape (V, D) or a module with one as weight, got "
            f"{type(weight).__name__}"
        )
    if table.shape[0] == 0:
        raise FlagsError(
            f"expected a table of at least one row to look up in, got shape {tuple(table.shape)}"
        )
    return table.shape[0]


def _size(x: Tensor, dim: int, index: Tensor) -> int:
    dims = max(x.dim(), 1)
    if not -dims <= dim < dims:
        raise FlagsError(
            f"expected dim to be one of the {dims} of x, -{dims}..{dims - 1}, got {dim}"
        )
    size = x.shape[dim] if x.dim() else 1
    if size == 0 and index.numel() != 0:
        raise FlagsError(
            f"expected something to look up in dimension {dim} of x, got shape {tuple(x.shape)}"
        )
    return size


def guarded_gather(
    x: Tensor,
    dim: int,
    index: Tensor,
    f: Tensor | None = None,
    *,
    module: int | str | nn.Module | None = None,
    fill: float | None = None,
    sparse_grad: bool = False,
    config: ErrorConfig | None = None,
) -> Any:
    """``x.gather(dim, index)`` and flags, for indices that may lie outside ``x.shape[dim]``.

    The samples are the rows of ``index`` (N, ...), also where ``dim`` is 0 and the values of
    ``index`` name rows of ``x``. ``f`` (N, W) None makes new flags; ``fill`` is the value of the
    output at bad indices, None the element at the index they were clamped to.

    Returns:
        (index.shape, flags (N, W)).

    Raises:
        FlagsError: nothing to look up along ``dim``, index is not of integers, or x's dtype does
            not hold ``fill``.
    """
    with_f = f is not None
    if isinstance(x, GuardedTensor) and not isinstance(index, GuardedTensor):
        index = guard(index)
    f, clamped = _clamped(index, _size(x, dim, index), module, f, config)
    if clamped.dtype != torch.int64:
        clamped = clamped.long()
    out = torch.gather(x, dim, clamped, sparse_grad=sparse_grad)
    return _given(_settle(out, index == clamped, fill), f, with_f)


def guarded_index_select(
    x: Tensor,
    dim: int,
    index: Tensor,
    f: Tensor | None = None,
    *,
    module: int | str | nn.Module | None = None,
    fill: float | None = None,
    config: ErrorConfig | None = None,
) -> Any:
    """``x.index_select(dim, index)`` and flags, for indices that may lie outside ``x.shape[dim]``.

    The samples are the entries of ``index`` (N,): for ``dim`` 0 the rows of what comes out. ``f``
    (N, W) None makes new flags; ``fill`` is the value at bad indices, None what lies at the index
    they were clamped to.

    Returns:
        (x.shape with N at dim, flags (N, W)).

    Raises:
        FlagsError: nothing to select along ``dim``, index is not of integers, or x's dtype does
            not hold ``fill``.
    """
    with_f = f is not None
    if isinstance(x, GuardedTensor) and not isinstance(index, GuardedTensor):
        index = guard(index)
    f, clamped = _clamped(index, _size(x, dim, index), module, f, config)
    out = torch.index_select(x, dim, clamped)
    good = index == clamped
    if out.dim():
        shape = [1] * out.dim()
        shape[dim] = -1
        good = good.reshape(shape)
    return _given(_settle(out, good, fill), f, with_f)
