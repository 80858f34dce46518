"""The locations of somebody else's model: every module, or those that a run calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from opguard.flags.locations import ErrorLocation, resolve_location
from opguard.flags.tracked import assign_locations

__all__ = ["LocationExtractor", "extract_locations", "location_from_stack"]


class LocationExtractor(fx.Interpreter):
    """Runs a model symbolically traced, and registers the modules that are called.

        extractor = LocationExtractor(model)
        extractor.run(x)
        extractor.locations

    Modules of a model that has its locations already keep them.

    Attributes:
        locations: path -> id, in the order of the calls.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(fx.symbolic_trace(module))
        self.locations: dict[str, int] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Registers the module and calls it."""
        path = str(target)
        module = self.fetch_attr(path)
        known = "_opguard_location" in module.__dict__
        self.locations[path] = resolve_location(module) if known else ErrorLocation.register(path)
        return super().call_module(target, args, kwargs)


def extract_locations(module: nn.Module, example_input: Any = None) -> dict[str, int]:
    """Gives every module of a model, stateless ones too, its path and id; path -> id.

    Args:
        module: its submodules get ``_fx_path``, as those of a ``@tracked`` model do.
        example_input: also runs the model, traced by torch.fx, on this tensor or tuple of
            arguments; where that fails, a warning says so and the walk over the modules stands.
    """
    locations = assign_locations(module, every=True)
    if example_input is None:
        return locations
    try:
        extractor = LocationExtractor(module)
        with torch.no_grad():
            extractor.run(
                *(example_input if isinstance(example_input, tuple) else (example_input,))
            )
        locations.update(extractor.locations)
    except Exception as error:
        warnings.warn(
            "expected a model that torch.fx can trace and run, got"
            f" {type(error).__name__}: {error}; its locations are those of its modules",
            UserWarning,
            stacklevel=2,
        )
    return locations


def location_from_stack(nn_module_stack: Mapping[str, Any]) -> int:
    """The id of the innermost module of a graph node's ``nn_module_stack``, 0 for an empty one."""
    if not nn_module_stack:
        return 0
    return ErrorLocation.register(next(reversed(list(nn_module_stack))))
