"""Canny's edge detector in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

__all__ = ["Canny"]

BLUR = (2.0, 4.0, 5.0, 4.0, 2.0)  # a Gaussian of about 1.4 pixels
# (dy, dx) to the neighbours of a pixel along the gradient, by its direction in eighths of a turn.
ALONG = ((0, 1), (1, 1), (1, 0), (1, -1))


class Canny(torch.nn.Module):
    """Edges one pixel wide: blur, gradient, the ridges of it, and what joins a strong one."""

    row: torch.Tensor
    slope: torch.Tensor

    def __init__(self, model_id: str = "canny") -> None:
        super().__init__()
        del model_id  # there is nothing to load
        row = torch.tensor(BLUR)
        slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        self.register_buffer("row", (row / row.sum()).reshape(1, 1, 1, 5), persistent=False)
        # A brightness that grows by 1 from pixel to pixel has the slope 1.
        self.register_buffer("slope", (slope / 8).reshape(1, 1, 3, 3), persistent=False)

    def forward(self, grey: torch.Tensor, low: float, high: float) -> Any:
        """Returns booleans of the shape (n, 1, height, width) of ``grey``, which is in [0, 1]."""
        with torch.autocast(grey.device.type, enabled=False):
            smooth = self._convolve(self._convolve(grey.float(), self.row), self.row.mT)
            across = self._convolve(smooth, self.slope)
            down = self._convolve(smooth, self.slope.mT)
            size = torch.hypot(across, down)
            ridge = self._is_ridge(size, torch.atan2(down, across))
        return _joined((size >= low) & ridge, (size >= high) & ridge)

    @staticmethod
    def _convolve(values: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        high, wide = kernel.shape[-2] // 2, kernel.shape[-1] // 2
        around = functional.pad(values, (wide, wide, high, high), mode="replicate")
        return functional.conv2d(around, kernel.float())

    @staticmethod
    def _is_ridge(size: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """Where no neighbour along the gradient is larger; of two equal ones, the second."""
        eighth = (angle * (4 / torch.pi)).round().long() % 4
        around = functional.pad(size, (1, 1, 1, 1))
        height, width = size.shape[-2:]
        ridge = torch.zeros_like(size, dtype=torch.bool)
        for at, (dy, dx) in enumerate(ALONG):
            ahead = around[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
            behind = around[..., 1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]
            ridge |= (eighth == at) & (size > ahead) & (size >= behind)
        return ridge & (size > 0)


def _joined(weak: torch.Tensor, strong: torch.Tensor) -> torch.Tensor:
    """Returns the weak pixels that are joined to a strong one through weak ones."""
    found = strong
    while True:
        grown = weak & (functional.max_pool2d(found.float(), 3, stride=1, padding=1) > 0)
        if torch.equal(grown, found):
            return found
        found = grown
