"""What a subclass of ``OpGuardBase`` says about its model, and what is chosen from that.

The class attributes, checked when a class is made and when an instance is; the choice of devices,
dtype, variant and quantization, made once an instance, before anything is loaded; and the keywords
with which the model's library is then asked for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any, ClassVar

import torch

from opguard._attributes import check_attributes
from opguard._instances import Instances, not_made
from opguard.devices import normalize_dtype
from opguard.guards.initial import InitValues, device_guard, init_guard
from opguard.guards.quantizing import QUANT_TYPES, same_config, settle

__all__ = ["Contract"]

HALF = (torch.float16, torch.bfloat16)


DTYPE_KEYWORDS = {"dtype", "torch_dtype"}

# Since when a library's from_pretrained takes dtype=; torch_dtype=, its older name, then warns.
_DTYPE_SINCE = {"transformers": (4, 56), "diffusers": (0, 42)}


def _dtype_keyword(kind: Any) -> str:
    """How ``kind.from_pretrained`` calls its dtype; transformers and diffusers renamed theirs."""
    roots = {base.__module__.partition(".")[0] for base in getattr(kind, "__mro__", ())}
    for library in roots & _DTYPE_SINCE.keys():
        found = metadata.version(library).split(".")[:2]
        return "dtype" if tuple(map(int, found)) >= _DTYPE_SINCE[library] else "torch_dtype"
    return "torch_dtype"


class Contract(Instances):
    """The class attributes of ``OpGuardBase`` and the choices made from them."""

    NAME: ClassVar[str]
    MODEL_ID: ClassVar[str | os.PathLike[str]]
    REVISION: ClassVar[str | None] = None
    DETECTOR_TYPE: ClassVar[Any]

    DEFAULT_DEVICE: ClassVar[Any] = None  # None: the best there is
    DEFAULT_DEVICE_MAP: ClassVar[Any] = None
    DTYPE_PREFERENCE: ClassVar[torch.dtype | str] = torch.bfloat16
    USE_SAFETENSORS: ClassVar[bool] = True
    NEED_GRADS: ClassVar[bool] = False
    IS_CALLABLE: ClassVar[bool] = True
    SKIP_TO_DEVICE: ClassVar[bool] = False
    SKIP_TO_DTYPE: ClassVar[bool] = False
    FROM_PRETRAINED_SKIP_KWARGS: ClassVar[tuple[str, ...]] = ()
    FROM_PRETRAINED_ADDITIONAL_KWARGS: ClassVar[Mapping[str, Any]] = {}
    DEFAULT_QUANT_TYPE: ClassVar[str | None] = None
    DEFAULT_QUANT_USE_DOUBLE: ClassVar[bool] = False
    DEFAULT_FLAGS: ClassVar[bool] = False

    _chosen: InitValues = not_made()
    _is_loaded: bool = False
    _reading: tuple[int, str] | None = None
    _local_files_only: bool
    _only_load_export: bool
    _local_files_only_on_refresh: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_attributes(cls)

    def _check_class(self) -> None:
        cls = type(self)
        ways = {
            "NAME": "a short name such as 'tiny-vae'",
            "MODEL_ID": "a hub id such as 'org/name', or a local folder",
            "DETECTOR_TYPE": "a class with from_pretrained, or a callable that gets the model id",
        }
        for name, meaning in ways.items():
            if getattr(cls, name, None) is None:
                raise ValueError(
                    f"{cls.__name__}.{name}: expected {meaning}, it is not set; set it in the class"
                )
        if not isinstance(cls.MODEL_ID, str | os.PathLike):
            raise TypeError(
                f"{cls.__name__}.MODEL_ID: expected a hub id such as 'org/name' or a local "
                f"folder, got {type(cls.MODEL_ID).__name__}"
            )

    @property
    def _detector_type(self) -> Any:
        """``DETECTOR_TYPE`` as the class has it: a function in a class body is no method here."""
        found = type(self).DETECTOR_TYPE
        return self.DETECTOR_TYPE if isinstance(found, property) else found

    def _revision_in_use(self) -> str | None:
        """The revision of a hub id; None for a local folder, which has none.

        Raises what is wrong with the model id before any library is asked to load it.
        """
        if not hasattr(self._detector_type, "from_pretrained"):
            return self.REVISION
        name, where = type(self).__name__, self._model_id
        if os.path.isdir(where):
            return None
        if where.startswith((os.sep, ".", "~")) or where.count("/") > 1:
            if self._only_load_export:  # the source need not be here
                return None
            raise FileNotFoundError(
                f"{name}.MODEL_ID: expected a folder, {where!r} is none; "
                "give an existing folder, or a hub id such as 'org/name'"
            )
        if not self.REVISION:
            raise ValueError(
                f"{name}.REVISION: expected a commit, tag or branch of the hub id {where!r}, "
                "it is not set; set it in the class"
            )
        return self.REVISION

    def _choose(self) -> None:
        """Settles devices, dtype, variant and quantization from the settings."""
        given = self._settings.get
        place: dict[str, Any] = {
            "device": given("device_override", self.DEFAULT_DEVICE),
            "device_map": given("device_map_override", self.DEFAULT_DEVICE_MAP),
        }
        with self._naming("DTYPE_PREFERENCE"):
            wish = normalize_dtype(self.DTYPE_PREFERENCE)
        with self._naming("DEFAULT_DEVICE", "device_override"), device_guard(**place) as device:
            # On the cpu half precision is somebody's choice for this instance, not a preference.
            preferred = torch.float32 if device.type == "cpu" and wish in HALF else wish
        place["device"] = device  # found once: a device that is not there is said once
        local = self._local_files_only or self._only_load_export
        # Of files that are on this machine the variant is seen there.
        unasked = local or self._local_files_only_on_refresh
        # What is not loaded from files has no weights of several variants to look for.
        is_loaded_from = hasattr(self._detector_type, "from_pretrained")
        with init_guard(
            **place,
            dtype=given("dtype_override", preferred),
            model_type=self._detector_type,
            model_id=self._model_id if is_loaded_from else None,
            revision=self._revision_in_use(),
            local_hfhub_variant_check_only=unasked
            or given("local_hfhub_variant_check_only", False),
            local_files_only=local,
            quant_config=given("quant_config_override"),
            quant_type=given("quant_type_override", self.DEFAULT_QUANT_TYPE),
            quant_use_double=given("quant_use_double_override", self.DEFAULT_QUANT_USE_DOUBLE),
            use_safetensors=self.use_safetensors,
            subfolder=self.FROM_PRETRAINED_ADDITIONAL_KWARGS.get("subfolder"),
        ) as chosen:
            self._chosen = chosen

    @contextlib.contextmanager
    def _naming(self, attribute: str, override: str | None = None) -> Iterator[None]:
        """An error about the value of a class attribute names that, unless it was overridden."""
        try:
            yield
        except (TypeError, ValueError) as error:
            _, _, said = str(error).partition(": ")
            if override in self._settings or not str(error).startswith(("device: ", "dtype: ")):
                raise
            raise type(error)(f"{type(self).__name__}.{attribute}: {said}") from None

    def _match(self, match: Any) -> None:
        """Joins the choices of ``match`` to the settings, also those where it chose nothing.

        What was given by keyword goes first. The instance itself is not kept.
        """
        if not isinstance(match, Contract):
            raise TypeError(
                f"instance_to_match: expected an instance of an OpGuardBase, got "
                f"{type(match).__name__}; leave it out to choose by the overrides"
            )
        matched = {
            "device_override": match.device,
            "dtype_override": match.dtype,
            "device_map_override": match.device_map,
        }
        if not self._settings.keys() & {"quant_config_override", "quant_type_override"}:
            matched |= self._matched_quant(match)
        self._matched = {key: matched[key] for key in matched if key not in self._settings}
        self._settings |= self._matched

    def _matched_quant(self, match: Contract) -> dict[str, Any]:
        chosen = match._chosen
        alike = same_config(match._detector_type, self._detector_type)
        if alike or chosen.quant_type not in QUANT_TYPES:
            return {"quant_type_override": None, "quant_config_override": chosen.quant_config}
        # A configuration is one library's own; what it means can be had from the other too.
        return {
            "quant_type_override": chosen.quant_type,
            "quant_use_double_override": chosen.quant_use_double,
            "quant_config_override": None,
        }

    @property
    def _read(self) -> str | None:
        """The export that this thread is loading the model from."""
        reading = self._reading
        return reading[1] if reading and reading[0] == threading.get_ident() else None

    @contextlib.contextmanager
    def _reading_from(self, folder: os.PathLike[str] | None) -> Iterator[None]:
        before = self._reading
        self._reading = (threading.get_ident(), os.fspath(folder)) if folder else before
        try:
            yield
        finally:
            self._reading = before

    def _from_pretrained_kwargs(self) -> dict[str, Any]:
        chosen = self._chosen
        kwargs: dict[str, Any] = {
            _dtype_keyword(self._detector_type): chosen.dtype,
            "use_safetensors": self.use_safetensors or None,
            "local_files_only": self._local_files_only or None,
            "device_map": chosen.device_map,
        }
        extra = dict(self.FROM_PRETRAINED_ADDITIONAL_KWARGS)
        of_source = {
            "revision": self._revision_in_use(),
            "variant": chosen.variant,
            "quantization_config": chosen.quant_config,
        }
        if self._read is None:
            kwargs |= of_source
        else:  # an export is one folder, quantized already
            kwargs["local_files_only"] = True
            extra = {k: v for k, v in extra.items() if k not in {*of_source, "subfolder"}}
        skip = {*self.FROM_PRETRAINED_SKIP_KWARGS, *extra}
        if not skip.isdisjoint(DTYPE_KEYWORDS):  # two names of one thing
            skip |= DTYPE_KEYWORDS
        kept = {key: kwargs[key] for key in kwargs if kwargs[key] is not None and key not in skip}
        return kept | extra

    def _place(self, detector: Any) -> Any:
        """Moves the model to the chosen device and dtype, unless its loader has settled those."""
        chosen = self._chosen
        to: dict[str, Any] = {}
        if not self.SKIP_TO_DEVICE and chosen.device_map is None:
            to["device"] = chosen.device
        if chosen.quant_config is not None:
            return settle(detector, to.get("device"))
        # Loaded as asked, a model may have kept some parts in float32 because they need it.
        settled = getattr(detector, "dtype", None) == chosen.dtype
        if not self.SKIP_TO_DTYPE and not settled:
            to["dtype"] = chosen.dtype
        return detector.to(**to) if to and hasattr(detector, "to") else detector

    @property
    def model_id(self) -> str:
        """The hub id or folder to load; set it on an instance before that loads.

        While the model is loaded from its export it is the export's folder, for the loading steps.
        """
        return self._model_id if self._read is None else self._read

    @model_id.setter
    def model_id(self, value: str | os.PathLike[str]) -> None:
        if self._is_loaded:
            raise RuntimeError(
                f"model_id: expected to be set before the model is loaded, {self._model_id!r} is "
                "loaded; call free() first, or set it on a new instance"
            )
        before, self._model_id = self._model_id, os.fspath(value)
        try:
            self._choose()  # another model has other variants
        except BaseException:
            self._model_id = before
            raise

    @property
    def use_safetensors(self) -> bool:
        """Whether weights come from safetensors files only; set it to True on an instance."""
        return self.USE_SAFETENSORS or self._use_safetensors

    @use_safetensors.setter
    def use_safetensors(self, value: bool) -> None:
        if not value:
            raise ValueError(
                "use_safetensors: expected True, other weight files run code when they are "
                "opened; a class that must read them sets USE_SAFETENSORS = False"
            )
        self._use_safetensors = True
        if not self._is_loaded:
            self._choose()  # a variant may be there in other files only

    @property
    def classname(self) -> str:
        return type(self).__name__

    @property
    def device(self) -> torch.device:
        return self._chosen.device

    @property
    def device_list(self) -> list[torch.device]:
        return list(self._chosen.device_list)

    @property
    def device_map(self) -> Any:
        return self._chosen.device_map

    @property
    def dtype(self) -> torch.dtype:
        return self._chosen.dtype

    @property
    def variant(self) -> str | None:
        return self._chosen.variant if self._read is None else None

    @property
    def quant_config(self) -> Any:
        return self._chosen.quant_config
