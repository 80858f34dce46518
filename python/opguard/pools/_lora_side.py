"""A LoRA beside its module: the product is added to the output, the weights stay as they are.

This is what quantized weights need: adding to them would quantize the sum again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from opguard.pools._lora_files import Pair
from opguard.pools._lora_places import Place
from opguard.pools._lora_targets import checked_pair

__all__ = ["add_sides", "drop_sides"]

_CONVS = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


class _Side:
    """The hook of one module: ``output + up(down(input))`` in fp32, in the output's dtype."""

    def __init__(self, pair: Pair) -> None:
        self.up, self.down = pair.up, pair.down
        self.bias = pair.bias

    def _on(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the matrices to where the module runs; they stay there."""
        if self.up.device != device or self.up.dtype != dtype:
            self.up, self.down = self.up.to(device, dtype), self.down.to(device, dtype)
            self.bias = None if self.bias is None else self.bias.to(device, dtype)

    def _added(self, module: nn.Module, given: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding):
            return functional.embedding(given, self.down.t()) @ self.up.t()
        given = given.to(self.up.dtype)
        for kind, function in _CONVS.items():
            if isinstance(module, kind):
                kernel = tuple(module.kernel_size)
                inner = self.down.view(self.down.shape[0], -1, *kernel)
                low = module._conv_forward(given, inner, None)
                return function(low, self.up.view(*self.up.shape, *(1,) * len(kernel)))
        return (given @ self.down.t()) @ self.up.t()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        given = args[0]
        wide = torch.float64 if output.dtype == torch.float64 else torch.float32
        self._on(output.device, wide)
        added = self._added(module, given)
        if self.bias is not None:
            shape = (-1, *(1,) * (output.dim() - 2)) if isinstance(module, tuple(_CONVS)) else (-1,)
            added = added + self.bias.view(shape)
        return (output.to(wide) + added).to(output.dtype)


def add_sides(places: Sequence[Place], where: str) -> list[RemovableHandle]:
    """Hooks on all modules, or an exception and none."""
    sides: list[tuple[nn.Module, Callable[..., Any]]] = []
    for place in places:
        if not isinstance(place.what, Pair):
            raise TypeError(
                f"expected pairs of matrices in {where} for mode='hook', came a whole weight at "
                f"{place.what.key!r}; leave mode out"
            )
        if hasattr(place.module, "embed_scale"):
            raise TypeError(
                f"expected a layer at {place.path} whose output is its product alone for "
                f"mode='hook', came {type(place.module).__name__} with an embed_scale for "
                f"{place.what.key!r} of {where}; leave mode out"
            )
        checked_pair(place, where)
        sides.append((place.module, _Side(place.what)))
    handles: list[RemovableHandle] = []
    try:
        for module, side in sides:
            handles.append(module.register_forward_hook(side))
    except BaseException:
        drop_sides(handles)
        raise
    return handles


def drop_sides(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
