"""What the model of an ``OpGuardBase`` is made from, and its way into an export and back.

The decision between source and export is ``opguard.exports.matching``'s; here is what it asks for:
the description, the two ways to load, and how to save. While an export is read, ``self.model_id``
is its folder for the thread that loads, and nothing else of the instance changes.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from opguard import hub
from opguard._contract import Contract
from opguard._secrets import is_secret
from opguard.guards.calling import _modules
from opguard.guards.locality import local_guard
from opguard.guards.quantizing import QUANT_TYPES, describe_quant, values_of

if TYPE_CHECKING:
    from opguard._lifecycle import Lifecycle

__all__ = ["Loading", "Parts", "describe_instance", "export_folder_of", "made_from"]

logger = logging.getLogger("opguard")

PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
OURS = {f"opguard.{name}" for name in ("_instances", "_contract", "_lifecycle", "base")}
# What a loader that cannot read an export as it reads its source ends in.
LOADER_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError)


# What it is made from


def made_from(
    owner: Lifecycle, network: bool, instance: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns all that decides the weights; ``network``: the hub is asked for commits.

    instance: what `describe_instance` said before a load, which may set what it names.
    """
    from opguard.exports.identity import describe_value, describe_versions

    chosen = owner._chosen
    quantized = chosen.quant_config is not None
    described = _describe_class(type(owner), network, ())
    described["source"] = _describe_source(
        type(owner), owner._model_id, owner._revision_in_use(), network
    )
    described |= {
        "dtype": str(chosen.dtype),
        "variant": chosen.variant,
        "quantization": describe_value(values_of(chosen.quant_config)),
        "device": chosen.device.type if quantized else None,
        "versions": describe_versions(quantized),
        "identity": describe_value(owner._export_identity()),
        "instance": describe_instance(owner) if instance is None else dict(instance),
    }
    if owner._only_load_export and described["source"].get("files") is None:
        # Which variants a source has cannot be seen where it is not.
        described["variant"] = _stored_variant(export_folder_of(owner))
    return described


def _stored_variant(folder: Path | None) -> Any:
    from opguard.exports import store

    with contextlib.suppress(OSError, store.BrokenExport):
        return store.read(folder)["made_from"].get("variant") if folder else None
    return None


def _describe_class(cls: type[Contract], network: bool, outer: tuple[type, ...]) -> dict[str, Any]:
    """Returns what a class says about its weights; the classes it names are described as well."""
    from opguard.exports.identity import describe_function
    from opguard.exports.naming import describe_globals, name_of

    loader = getattr(cls.DETECTOR_TYPE, "from_pretrained", None)
    described: dict[str, Any] = {
        "name": cls.NAME,
        "class": name_of(cls),
        "attributes": {
            name: _describe_attribute(name, getattr(cls, name), network, (*outer, cls))
            for name in sorted(dir(cls))
            if name.isupper() and name not in ("NAME", "MODEL_ID", "REVISION", "DEFAULT_FLAGS")
        },
        "loaders": {name: describe_function(each) for name, each in _loaders(cls)},
        "globals": describe_globals([*(each for _, each in _loaders(cls)), *_made_by(cls)]),
        "from_pretrained": describe_function(loader) if loader else None,
    }
    if outer:
        model_id = os.fspath(cls.MODEL_ID)
        revision = None if os.path.isdir(model_id) else cls.REVISION
        described["source"] = _describe_source(cls, model_id, revision, network)
    return described


def _describe_attribute(name: str, value: Any, network: bool, outer: tuple[type, ...]) -> Any:
    from opguard.exports.identity import describe_named
    from opguard.exports.naming import name_of

    if isinstance(value, type) and issubclass(value, Contract) and hasattr(value, "MODEL_ID"):
        if value in outer:
            return {"class": name_of(value)}
        return _describe_class(value, network, outer)
    if isinstance(value, Mapping) and not is_secret(name, value):
        return {
            str(key): _describe_attribute(str(key), value[key], network, outer) for key in value
        }
    if isinstance(value, list | tuple) and not is_secret(name, value):
        return [_describe_attribute("", each, network, outer) for each in value]
    return describe_named(name, value)


def _is_own(cls: type[Contract]) -> bool:
    """Whether code that is no library's reads the source's files."""
    from opguard.exports.naming import is_of_library

    return not is_of_library(cls.DETECTOR_TYPE) or any(
        not each.__module__.startswith("opguard.") for _, each in _loaders(cls)
    )


def _describe_source(
    cls: type[Contract], model_id: str, revision: str | None, network: bool
) -> dict[str, Any]:
    from opguard.exports.identity import describe_model

    own = _is_own(cls)
    if hasattr(cls.DETECTOR_TYPE, "from_pretrained"):
        cache = cls.FROM_PRETRAINED_ADDITIONAL_KWARGS.get("cache_dir")
        return describe_model(model_id, revision, network=network, every_file=own, cache_dir=cache)
    if os.path.isdir(model_id):
        return describe_model(model_id, revision, every_file=own)
    return {"model": model_id}  # a name that only the class's own loader understands


def _code_of(function: Callable[..., Any]) -> CodeType:
    code: CodeType = inspect.unwrap(function).__code__
    return code


def _is_ours(base: type) -> bool:
    return base.__module__ in OURS


def _loaders(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields the loading steps of a class and the methods they name, each by its full name."""
    from opguard.exports.naming import names_in

    pending, seen = ["_load_detector", "_load_processor"], set()
    while pending:
        name = pending.pop()
        seen.add(name)
        for base in cls.__mro__:
            found = vars(base).get(name)
            if found is None or _is_ours(base):
                continue
            found = getattr(found, "fget", None) or getattr(found, "__func__", found)
            if isinstance(inspect.unwrap(found), FunctionType):
                yield f"{base.__qualname__}.{name}", found
                pending += sorted(set(names_in(_code_of(found))) - seen - set(pending))


def _made_by(cls: type[Contract]) -> Iterator[Callable[..., Any]]:
    """Yields the function that makes the detector, where no library's version stands for it."""
    from opguard.exports.naming import is_versioned

    made_by = getattr(cls.DETECTOR_TYPE, "from_pretrained", cls.DETECTOR_TYPE)
    made_by = getattr(made_by, "__func__", made_by)
    inner = inspect.unwrap(made_by)
    if isinstance(inner, FunctionType) and not is_versioned(inner):
        yield inner


def describe_instance(owner: Lifecycle) -> dict[str, Any]:
    """Returns the plain values of this instance, beside the base's own, that its loaders name.

    Of those it had before its first load: what a load sets is no cause of it. Lists and mappings
    of plain values count: a constructor is often given its adapters so.
    """
    from opguard.exports.identity import describe_named
    from opguard.exports.naming import is_plain, names_in

    held = vars(owner)
    if owner._told is None:
        ours = {name for base in type(owner).__mro__ if _is_ours(base) for name in _declared(base)}
        owner._told = frozenset(held.keys() - ours)
    named = {name for _, each in _loaders(type(owner)) for name in names_in(_code_of(each))}
    return {
        name: describe_named(name, held[name])
        for name in sorted(named & owner._told & held.keys())
        if is_plain(held[name], (tuple, frozenset, list, set, Mapping))
        and held[name] not in ([], {}, set())  # which are for the load to fill
    }


def _declared(base: type) -> set[str]:
    return {*vars(base), *vars(base).get("__annotations__", ())}


# Where it is


def export_folder_of(owner: Contract) -> Path | None:
    """Returns the folder of this instance's export; None where exports are off."""
    from opguard.exports.store import export_folder

    chosen = owner._chosen
    return export_folder(
        f"{owner.NAME}-detector",
        precision=PRECISIONS.get(chosen.dtype),
        quant_type=chosen.quant_type,
        quant_use_double=chosen.quant_use_double,
    )


# Loading and saving


class Parts(NamedTuple):
    """What an instance loads."""

    processor: Any
    detector: Any


class Loading:
    """One load of an instance's parts, by ``load`` of the guard around it."""

    def __init__(self, owner: Lifecycle, load: Callable[..., Any]) -> None:
        self._owner = owner
        self._load = load
        self._loaded: Parts | None = None

    def run(self) -> Parts:
        """Loads from the export that matches, or from the source and exports it."""
        parts = self._run()
        _say_unquantized(self._owner, _modules(parts.detector) or ())
        return parts

    def _run(self) -> Parts:
        from opguard.exports.matching import Settings, load_or_refresh

        owner, folder = self._owner, export_folder_of(self._owner)
        instance = describe_instance(owner)
        only = owner._only_load_export
        if not owner.use_safetensors:
            if only:
                raise ValueError(
                    f"only_load_export: expected {owner.classname}.USE_SAFETENSORS to be True, "
                    "exports are safetensors; leave only_load_export out"
                )
            return self.from_source()
        if only and folder is not None and not os.path.exists(folder):
            self._check_exportable()
        if folder is not None and not (only or self._promises() or os.path.exists(folder)):
            self._loaded = self.from_source()
            if not self._can_be_exported(self._loaded.detector):
                return self._loaded
        return load_or_refresh(
            folder=folder,
            describe=lambda network: made_from(owner, network, instance),
            from_source=self.from_source,
            from_export=self.from_export,
            save=self.save,
            settings=Settings(
                only_load_export=only,
                force_refresh=owner._force_export_refresh,
                local_on_refresh=owner._local_files_only_on_refresh,
                network=not (owner._local_files_only or only),
            ),
        )

    def _promises(self) -> bool:
        """Whether the detector will be one that can be saved, as far as its type tells.

        Others are described, which reads every file of a folder, only if they can be.
        """
        from opguard.exports.naming import is_of_library

        kind = self._owner._detector_type
        return hasattr(kind, "save_pretrained") or is_of_library(kind)

    def _has_own_loader(self) -> bool:
        return type(self._owner)._load_detector.__module__ != "opguard._lifecycle"

    def _check_exportable(self) -> None:
        """Raises where no load would ever make the export that alone may be loaded."""
        owner, kind = self._owner, self._owner._detector_type
        if isinstance(kind, type) and not (self._promises() or self._has_own_loader()):
            raise ValueError(
                f"only_load_export: expected {owner.classname} to be a class whose model can be "
                f"exported, but {kind.__name__} has no save_pretrained; leave only_load_export out"
            )

    def _can_be_exported(self, detector: Any) -> bool:
        why = None
        if not hasattr(detector, "save_pretrained"):
            why = f"{type(detector).__name__} has no save_pretrained"
        elif not self._promises() and not os.path.isdir(self._owner._model_id):
            why = f"{self._owner._model_id!r} is no folder whose files can be compared"
        elif any(tensor.is_meta for module in _modules(detector) or () for tensor in _all(module)):
            why = "parts of it are not in memory"
        if why is not None:
            logger.info("exports: no export of %s, %s", self._owner.classname, why)
        return why is None

    def from_source(self) -> Parts:
        if self._loaded is None:
            owner, local = self._owner, self._owner._local_files_only_on_refresh
            # None that does nothing: it would clear the frames by which the outer one names files.
            with local_guard() if local else contextlib.nullcontext():
                owner._processor = owner._load_processor()
                with _noting_damage(owner):
                    return Parts(owner._processor, self._load(owner._load_detector))
        return self._loaded

    def from_export(self, folder: Path) -> Parts:
        from opguard.exports.matching import ExportUnfit
        from opguard.exports.proving import notes_of, prove

        owner, notes = self._owner, notes_of(folder)
        owner._processor = self._processor_from(folder if notes["processor"] else None)
        try:
            with local_guard(), owner._reading_from(folder):
                detector = self._load(owner._load_detector)
        except LOADER_ERRORS as error:  # the files are whole, so it is how they are read
            raise ExportUnfit(f"{type(error).__name__}: {error}") from None
        wrong = prove(folder, notes["weights"], _modules(detector) or ())
        if wrong:
            raise ExportUnfit(wrong)
        return Parts(owner._processor, detector)

    def _processor_from(self, folder: Path | None) -> Any:
        if folder is not None:
            try:
                with local_guard(), self._owner._reading_from(folder):
                    return self._owner._load_processor()
            except LOADER_ERRORS as error:
                logger.info("exports: the processor is read from the source (%s)", error)
        return self._owner._load_processor()

    def save(self, parts: Parts, folder: Path) -> bool:
        from opguard.exports.naming import is_of_library
        from opguard.exports.proving import note

        owner, detector = self._owner, parts.detector
        if not self._can_be_exported(detector):
            return False
        detector.save_pretrained(str(folder))
        own = self._has_own_loader() or not is_of_library(type(detector))
        compared = own and owner.quant_config is None
        note(
            folder,
            _modules(detector) or () if compared else None,
            processor=_save_processor(parts.processor, folder),
        )
        return True


@contextlib.contextmanager
def _noting_damage(owner: Contract) -> Iterator[None]:
    """Notes on the error of a damaged weight file where it is, which the error does not say."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            folder = hub.local_folder(owner._model_id, owner._revision_in_use())
            error.add_note(
                f"opguard: a weight file of {owner.classname} is damaged, in "
                f"{folder or owner._model_id}; fetch it again"
            )
        raise


def _say_unquantized(owner: Contract, modules: Sequence[torch.nn.Module]) -> None:
    """Warns of a quantization that came to nothing, as of a model of convolutions only.

    The libraries quantize linear layers, and say nothing where there are none.
    """
    wanted = describe_quant(owner.quant_config).quant_type
    weights = [weight for module in modules for weight in module.parameters()]
    if wanted not in QUANT_TYPES or not weights or any(map(_is_quantized, weights)):
        return
    layers = [each for module in modules for each in module.modules()]
    found = sum(isinstance(layer, torch.nn.Linear) for layer in layers)
    logger.warning(
        "quant_guard: %s was asked for, but nothing of %s is quantized, which has %s linear "
        "layers; leave the quantization out",
        wanted,
        owner.classname,
        found or "no",
    )


def _is_quantized(weight: torch.Tensor) -> bool:
    kinds = (torch.Tensor, torch.nn.Parameter)
    return type(weight) not in kinds or not weight.dtype.is_floating_point


def _all(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _save_processor(processor: Any, folder: Path) -> bool:
    """Saves the processor beside the model, as the hub does, unless a file of it is the model's."""
    if not hasattr(processor, "save_pretrained"):
        return False
    aside = folder / ".processor"
    try:
        processor.save_pretrained(str(aside))
        files = [path.relative_to(aside) for path in aside.rglob("*") if path.is_file()]
        if not files or any((folder / name).exists() for name in files):
            return False
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).rename(folder / name)
    except Exception as error:
        logger.info("exports: the processor is not exported (%s)", error)
        return False
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True
