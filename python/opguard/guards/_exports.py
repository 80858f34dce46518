"""Keeps an export of a loaded model in a folder, and reads it while nothing it came from changed.

What it came from is written in the folder's metadata.json as text a person can read: the loader,
its arguments, revision and commit, the source's weight files with size and time, and library
versions. An export is read only where all of it is equal, so a doubt costs a load, never a stale
model. Saving is best effort: a model that was loaded is returned whether or not it could be saved.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opguard.guards.locality import LocalFileMissing, hub_cache_dir, local_folder, local_guard

__all__ = ["Settings", "export_folder", "load", "parameters_of"]

logger = logging.getLogger("opguard")

_SOURCE_NAMES = ("pretrained_model_name_or_path", "model_id")
_OF_THE_SOURCE = ("revision", "variant", "subfolder")
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
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")


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


def export_folder(name: str) -> Path:
    """Returns the folder of the export `name`: under OPGUARD_EXPORTS, or beside the hub cache."""
    root = os.environ.get("OPGUARD_EXPORTS")
    base = Path(root).expanduser() if root else hub_cache_dir().parent / "exports"
    return base / ("models--" + name.replace("/", "--"))


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


def _redirected(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], folder: Path
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments with the export in the place of the model."""
    named = {name: value for name, value in kwargs.items() if name not in _OF_THE_SOURCE}
    for name in _SOURCE_NAMES:
        if name in named:
            return args, named | {name: str(folder)}
    return (str(folder), *args[1:]), named


def _identity(source: str, revision: str | None) -> dict[str, Any]:
    """Returns what says which weights `source` is: its commit, and its files on this machine."""
    folder = local_folder(source, revision)
    if folder is None:
        return {"commit": None, "files": None}
    files = sorted(path for path in folder.rglob("*") if path.suffix in _WEIGHTS)
    return {
        "commit": folder.name if folder.parent.name == "snapshots" else None,
        "files": {
            path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
            if path.is_file()
        },
    }


def _loader_text(loader: Callable[..., Any]) -> dict[str, str]:
    owner = getattr(loader, "__self__", None)
    name = f"{getattr(loader, '__module__', '')}.{getattr(loader, '__qualname__', repr(loader))}"
    if isinstance(owner, type):
        name = f"{owner.__module__}.{owner.__qualname__}.{getattr(loader, '__name__', '')}"
    try:
        text = inspect.getsource(inspect.unwrap(loader))
    except (OSError, TypeError):
        text = ""
    return {"name": name, "source_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _describe(
    loader: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns all that an export came from, as it is written to metadata.json."""
    source = _source(args, kwargs)
    revision = kwargs.get("revision")
    skipped = ("local_files_only", *_SOURCE_NAMES)
    versions = {"torch": str(torch.__version__)}
    for library in ("transformers", "diffusers"):
        if library in sys.modules:
            versions[library] = str(sys.modules[library].__version__)
    return {
        "model": source,
        "revision": None if revision is None else str(revision),
        **_identity(source, revision),
        "loader": _loader_text(loader),
        "arguments": {
            **{str(index): repr(value) for index, value in enumerate(args[1:], 1)},
            **{name: repr(kwargs[name]) for name in sorted(kwargs) if name not in skipped},
        },
        "versions": versions,
    }


def _matches(folder: Path, wanted: Mapping[str, Any]) -> bool:
    if not wanted["files"]:
        # The source is not on this machine, so nothing can say that it is the same.
        return False
    try:
        found = json.loads((folder / "metadata.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(found == wanted)


def _save(model: Any, folder: Path, description: Mapping[str, Any]) -> None:
    """Writes the export aside and renames it into place, or leaves what was there."""
    if not hasattr(model, "save_pretrained"):
        logger.warning("cache_guard: %s has no save_pretrained, no export", type(model).__name__)
        return
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        fresh, old = aside / "new", aside / "old"
        model.save_pretrained(str(fresh))
        if any(fresh.rglob("*.bin")):
            raise ValueError("it was not saved as safetensors")
        (fresh / "metadata.json").write_text(json.dumps(description, indent=2, sort_keys=True))
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except Exception as error:
        logger.warning("cache_guard: no export in %s: %s", folder, error)
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _from_export(
    loader: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    folder: Path,
) -> Any:
    moved_args, moved = _redirected(args, kwargs, folder)
    with local_guard():
        return loader(*moved_args, **moved)


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
    folder = export_folder(settings.name)
    wanted = _describe(loader, args, kwargs)
    if not settings.force_refresh and _matches(folder, wanted):
        try:
            return _from_export(loader, args, kwargs, folder)
        except Exception as error:
            if settings.only_load_export:
                raise
            logger.warning("cache_guard: %s is made anew, it failed: %s", folder, error)
    if settings.only_load_export:
        raise LocalFileMissing(
            f"only_load_export: expected an export of {wanted['model']!r} in {folder}, found none "
            "made from the same loader, arguments, files and versions; load once without "
            "only_load_export to make it"
        )
    with local_guard(local_files_only=settings.local_on_refresh):
        model = loader(*args, **kwargs)
    # Described again: loading may have brought the source to this machine.
    _save(model, folder, _describe(loader, args, kwargs))
    return model
