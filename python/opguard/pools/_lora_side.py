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
from opguard.pools._lora_targets import checked_pair, targets_of

__all__ = ["add_sides", "drop_sides"]

_CONVS = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


class _Side:
    """The hook of one module: ``output + up(down(input))`` in fp32, in the output's dtype."""

    def __init__(self, pair: Pair) -> None:
        self._matrices = (
            pair.up * pair.scale,
            pair.down,
            None if pair.bias is None else pair.bias * pair.scale,
        )

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """The matrices where the module runs; they stay there. Several threads may call."""
        up, down, bias = self._matrices
        if up.device != device or up.dtype != dtype:
            up, down = up.to(device, dtype), down.to(device, dtype)
            bias = None if bias is None else bias.to(device, dtype)
            self._matrices = up, down, bias
        return up, down, bias

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        wide = torch.float64 if output.dtype == torch.float64 else torch.float32
        up, down, bias = self._on(output.device, wide)
        added = _product(module, given, up, down)
        if bias is not None:
            shape = (-1, *(1,) * (output.dim() - 2)) if isinstance(module, tuple(_CONVS)) else (-1,)
            added = added + bias.view(shape)
        return (output.to(wide) + added).to(output.dtype)


def _product(module: nn.Module, given: Tensor, up: Tensor, down: Tensor) -> Tensor:
    if isinstance(module, nn.Embedding):
        return functional.embedding(given, down.t()) @ up.t()
    given = given.to(up.dtype)
    for kind, function in _CONVS.items():
        if isinstance(module, kind):
            kernel = tuple(module.kernel_size)
            low = module._conv_forward(given, down.view(down.shape[0], -1, *kernel), None)
            return function(low, up.view(*up.shape, *(1,) * len(kernel)))
    return (given @ down.t()) @ up.t()


def add_sides(places: Sequence[Place], where: str) -> list[RemovableHandle]:
    """Hooks on all modules, or an exception and none."""
    sides: list[tuple[nn.Module, Callable[..., Any]]] = []
    for place in places:
        if not isinstance(place.what, Pair):
            (target,) = targets_of(place, where)
            if torch.equal(target.parameter, place.what.tensor.to(target.parameter)):
                continue  # peft saves embeddings beside their pairs, changed or not
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
            handles.append(module.register_forward_hook(side, with_kwargs=True))
    except BaseException:
        drop_sides(handles)
        raise
    return handles


def drop_sides(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
