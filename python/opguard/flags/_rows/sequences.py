"""Row rules of embeddings, recurrent networks and packed sequences."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from opguard.flags._rows.axes import Axis, strides
from opguard.flags._rows.placing import (
    After,
    Shape,
    each,
    entire,
    inputs,
    merged,
    place,
    spell,
    union,
    whole,
)
from opguard.flags._rows.rows import Rows
from opguard.flags._rows.rules import Call, rule

__all__: list[str] = []


def _numbers(value: Any) -> Tensor | None:
    """A real, plain CPU tensor of indices, which may be looked at without a wait; or None."""
    if type(value) is not Tensor or value.device.type != "cpu":
        return None
    try:
        value.data_ptr()
    except RuntimeError:  # made by a transform: it holds no numbers
        return None
    return value


# --- embeddings -----------------------------------------------------------------------------------


@rule("aten::embedding")
def _embedding(call: Call) -> After:
    """(V, D) looked up by ids of any shape: a vector has its id's row and its own."""
    rank = len(call.shape("indices"))

    def placed(name: str, rows: Rows, shape: Shape) -> Rows | None:
        if name == "indices":
            return place(rows, range(rank), shape)
        ids = _numbers(call["indices"])
        rows = rows.aligned()
        if ids is None or [axis.dim for axis in rows.axes] != [0]:
            return rows.whole(shape)
        taken = rows.taken(0, ids.reshape(-1))
        return taken.reshaped(shape)

    return union(call, placed)


def _bag_rows(rows: Rows, offsets: Tensor, bags: int) -> Tensor:
    """(bags, K) int64: which rows of 1-D ids lie in each bag; -1 where it has fewer."""
    count = int(rows.shape[0])
    number = torch.zeros(count, dtype=torch.int64)
    for axis, step in zip(rows.axes, strides(rows.sizes), strict=True):
        number += torch.arange(count) // axis.inner % axis.size * step
    starts = [*offsets.tolist()[:bags], count]
    if len(offsets) > bags:  # the last offset is the end of the last bag
        starts[bags] = int(offsets[bags])
    found = [torch.unique(number[start:end]) for start, end in pairwise(starts[: bags + 1])]
    most = max(map(len, found), default=0)
    index = torch.full((bags, max(most, 1)), -1)
    for bag, numbers in enumerate(found):
        index[bag, : len(numbers)] = numbers
    return index


@rule("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def _embedding_bag(call: Call) -> After:
    """Bags of ids, told apart where their offsets are plain numbers on the CPU."""
    offsets = _numbers(call["offsets"])

    def placed(at: int, shape: Shape) -> Rows | None:
        if at:
            return None  # bookkeeping for the gradient
        found: list[Rows | None] = []
        for name, rows in inputs(call):
            known = offsets is not None and type(shape[0]) is int and type(rows.shape[0]) is int
            if name in {"indices", "per_sample_weights"} and known and offsets is not None:
                index = _bag_rows(rows, offsets, shape[0])
                payload = rows.payload.gather(index)
                found.append(Rows(shape, (Axis(0, 1, shape[0]),), payload))
            else:
                found.append(rows.whole(shape))
        return merged(found, shape)

    return each(placed)


# --- recurrent networks ---------------------------------------------------------------------------

spell("_thnn_fused_lstm_cell", "bh", input_gates="bg", hidden_gates="bg", cx="bh")
spell("_thnn_fused_gru_cell", "bh", input_gates="bg", hidden_gates="bg", hx="bh")
spell("mkldnn_rnn_layer", "ybh", "*bh", "*bh", "-", input="tbi", hx_="*bh", cx_="*bh")


@rule("aten::_cudnn_rnn", "aten::miopen_rnn")
def _whole_network(call: Call) -> After:
    """(T, N, I), or (N, T, I) by batch_first, with states (L, N, H); packed input merges."""
    packed = len(call.shape("input")) != 3 or bool(call["batch_sizes"])
    if packed:
        return entire(call)
    batch = 0 if call["batch_first"] else 1

    def placed(at: int, shape: Shape) -> Rows | None:
        if at > 2 or len(shape) != 3:
            return None
        to = batch if at == 0 else 1
        found: list[Rows | None] = []
        for name, rows in inputs(call):
            dims: list[int | None] = [None] * len(rows.shape)
            if name == "input":
                dims[batch] = to
            elif name in {"hx", "cx"} and len(dims) == 3:
                dims[1] = to
            found.append(place(rows, dims, shape))
        return merged(found, shape)

    return each(placed)


@rule("aten::_pack_padded_sequence")
def _pack(call: Call) -> After:
    """(T, N, ...) padded to (sum of lengths, ...): first all samples' step 0, then step 1, ..."""
    lengths = _numbers(call["lengths"])
    batch = 0 if call["batch_first"] else 1

    def placed(at: int, shape: Shape) -> Rows | None:
        rows = call.rows("input")
        if at or rows is None:
            return None
        rows = rows.mixed([1 - batch]).aligned()
        exact = [axis.dim for axis in rows.axes if axis.size != 1] == [batch]
        if lengths is None or not exact:
            return whole(call, shape)
        steps = torch.arange(int(lengths.max()))
        alive = lengths[None, :] > steps[:, None]  # (T, N)
        index = alive.nonzero()[:, 1:].contiguous()
        lead = Rows(rows.shape, tuple(a for a in rows.axes if a.size != 1), rows.payload)
        return Rows(shape, (Axis(0, 1, len(index)),), lead.payload.gather(index))

    return each(placed)


# Rows of the table are scaled one by one; which of them depends on all ids.
spell("embedding_renorm", "vd", self="vk")
