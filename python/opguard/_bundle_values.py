"""Values of a repro bundle: a tree that a person can read in JSON, and the values of it again.

Plain values are written as themselves. What JSON has no word for is an object with one ``$word``.
An object of a kind not named here is described by its type alone: what is in it is nobody's to
write down. The path of a value is that of a JSON pointer; a value met again is ``{"$same": path}``.
"""

from __future__ import annotations

import base64
import enum
import struct
import sys
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import torch

from opguard._bundle_tensors import TensorReader, TensorWriter, Unsavable
from opguard._loaded import loaded
from opguard._secrets import SECRET_TEXT, is_secret, masked

__all__ = ["Missing", "ValueReader", "ValueWriter", "masked"]

DEEPEST = 100
MOST_VALUES = 1_000_000


def type_name(kind: type) -> str:
    """``module:qualname`` of a type; what a metaclass makes of it is not asked."""
    module = type.__dict__["__module__"].__get__(kind)
    return f"{module}:{type.__dict__['__qualname__'].__get__(kind)}"


def _step(path: str, key: object) -> str:
    return f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"


def _float(value: float) -> Any:
    if value - value == 0:
        return value
    return {"$float": struct.pack(">d", value).hex()}  # a NaN's own bits too


def _int(value: int) -> Any:
    # str() refuses integers of more digits than this.
    return value if value.bit_length() < 4096 else {"$int": hex(value)}


class Missing:
    """Stands where a bundle could not carry a value; says of which type and why."""

    def __init__(self, path: str, kind: str, why: str) -> None:
        self.path, self.kind, self.why = path, kind, why

    def __repr__(self) -> str:
        return f"<{self.path}: {self.kind}, {self.why}>"


class ValueWriter:
    """Writes values down; tensors go to ``tensors``."""

    def __init__(self) -> None:
        self.tensors = TensorWriter()
        self._seen: dict[int, tuple[str, Any]] = {}  # the value keeps its id from another's
        self._instead: dict[int, tuple[Any, Any]] = {}
        self._count = 0

    def write(self, value: Any, path: str, depth: int = 0) -> Any:
        """Returns the node of ``value``; nothing of ``value`` can make it raise an Exception."""
        self._count += 1
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind in PLAIN:
            return PLAIN[kind](value)
        if id(value) in self._seen:
            return {"$same": self._seen[id(value)][0]}
        try:
            return self._compound(value, path, depth)
        except Unsavable as error:
            return self._missing(value, str(error))
        except Exception as error:
            return self._missing(value, f"reading it raised {type_name(type(error))}")

    def _missing(self, value: Any, why: str) -> dict[str, Any]:
        return {"$missing": {"type": type_name(type(value)), "why": why}}

    def _compound(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if depth > DEEPEST:
            raise Unsavable(f"nested deeper than {DEEPEST} levels")
        if self._count > MOST_VALUES:
            raise Unsavable("a million values were written before it")
        if isinstance(value, torch.Tensor):
            self._remember(value, path)
            return self.tensors.add(value, path)
        if kind in (list, tuple, set, frozenset):
            self._remember(value, path)
            items = [self.write(item, _step(path, i), depth + 1) for i, item in enumerate(value)]
            return items if kind is list else {f"${kind.__name__}": items}
        if kind is dict or kind is OrderedDict:
            self._remember(value, path)
            return self._mapping(value, path, depth)
        for matches, write in KINDS:
            if matches(value):
                self._remember(value, path)
                return write(self, value, path, depth)
        raise Unsavable("an object that a bundle does not know how to carry")

    def instead_of(self, value: Any, other: Any) -> None:
        """Writes ``other`` where ``value`` is met."""
        self._instead[id(value)] = (value, other)

    def _remember(self, value: Any, path: str) -> None:
        self._seen[id(value)] = (path, value)

    def _mapping(self, value: Any, path: str, depth: int) -> Any:
        if type(value) is dict and all(type(k) is str and not k.startswith("$") for k in value):
            return {key: self._named(key, value[key], path, depth) for key in list(value)}
        word = "$dict" if type(value) is dict else "$ordered"
        pairs = []
        for index, (key, item) in enumerate(list(value.items())):
            at = _step(path, index)
            name = key if type(key) is str else ""
            pairs.append(
                [self.write(key, f"{at}/key", depth + 1), self._named(name, item, at, depth)]
            )
        return {word: pairs}

    def _named(self, name: str, value: Any, path: str, depth: int) -> Any:
        if is_secret(name, value):
            return {"$missing": {"type": type_name(type(value)), "why": "its name says a secret"}}
        return self.write(value, _step(path, name), depth + 1)

    def _array(self, value: Any, path: str, depth: int) -> Any:
        import numpy as np

        if type(value) is not np.ndarray and not isinstance(value, np.generic):
            raise Unsavable("a subclass of numpy's array")
        array = np.asarray(value)
        node: dict[str, Any] = {"shape": list(array.shape)}
        if array.dtype.hasobject:
            node["items"] = self.write(array.reshape(-1).tolist(), _step(path, "items"), depth + 1)
            return {"$array": node}
        node["dtype"] = self.write(np.lib.format.dtype_to_descr(array.dtype), "", depth + 1)
        if isinstance(value, np.generic):
            node["scalar"] = True
        if array.flags.f_contiguous and not array.flags.c_contiguous:
            node["order"] = "F"
        raw = array.tobytes(order=node.get("order", "C"))
        data = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0).byte()
        return {"$array": node | {"bytes": self.tensors.add(data, path)}}

    def _image(self, value: Any, path: str, depth: int) -> Any:
        raw = value.tobytes()
        data = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0).byte()
        node = {"mode": value.mode, "size": list(value.size), "bytes": self.tensors.add(data, path)}
        if value.palette is not None:
            of = value.palette.mode
            node["palette"] = {"mode": of, "colors": value.getpalette(of)}
        if "transparency" in value.info:
            node["transparency"] = self.write(value.info["transparency"], "", depth + 1)
        return {"$image": node}

    def _namedtuple(self, value: Any, path: str, depth: int) -> Any:
        fields = dict(zip(value._fields, tuple.__iter__(value), strict=True))
        items = {name: self._named(name, item, path, depth) for name, item in fields.items()}
        return {"$namedtuple": {"type": type_name(type(value)), "fields": items}}

    def _of_transformers(self, value: Any, path: str, depth: int) -> Any:
        data = self.write(dict(value.data), _step(path, "data"), depth + 1)
        return {"$transformers": {"type": type(value).__name__, "data": data}}

    def _generator(self, value: Any, path: str, depth: int) -> Any:
        _, value = self._instead.get(id(value), (None, value))
        state = self.tensors.add(value.get_state(), path)
        return {"$generator": {"device": str(value.device), "state": state}}

    def _config(self, value: Any, path: str, depth: int) -> Any:
        values = self.write(value.to_dict(), _step(path, "values"), depth + 1)
        return {"$config": {"type": type_name(type(value)), "values": values}}

    def _bytes(self, value: Any, path: str, depth: int) -> Any:
        return {f"${type(value).__name__}": base64.b64encode(bytes(value)).decode()}

    def _enum(self, value: Any, path: str, depth: int) -> Any:
        return {"$enum": {"type": type_name(type(value)), "name": value.name}}


def _is_config(value: Any) -> bool:
    root = type(value).__module__.partition(".")[0]
    return root in ("transformers", "diffusers") and type(value).__name__ in CONFIGS


CONFIGS = ("BitsAndBytesConfig", "QuantoConfig", "TorchAoConfig")
PLAIN: dict[type, Callable[[Any], Any]] = {
    int: _int,
    float: _float,
    str: lambda text: text if not SECRET_TEXT.search(text) else {"$masked": masked(text)},
    complex: lambda z: {"$complex": [_float(z.real), _float(z.imag)]},
    range: lambda r: {"$range": [_int(r.start), _int(r.stop), _int(r.step)]},
    torch.Size: lambda size: {"$size": list(size)},
    torch.dtype: lambda dtype: {"$dtype": str(dtype).removeprefix("torch.")},
    torch.device: lambda device: {"$device": str(device)},
    type(...): lambda _: {"$ellipsis": True},
}
KINDS: tuple[tuple[Callable[[Any], bool], Callable[[ValueWriter, Any, str, int], Any]], ...] = (
    (lambda v: isinstance(v, bytes | bytearray), ValueWriter._bytes),
    (lambda v: isinstance(v, enum.Enum), ValueWriter._enum),
    (lambda v: isinstance(v, PurePath), lambda w, v, p, d: {"$path": str(v)}),
    (
        lambda v: type(v) is slice,
        lambda w, v, p, d: {"$slice": [w.write(n, p, d) for n in (v.start, v.stop, v.step)]},
    ),
    (lambda v: isinstance(v, torch.Generator), ValueWriter._generator),
    (lambda v: isinstance(v, loaded("numpy", "ndarray")), ValueWriter._array),
    (lambda v: isinstance(v, loaded("numpy", "generic")), ValueWriter._array),
    (lambda v: isinstance(v, loaded("PIL.Image", "Image")), ValueWriter._image),
    (lambda v: isinstance(v, tuple) and hasattr(v, "_fields"), ValueWriter._namedtuple),
    (
        lambda v: isinstance(v, UserDict) and type(v).__module__.startswith("transformers."),
        ValueWriter._of_transformers,
    ),
    (_is_config, ValueWriter._config),
)


def _found(name: str) -> Any:
    """The object named ``module:qualname``, in a module that is loaded already; None otherwise."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


class ValueReader:
    """Makes values of nodes again; ``missing`` names what the bundle could not carry."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = TensorReader(tensors)
        self.missing: list[Missing] = []
        self._made: dict[str, Any] = {}

    def read(self, node: Any, path: str) -> Any:
        """Returns the value of ``node``.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the node is none that was written.
        """
        if isinstance(node, list):
            return self._fill(path, [], node)
        if not isinstance(node, dict):
            return node
        word = next(iter(node), "")
        if not word.startswith("$"):
            made: dict[Any, Any] = {}
            self._made[path] = made
            made.update({key: self.read(item, _step(path, key)) for key, item in node.items()})
            return made
        is_tensor = word == "$tensor"
        value = self.tensors.make(node) if is_tensor else READ[word](self, node[word], path)
        self._made.setdefault(path, value)
        return value

    def _fill(self, path: str, made: list[Any], items: list[Any]) -> list[Any]:
        self._made[path] = made
        made.extend(self._items(items, path))
        return made

    def _items(self, items: list[Any], path: str) -> Iterator[Any]:
        for index, item in enumerate(items):
            yield self.read(item, _step(path, index))

    def _lost(self, path: str, kind: str, why: str) -> Missing:
        lost = Missing(path, kind, why)
        self.missing.append(lost)
        return lost

    def _same(self, node: str, path: str) -> Any:
        if node in self._made:
            return self._made[node]
        return self._lost(path, "a container", f"it contains itself, as {node}")

    def _pairs(self, node: list[Any], path: str, made: Any) -> Any:
        self._made[path] = made
        for index, (key, item) in enumerate(node):
            at = _step(path, index)
            name = self.read(key, f"{at}/key")
            made[name] = self.read(item, _step(at, name if type(name) is str else ""))
        return made

    def _array(self, node: dict[str, Any], path: str) -> Any:
        import numpy as np

        if "items" in node:
            array = np.empty(len(node["items"]), dtype=object)
            array[:] = self.read(node["items"], _step(path, "items"))
            return array.reshape(node["shape"])
        dtype = np.lib.format.descr_to_dtype(self.read(node["dtype"], ""))
        raw = self.tensors.make(node["bytes"]).numpy().tobytes()
        array = np.frombuffer(bytearray(raw), dtype=dtype)
        array = array.reshape(node["shape"], order=node.get("order", "C"))
        return array[()] if node.get("scalar") else array

    def _image(self, node: dict[str, Any], path: str) -> Any:
        from PIL import Image

        raw = self.tensors.make(node["bytes"]).numpy().tobytes()
        width, height = node["size"]
        if width * height > 8 * len(raw):  # pillow would take the memory before it looked
            raise ValueError(f"{len(raw)} bytes are no picture of {width} x {height}")
        image = Image.frombytes(node["mode"], (width, height), raw)
        if "palette" in node:
            image.putpalette(node["palette"]["colors"], node["palette"]["mode"])
        if "transparency" in node:
            image.info["transparency"] = self.read(node["transparency"], "")
        return image

    def _namedtuple(self, node: dict[str, Any], path: str) -> Any:
        fields = {name: self.read(n, _step(path, name)) for name, n in node["fields"].items()}
        kind: Any = _found(node["type"])
        if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_make")):
            kind = _of_fields(node["type"].rpartition(":")[2].rpartition(".")[2], fields)
        return kind._make(fields.values())

    def _enum(self, node: dict[str, Any], path: str) -> Any:
        kind = _found(node["type"])
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return kind[node["name"]]
        return self._lost(path, node["type"], f"it is no enumeration here; it was {node['name']}")

    def _transformers(self, node: dict[str, Any], path: str) -> Any:
        import transformers

        kind = getattr(transformers, node["type"])
        if not (isinstance(kind, type) and issubclass(kind, UserDict)):
            raise ValueError(f"{node['type']!r} is no mapping of transformers")
        return kind(self.read(node["data"], _step(path, "data")))

    def _config(self, node: dict[str, Any], path: str) -> Any:
        import importlib

        module, _, name = node["type"].partition(":")
        root = module.partition(".")[0]
        if root not in ("transformers", "diffusers") or name not in CONFIGS:
            raise ValueError(f"{node['type']!r} is no quantization config")
        kind = getattr(importlib.import_module(root), name)
        return kind.from_dict(self.read(node["values"], _step(path, "values")))

    def _generator(self, node: dict[str, Any], path: str) -> Any:
        generator = torch.Generator(self.tensors._device(node["device"]))
        generator.set_state(self.tensors.make(node["state"]))
        return generator


def _of_fields(name: str, fields: dict[str, Any]) -> Any:
    return namedtuple(name, list(fields))


def _number(value: Any) -> float:
    if isinstance(value, dict):
        unpacked: float = struct.unpack(">d", bytes.fromhex(value["$float"]))[0]
        return unpacked
    return float(value)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


READ: dict[str, Callable[[ValueReader, Any, str], Any]] = {
    "$missing": lambda r, n, p: r._lost(p, n["type"], n["why"]),
    "$masked": lambda r, n, p: r._lost(p, "builtins:str", "an access token was in it"),
    "$same": ValueReader._same,
    "$float": lambda r, n, p: _number({"$float": n}),
    "$int": lambda r, n, p: int(n, 16),
    "$complex": lambda r, n, p: complex(_number(n[0]), _number(n[1])),
    "$range": lambda r, n, p: range(*r._items(n, p)),
    "$slice": lambda r, n, p: slice(*r._items(n, p)),
    "$size": lambda r, n, p: torch.Size(n),
    "$dtype": lambda r, n, p: _dtype(n),
    "$device": lambda r, n, p: torch.device(n),
    "$ellipsis": lambda r, n, p: ...,
    "$tuple": lambda r, n, p: tuple(r._items(n, p)),
    "$set": lambda r, n, p: set(r._items(n, p)),
    "$frozenset": lambda r, n, p: frozenset(r._items(n, p)),
    "$dict": lambda r, n, p: r._pairs(n, p, {}),
    "$ordered": lambda r, n, p: r._pairs(n, p, OrderedDict()),
    "$bytes": lambda r, n, p: base64.b64decode(n, validate=True),
    "$bytearray": lambda r, n, p: bytearray(base64.b64decode(n, validate=True)),
    "$path": lambda r, n, p: Path(n),
    "$enum": ValueReader._enum,
    "$array": ValueReader._array,
    "$image": ValueReader._image,
    "$namedtuple": ValueReader._namedtuple,
    "$transformers": ValueReader._transformers,
    "$generator": ValueReader._generator,
    "$config": ValueReader._config,
}
