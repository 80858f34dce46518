"""Where rows go in ops that order elements, or pick them by their order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opguard.flags._rows.rows import Rows, merge_rows
from opguard.flags._rows.rules import rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from opguard.flags._rows.rules import Call

__all__: list[str] = []


@rule("aten::sort", "aten::topk")
def _sort(call: Call) -> Any:
    rows, dim = call.rows("self"), call["dim"]
    if rows is None:
        return None

    def found(outs: Sequence[Tensor]) -> list[Rows | None]:
        moved = rows.reordered_by(outs[1], dim)
        return [moved, moved]

    return found


@rule("aten::kthvalue")
def _kthvalue(call: Call) -> Any:
    rows, dim, keepdim = call.rows("self"), call["dim"], call["keepdim"]
    if rows is None:
        return None

    def found(outs: Sequence[Tensor]) -> list[Rows | None]:
        if not rows.shape:
            return [rows, rows]
        index = outs[1] if keepdim else outs[1].unsqueeze(dim)
        moved = rows.reordered_by(index, dim)
        if not keepdim:
            moved = moved.reduced((dim,))
        return [moved, moved]

    return found


@rule(
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::_unique",
    "aten::_unique2",
)
def _unique(call: Call) -> Any:
    rows = call.rows("self")
    # A value that several rows have stands for all of them: one row for everything.
    if rows is None:
        return None
    return lambda outs: [rows.whole(tuple(out.shape)) for out in outs]


def _looked_up(own: Rows | None, table: Rows | None, shape: tuple[Any, ...]) -> Rows | None:
    found = [own] if own is not None else []
    if table is not None:
        found.append(table.whole(shape))
    return merge_rows(found, shape) if found else None


@rule("aten::bucketize")
def _bucketize(call: Call) -> Rows | None:
    return _looked_up(call.rows("self"), call.rows("boundaries"), call.shape("self"))


@rule("aten::isin")
def _isin(call: Call) -> Rows | None:
    one, other = ("elements", "test_elements")
    if one not in call:  # of one number
        one, other = ("element", "test_elements")
    elif other not in call:
        other = "test_element"
    return _looked_up(call.rows(one), call.rows(other), call.shape(one))


@rule("aten::searchsorted")
def _searchsorted(call: Call) -> Rows | None:
    own, table, shape = call.rows("self"), call.rows("sorted_sequence"), call.shape("self")
    lead = len(call.shape("sorted_sequence")) - 1
    if table is None or lead == 0:
        return _looked_up(own, table, shape)
    # Each row of the table is searched for the values in the same row.
    table = table.resized(-1, shape[-1])
    return merge_rows([table] if own is None else [own, table], shape)
