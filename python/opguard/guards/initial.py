"""Chooses what to run with before anything is loaded: device, dtype, variant, quantization.

Each guard enters to the value chosen. Nothing is allocated and no library but torch is imported,
unless a quantization is asked for. What was asked for but cannot be had here is logged with what
was taken instead; what cannot be meant is an error of one sentence.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from opguard import devices, hub
from opguard.devices import DeviceLike, DtypeLike
from opguard.guards import locality, quantizing
from opguard.guards._base import Guard

__all__ = [
    "InitValues",
    "device_guard",
    "dtype_guard",
    "init_guard",
    "quant_guard",
    "variant_guard",
]

logger = logging.getLogger("opguard")

DeviceMapLike: TypeAlias = str | Mapping[str, DeviceLike] | None
MAP_NAMES = ("auto", "balanced", "balanced_low_0", "sequential", "cuda", "xpu", "mps")


class InitValues(NamedTuple):
    """What `init_guard` chose."""

    device_list: list[torch.device]
    device: torch.device
    dtype: torch.dtype
    variant: str | None
    device_map: str | dict[str, Any] | None
    quant_config: Any

    @property
    def quant_type(self) -> str | None:
        """The quantization in effect, whatever was asked for: "i8", "fp4", "nf4", or its name."""
        return quantizing.describe_quant(self.quant_config).quant_type

    @property
    def quant_use_double(self) -> bool:
        """Whether the scales of the quantized weights are quantized too."""
        return quantizing.describe_quant(self.quant_config).use_double

    @property
    def quant_backend(self) -> str | None:
        """What holds the quantized weights: "bnb", "torchao", None for none or another one."""
        return quantizing.describe_quant(self.quant_config).backend


def _available(device: DeviceLike | None) -> torch.device:
    """Returns `device` where this machine has its type, the best device it has otherwise."""
    wanted = devices.normalize_device(device)
    if wanted.type in ("cpu", "meta"):
        return wanted
    here = devices.list_devices()
    if wanted in here:
        return wanted
    if all(found.type != wanted.type for found in here):
        best = devices.best_device()
        logger.warning("device_guard: no %s on this machine, %s is used", wanted.type, best)
        return best
    raise ValueError(
        f"device: expected one of {', '.join(map(str, here))}, got {device!r}; "
        "leave it out for the best one"
    )


def _mapped(device_map: Mapping[str, DeviceLike]) -> list[torch.device]:
    """Returns the devices a map names, once each; "disk" is accelerate's, not a device."""
    found: list[torch.device] = []
    here = devices.list_devices()
    for module, device in device_map.items():
        if device == "disk":
            continue
        place = devices.normalize_device(device)
        if place not in here and place.type != "meta":
            raise ValueError(
                f"device_map[{module!r}]: expected one of {', '.join(map(str, here))}, "
                f"got {device!r}"
            )
        found.append(place)
    unlike = {place.type for place in found} - {"cpu", "meta"}
    if len(unlike) > 1:
        raise ValueError(
            f"device_map: expected accelerators of one type, got {' and '.join(sorted(unlike))}"
        )
    return list(dict.fromkeys(found))


class _Devices(NamedTuple):
    device_list: list[torch.device]
    device: torch.device
    device_map: str | dict[str, Any] | None


def choose_devices(device: DeviceLike | None, device_map: DeviceMapLike) -> _Devices:
    """Returns the devices in use, the one for inputs, and the map with which to load."""
    if device_map is not None and not isinstance(device_map, str | Mapping):
        raise TypeError(
            "device_map: expected None, a name such as 'auto', or a dict of module name to device, "
            f"got {type(device_map).__name__}"
        )
    if isinstance(device_map, Mapping):
        mapped = _mapped(device_map)
        chosen = _available(device) if device is not None else next(iter(mapped), devices.CPU)
        return _Devices(mapped or [chosen], chosen, dict(device_map))
    if device_map is not None and device_map not in MAP_NAMES:
        raise ValueError(f"device_map: expected one of {', '.join(MAP_NAMES)}, got {device_map!r}")
    chosen = _available(device)
    if device_map is None or chosen.type in ("cpu", "meta"):
        return _Devices([chosen], chosen, None)
    if device_map in ("cuda", "xpu", "mps") and device_map != chosen.type:
        return _Devices([chosen], chosen, None)
    every = [found for found in devices.list_devices() if found.type == chosen.type]
    return _Devices(every, chosen, device_map)


def choose_dtype(device_list: Iterable[DeviceLike], dtype_desired: DtypeLike | None) -> torch.dtype:
    """Returns the desired dtype, or the nearest one that all devices compute in.

    None: the half precision an accelerator has, float32 on the cpu.
    """
    places = [devices.normalize_device(device) for device in device_list]
    if dtype_desired is None:
        if not places or any(place.type in ("cpu", "meta") for place in places):
            return torch.float32
        wanted = torch.bfloat16
    else:
        wanted = devices.normalize_dtype(dtype_desired)
    if not wanted.is_floating_point:
        raise TypeError(
            f"dtype_desired: expected a floating dtype such as 'fp32' or 'bf16', got {wanted}; "
            "for 8 or 4 bit weights use quant_guard(quant_type=...)"
        )
    if all(devices.device_supports_dtype(place, wanted) for place in places):
        return wanted
    taken = torch.float32
    if wanted is torch.bfloat16 and all(
        devices.device_supports_dtype(place, torch.float16) for place in places
    ):
        taken = torch.float16
    if dtype_desired is not None:
        logger.warning("dtype_guard: %s is not supported here, %s is used", wanted, taken)
    return taken


# In order of preference. Values of either half precision are cast to the other while they load.
_VARIANTS = {torch.float16: ("fp16", "bf16"), torch.bfloat16: ("bf16", "fp16")}


def _has_variant(names: Iterable[str], variant: str, safetensors: bool) -> bool:
    """Returns whether weight files of the variant are among `names`, whole or in shards.

    Of shards both spellings are in use: model.fp16-00001-of-00002.safetensors and
    model-00001-of-00002.fp16.safetensors.
    """
    end = "safetensors" if safetensors else "(safetensors|bin)"
    pattern = re.compile(rf"\.{variant}(-\d+-of-\d+)?\.{end}")
    return any(pattern.search(name, name.rfind("/") + 1) for name in names)


# What the libraries call their weights; files of other names, whatever their end, they do not read.
_WEIGHTS = ("model", "pytorch_model", "diffusion_pytorch_model")


def _looked_at(names: Iterable[str], model_type: type | None, subfolder: str | None) -> list[str]:
    """Returns the names, relative to the repo, that a load of `model_type` looks at.

    A pipeline has its weights in folders, one for each part; a model of transformers or diffusers
    in its subfolder or at the top. Of other classes nothing is known.
    """
    library = None if model_type is None else quantizing.library_of(model_type)
    if library is None and not subfolder:
        return list(names)
    above = (subfolder or "").strip("/")
    found = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if library is not None and re.split("[.-]", file)[0] not in _WEIGHTS:
            continue
        if library == quantizing.PIPELINE:
            folder, _, part = folder.rpartition("/")
            if not part:
                continue
        if folder == above:
            found.append(name)
    return found


def _names_in(folder: Path) -> list[str]:
    """Returns the files below `folder`, as "unet/model.safetensors"; no broken links."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths]


def _listed(name: str, revision: str | None) -> list[str]:
    """Returns the names that the hub lists; none where it cannot or may not be asked."""
    if locality.is_offline() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return []
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(name, revision=revision))
    except Exception as error:
        # The listing is a convenience: the load that follows says what is wrong with the repo.
        logger.warning("variant_guard: %s could not be listed (%s)", name, type(error).__name__)
        return []


def choose_variant(
    *,
    dtype: DtypeLike | None,
    model_id: str | os.PathLike[str] | None,
    revision: str | None,
    ask: bool,
    use_safetensors: bool = True,
    model_type: type | None = None,
    subfolder: str | None = None,
) -> str | None:
    """Returns the variant to ask for where half precision is wanted and has files, else None."""
    if dtype is None or model_id is None:
        return None
    wanted = _VARIANTS.get(devices.normalize_dtype(dtype))
    if wanted is None:
        return None
    name = os.fspath(model_id)
    folder = hub.local_folder(name, revision)
    found = _names_in(folder) if folder is not None else []
    if folder is None and ask:
        found = _listed(name, revision)
    names = _looked_at(found, model_type, subfolder)
    for variant in wanted:
        if _has_variant(names, variant, use_safetensors):
            return variant
    return None


class device_guard(Guard):
    """Enters to the `torch.device` to use.

    device: None is the best there is; one whose type this machine lacks becomes the best, logged.
    device_map: None, a name such as "auto", or a dict of module name to device, whose first device
    is the one to use. The overrides are taken as they are. `init_guard` gives the list and the map
    as well.
    """

    def __init__(
        self,
        *,
        device: DeviceLike | None = None,
        device_map: DeviceMapLike = None,
        device_list_override: Iterable[DeviceLike] | None = None,
        device_normalized_override: torch.device | None = None,
    ) -> None:
        self._arguments = (device, device_map, device_list_override, device_normalized_override)

    def _choose(self) -> _Devices:
        device, device_map, list_override, device_override = self._arguments
        if device_override is not None:
            chosen = _Devices([device_override], device_override, None)
        else:
            chosen = choose_devices(device, device_map)
        if list_override is not None:
            chosen = chosen._replace(device_list=devices.normalize_devices(list_override))
        return chosen

    def _enter(self) -> torch.device:
        return self._choose().device


class dtype_guard(Guard):
    """Enters to the `torch.dtype` to compute in.

    dtype_desired: a floating dtype or its name; one that a device of `device_list` (None: the best
    device) lacks becomes the nearest it has, logged. None is half precision on an accelerator and
    float32 on the cpu, where bf16 and fp16 are a choice. dtype_override is taken as it is.
    """

    def __init__(
        self,
        *,
        device_list: Iterable[DeviceLike] | None = None,
        dtype_desired: DtypeLike | None = None,
        dtype_override: DtypeLike | None = None,
    ) -> None:
        self._devices = device_list
        self._desired = dtype_desired
        self._override = dtype_override

    def _enter(self) -> torch.dtype:
        if self._override is not None:
            return devices.normalize_dtype(self._override)
        places = [devices.best_device()] if self._devices is None else self._devices
        return choose_dtype(devices.normalize_devices(places), self._desired)


class variant_guard(Guard):
    """Enters to the variant of weight files to load, "fp16" or "bf16", None for the plain ones.

    Where half precision is wanted and the model has files of it: those of the dtype itself first,
    else those of the other half precision. use_safetensors=False counts other weight files too;
    model_type and subfolder narrow the search to the files that a load of that class reads.

    The model is a folder or a hub id, looked for on this machine. Only where it is not here and
    `local_hfhub_variant_check_only=False` is the hub asked, and never with `local_files_only`,
    inside a `local_guard`, or when the user is offline.
    """

    def __init__(
        self,
        *,
        dtype: DtypeLike | None = None,
        model_id: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        local_hfhub_variant_check_only: bool = True,
        variant_override: str | None = None,
        local_files_only: bool = False,
        use_safetensors: bool = True,
        model_type: type | None = None,
        subfolder: str | None = None,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "dtype": dtype,
            "model_id": model_id,
            "revision": revision,
            "ask": not (local_hfhub_variant_check_only or local_files_only),
            "use_safetensors": use_safetensors,
            "model_type": model_type,
            "subfolder": subfolder,
        }
        self._override = variant_override

    def _enter(self) -> str | None:
        if self._override is not None:
            return self._override
        return choose_variant(**self._arguments)


class quant_guard(Guard):
    """Enters to the quantization configuration with which to load, None for none.

    quant_type: None, "i8", "fp4" or "nf4". The configuration is what `model_type.from_pretrained`
    takes: that of the library the class (or a base of it) comes from, transformers where it is
    None; a `PipelineQuantizationConfig` for pipelines of diffusers, whose parts are read from the
    folder of model_id and revision where that is on this machine.

    backend: "bnb" (bitsandbytes), "torchao", or None for what this machine can run. With None, what
    the hardware or the installation lacks becomes i8 by torchao or no quantization, said by a
    WARNING; with a name it is a ValueError or an ImportError, before anything is loaded. The table
    at the head of `opguard.guards.quantizing` says what needs what. quant_config_override is taken
    as it is.
    """

    def __init__(
        self,
        *,
        compute_dtype: DtypeLike | None = None,
        model_type: type | None = None,
        quant_type: str | None = None,
        quant_config_override: Any = None,
        quant_use_double: bool = False,
        backend: str | None = None,
        device: DeviceLike | None = None,
        model_id: str | os.PathLike[str] | None = None,
        revision: str | None = None,
    ) -> None:
        if backend is not None and backend not in quantizing.BACKENDS:
            raise ValueError(
                f"backend: expected None, 'bnb' (bitsandbytes) or 'torchao', got {backend!r:.80}"
            )
        self._override = quant_config_override
        self._device = device
        self._arguments: dict[str, Any] = {
            "compute_dtype": compute_dtype,
            "model_type": model_type,
            "quant_type": quant_type,
            "quant_use_double": quant_use_double,
            "backend": backend,
            "model_id": model_id,
            "revision": revision,
        }

    def _enter(self) -> Any:
        if self._override is not None:
            quantizing.import_backend_of(self._override)
            return self._override
        device = devices.normalize_device(self._device)
        return quantizing.choose_quant(device=device, **self._arguments)


class init_guard(Guard):
    """Enters to `InitValues`: what the four guards of this module choose, each from the one before.

    Takes their parameters: `dtype` is the one desired, `quant_config` overrides, `quant_backend` is
    quant_guard's `backend`. `local_files_only` keeps the variant probe off the network. A quantized
    model is loaded where it is to be, so that device_map is set for it where none was given.
    """

    def __init__(
        self,
        *,
        dtype: DtypeLike | None = None,
        device: DeviceLike | None = None,
        device_map: DeviceMapLike = None,
        model_type: type | None = None,
        model_id: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        local_hfhub_variant_check_only: bool = True,
        device_list_override: Iterable[DeviceLike] | None = None,
        device_normalized_override: torch.device | None = None,
        dtype_override: DtypeLike | None = None,
        variant_override: str | None = None,
        quant_config: Any = None,
        quant_type: str | None = None,
        quant_use_double: bool = False,
        quant_backend: str | None = None,
        local_files_only: bool = False,
        use_safetensors: bool = True,
        subfolder: str | None = None,
    ) -> None:
        self._dtype = {"dtype_desired": dtype, "dtype_override": dtype_override}
        self._device: dict[str, Any] = {
            "device": device,
            "device_map": device_map,
            "device_list_override": device_list_override,
            "device_normalized_override": device_normalized_override,
        }
        self._variant: dict[str, Any] = {
            "model_id": model_id,
            "revision": revision,
            "local_hfhub_variant_check_only": local_hfhub_variant_check_only,
            "variant_override": variant_override,
            "local_files_only": local_files_only,
            "use_safetensors": use_safetensors,
            "model_type": model_type,
            "subfolder": subfolder,
        }
        self._quant: dict[str, Any] = {
            "model_type": model_type,
            "model_id": model_id,
            "revision": revision,
            "quant_type": quant_type,
            "quant_config_override": quant_config,
            "quant_use_double": quant_use_double,
            "backend": quant_backend,
        }

    def _enter(self) -> InitValues:
        chosen = device_guard(**self._device)._choose()
        with dtype_guard(device_list=chosen.device_list, **self._dtype) as dtype:
            pass
        with variant_guard(dtype=dtype, **self._variant) as variant:
            pass
        with quant_guard(compute_dtype=dtype, device=chosen.device, **self._quant) as quant:
            pass
        kind = self._quant["model_type"]
        device_map = quantizing.load_map(quant, chosen.device_map, chosen.device, kind)
        return InitValues(chosen.device_list, chosen.device, dtype, variant, device_map, quant)
