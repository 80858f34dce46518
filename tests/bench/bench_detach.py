"""detach_to_cpu against a loop, pytree and clone, on a thousand small tensors in host memory."""

from __future__ import annotations

from typing import Any

import torch
from harness import Row
from torch.utils import _pytree as pytree

from opguard.detaching import detach_to_cpu

COUNT = 1000


def _nested(leaves: list[torch.Tensor]) -> dict[str, Any]:
    left = iter(leaves)
    return {
        f"a{i}": {f"b{j}": {f"c{k}": next(left) for k in range(10)} for j in range(10)}
        for i in range(10)
    }


def _map(value: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach().cpu(), value)


def rows() -> list[Row]:
    weight = torch.ones(4, requires_grad=True)
    history = [weight * i for i in range(COUNT)]
    plain = [torch.ones(4) for _ in range(COUNT)]
    nested = _nested([weight * i for i in range(COUNT)])

    def loop() -> list[torch.Tensor]:
        return [t.detach().cpu() for t in history]

    return [
        Row("flat list / loop", lambda: detach_to_cpu(history), loop, limit=0.7),
        Row("flat list / tree_map", lambda: detach_to_cpu(history), lambda: _map(history), 0.45),
        Row("10x10x10 dict / loop", lambda: detach_to_cpu(nested), loop, limit=0.8),
        Row("10x10x10 dict / tree_map", lambda: detach_to_cpu(nested), lambda: _map(nested), 0.4),
        Row(
            "plain tensors / loop",
            lambda: detach_to_cpu(plain),
            lambda: [t.detach().cpu() for t in plain],
            limit=0.4,
        ),
        Row(
            "copy=True / detach().clone()",
            lambda: detach_to_cpu(history, copy=True),
            lambda: [t.detach().clone() for t in history],
            limit=1.1,
        ),
    ]
