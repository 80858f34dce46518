# ruff: noqa: F821, UP037 - names of dimensions are no forward references
"""Functions whose annotations are strings, some of names that come later or never."""

from __future__ import annotations

import torch

from opguard.flags import typing as ft
from opguard.flags.tensorcheck import tensorcheck
from opguard.flags.typing import Dim, Tensor, error_t, float32_t


class Model(torch.nn.Module):
    size = 4

    @tensorcheck
    def forward(
        self, x: Tensor[float32_t, ("N", Dim.size)], y: Tensor[float32_t, ("N",)] | None = None
    ) -> tuple[Tensor[float32_t, ("N", Dim.size)], Tensor[float32_t, ("N",)] | None]:
        return x, y


@tensorcheck
def later(x: Later) -> Later:
    return x


@tensorcheck
def flagged(x: Tensor[float32_t], f: ft.Tensor[error_t]) -> dict[str, Tensor[error_t]]:
    return {"flags": f.clone()}


@tensorcheck
def never(x: Nowhere) -> Tensor[float32_t]:
    return x


def make():
    Local = Tensor[float32_t, (2,)]

    class Inner:
        Own = Tensor[float32_t, (3,)]

        @tensorcheck
        def method(self, x: Local, y: Own) -> None:
            return None

    return Inner()


Later = Tensor[float32_t, (5,)]
