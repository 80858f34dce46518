"""Chooses a quantization before anything is loaded, and settles a model that was loaded with one.

What each type needs, and what holds it (`reason_against` is this table):

======== ============== ============================================ ==============================
type     backend        classes of                                   devices
======== ============== ============================================ ==============================
i8       bitsandbytes   transformers; diffusers without the cpu      cpu, xpu, cuda from 7.5
i8       torchao        transformers, diffusers                      cpu, xpu, cuda
fp4, nf4 bitsandbytes   transformers; diffusers without the cpu      cpu, xpu, cuda from 6.0
======== ============== ============================================ ==============================

All of it needs accelerate; bitsandbytes on the cpu needs transformers 4.53, and torchao, where
diffusers is to use it, diffusers 0.36. Weights of linear layers become small, the others keep the
dtype; 4 bit computes in that dtype (on processors with AVX512-BF16 in bfloat16, whatever the
dtype). A pipeline of diffusers is quantized part by part: its denoiser and its text encoders, not
its autoencoder.

bitsandbytes asks the hub for compiled code while it is imported on some processors, where the
package `kernels` is installed. It is imported here first, off the network: what the cache holds of
it is used, nothing is fetched.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import os
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

import torch

from opguard import devices, hub
from opguard.devices import DtypeLike
from opguard.guards import locality

__all__ = [
    "PIPELINE",
    "QUANT_TYPES",
    "choose_quant",
    "describe_quant",
    "load_map",
    "same_config",
    "settle",
    "values_of",
]

logger = logging.getLogger("opguard")

QUANT_TYPES = ("i8", "fp4", "nf4")
BACKENDS = {"bnb": "bitsandbytes", "torchao": "torchao"}
_LEAST = {"bitsandbytes": (0, 48), "torchao": (0, 16), "accelerate": (1, 1)}
# Before: on the cpu with Intel's extension only; no configuration of torchao's own.
_CPU_SINCE = {"transformers": (4, 53)}
_TORCHAO_SINCE = {"diffusers": (0, 36)}
PIPELINE = "a pipeline"
_BASES = {
    ("transformers", "PreTrainedModel"): "transformers",
    ("diffusers", "ModelMixin"): "diffusers",
    ("diffusers", "DiffusionPipeline"): PIPELINE,
}
# Where neither the folder nor the class says what a pipeline consists of.
_USUAL_PARTS = {
    "unet": "diffusers",
    "transformer": "diffusers",
    "text_encoder": "transformers",
    "text_encoder_2": "transformers",
    "text_encoder_3": "transformers",
}
# Convolutions, to which quantization gives nothing, or a filter that must judge as it was made to.
_LEFT_PARTS = ("vae", "vqvae", "vqgan", "movq", "safety_checker")


class Quant(NamedTuple):
    """What a configuration means: type, whether the scales are quantized too, and what holds it."""

    quant_type: str | None
    use_double: bool
    backend: str | None


def library_of(model_type: Any) -> str | None:
    """Returns "transformers", "diffusers" or `PIPELINE`, None for classes of neither library.

    By whose from_pretrained it is: diffusers has models of transformers of its own.
    """
    found = None
    for base in getattr(model_type, "__mro__", (model_type,)):
        module, name = str(getattr(base, "__module__", "")), getattr(base, "__name__", "")
        root = module.partition(".")[0]
        if (root, name) in _BASES:
            return _BASES[root, name]
        if module == "diffusers.pipelines.auto_pipeline":
            return PIPELINE
        if found is None and root in ("transformers", "diffusers"):
            found = root
    return found


def same_config(first: Any, second: Any) -> bool:
    """Returns whether one configuration serves both classes; a pipeline's names its own parts."""
    library = library_of(first)
    return library == library_of(second) and (library != PIPELINE or first is second)


# What can be had


def _lacks(package: str, least: tuple[int, ...] | None = None) -> str | None:
    """Returns what is wrong with the installation of `package`, None where it will do.

    least: the oldest version that will do; None is the one for any use.
    """
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed (python -m pip install {package})"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # a checkout on the path: its version is its owner's business
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    least = least or _LEAST[package]
    if numbers >= least:
        return None
    return f"{package} {found} is older than {'.'.join(map(str, least))}"


def _too_old(backend: str, device: torch.device, libraries: frozenset[str]) -> str | None:
    """Returns which of `libraries` does not know `backend` on `device` yet, and why."""
    since = _TORCHAO_SINCE if backend == "torchao" else {}
    if backend == "bnb" and device.type == "cpu":
        since = _CPU_SINCE
    for library in sorted(libraries & since.keys()):
        lacking = _lacks(library, since[library])
        if lacking is not None:
            return f"{lacking}, which {BACKENDS[backend]} on {device.type} needs"
    return None


def import_backend(package: str) -> ModuleType:
    """Imports bitsandbytes or torchao without letting that reach the hub."""
    locality.enter_local()
    try:
        return importlib.import_module(package)
    finally:
        locality.leave_local()


def import_backend_of(config: Any) -> None:
    """Imports what holds the weights under `config`, where it is installed, off the network."""
    package = BACKENDS.get(describe_quant(config).backend or "")
    if package is not None and importlib.util.find_spec(package) is not None:
        _unusable(package)  # what is wrong with it, the load says


def _unusable(package: str) -> str | None:
    try:
        import_backend(package)
    except Exception as error:  # a library built for another machine fails in any way it likes
        return f"{package} cannot be imported ({type(error).__name__}: {error!s:.120})"
    return None


def _old_gpu(quant_type: str, device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    needed = (7, 5) if quant_type == "i8" else (6, 0)
    found = torch.cuda.get_device_capability(device)
    if found >= needed:
        return None
    return (
        f"bitsandbytes needs compute capability {needed[0]}.{needed[1]} for {quant_type}, "
        f"{device} has {found[0]}.{found[1]}"
    )


def reason_against(
    backend: str, quant_type: str, device: torch.device, libraries: frozenset[str]
) -> str | None:
    """Returns why `backend` cannot hold `quant_type` here, None where it can.

    libraries: those that load what is to be quantized, "transformers", "diffusers" or both.
    """
    package = BACKENDS[backend]
    if backend == "torchao" and quant_type != "i8":
        return f"torchao holds i8 only, not {quant_type}"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"{package} quantizes on cpu, cuda or xpu, not on {device}"
    if backend == "bnb" and "diffusers" in libraries and device.type == "cpu":
        return "diffusers quantizes with bitsandbytes on an accelerator only, not on the cpu"
    lacking = _lacks(package) or _lacks("accelerate") or _too_old(backend, device, libraries)
    if lacking is not None:
        return lacking
    return (_old_gpu(quant_type, device) if backend == "bnb" else None) or _unusable(package)


def _candidates(quant_type: str, backend: str | None) -> Iterator[tuple[str, str]]:
    """Yields (backend, type) in the order in which to try them."""
    if backend is not None:
        yield backend, quant_type
        return
    yield "bnb", quant_type
    yield "torchao", "i8"


def _refuse(backend: str, quant_type: str, why: str) -> typing.NoReturn:
    kind = ImportError if "not installed" in why or "older than" in why else ValueError
    raise kind(
        f"backend: expected one that can hold {quant_type!r} here, got {backend!r}: {why}; "
        "leave backend out for what can be had"
    )


def _choose(
    quant_type: str, backend: str | None, device: torch.device, libraries: frozenset[str]
) -> tuple[str, str] | None:
    """Returns the backend and the type to use, and says where that is not what was asked for."""
    reasons: list[str] = []
    for candidate, held in _candidates(quant_type, backend):
        why = reason_against(candidate, held, device, libraries)
        if why is None:
            if held != quant_type:
                said = "quant_guard: %s cannot be had here, %s by %s is used: %s"
                logger.warning(said, quant_type, held, candidate, "; ".join(reasons))
            elif reasons:
                said = "quant_guard: %s is held by %s: %s"
                logger.info(said, held, candidate, "; ".join(reasons))
            return candidate, held
        if backend is not None:
            _refuse(backend, quant_type, why)
        if why not in reasons:
            reasons.append(why)
    logger.warning(
        "quant_guard: %s cannot be had here, the model is loaded unquantized: %s",
        quant_type,
        "; ".join(reasons),
    )
    return None


# What it takes


def _config(library: str, backend: str, quant_type: str, double: bool, dtype: torch.dtype) -> Any:
    module = importlib.import_module(library)
    if backend == "torchao":
        # version 2 is the one that both libraries write to safetensors and read again
        weights = import_backend("torchao.quantization").Int8WeightOnlyConfig(version=2)
        return module.TorchAoConfig(weights)
    if quant_type == "i8":
        return module.BitsAndBytesConfig(load_in_8bit=True)
    return module.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double,
    )


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.nn.Module)


def _saved_parts(model_id: str | os.PathLike[str] | None, revision: str | None) -> dict[str, str]:
    """Returns {part: library} of the models in a pipeline's folder on this machine, if any."""
    folder = None if model_id is None else hub.local_folder(os.fspath(model_id), revision)
    if folder is None:
        return {}
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = {}
    for name, value in index.items():
        library, kind = value if isinstance(value, list) and len(value) == 2 else (None, None)
        if library not in ("transformers", "diffusers") or not isinstance(kind, str):
            continue
        if _is_model(getattr(importlib.import_module(library), kind, None)):
            found[name] = str(library)
    return found


def _declared_parts(pipeline: Any) -> dict[str, str]:
    """Returns {part: library} of the models that a pipeline's constructor names by their types."""
    try:
        hints = typing.get_type_hints(pipeline.__init__)
    except (NameError, TypeError):
        return {}
    found = {}
    for name in inspect.signature(pipeline.__init__).parameters:
        hint = hints.get(name)
        for kind in typing.get_args(hint) or (hint,):
            library = library_of(kind) if _is_model(kind) else None
            if library in ("transformers", "diffusers"):
                found[name] = library
    return found


def pipeline_parts(
    pipeline: Any, model_id: str | os.PathLike[str] | None, revision: str | None
) -> dict[str, str]:
    """Returns {part: library} of what to quantize in a pipeline.

    From its folder where that is on this machine, else from its class, else what is usual.
    """
    parts = _saved_parts(model_id, revision) or _declared_parts(pipeline) or _USUAL_PARTS
    return {name: parts[name] for name in parts if name not in _LEFT_PARTS}


def choose_quant(
    *,
    compute_dtype: DtypeLike | None,
    model_type: Any,
    quant_type: str | None,
    quant_use_double: bool,
    backend: str | None,
    device: torch.device,
    model_id: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> Any:
    """Returns the configuration that `model_type.from_pretrained` takes, None for none.

    With backend None, what cannot be had becomes the nearest that can, with a WARNING.

    Raises:
        ValueError: an unknown type or class, or the backend asked for cannot hold the type here.
        ImportError: the backend asked for is not installed.
    """
    if quant_type is None:
        return None
    if quant_type not in QUANT_TYPES:
        raise ValueError(
            f"quant_type: expected None or one of {', '.join(QUANT_TYPES)}, got {quant_type!r:.80}"
        )
    library = "transformers" if model_type is None else library_of(model_type)
    if library is None:
        raise ValueError(
            "model_type: expected a class of transformers or diffusers to quantize, got "
            f"{getattr(model_type, '__qualname__', model_type)!r}; leave quant_type out for others"
        )
    parts: dict[str, str] = {}
    if library == PIPELINE:
        parts = pipeline_parts(model_type, model_id, revision)
    found = _choose(quant_type, backend, device, frozenset(parts.values() or [library]))
    if found is None:
        return None
    dtype = devices.normalize_dtype(compute_dtype or torch.float32)
    arguments = (*found, quant_use_double, dtype)
    if library != PIPELINE:
        return _config(library, *arguments)
    if not parts:
        logger.warning("quant_guard: the pipeline has no part to quantize")
        return None
    mapping = {name: _config(root, *arguments) for name, root in parts.items()}
    whole = importlib.import_module("diffusers").PipelineQuantizationConfig(quant_mapping=mapping)
    # Which parts there are follows from the class and the source; their names are no choice.
    whole.opguard_choice = [*describe_quant(whole), str(dtype)]
    return whole


# What it means


def _describe_mapping(mapping: Mapping[str, Any]) -> Quant:
    kinds = [describe_quant(config) for config in mapping.values()]
    names = sorted({kind.quant_type for kind in kinds if kind.quant_type})
    backends = sorted({kind.backend for kind in kinds if kind.backend})
    double = any(kind.use_double for kind in kinds)
    return Quant("-".join(names) or None, double, "-".join(backends) or None)


def describe_quant(config: Any) -> Quant:
    """Returns what a quantization configuration of any library means.

    The type is "i8", "fp4" or "nf4" where it is one of those, otherwise the method's own name
    ("gptq", "int4weightonly"); for a pipeline whose parts differ, the names joined by "-".
    """
    if config is None:
        return Quant(None, False, None)
    given = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    given = {str(name).lstrip("_"): value for name, value in given.items()}
    if isinstance(given.get("quant_mapping"), Mapping):
        return _describe_mapping(given["quant_mapping"])
    if given.get("quant_backend"):  # a pipeline's, one for all parts
        return describe_quant({"quant_method": given["quant_backend"]} | given["quant_kwargs"])
    method = given.get("quant_method", type(config).__name__)
    name = str(getattr(method, "value", method)).lower()
    return _describe_method(name, given)


def _torchao_name(weights: Any) -> str:
    """Returns the name of a torchao configuration: an object, its values, or a name of old."""
    if isinstance(weights, Mapping):
        weights = str(weights.get("default", weights).get("_type"))
    name = weights if isinstance(weights, str) else type(weights).__name__
    return name.lower().replace("_", "").removesuffix("config")


def _describe_method(name: str, given: Mapping[str, Any]) -> Quant:
    if name == "torchao":
        weights = _torchao_name(given.get("quant_type"))
        return Quant("i8" if weights in ("int8weightonly", "int8wo") else weights, False, "torchao")
    if given.get("load_in_4bit") or name == "bitsandbytes_4bit":
        double = bool(given.get("bnb_4bit_use_double_quant"))
        return Quant(str(given.get("bnb_4bit_quant_type", "fp4")), double, "bnb")
    if given.get("load_in_8bit") or name == "bitsandbytes_8bit":
        return Quant("i8", False, "bnb")
    return Quant(name, False, None)


def values_of(config: Any) -> Any:
    """Returns the values of a configuration, the same before a load and after it.

    The object itself is written to by a pipeline that is loaded with it.
    """
    given = getattr(config, "__dict__", {})
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    if "opguard_choice" in given:
        return {"kind": kind, "parts": given["opguard_choice"]}
    if isinstance(given.get("quant_mapping"), Mapping):
        mapping = given["quant_mapping"]
        return {"kind": kind, "parts": {name: values_of(mapping[name]) for name in sorted(mapping)}}
    if given.get("quant_backend"):
        names = ("quant_backend", "quant_kwargs", "components_to_quantize")
        return {"kind": kind} | {name: given.get(name) for name in names}
    if callable(getattr(config, "to_dict", None)):
        return {"kind": kind, "values": config.to_dict()}
    return config


# What a load needs beside it


def load_map(config: Any, device_map: Any, device: torch.device, model_type: Any) -> Any:
    """Returns the device map with which to load under `config`, so that it lands on `device`.

    A quantized model is not moved afterwards, and without a map it goes to the first accelerator.
    diffusers takes a map to the cpu for offloading and quantizes nothing there, so that it gets
    none.
    """
    library = None if model_type is None else library_of(model_type)
    if library == PIPELINE and isinstance(device_map, Mapping) and device_map.keys() == {""}:
        return None  # it takes names of strategies only, and can be moved
    if config is None or library not in ("transformers", "diffusers"):
        return device_map
    if library == "transformers":
        return {"": str(device)} if device_map is None else device_map
    if isinstance(device_map, Mapping):
        places = {str(place).partition(":")[0] for place in device_map.values()}
        return None if places <= {"cpu"} else device_map
    if device_map is None and device.type != "cpu":
        return {"": str(device)}
    return device_map


def settle(model: Any, device: torch.device | None = None) -> Any:
    """Makes a quantized model, just loaded, ready for use; returns it.

    A pipeline's parts are moved to `device`; nothing changes its dtype. 4 bit layers whose sizes
    do not fit bitsandbytes' packed format for AVX512-BF16 are told to do without it, where their
    first call would fail.
    """
    is_pipeline = library_of(type(model)) == PIPELINE
    if is_pipeline and device is not None and device.type != "cpu":
        model = model.to(device)
    if "bitsandbytes" not in sys.modules:
        return model
    for part in model.components.values() if is_pipeline else (model,):
        layers: Iterable[Any] = part.modules() if isinstance(part, torch.nn.Module) else ()
        for layer in layers:
            if getattr(layer, "support_avx512bf16_for_cpu", False) and not _packs(layer):
                layer.support_avx512bf16_for_cpu = False
    return model


def _packs(layer: Any) -> bool:
    """Whether the packed format has room for the layer: whole blocks of inputs and of outputs."""
    state = getattr(layer.weight, "quant_state", None)
    block = getattr(state, "blocksize", 64)
    return bool(layer.in_features % block == 0 and layer.out_features % 32 == 0)
