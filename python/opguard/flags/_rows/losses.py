"""Row rules of losses over classes and of sequences' losses, with each reduction."""

from __future__ import annotations

from opguard.flags._rows.placing import (
    After,
    Shape,
    broadcast,
    each,
    entire,
    inputs,
    merged,
    place,
)
from opguard.flags._rows.rows import Rows
from opguard.flags._rows.rules import Call, rule

__all__: list[str] = []


@rule(
    "aten::nll_loss_forward",
    "aten::nll_loss2d_forward",
    "aten::multi_margin_loss",
    "aten::multilabel_margin_loss_forward",
)
def _classes(call: Call) -> After:
    """(N, C, ...) scores and targets to (N, ...) losses, or a number of all of them."""
    rank = len(call.shape("self"))
    alone = call["reduction"] == 0
    margins = "margin" in call.name

    def placed(at: int, shape: Shape) -> Rows | None:
        found: list[Rows | None] = []
        for name, rows in inputs(call):
            if at and margins and name in {"target", "self"}:  # is_target, shaped like the target
                fits = len(rows.shape) == len(shape) and name == "target"
                last = len(rows.shape) - 1
                found.append(broadcast(rows.mixed([last]), shape) if fits else None)
            elif not alone or at or name == "weight" or (rank == 1 and shape == ()):
                found.append(rows.whole(shape))
            elif name == "self":
                found.append(_scores(rows, shape))
            else:
                found.append(_targets(rows, shape))
        return merged(found, shape)

    return each(placed)


def _scores(rows: Rows, shape: Shape) -> Rows | None:
    rank = len(rows.shape)
    if rank < 2 or len(shape) != rank - 1:
        return rows.whole(shape)
    return place(rows, [0, None, *range(1, rank - 1)], shape)


def _targets(rows: Rows, shape: Shape) -> Rows | None:
    rank = len(rows.shape)
    if rank < len(shape):
        return rows.whole(shape)
    return place(rows, [*range(len(shape)), *[None] * (rank - len(shape))], shape)


@rule("aten::_ctc_loss", "aten::_use_cudnn_ctc_loss", "aten::_cudnn_ctc_loss")
def _ctc(call: Call) -> After:
    """(T, N, C) and the targets of each sample to (N,) losses and their (N, ...) tables."""
    if len(call.shape("log_probs")) != 3:
        return entire(call)

    def placed(at: int, shape: Shape) -> Rows | None:
        found: list[Rows | None] = []
        for name, rows in inputs(call):
            if name == "log_probs":
                batch: tuple[int | None, ...] = (None, 0, None)
            elif name == "targets" and len(rows.shape) == 2:
                batch = (0, None)
            elif name.endswith("lengths"):
                batch = (0,)
            else:
                found.append(rows.whole(shape))
                continue
            if "cudnn" in call.name and at:  # a gradient (T, N, C)
                batch = tuple(1 if dim == 0 else None for dim in batch)
            found.append(place(rows, batch, shape))
        return merged(found, shape)

    return each(placed)
