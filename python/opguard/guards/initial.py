"""Chooses what to run with before anything is loaded: device, dtype, variant, quantization.

Each guard enters to the value chosen. Nothing is allocated and no library but torch is imported,
unless a quantization is asked for. What was asked for but cannot be had here is logged with what
was taken instead; what cannot be meant is an error of one sentence.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch

from opguard import devices
from opguard.devices import DeviceLike, DtypeLike
from opguard.guards import locality
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


_HALF_FILE = r"\.fp16(\.|-\d)"


def _has_half_files(names: Iterable[str]) -> bool:
    return any(re.search(_HALF_FILE, name.rpartition("/")[2]) for name in names)


def choose_variant(
    dtype: DtypeLike | None,
    model_id: str | os.PathLike[str] | None,
    revision: str | None,
    ask: bool,
) -> str | None:
    """Returns "fp16" where half precision is wanted and the model has such files, else None."""
    if dtype is None or model_id is None:
        return None
    if devices.normalize_dtype(dtype) not in (torch.float16, torch.bfloat16):
        return None
    name = os.fspath(model_id)
    folder = locality.local_folder(name, revision)
    if folder is not None:
        return "fp16" if _has_half_files(path.name for path in folder.rglob("*")) else None
    if not ask or locality.is_offline() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    from huggingface_hub import HfApi

    try:
        listed = HfApi().list_repo_files(name, revision=revision)
    except Exception as error:
        # The listing is a convenience: the load that follows says what is wrong with the repo.
        logger.warning("variant_guard: %s could not be listed (%s)", name, type(error).__name__)
        return None
    return "fp16" if _has_half_files(listed) else None


QUANT_TYPES = ("i8", "fp4", "nf4")


def _quant_library(model_type: type | None) -> str:
    """Returns which library's configuration `model_type` takes, by its own or a base's module."""
    if model_type is None:
        return "transformers"
    for base in getattr(model_type, "__mro__", (model_type,)):
        root = str(getattr(base, "__module__", "")).partition(".")[0]
        if root in ("transformers", "diffusers"):
            return root
    raise ValueError(
        "model_type: expected a class of transformers or diffusers to quantize, got "
        f"{getattr(model_type, '__qualname__', model_type)!r}; leave quant_type out for others"
    )


def _check_quant_hardware(quant_type: str, device: torch.device) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quant_type: expected the package bitsandbytes for {quant_type!r}, it is not "
            "installed; run: python -m pip install bitsandbytes"
        )
    if device.type not in ("cpu", "cuda", "xpu"):
        raise ValueError(
            f"quant_type: expected cpu, cuda or xpu for {quant_type!r}, got {device}; "
            "leave quant_type out there"
        )
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        needed = (7, 5) if quant_type == "i8" else (6, 0)
        found = torch.cuda.get_device_capability(device)
        if found < needed:
            raise ValueError(
                f"quant_type: expected a gpu of compute capability {needed[0]}.{needed[1]} for "
                f"{quant_type!r}, got {found[0]}.{found[1]} on {device}; leave quant_type out there"
            )


def choose_quant(
    *,
    compute_dtype: DtypeLike | None,
    model_type: type | None,
    quant_type: str | None,
    quant_use_double: bool,
    device: torch.device,
) -> Any:
    """Returns the library's quantization configuration for `quant_type`, None for None."""
    if quant_type is None:
        return None
    if quant_type not in QUANT_TYPES:
        raise ValueError(
            f"quant_type: expected None or one of {', '.join(QUANT_TYPES)}, got {quant_type!r:.80}"
        )
    library = _quant_library(model_type)
    _check_quant_hardware(quant_type, device)
    module = importlib.import_module(library)
    if quant_type == "i8":
        return module.BitsAndBytesConfig(load_in_8bit=True)
    return module.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_compute_dtype=devices.normalize_dtype(compute_dtype or torch.float32),
        bnb_4bit_use_double_quant=quant_use_double,
    )


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
    """Enters to "fp16" where half precision is wanted and the model has such files, else None.

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
    ) -> None:
        self._arguments = (dtype, model_id, revision)
        self._ask = not (local_hfhub_variant_check_only or local_files_only)
        self._override = variant_override

    def _enter(self) -> str | None:
        if self._override is not None:
            return self._override
        return choose_variant(*self._arguments, ask=self._ask)


class quant_guard(Guard):
    """Enters to the quantization configuration with which to load, None for none.

    quant_type: None, "i8", "fp4" or "nf4"; the configuration is the `BitsAndBytesConfig` of the
    library that model_type (or a base of it) comes from, transformers where that is None. What
    the hardware or the installation lacks is said before anything is loaded, by ValueError or
    ImportError. quant_config_override is taken as it is.
    """

    def __init__(
        self,
        *,
        compute_dtype: DtypeLike | None = None,
        model_type: type | None = None,
        quant_type: str | None = None,
        quant_config_override: Any = None,
        quant_use_double: bool = False,
        backend: str = "bnb",
        device: DeviceLike | None = None,
    ) -> None:
        if backend != "bnb":
            raise ValueError(f"backend: expected 'bnb' (bitsandbytes), got {backend!r:.80}")
        self._override = quant_config_override
        self._device = device
        self._arguments: dict[str, Any] = {
            "compute_dtype": compute_dtype,
            "model_type": model_type,
            "quant_type": quant_type,
            "quant_use_double": quant_use_double,
        }

    def _enter(self) -> Any:
        if self._override is not None:
            return self._override
        device = devices.normalize_device(self._device)
        return choose_quant(device=device, **self._arguments)


class init_guard(Guard):
    """Enters to `InitValues`: what the four guards of this module choose, each from the one before.

    Takes their parameters: `dtype` is the one desired, `quant_config` overrides. `local_files_only`
    keeps the variant probe off the network.
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
        local_files_only: bool = False,
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
        }
        self._quant: dict[str, Any] = {
            "model_type": model_type,
            "quant_type": quant_type,
            "quant_config_override": quant_config,
            "quant_use_double": quant_use_double,
        }

    def _enter(self) -> InitValues:
        chosen = device_guard(**self._device)._choose()
        with dtype_guard(device_list=chosen.device_list, **self._dtype) as dtype:
            pass
        with variant_guard(dtype=dtype, **self._variant) as variant:
            pass
        with quant_guard(compute_dtype=dtype, device=chosen.device, **self._quant) as quant:
            pass
        return InitValues(
            chosen.device_list, chosen.device, dtype, variant, chosen.device_map, quant
        )
