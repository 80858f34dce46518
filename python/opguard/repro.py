"""Repro bundles read again: what a failed call was given, and the call once more.

Where OPGUARD_REPRO_DIR names a folder, each failed call of an :class:`opguard.OpGuardBase` leaves
one safetensors file there. ``opguard replay FILE`` runs it again; here is the same in Python::

    bundle = opguard.repro.read("TinyVAE-20260101T120000Z-4711-1.safetensors")
    bundle.kwargs, bundle.settings, bundle.error["message"]
    outcome = opguard.repro.replay(bundle)

A file is data: nothing in it is run. The class that it names is imported as any import does, so
replay files of programs that you would run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opguard._bundle import FORMAT, KEY, capture, write
from opguard._bundle_values import Missing, ValueReader, masked, type_name
from opguard.base import OpGuardBase

__all__ = ["Bundle", "Replayed", "capture", "load_class", "main", "read", "replay", "write"]

OPTIONAL: dict[str, type] = {"model": dict, "changed_by_the_call": list, "positional": list}
NAMED = "name where it is, as module:Class or path/to/file.py:Class"
NEEDED = {"class": dict, "settings": dict, "call": dict, "error": dict, "versions": dict}


@dataclass(frozen=True)
class Bundle:
    """What a repro bundle holds.

    ``kwargs`` are the keywords of the call and ``settings`` those of the constructor; change them
    to try something else. ``missing`` names what could not be carried, ``notes`` what is not as it
    was.
    """

    path: Path
    class_name: str  # module:qualname
    settings: dict[str, Any]
    kwargs: dict[str, Any]
    error: dict[str, Any]  # type, message, notes, traceback
    random: dict[str, Any] | None
    description: dict[str, Any]  # all of the readable part
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    positional: list[Any] = field(default_factory=list)  # the constructor's arguments without name


@dataclass(frozen=True)
class Replayed:
    """How a replay ended: ``outcome`` is "reproduced", "another" (failure) or "none"."""

    outcome: str
    expected: str  # type: message
    got: str | None
    error: BaseException | None
    notes: list[str]


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"replay: expected a repro bundle in {str(path)!r}, {why}; give a file that opguard wrote "
        "into OPGUARD_REPRO_DIR"
    )


def _described(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        raise _unreadable(path, "it is a safetensors file of something else")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "its description is no JSON") from error
    if not isinstance(whole, dict):
        raise _unreadable(path, "its description is no object")
    version = whole.get("format")
    if version != FORMAT:
        theirs = whole.get("versions")
        written = theirs.get("opguard") if isinstance(theirs, dict) else None
        raise ValueError(
            f"replay: expected a repro bundle of format {FORMAT}, {str(path)!r} has format "
            f"{version!r:.40}; read it with the opguard that wrote it ({written!r:.40})"
        )
    for name, kind in NEEDED.items():
        if not isinstance(whole.get(name), kind):
            raise _unreadable(path, f"its description has no {name!r}")
    for name, key in (("class", "name"), ("error", "type"), ("error", "message")):
        if not isinstance(whole[name].get(key), str):
            raise _unreadable(path, f"its description has no {name}.{key}")
    for name, expected in OPTIONAL.items():
        if name in whole and not isinstance(whole[name], expected):
            raise _unreadable(path, f"its {name!r} is no {expected.__name__}")
    if whole["class"]["name"].rpartition(":")[0].endswith(".py"):
        # A file is run only where the one who replays names it.
        raise _unreadable(path, "its class is named by a file")
    return whole


def read(path: str | os.PathLike[str]) -> Bundle:
    """Returns what the bundle at ``path`` holds; nothing of it is run.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no repro bundle, is damaged, or comes from a format this one cannot read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with open(path, "rb"):  # the system's own words for a missing file or a folder
        pass
    try:
        with safe_open(path, framework="pt") as file:
            whole = _described(path, (file.metadata() or {}).get(KEY))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _unreadable(path, f"safetensors says {str(error)!r:.200}") from error
    reader = ValueReader(tensors)
    try:
        # In the order they were written: a value met again refers to where it was first.
        positional = reader.read(whole.get("positional", []), "positional")
        settings, kwargs = (
            reader.read(whole["settings"], "settings"),
            reader.read(whole["call"], "call"),
        )
        states = reader.read(whole.get("random"), "random")
    except Exception as error:
        why = f"a value of it cannot be made: {type(error).__name__}: {error!s:.200}"
        raise _unreadable(path, why.replace("\n", " ")) from error
    if not all(isinstance(name, str) for given in (settings, kwargs) for name in given):
        raise _unreadable(path, "its keywords are no names")
    notes = [*reader.tensors.notes, *_notes(whole)]
    return Bundle(
        path=path,
        class_name=whole["class"]["name"],
        settings=settings,
        kwargs=kwargs,
        error=whole["error"],
        random=states,
        description=whole,
        missing=reader.missing,
        notes=notes,
        positional=positional,
    )


def _notes(whole: dict[str, Any]) -> list[str]:
    """What may make a replay end otherwise than the call did."""
    from opguard._bundle import _versions

    notes = [
        f"{changed} was changed in place by the call that failed: it is carried as it was then"
        for changed in whole.get("changed_by_the_call", [])
    ]
    here = _versions()
    for name, there in whole["versions"].items():
        if here.get(name) != there:
            notes.append(f"{name} was {there}, here it is {here.get(name, 'not installed')}")
    if whole.get("random") is None:
        notes.append(
            "the random numbers are others: OPGUARD_REPRO_DIR was set only after the model's load"
        )
    return notes


# The class


def load_class(name: str) -> type[OpGuardBase]:
    """Imports the OpGuardBase subclass that ``module:Class`` or ``path/to/file.py:Class`` names.

    As ``python`` does, a module is looked for in the current folder too, and what a file imports
    beside it.

    Raises:
        ValueError: the name has another form, or what it names is no OpGuardBase.
        ImportError: there is no such module, it cannot be imported, or it has no such class.
    """
    place, _, qualname = name.rpartition(":")
    if not place or not qualname:
        raise ValueError(
            f"class: expected module:Class or path/to/file.py:Class, got {name!r}; "
            "name the module before a colon"
        )
    if "<locals>" in qualname or place == "__main__":
        raise ImportError(
            f"class: expected one that can be imported, {name} was defined in a function, a script "
            f"or a notebook; {NAMED}"
        )
    found: Any = _module(place, qualname)
    for part in qualname.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ImportError(
                f"class: expected {qualname} in {place}, there is none; {NAMED}"
            ) from None
    if not (isinstance(found, type) and issubclass(found, OpGuardBase)):
        raise ValueError(
            f"class: expected a subclass of OpGuardBase, {name} is {found!r:.80}; name another one"
        )
    return found


@contextlib.contextmanager
def importable(name: str | None) -> Iterator[None]:
    """Lets the code of ``name`` import what ``python`` would let it: what is beside its file."""
    place = (name or "").rpartition(":")[0]
    folder = str(Path(place).resolve().parent) if place.endswith(".py") else os.getcwd()
    added = bool(place) and folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


def _module(place: str, qualname: str) -> Any:
    if place.endswith(".py") and not Path(place).is_file():
        raise ImportError(f"class: expected a file {place!r}, there is none; check the path")
    try:
        with importable(f"{place}:"):
            return _run(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a script may end itself
        what = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError) and error.name:
            if not place.endswith(".py") and f"{place}.".startswith(f"{error.name}."):
                raise ImportError(
                    f"class: expected a module {place!r}, {what}; run this where it can be "
                    "imported, or name the file, as path/to/file.py:Class"
                ) from error
            way = f"install {error.name}, or put its folder into PYTHONPATH"
        else:
            way = "see that python imports it"
        raise ImportError(
            f"class: expected to import {place} for {qualname}, got {what}; {way}"
        ) from error


def _run(path: Path) -> Any:
    """Imports the file by its own name, though it may be in no folder of sys.path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(path.stem, None)
        raise
    return module


# The call


@contextlib.contextmanager
def _random_kept() -> Iterator[None]:
    """The program's random numbers are afterwards what they were."""
    from opguard._bundle import _random_states

    before = _random_states()
    try:
        yield
    finally:
        _set_random(before)


def _set_random(states: dict[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        import numpy as np

        np.random.set_state(states["numpy"])
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None and str(kind) in states:
        module = torch.get_device_module(kind)
        for index, state in enumerate(states[str(kind)][: torch.accelerator.device_count()]):
            module.set_rng_state(state, index)


def _comparable(text: str) -> str:
    """A message without what differs from run to run: addresses, and sizes of memory."""
    text = re.sub(r"0x[0-9a-fA-F]{4,}", "0x", text)
    return re.sub(r"[\d.]+ (?:bytes|[KMGT]i?B)", "N bytes", text)


def replay(bundle: Bundle | str | os.PathLike[str], *, cls: Any = None) -> Replayed:
    """Makes the class of ``bundle`` with its settings, calls it, and says how that ended.

    Args:
        bundle: the file, or what :func:`read` made of it.
        cls: the class to use, where the bundle's own cannot be imported.

    Raises:
        ValueError: no bundle, or something is missing in it: give it in ``read(...).kwargs``.
        ImportError: the class cannot be imported; give it as ``cls``.
    """
    if not isinstance(bundle, Bundle):
        bundle = read(bundle)
    gone = [lost for lost in bundle.missing if _still(lost, bundle)]
    if gone:
        raise ValueError(
            "replay: expected every value of the call and of the constructor, the bundle could not "
            f"carry {', '.join(map(repr, gone))}; put them into .kwargs or .settings of "
            "opguard.repro.read(FILE) and replay that"
        )
    cls = load_class(bundle.class_name) if cls is None else cls
    expected = f"{bundle.error['type']}: {bundle.error['message']}"
    notes = [*bundle.notes]
    here = {"MODEL_ID": str(cls.MODEL_ID), "REVISION": cls.REVISION}
    for name, value in here.items():
        there = bundle.description["class"].get(name, value)
        if there != value:
            notes.append(f"{cls.__name__}.{name} was {there!r}, here it is {value!r}")
    if bundle.random is not None:
        try:
            with _random_kept():
                _set_random(bundle.random)
        except Exception as error:
            raise _unreadable(bundle.path, f"its random state is none: {error!s:.100}") from error
    kept = {name: os.environ.pop(name) for name in ("OPGUARD_REPRO_DIR",) if name in os.environ}
    try:
        with _random_kept():
            _call(cls, bundle)
    except Exception as error:
        got = f"{type_name(type(error))}: {masked(str(error))}"
        same = _comparable(got) == _comparable(expected)
        return Replayed("reproduced" if same else "another", expected, got, error, notes)
    finally:
        os.environ.update(kept)
    return Replayed("none", expected, None, None, notes)


def _still(lost: Missing, bundle: Bundle) -> bool:
    """Whether ``lost`` is where it was: a caller may have put a value into its place."""
    stack, seen = [bundle.kwargs, bundle.settings, bundle.positional], set()
    while stack:
        at: Any = stack.pop()
        if at is lost:
            return True
        if id(at) in seen or not isinstance(at, dict | list | tuple | set | frozenset):
            continue
        seen.add(id(at))
        stack += [*at.keys(), *at.values()] if isinstance(at, dict) else list(at)
    return False


def _call(cls: Any, bundle: Bundle) -> None:
    instance = cls(*bundle.positional, **bundle.settings)
    model_id = bundle.description.get("model", {}).get("model_id")
    if isinstance(model_id, str) and model_id != os.fspath(instance.model_id):
        own = bundle.description["class"].get("MODEL_ID")
        if model_id != own:  # it was set on the instance
            instance.model_id = model_id
    with instance:
        # Noted when the model was loaded, so a load here comes before it too.
        if bundle.random is not None:
            _set_random(bundle.random)
        instance(**bundle.kwargs)


ENDINGS = {
    "reproduced": "reproduced: the call failed as it did",
    "another": "another failure: the call failed otherwise than it did",
    "none": "no failure: the call that failed went well this time",
}


def main(file: str, *, class_name: str | None = None, as_json: bool = False) -> int:
    """``opguard replay``: returns 0 reproduced, 1 another failure or none, 2 wrong usage."""
    try:
        bundle = read(file)
        with importable(class_name):
            done = replay(bundle, cls=None if class_name is None else load_class(class_name))
    except (OSError, ValueError, ImportError) as error:
        said = str(error).replace("\n", " ")
        if class_name is None and said.endswith(NAMED):
            said = f"{said} with --class"
        if isinstance(error, OSError):
            said = f"expected a repro bundle in {file!r}, {error.strerror or said}; check the path"
        print(f"opguard replay: {said.removeprefix('replay: ')}", file=sys.stderr)
        return 2
    if as_json:
        shown = {"outcome": done.outcome, "expected": done.expected, "got": done.got}
        print(json.dumps(shown | {"class": bundle.class_name, "notes": done.notes}, indent=2))
    else:
        print(f"{bundle.class_name}, called {bundle.description.get('written')}")
        for note in done.notes:
            print(f"  note: {note}")
        print(f"  expected {done.expected}")
        if done.outcome == "another":
            print(f"  got      {done.got}")
        print(ENDINGS[done.outcome])
    return 0 if done.outcome == "reproduced" else 1
