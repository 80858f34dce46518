"""A GuardedTensor through an MLP of three 512-wide layers, and what single ops cost beside data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Row

from opguard.flags import guard


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512) for _ in range(3)]
    net = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    x = torch.randn(256, 512)
    g = guard(x)
    compiled = torch.compile(net)
    with torch.no_grad():
        yield Row("GuardedTensor: MLP, eager", lambda: net(g), lambda: net(x), limit=1.10, turns=5)
        yield Row(
            "GuardedTensor: MLP, compiled",
            lambda: compiled(g),
            lambda: compiled(x),
            limit=1.05,
            turns=5,
        )
        yield from _ops()


def _ops() -> Iterator[Row]:
    x = torch.randn(8, 8)
    g = guard(x)
    linear, norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
    for name, op, extra in (
        ("relu", torch.relu, 15.0),
        ("linear", linear, 20.0),
        ("view", lambda t: t.view(4, 2, 8), 20.0),
        ("layer norm, which gives three tensors", norm, 35.0),
    ):
        yield Row(
            f"GuardedTensor: {name}",
            lambda op=op: op(g),
            lambda op=op: op(x),
            extra_us=extra,
        )
