"""What a model is made from, as values a person can read in metadata.json and a program compare.

A value that cannot be told apart from another is never left out: at worst an export is made anew.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import CodeType
from typing import Any

from opguard import hub
from opguard._secrets import HIDDEN, is_secret, masked
from opguard.exports.hashing import hash_files
from opguard.exports.naming import LIBRARIES, full_name_of, is_of_program, is_plain, name_of

__all__ = [
    "describe_function",
    "describe_model",
    "describe_named",
    "describe_type",
    "describe_value",
    "describe_versions",
]

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_SOURCES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".py"}) | _PICKLES
_PROSE = frozenset({".md"})
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_QUANTIZERS = ("bitsandbytes", "torchao")
# Classes whose code a version stands for; what exec makes may call itself a builtin.
_VERSIONED = frozenset({"torch", *LIBRARIES, *sys.stdlib_module_names}) - {"builtins"}
_DEEP = 12
_READ_AS = ("dtype", "shape", "typecode", "mode", "size")


def describe_versions(quantized: bool = False) -> dict[str, str]:
    """Returns the versions that decide what a load makes: opguard, torch, and the hub's libraries.

    quantized: those of the quantizing libraries as well. What is not installed is left out.
    """
    import torch

    import opguard

    found = {"opguard": str(opguard.__version__), "torch": str(torch.__version__)}
    for name in LIBRARIES + (_QUANTIZERS if quantized else ()):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the files under a folder, through linked folders too, without hidden ones."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        here = os.stat(where)
        if (here.st_dev, here.st_ino) in seen:  # a link to a folder that it is in
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _source_files(folder: Path, every_file: bool) -> list[Path]:
    """Returns the files a library may read: no pickles in a folder that has safetensors."""
    if every_file:
        return [path for path in _walk(folder) if path.suffix not in _PROSE]
    files = [path for path in _walk(folder) if path.suffix in _SOURCES]
    safe = {path.parent for path in files if path.suffix == ".safetensors"}
    return [path for path in files if path.suffix not in _PICKLES or path.parent not in safe]


def describe_model(
    model_id: str | os.PathLike[str],
    revision: str | None = None,
    *,
    network: bool = False,
    every_file: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Returns which weights a hub id or a folder stands for.

    ``model`` and ``revision`` as asked for; ``commit``: the one that the revision names, asked of
    the hub where `network` allows it and the revision is not a commit itself, otherwise the one in
    the local cache, None for a folder or where nothing is known; ``files``: SHA-256 of each file on
    this machine by its name, None where the model is not here.

    every_file: of a folder also the files that transformers and diffusers do not read, for a loader
    that is none of theirs. cache_dir: the hub cache that the load uses, where it is another.
    """
    name = os.fspath(model_id)
    cache = None if cache_dir is None else os.fspath(cache_dir)
    described: dict[str, Any] = {"model": name, "revision": revision, "commit": None}
    at = revision
    is_folder = os.path.isdir(hub.expanded(name))
    if not is_folder:
        commit = None
        if network and not hub.is_commit(revision):
            commit = hub.upstream_commit(name, revision)
        described["commit"] = at = commit or hub.local_commit(name, revision, cache)
    folder = hub.local_folder(name, at, cache)
    if folder is None:
        return described | {"files": None}
    digests = hash_files(_source_files(folder, every_file and is_folder))
    files = {path.relative_to(folder).as_posix(): found for path, found in digests.items()}
    return described | {"files": files}


def describe_named(name: str, value: Any) -> Any:
    """Returns `describe_value`, of a text that is a path or a hub id with what it stands for now.

    Such as an adapter that a loader fuses. A name that says a secret has no value: who asks for a
    model changes nothing of it.
    """
    if is_secret(name, value):
        return HIDDEN
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and (_is_path(value) or os.path.isfile(text)):
            return _describe_named_files(text)
    if isinstance(value, Mapping):
        return {_key(key, 0): describe_named(str(key), value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [describe_named("", each) for each in value]
    return describe_value(value)


def _is_path(value: str | os.PathLike[str]) -> bool:
    return not isinstance(value, str) or "/" in value or os.sep in value


def _describe_named_files(text: str) -> Any:
    """Only files directly in a folder: it may be one of anything, such as a cache."""
    described: dict[str, Any] = {"model": text, "revision": None, "commit": None}
    path = hub.expanded(text)
    if os.path.isfile(path):
        files = [path]
    elif os.path.isdir(path):
        files = [each for each in sorted(path.iterdir()) if each.suffix in _SOURCES]
        files = [each for each in files if each.is_file()]
    else:
        commit = hub.local_commit(text, None) if _HUB_ID.fullmatch(text) else None
        return masked(text) if commit is None else described | {"commit": commit, "files": None}
    return described | {"files": {each.name: found for each, found in hash_files(files).items()}}


def _sha(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def _constants(code: CodeType) -> list[Any]:
    described = []
    for value in code.co_consts:
        if isinstance(value, CodeType):
            described.append(_code(value))
        elif isinstance(value, frozenset):  # its order is another in each process
            described.append(["frozenset", *sorted(map(repr, value))])
        else:
            described.append([type(value).__name__, repr(value)])
    return described


def _code(code: CodeType) -> list[Any]:
    return [
        code.co_code.hex(),
        list(code.co_names),
        list(code.co_varnames),
        list(code.co_freevars),
        _constants(code),
    ]


def _source_text(function: Any) -> str | None:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None


def describe_function(function: Callable[..., Any], depth: int = 0) -> dict[str, Any]:
    """Returns what tells this function from every other: its name, text, code and what it holds.

    The code counts beside the text, because the text is read from the file as it is now. Functions
    without text (made by exec, typed at a prompt) have their code, so two do not pass for one.
    """
    if isinstance(function, functools.partial):
        return {
            "partial": describe_function(function.func, depth + 1),
            "arguments": describe_value([function.args, function.keywords], depth + 1),
        }
    owner = getattr(function, "__self__", None)
    inner = inspect.unwrap(getattr(function, "__func__", function))
    described: dict[str, Any] = {"name": name_of(inner)}
    if isinstance(owner, type):
        described["of"] = name_of(owner)
    elif owner is not None and not inspect.ismodule(owner):
        described["of"] = describe_value(owner, depth + 1)
    code = getattr(inner, "__code__", None)
    if code is None:
        described["name"] = full_name_of(inner)
        if isinstance(inner, type) or not inspect.isroutine(inner):
            return described | {"value": describe_value(inner, depth + 1)}
        return described
    text = _source_text(inner)
    if text is not None:
        described["text"] = _sha(text)
    python = "{}.{}".format(*sys.version_info)
    described["code"] = {python: _sha(json.dumps(_code(code)))}
    if inner.__defaults__ or inner.__kwdefaults__:
        described["defaults"] = describe_value(
            [inner.__defaults__, inner.__kwdefaults__], depth + 1
        )
    held = {}
    for name, cell in zip(code.co_freevars, inner.__closure__ or (), strict=True):
        # The class of super() is named already; a cell may not be set yet.
        with contextlib.suppress(ValueError):
            if name != "__class__":
                held[name] = cell.cell_contents
    if held:
        described["holds"] = describe_value(held, depth + 1)
    return described


def _defaults(function: Any) -> Any:
    inner = inspect.unwrap(getattr(function, "__func__", function))
    return describe_value([inner.__defaults__, inner.__kwdefaults__], _DEEP - 3)


def describe_type(kind: type) -> dict[str, Any]:
    """Returns a class's name and, where no library's version stands for it, its code.

    Of a program's own class the plain values in it as well, since no module's name is in the key.
    """
    described: dict[str, Any] = {"class": name_of(kind)}
    functions, values = {}, {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in _VERSIONED:
            continue
        for name, value in vars(base).items():
            code = getattr(inspect.unwrap(getattr(value, "__func__", value)), "__code__", None)
            if isinstance(code, CodeType):
                functions[f"{base.__qualname__}.{name}"] = [_code(code), _defaults(value)]
            elif not name.startswith("__") and is_of_program(base) and is_plain(value):
                values[f"{base.__qualname__}.{name}"] = describe_named(name, value)
    if functions:
        described["code"] = _sha(json.dumps(functions, sort_keys=True))
    if values:
        described["values"] = values
    return described


def _describe_tensor(value: Any) -> dict[str, Any]:
    import torch

    whole = value.detach().to("cpu").contiguous()
    data = whole.reshape(-1).view(torch.uint8).numpy() if whole.numel() else b""
    return {"tensor": _sha(bytes(data)), "shape": list(whole.shape), "dtype": str(whole.dtype)}


def _canonical(described: Any) -> str:
    return json.dumps(described, sort_keys=True)


def _key(name: Any, depth: int) -> str:
    if isinstance(name, str):
        return name
    return f"{type(name).__name__} {_canonical(describe_value(name, depth + 1))}"


def _items(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        return {
            _key(name, depth): HIDDEN if is_secret(name, item) else describe_value(item, depth + 1)
            for name, item in value.items()
        }
    if isinstance(value, set | frozenset):
        return sorted((describe_value(item, depth + 1) for item in value), key=_canonical)
    return [describe_value(item, depth + 1) for item in value]


def _plain(value: Any) -> Any:
    """Returns a value without parts as JSON has it, `_plain` itself for any other."""
    import torch

    described: Any = _plain
    if isinstance(value, enum.Enum):
        described = f"{full_name_of(type(value))}.{value.name}"
        if is_of_program(type(value)):
            name = f"{name_of(type(value))}.{value.name}"
            described = {"enum": name, "is": describe_value(value.value, _DEEP - 3)}
    elif isinstance(value, str):
        described = masked(value)
    elif value is None or isinstance(value, bool | int):
        described = value
    elif isinstance(value, float):
        described = value if math.isfinite(value) else repr(value)
    elif isinstance(value, complex | range | torch.dtype | torch.device):
        described = repr(value)
    elif isinstance(value, bytes | bytearray):
        described = {"bytes": _sha(bytes(value))}
    elif isinstance(value, os.PathLike):
        described = os.fspath(value)
    elif inspect.ismodule(value):
        described = {"module": value.__name__}
    return described


def describe_value(value: Any, depth: int = 0) -> Any:
    """Returns a value as JSON can carry it: the same for equal ones in every process.

    Objects are described by their class and what they hold, not by where they are in memory.
    """
    import torch

    described = _plain(value)
    if described is not _plain:
        return described
    if depth >= _DEEP:
        described = {"object": name_of(type(value))}
    elif isinstance(value, Mapping | list | tuple | set | frozenset):
        described = _items(value, depth)
    elif isinstance(value, torch.Tensor):
        described = _describe_tensor(value)
    elif isinstance(value, type):
        described = describe_type(value)
    elif inspect.isroutine(value) or isinstance(value, functools.partial):
        described = describe_function(value, depth)
    else:
        described = _describe_object(value, depth)
    return described


def _describe_object(value: Any, depth: int) -> dict[str, Any]:
    kind = type(value)
    described: dict[str, Any] = {"object": name_of(kind)}
    if is_of_program(kind):  # whose methods a loader may call
        described["type"] = describe_type(kind)
    if callable(getattr(type(value), "to_dict", None)):
        # Where it fails, what the object holds says as much.
        with contextlib.suppress(Exception):
            return described | {"holds": _items(value.to_dict(), depth)}
    if callable(getattr(type(value), "tobytes", None)):  # an array or a picture
        with contextlib.suppress(Exception):
            return described | _content(value, depth)
    holds = dict(getattr(value, "__dict__", None) or {})
    for base in type(value).__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            with contextlib.suppress(AttributeError):  # not set, or by another name
                if name not in ("__dict__", "__weakref__"):
                    holds.setdefault(name, getattr(value, name))
    if holds or hasattr(value, "__dict__"):
        return described | {"holds": _items(holds, depth)}
    text = repr(value)
    return described if " at 0x" in text else described | {"is": masked(text)}


def _content(value: Any, depth: int) -> dict[str, Any]:
    """Returns what an object of bytes has in it, and how they are read."""
    if getattr(getattr(value, "dtype", None), "hasobject", False):
        return {"holds": _items(value.tolist(), depth)}
    read_as = {name: str(getattr(value, name)) for name in _READ_AS if hasattr(value, name)}
    return {"bytes": _sha(value.tobytes()), "read as": read_as}
