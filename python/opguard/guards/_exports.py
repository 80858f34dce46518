"""Exports for `cache_guard` and `load_guard`: the engine of opguard.exports, fed a loader's call.

What an export is made from is then the loader and its arguments, of which one is the model.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from opguard.guards.calling import _modules
from opguard.guards.locality import is_offline, local_guard
from opguard.guards.quantizing import values_of

__all__ = ["Settings", "load", "parameters_of"]

_SOURCE_NAMES = ("pretrained_model_name_or_path", "model_id")
# An export is one folder, quantized already.
_OF_THE_SOURCE = ("revision", "variant", "subfolder", "quantization_config")
_QUANTIZATION = ("quantization_config", "quant_config")
_PARAMETERS = (
    "model_id",
    "device",
    "dtype",
    "variant",
    "local_files_only",
    "revision",
    "use_safetensors",
    "quant_config",
)


class Settings(NamedTuple):
    """How `load` keeps exports; see `cache_guard`."""

    name: str | None = None
    only_load_export: bool = False
    force_refresh: bool = False
    local_on_refresh: bool = False
    use_safetensors: bool = True


def parameters_of(params: Any) -> dict[str, Any]:
    """Returns what a loader-parameters object says: its attributes that are set, by name."""
    found = {name: getattr(params, name, None) for name in _PARAMETERS}
    return {name: value for name, value in found.items() if value is not None}


def _source(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Returns the model the loader is told to load: a folder or a hub id."""
    values = [kwargs[name] for name in _SOURCE_NAMES if name in kwargs] + list(args[:1])
    for value in values:
        if isinstance(value, str | os.PathLike):
            return os.fspath(value)
    raise ValueError(
        "base_export_name: expected a loader that is given the model as first argument or as "
        "model_id, so that it can be given the export instead; leave base_export_name out"
    )


class _Call(NamedTuple):
    """One call of a loader, and the same call with an export in the place of the model."""

    loader: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    local_on_refresh: bool

    def describe(self, network: bool) -> dict[str, Any]:
        from opguard.exports import identity, naming

        kwargs = self.kwargs
        owner = getattr(self.loader, "__self__", None)
        inner = inspect.unwrap(getattr(self.loader, "__func__", self.loader))
        is_own = isinstance(inner, FunctionType) and not naming.is_versioned(inner)
        named = {name: kwargs[name] for name in kwargs if name not in _SOURCE_NAMES}
        named.pop("local_files_only", None)
        revision = named.pop("revision", None)
        quantized = any(kwargs.get(name) for name in _QUANTIZATION)
        named |= {name: values_of(named[name]) for name in _QUANTIZATION if name in named}
        return {
            "loader": identity.describe_function(self.loader),
            "loader_type": identity.describe_type(owner) if isinstance(owner, type) else None,
            "globals": naming.describe_globals([inner] if is_own else []),
            "source": identity.describe_model(
                _source(self.args, kwargs),
                None if revision is None else str(revision),
                network=network,
                every_file=not naming.is_of_library(owner),
                cache_dir=kwargs.get("cache_dir"),
            ),
            "arguments": identity.describe_value([self.args[1:], named]),
            "versions": identity.describe_versions(quantized),
        }

    def from_source(self) -> Any:
        with local_guard(local_files_only=self.local_on_refresh):
            return self.loader(*self.args, **self.kwargs)

    def from_export(self, folder: Path) -> Any:
        named = {name: self.kwargs[name] for name in self.kwargs if name not in _OF_THE_SOURCE}
        from opguard.exports import matching, proving

        args = self.args
        model = next((name for name in _SOURCE_NAMES if name in named), None)
        if model is not None:
            named[model] = str(folder)
        else:
            args = (str(folder), *args[1:])
        with local_guard():
            loaded = self.loader(*args, **named)
        wrong = proving.prove(folder, proving.notes_of(folder)["weights"], _modules(loaded) or ())
        if wrong:
            raise matching.ExportUnfit(wrong)
        return loaded

    def save(self, model: Any, folder: Path) -> bool:
        from opguard.exports import proving
        from opguard.exports.naming import is_of_library

        if not hasattr(model, "save_pretrained"):
            raise TypeError(f"{type(model).__name__} has no save_pretrained")
        model.save_pretrained(str(folder))
        quantized = any(self.kwargs.get(name) for name in _QUANTIZATION)
        compared = not (quantized or is_of_library(getattr(self.loader, "__self__", None)))
        proving.note(folder, _modules(model) or () if compared else None)
        return True


def load(
    loader: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    settings: Settings,
) -> Any:
    """Returns what the loader makes, from an export where `settings` name one and it matches."""
    if settings.name is None:
        if settings.only_load_export:
            raise ValueError("only_load_export: expected a base_export_name to load from, got none")
        return loader(*args, **kwargs)
    if not settings.use_safetensors:
        raise ValueError("use_safetensors: expected True with base_export_name, exports have it")
    from opguard.exports import matching, store

    call = _Call(loader, args, kwargs, settings.local_on_refresh)
    _source(args, kwargs)
    local = is_offline() or bool(kwargs.get("local_files_only"))
    return matching.load_or_refresh(
        folder=store.export_folder(settings.name),
        describe=call.describe,
        from_source=call.from_source,
        from_export=call.from_export,
        save=call.save,
        settings=matching.Settings(
            only_load_export=settings.only_load_export,
            force_refresh=settings.force_refresh,
            local_on_refresh=settings.local_on_refresh,
            network=not local,
        ),
    )
