"""Bringing many small device tensors to the host; no rows without a CUDA device."""

from __future__ import annotations

import torch
from harness import Row


def rows() -> list[Row]:
    if not torch.cuda.is_available():
        return []
    from torch.utils._pytree import tree_map

    from opguard import detach_to_cpu

    tensors = [torch.randn(16, device="cuda") for _ in range(1000)]
    return [
        Row(
            "detach_to_cpu, 1000 small CUDA tensors / tree_map(detach().cpu())",
            lambda: detach_to_cpu(tensors),
            lambda: tree_map(lambda t: t.detach().cpu(), tensors),
            limit=0.2,
        )
    ]
