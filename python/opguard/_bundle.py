"""Writes a repro bundle: one safetensors file with what a failed call of an OpGuardBase was given.

``OpGuardBase.__call__`` asks for it when a call failed and OPGUARD_REPRO_DIR names a folder::

    before = capture(kwargs)                       # before the call, where the variable was set
    path = write(self, kwargs, error, before)      # after it failed and was sanitized

Tensors are tensors of the file; all else is the JSON text under ``opguard.repro`` in its metadata.
Nothing is pickled. No value of an environment variable is written, and none whose name says that it
is a secret.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import logging
import os
import platform
import random
import re
import shlex
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opguard._bundle_values import ValueWriter, masked, type_name

__all__ = ["FORMAT", "KEY", "Before", "capture", "folder", "write"]

KEY = "opguard.repro"
FORMAT = 1
MOST_FILES = 100  # of one process: a loop of failing calls must not fill the disk
LONGEST_TEXT = 100_000
LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "bitsandbytes", "torchao", "numpy")
ATTRIBUTES = ("NAME", "MODEL_ID", "REVISION", "NEED_GRADS")

_numbers = itertools.count(1)
_log = logging.getLogger("opguard")


class Before(NamedTuple):
    """What a call changes, as it was before it."""

    random: dict[str, Any]  # states of the random number generators, by whose they are
    generators: dict[int, tuple[torch.Generator, torch.Generator]]  # those given, and copies
    versions: list[tuple[str, torch.Tensor, int]]  # tensors given: path, tensor, version
    holders: list[tuple[str, Any, Any]]  # lists and such given: path, holder, what was in it

    def changed(self) -> list[str]:
        """The paths of what is not any more as it was."""
        tensors = [path for path, tensor, version in self.versions if tensor._version != version]
        return tensors + [path for path, held, was in self.holders if _differs(held, was)]


def _items(held: Any) -> list[Any]:
    return [*held.keys(), *held.values()] if isinstance(held, dict) else list(held)


def _differs(held: Any, was: list[Any]) -> bool:
    """Whether other objects are in a list, set or dict: their own changes are theirs."""
    here = _items(held)
    return len(here) != len(was) or any(a is not b for a, b in zip(here, was, strict=True))


def folder() -> Path | None:
    """Returns the folder that OPGUARD_REPRO_DIR names, None where it names none."""
    named = os.environ.get("OPGUARD_REPRO_DIR")
    return Path(named).expanduser() if named else None


def _random_states() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": (version, torch.tensor(numbers, dtype=torch.int64), gauss),
        "torch": torch.get_rng_state(),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        module = torch.get_device_module(kind)
        if not hasattr(module, "is_initialized") or module.is_initialized():
            states[str(kind)] = [
                module.get_rng_state(index) for index in range(torch.accelerator.device_count())
            ]
    return states


def _walk(value: Any, path: str, depth: int = 0) -> list[tuple[str, Any]]:
    found = [(path, value)]
    if depth < 3 and type(value) in (list, tuple, dict):
        pairs = value.items() if type(value) is dict else enumerate(value)
        for key, item in itertools.islice(pairs, 1000):
            found += _walk(item, f"{path}/{key}", depth + 1)
    return found


def capture(call_kwargs: Mapping[str, Any]) -> Before | None:
    """Notes what a call with these keywords may change; call it right before the call.

    Takes tens of microseconds, so base asks only where OPGUARD_REPRO_DIR was set at the load. Never
    raises an Exception; None where the state cannot be had.
    """
    try:
        generators, versions, holders = {}, [], []
        for name, given in call_kwargs.items():
            for path, value in _walk(given, name):
                if isinstance(value, torch.Generator):
                    generators[id(value)] = (value, value.clone_state())
                elif isinstance(value, torch.Tensor) and not value.is_inference():
                    versions.append((path, value, value._version))
                elif type(value) in (list, dict, set, bytearray):
                    holders.append((path, value, _items(value)))
        return Before(_random_states(), generators, versions, holders)
    except Exception:
        _log.debug("no state of random numbers for a repro bundle", exc_info=True)
        return None


def _class_described(cls: type) -> dict[str, Any]:
    module = cls.__module__
    if module == "__main__":
        # With `python -m package.module` there is a name to import it by.
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        module = spec.name if spec is not None and spec.name else module
    found: dict[str, Any] = {"name": f"{module}:{cls.__qualname__}"}
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file:
        found["file"] = os.path.abspath(file)
    for name in ATTRIBUTES:
        value = getattr(cls, name, None)
        if value is None or isinstance(value, bool | str | os.PathLike):
            found[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return found


def _text(error: BaseException) -> str:
    try:
        return masked(str(error))[:LONGEST_TEXT]
    except Exception as failure:
        return f"(no message: its __str__ raised {type_name(type(failure))})"


def _error_described(error: BaseException) -> dict[str, Any]:
    try:
        lines = "".join(traceback.format_exception(error))
    except Exception as failure:
        lines = f"(no traceback: formatting it raised {type_name(type(failure))})"
    notes = getattr(error, "__notes__", None)
    notes = [masked(note) for note in notes if type(note) is str] if type(notes) is list else []
    return {
        "type": type_name(type(error)),
        "message": _text(error),
        "notes": notes,
        "traceback": masked(lines)[-LONGEST_TEXT:].splitlines(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["opguard"] = getattr(sys.modules.get("opguard"), "__version__", "")
    for name in LIBRARIES:
        # Asked of the installation: importing a library here is not ours to do.
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _model_described(instance: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("model_id", "device", "dtype", "variant", "device_list", "is_loaded"):
        with contextlib.suppress(Exception):
            value = getattr(instance, name)
            plain = value is None or isinstance(value, bool | str)
            found[name] = value if plain else str(value)
    found["torch"] = {
        "default_dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }
    return found


def _constructed_with(instance: Any) -> tuple[list[Any], dict[str, Any]]:
    """The constructor's arguments; those that have a name by it, which also tells secrets."""
    args, given = getattr(instance, "_given", ((), {}))
    settings = dict(given)
    if "instance_to_match" in settings:  # it is not kept, what it chose is
        del settings["instance_to_match"]
        settings = dict(instance._matched) | settings
    parameters = inspect.signature(type(instance)).parameters.values()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    only = any(each.kind is each.POSITIONAL_ONLY for each in parameters)
    if only or len(args) > len(names):
        return list(args), settings
    return [], dict(zip(names, args, strict=False)) | settings


def _described(
    instance: Any, kwargs: Mapping[str, Any], error: BaseException, before: Before | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The readable part of a bundle and its tensors."""
    writer = ValueWriter()
    if before is not None:
        for given, as_it_was in before.generators.values():
            writer.instead_of(given, as_it_was)
    positional, settings = _constructed_with(instance)
    whole = {
        "format": FORMAT,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "class": _class_described(type(instance)),
        "positional": writer.write(positional, "positional"),
        "settings": writer.write(settings, "settings"),
        "call": writer.write(dict(kwargs), "call"),
        "changed_by_the_call": before.changed() if before is not None else [],
        "random": writer.write(before.random, "random") if before is not None else None,
        "model": _model_described(instance),
        "versions": _versions(),
        "error": _error_described(error),
    }
    return whole, writer.tensors.saved()


def _place(where: Path, instance: Any) -> Path:
    name = re.sub(r"\W", "_", type(instance).__name__)[:80]
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return where / f"{name}-{time}-{os.getpid()}-{next(_numbers)}.safetensors"


def _save(path: Path, whole: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Writes the file beside its place and renames it: under its name it is whole or not there."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(whole, indent=1, allow_nan=False)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        # Inputs may be private: the file is its owner's alone from its first byte.
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        save_file(tensors, beside, metadata={KEY: text})
        os.chmod(beside, 0o600)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.rename(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _command(cls: type, path: Path) -> str:
    """What replays the bundle at ``path``; a script's class is imported by nothing but its file."""
    words = ["opguard", "replay", str(path)]
    described = _class_described(cls)
    named = described["name"].startswith("__main__:") and "<locals>" not in cls.__qualname__
    if named and "file" in described:
        words += ["--class", f"{described['file']}:{cls.__qualname__}"]
    return shlex.join(words)


def write(
    instance: Any, call_kwargs: Mapping[str, Any], error: BaseException, before: Before | None
) -> Path | None:
    """Writes the bundle of a failed call and notes its path on ``error``; returns the path.

    Args:
        instance: the OpGuardBase that was called; what it was made with is kept.
        call_kwargs: the keywords of the call.
        error: what the call raised, sanitized.
        before: what ``capture`` returned before the call; None where it was not asked.

    Returns None where OPGUARD_REPRO_DIR is not set, where ``error`` is no Exception (an interrupt),
    and where the bundle cannot be written, which is logged as a warning: it never raises in the way
    of ``error``.
    """
    where: object = os.environ.get("OPGUARD_REPRO_DIR")
    if not where or not isinstance(error, Exception):
        return None
    try:
        where = found = folder()  # a user's folder that is not there raises
        assert found is not None
        path = _place(found, instance)
        if int(path.stem.rpartition("-")[2]) > MOST_FILES:
            _log.info("no repro bundle: this process has written %d already", MOST_FILES)
            return None
        with torch.inference_mode(False), torch.no_grad():
            whole, tensors = _described(instance, call_kwargs, error, before)
            _save(path, whole, tensors)
    except Exception as failure:
        _log.warning(
            "OPGUARD_REPRO_DIR: expected to write a repro bundle into %s, got %s: %s; the call's "
            "own error goes on",
            where,
            type(failure).__name__,
            _text(failure),
        )
        return None
    with contextlib.suppress(Exception):
        error.add_note(f"opguard: run this call again with: {_command(type(instance), path)}")
    return path
