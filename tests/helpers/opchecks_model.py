"""A model whose head logs a zero where an input is too large, and what findings of it look like."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from opguard import flags

INF, NAN = float("inf"), float("nan")


def line_of(function, text: str) -> int:
    """The number of the line in ``function`` that ends with ``# text``."""
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if line.rstrip().endswith(f"# {text}"))


def found(c) -> dict[int, list[str]]:
    """sample -> its errors as "CODE@location"."""
    return {
        i: [f"{each.code_name}@{each.location_name}" for each in errors]
        for i, errors in enumerate(flags.ErrorFlags.unpack_all(c.flags))
        if errors
    }


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        y = self.proj(x).abs()
        y = torch.where(x > 1e6, 0.0, y + 1)
        return torch.log(y)  # log


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = Head()

    def forward(self, x):
        return self.head(x + self.stem(x) * 0)


def at(op: str, function, text: str) -> str:
    """The name of the location of ``op`` on that line."""
    name = function.__qualname__.rpartition("<locals>.")[2]
    file = function.__code__.co_filename.rpartition("/")[2]
    return f"aten::{op} at {file}:{line_of(function, text)} in {name}"
