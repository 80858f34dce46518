"""Where rows go in ops that put several tensors side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opguard.flags._rows.rows import Rows, cat_rows, stack_rows
from opguard.flags._rows.rules import rule

if TYPE_CHECKING:
    from opguard.flags._rows.rules import Call

__all__: list[str] = []


def _parts(call: Call) -> list[tuple[Rows | None, tuple[Any, ...]]]:
    shapes = [tuple(tensor.shape) for tensor in call["tensors"]]
    return list(zip(call.rows_list("tensors"), shapes, strict=True))


@rule("aten::cat", "aten::concat", "aten::concatenate")
def _cat(call: Call) -> Rows | None:
    parts = _parts(call)
    # torch lets an empty 1-D tensor stand among tensors of any shape.
    kept = [part for part in parts if part[1] != (0,)] or parts[:1]
    if all(rows is None for rows, _ in kept):
        return None
    return cat_rows(kept, call["dim"])


@rule("aten::stack", "aten::_stack")
def _stack(call: Call) -> Rows | None:
    parts = _parts(call)
    if all(rows is None for rows, _ in parts):
        return None
    return stack_rows(parts, call["dim"])


@rule("aten::block_diag")
def _block_diag(call: Call) -> Rows | None:
    parts = []
    for rows, shape in _parts(call):
        flat = (1,) * (2 - len(shape)) + shape
        parts.append((None if rows is None else rows.reshaped(flat), flat))
    if all(rows is None for rows, _ in parts):
        return None
    width = sum(shape[1] for _, shape in parts)
    bands: list[tuple[Rows | None, tuple[Any, ...]]] = []
    at: Any = 0
    for rows, shape in parts:
        band = None if rows is None else rows.padded(1, at, width - at - shape[1])
        bands.append((band, (shape[0], width)))
        at = at + shape[1]
    return cat_rows(bands, 0)
