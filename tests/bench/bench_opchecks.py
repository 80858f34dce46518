"""check_ops: every op of a model looked at, eager and compiled, against the model alone.

Beside it what one would write oneself (a dispatch mode that asks isnan().any() of every output) and
torch's anomaly mode, on the same models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row
from torch.utils._python_dispatch import TorchDispatchMode

from opguard.flags import check_ops


class Naive(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and bool(out.isnan().any()):
            raise RuntimeError(f"NaN made by {func}")
        return out


class Within:
    """A call inside a block that is entered for each round of calls, and not for each call."""

    def __init__(self, block: Callable[[], Any], call: Callable[[], object], calls: int) -> None:
        self.block, self.call, self.calls = block, call, calls

    def __call__(self) -> None:
        with self.block():
            for _ in range(self.calls):
                self.call()


def _mlp() -> torch.nn.Module:
    wide = [torch.nn.Linear(512, 512) for _ in range(3)]
    return torch.nn.Sequential(wide[0], torch.nn.ReLU(), wide[1], torch.nn.ReLU(), wide[2])


def _transformer() -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()


def _times(call: Callable[[], object], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            call()

    return run


def rows() -> Iterator[Row]:
    mlp, transformer = _mlp(), _transformer()
    x, words = torch.randn(256, 512), torch.randn(16, 32, 128)
    calls = 10
    with torch.no_grad():
        for name, model, batch, limit in (
            ("MLP 3x512, batch 256", mlp, x, 1.6),
            ("MLP 3x512, batch 32", mlp, x[:32], None),
            ("transformer of 2 layers, 16x32x128", transformer, words, None),
        ):
            call = lambda m=model, b=batch: m(b)
            plain = _times(call, calls)
            checked = Within(check_ops, call, calls)
            yield Row(f"check_ops, eager {name}", checked, plain, limit, per=calls, turns=3)
            yield Row(
                f"  isnan().any() in a mode instead, eager {name}",
                Within(Naive, call, calls), plain, per=calls, turns=3,
            )  # fmt: skip
        for name, model, batch, limit in (
            ("MLP 3x512, batch 256", mlp, x, 1.1),
            ("transformer of 2 layers, 16x32x128", transformer, words, None),
        ):
            torch.compiler.reset()
            fast = torch.compile(model, fullgraph=True)
            call = lambda m=fast, b=batch: m(b)
            yield Row(
                f"check_ops, compiled {name}",
                Within(check_ops, call, calls), _times(call, calls), limit, per=calls, turns=3,
            )  # fmt: skip

    def step() -> None:
        mlp(x).sum().backward()

    plain = _times(step, 3)
    yield Row(
        "check_ops, forward and backward, MLP 3x512", Within(check_ops, step, 3), plain, per=3
    )
    yield Row(
        "  anomaly mode instead (backward alone is looked at), MLP 3x512",
        Within(torch.autograd.detect_anomaly, step, 3), plain, per=3,
    )  # fmt: skip
