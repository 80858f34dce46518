"""``OpGuardBase``: a model with everything a guarded call of it needs, as a class to subclass.

A subclass says what differs (which model, how inputs become tensors and outputs become answers);
loading, placing, modes, detaching, scrubbing and freeing are here, through the guards.

Who holds the model: ``with`` blocks and running calls are counted as its users under one lock. The
first user loads, the last one frees, so that no thread frees under another. Whether it is loaded
is a flag of its own and never judged by an object's truth value.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from importlib import metadata
from types import TracebackType
from typing import Any, ClassVar, Self

import torch

from opguard._routing import Routes, near_miss
from opguard.detaching import detach_to_cpu
from opguard.devices import normalize_dtype
from opguard.guards._base import _sanitize
from opguard.guards.calling import Guard, _call_settings
from opguard.guards.freeing import Releasing
from opguard.guards.initial import InitValues, device_guard, init_guard
from opguard.guards.loading import load_guard

__all__ = ["OpGuardBase"]

HALF = (torch.float16, torch.bfloat16)


# Since when a library's from_pretrained takes dtype=; torch_dtype=, its older name, then warns.
_DTYPE_SINCE = {"transformers": (4, 56), "diffusers": (0, 42)}


def _dtype_keyword(kind: Any) -> str:
    """How ``kind.from_pretrained`` calls its dtype; transformers and diffusers renamed theirs."""
    roots = {base.__module__.partition(".")[0] for base in getattr(kind, "__mro__", ())}
    for library in roots & _DTYPE_SINCE.keys():
        found = metadata.version(library).split(".")[:2]
        return "dtype" if tuple(map(int, found)) >= _DTYPE_SINCE[library] else "torch_dtype"
    return "torch_dtype"


class _Free(Releasing):
    """Gives an accelerator's memory back; collects garbage only where cycles keep the model."""

    def __init__(self, model: Any, device_list: list[torch.device]) -> None:
        self._device_list = device_list
        self._model: Callable[[], Any] = lambda: None
        if any(device.type != "cpu" for device in device_list):
            with contextlib.suppress(TypeError):  # not every detector can be referred to weakly
                self._model = weakref.ref(model)

    def _collects(self, error: BaseException | None) -> bool:
        return self._model() is not None


class OpGuardBase:
    """Base of guarded models: loads lazily, calls under guard, frees predictably.

    A subclass sets the class attributes ``NAME``, ``MODEL_ID`` (a hub id, or a local folder),
    ``REVISION`` (needed for a hub id) and ``DETECTOR_TYPE`` (a class with ``from_pretrained``, or
    a callable that gets the model id), and overrides the steps it needs::

        with TinyVAE() as vae:
            y = vae(input_raw=x)

    ``__call__`` runs ``_preprocess -> _predict -> _postprocess`` in eval mode, without gradients,
    and detaches the answer to the CPU. Its other keywords reach the steps whose signatures name
    them; a keyword that no step names is an error.

    The model is loaded by the first of: a call, ``with``, ``.detector``, ``keep_warm=True``. It is
    freed when the outermost ``with`` ends, after a call outside any ``with`` (unless
    ``keep_warm``), by ``free()``, and when the object goes; never while another call runs.

    Args:
        device_override: device to use instead of ``DEFAULT_DEVICE``.
        dtype_override: dtype to use instead of ``DTYPE_PREFERENCE`` where the device can.
        device_map_override: passed to ``from_pretrained`` instead of ``DEFAULT_DEVICE_MAP``.
        quant_config_override: quantization config to pass on as it is.
        quant_type_override: quantization type instead of ``DEFAULT_QUANT_TYPE``.
        quant_use_double_override: instead of ``DEFAULT_QUANT_USE_DOUBLE``.
        keep_warm: load now, and stay loaded between calls.
        sanitize_all_exceptions: False keeps the frames' variables on exceptions, for a debugger.
        detach_outputs: False hands the answer out as the model made it.
        local_hfhub_variant_check_only: look for weight variants in the local cache only.
        local_files_only: never touch the network.
        only_load_export: load from the local export or not at all.
        force_export_refresh: make the local export anew.
        instance_to_match: take device, device map, dtype and quantization from this instance.

    Raises:
        TypeError: an unknown keyword, or a class attribute of a wrong type.
        ValueError: a class attribute is missing or empty.
    """

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

    # On the class, so that __del__ of a half-made instance finds them.
    _is_loaded: bool = False
    _is_loading: bool = False
    _users: int = 0
    _coming: int = 0
    _detector: Any = None
    _processor: Any = None
    _chosen: InitValues
    _guarding: tuple[tuple[Any, ...], tuple[torch.nn.Module, ...]]
    _routes_of_class: ClassVar[Routes]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        skip = cls.FROM_PRETRAINED_SKIP_KWARGS
        if not isinstance(skip, tuple):
            raise TypeError(
                f"{cls.__name__}.FROM_PRETRAINED_SKIP_KWARGS: expected a tuple of names, "
                f"got {type(skip).__name__}; write ('name',)"
            )
        if not isinstance(cls.FROM_PRETRAINED_ADDITIONAL_KWARGS, Mapping):
            raise TypeError(
                f"{cls.__name__}.FROM_PRETRAINED_ADDITIONAL_KWARGS: expected a mapping, got "
                f"{type(cls.FROM_PRETRAINED_ADDITIONAL_KWARGS).__name__}; write {{'name': value}}"
            )
        for name in ("NAME", "MODEL_ID", "REVISION", "DETECTOR_TYPE"):
            value = cls.__dict__.get(name, ...)
            if isinstance(value, str) and not value:
                raise ValueError(f"{cls.__name__}.{name}: expected a value, got an empty string")

    def __init__(
        self,
        *,
        device_override: Any = None,
        dtype_override: Any = None,
        device_map_override: Any = None,
        quant_config_override: Any = None,
        quant_type_override: str | None = None,
        quant_use_double_override: bool | None = None,
        keep_warm: bool = False,
        sanitize_all_exceptions: bool = True,
        detach_outputs: bool = True,
        local_hfhub_variant_check_only: bool = False,
        local_files_only: bool = False,
        only_load_export: bool = False,
        force_export_refresh: bool = False,
        instance_to_match: OpGuardBase | None = None,
        **unknown: Any,
    ) -> None:
        cls = type(self)
        if unknown:
            known = set(inspect.signature(OpGuardBase.__init__).parameters)
            raise TypeError(
                f"{cls.__name__}(): expected keywords of OpGuardBase, got "
                f"{near_miss(unknown, known - {'self', 'unknown'})}"
            )
        self._check_class()
        if "_routes_of_class" not in cls.__dict__:
            cls._routes_of_class = Routes.of(cls, OpGuardBase)
        self._routes = cls._routes_of_class
        self._lock = threading.RLock()
        self._door = threading.Lock()
        self._entries: list[tuple[int, BaseException | None]] = []
        self._free_wanted = False
        self._model_id = os.fspath(cls.MODEL_ID)
        self._keep_warm = keep_warm
        self._sanitizes = sanitize_all_exceptions
        self._detach = detach_outputs and not self.NEED_GRADS
        self._local_files_only = local_files_only
        self._only_load_export = only_load_export
        self._force_export_refresh = force_export_refresh
        self._extra_info: dict[str, Any] = {}
        handled = sys.exception()
        try:
            self._choose(
                {
                    "device": device_override,
                    "dtype": dtype_override,
                    "device_map": device_map_override,
                    "quant_config": quant_config_override,
                    "quant_type": quant_type_override,
                    "quant_use_double": quant_use_double_override,
                },
                instance_to_match,
                local_hfhub_variant_check_only or local_files_only,
            )
            if keep_warm:
                self._load()
        except BaseException as error:
            self._scrub(error, handled)
            raise

    # What a subclass overrides

    def _load_detector(self, **kwargs: Any) -> Any:
        """Returns the model, placed on ``self.device`` as ``self.dtype``.

        The default calls ``DETECTOR_TYPE.from_pretrained`` with the model id, the revision, the
        dtype, the variant, the device map, the quantization config and the locality, less
        ``FROM_PRETRAINED_SKIP_KWARGS``, plus ``FROM_PRETRAINED_ADDITIONAL_KWARGS`` and
        ``kwargs``; a ``DETECTOR_TYPE`` without ``from_pretrained`` gets the model id alone.
        """
        loader = getattr(self.DETECTOR_TYPE, "from_pretrained", None)
        if loader is None:
            detector = self.DETECTOR_TYPE(str(self.model_id), **kwargs)
        else:
            detector = loader(str(self.model_id), **(self._from_pretrained_kwargs() | kwargs))
        return self._place(detector)

    def _load_processor(self) -> Any:
        """Returns what the steps need beside the model (a tokenizer ...); None by default."""
        return None

    def _preprocess(self, *, input_raw: Any) -> Any:
        """Returns the model's input; by default what ``processor.preprocess`` makes of it."""
        if hasattr(self._processor, "preprocess"):
            return self._processor.preprocess(input_raw)
        return input_raw

    def _predict(self, *, input_proc: Any) -> Any:
        """Runs the model; by default on the input, or on its items where it is a mapping."""
        if isinstance(input_proc, Mapping):
            return self._detector(**input_proc)
        return self._detector(input_proc)

    def _postprocess(self, *, output_raw: Any) -> Any:
        """Returns the answer; by default what ``processor.postprocess`` makes of the output."""
        if hasattr(self._processor, "postprocess"):
            return self._processor.postprocess(output_raw)
        return output_raw

    def _caller(self, *, input_raw: Any, **kwargs: Any) -> Any:
        """Runs the three steps; ``kwargs`` reach those whose signatures name them."""
        if not kwargs:
            proc = self._preprocess(input_raw=input_raw)
            return self._postprocess(output_raw=self._predict(input_proc=proc))
        pre, predict, post = (step.pick(kwargs) for step in self._routes.steps)
        if len(kwargs) > len(pre.keys() | predict.keys() | post.keys()):
            raise self._refusal((), kwargs)
        proc = self._preprocess(input_raw=input_raw, **pre)
        output = self._predict(input_proc=proc, **predict)
        return self._postprocess(output_raw=output, **post)

    # Calling

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on ``input_raw`` under guard and returns what ``_postprocess`` makes.

        Raises:
            TypeError: an unknown keyword, or the class is not callable (``IS_CALLABLE``).
        """
        accepted = self._routes.accepted
        if args or not self.IS_CALLABLE or not (accepted is None or kwargs.keys() <= accepted):
            raise self._refusal(args, kwargs)
        handled = sys.exception()
        try:
            self._join()
            try:
                result = self._guarded(kwargs)
            except BaseException:
                self._leave_quietly()
                raise
            self._leave()
            return result
        except BaseException as error:
            self._scrub(error, handled)
            raise

    def _guarded(self, kwargs: dict[str, Any]) -> Any:
        # A frame of its own: the guard, which knows the model, is gone before the model is freed.
        settings, models = self._guarding
        with Guard(*settings):
            result = self._caller(**kwargs)
        return detach_to_cpu(result, models=models) if self._detach else result

    def _refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TypeError:
        name = type(self).__name__
        if not self.IS_CALLABLE:
            return TypeError(
                f"{name}(): expected a class that is callable, {name}.IS_CALLABLE is False; "
                "hand its .detector to the model that uses it"
            )
        if args:
            return TypeError(
                f"{name}(): expected keywords only, got {len(args)} positional; write input_raw=..."
            )
        accepted = self._routes.accepted
        if accepted is None:  # _caller is overridden and passed these on
            accepted = frozenset({"input_raw"}).union(*(step.names for step in self._routes.steps))
        wrong = near_miss(kwargs.keys() - accepted, accepted)
        return TypeError(
            f"{name}(): expected keywords that a step names ({', '.join(sorted(accepted))}), "
            f"got {wrong}"
        )

    # Loading and freeing

    def __enter__(self) -> Self:
        handled = sys.exception()
        try:
            self._join()
        except BaseException as error:
            self._scrub(error, handled)
            raise
        with self._lock:
            self._entries.append((threading.get_ident(), handled))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            here = threading.get_ident()
            mine = [i for i, entry in enumerate(self._entries) if entry[0] == here]
            _, handled = self._entries.pop(mine[-1] if mine else -1)
            if not self._entries:
                self._free_wanted = True
        if error is None:
            self._leave()
        else:
            self._scrub(error, handled)
            self._leave_quietly()

    def free(self) -> bool:
        """Frees the model; returns whether it is free now.

        False while a call or a ``with`` still uses it: the last of them frees it then.
        """
        with self._lock:
            self._free_wanted = self._users > 0
            if not self._free_wanted:
                self._free()
            return not self._is_loaded

    def __del__(self) -> None:
        # Also runs for half-made instances and while the interpreter ends.
        with contextlib.suppress(BaseException):
            if self._is_loaded:
                self._free()

    def _join(self) -> None:
        """Becomes a user of the model, which is loaded when this returns.

        Who waits for another's load is counted too, or each of a few threads that call at once
        would free what the next one has to load again.
        """
        with self._door:
            self._coming += 1
        try:
            with self._lock:
                if not self._is_loaded:
                    self._load()
                self._users += 1
        finally:
            with self._door:
                self._coming -= 1

    def _leave(self) -> None:
        """Stops being a user; the last one frees what nobody asked to keep."""
        with self._lock:
            self._users -= 1
            last = self._users == 0 and not (self._coming and not self._free_wanted)
            if last and (self._free_wanted or not self._keep_warm):
                self._free()

    def _leave_quietly(self) -> None:
        """Leaves while a failure is under way, which a failure to clean up must not hide."""
        with contextlib.suppress(Exception):
            self._leave()

    def _part(self, name: str) -> Any:
        with self._lock:
            if not self._is_loaded and not (self._is_loading and name == "_processor"):
                self._load()
            return getattr(self, name)

    def _load(self) -> None:
        with self._lock:
            if self._is_loading:
                raise RuntimeError(
                    f"{type(self).__name__}: expected the loading steps not to use the model, "
                    "it was asked for while it loads; build what you need from self.model_id"
                )
            self._is_loading = True
            try:
                self._load_parts()
                self._is_loaded = True
            except BaseException:
                self._forget()
                raise
            finally:
                self._is_loading = False

    def _load_parts(self) -> None:
        exports = self._only_load_export or self._force_export_refresh
        with load_guard(
            device_list=self._chosen.device_list,
            local_files_only=self._local_files_only,
            base_export_name=f"{self.NAME}-detector" if exports else None,
            only_load_export=self._only_load_export,
            force_export_refresh=self._force_export_refresh,
            sanitize_all_exceptions=self._sanitizes,
        ) as load:
            self._processor = self._load_processor()
            if exports:
                self._detector = self._place(self._load_export(load))
            else:
                self._detector = load(self._load_detector)
        settings = _call_settings(
            models=(self._processor, self._detector),
            need_grads=self.NEED_GRADS,
            effective_dtype=self._chosen.dtype if self._chosen.dtype in HALF else None,
            device_list=self._chosen.device_list,
            sanitize_all_exceptions=self._sanitizes,
            detach_outputs=self._detach,
        )
        # Without the devices to measure: that would cost more than the guard itself.
        self._guarding = (*settings[:4], None, *settings[5:]), settings[2] or ()

    def _load_export(self, load: Callable[..., Any]) -> Any:
        loader = getattr(self.DETECTOR_TYPE, "from_pretrained", None)
        if loader is None or type(self)._load_detector is not OpGuardBase._load_detector:
            raise TypeError(
                f"{type(self).__name__}: expected a DETECTOR_TYPE with from_pretrained, loaded by "
                "the default _load_detector, to keep an export of it; leave only_load_export and "
                "force_export_refresh out"
            )
        return load(loader, self.model_id, **self._from_pretrained_kwargs())

    def _forget(self) -> None:
        self._is_loaded = False
        self._free_wanted = False
        self._detector = None
        self._processor = None
        self._guarding = (), ()
        self._extra_info.clear()

    def _free(self) -> None:
        if self._is_loaded:
            with _Free(self._detector, self._chosen.device_list):
                self._forget()

    def _scrub(self, error: BaseException, handled: BaseException | None) -> None:
        if self._sanitizes:
            _sanitize(error, handled, ())

    # Choosing

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

    def _revision_in_use(self) -> str | None:
        """The revision of a hub id; None for a local folder, which has none.

        Raises what is wrong with the model id before any library is asked to load it.
        """
        if not hasattr(self.DETECTOR_TYPE, "from_pretrained"):
            return self.REVISION
        name, where = type(self).__name__, self._model_id
        if os.path.isdir(where):
            return None
        if where.startswith((os.sep, ".", "~")) or where.count("/") > 1:
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

    def _choose(self, given: dict[str, Any], match: OpGuardBase | None, local_only: bool) -> None:
        """Settles devices, dtype, variant and quantization, once."""
        if match is not None:
            if not isinstance(match, OpGuardBase):
                raise TypeError(
                    f"instance_to_match: expected an instance of an OpGuardBase, got "
                    f"{type(match).__name__}; leave it out to choose by the overrides"
                )
            matched = {
                "device": match.device,
                "dtype": match.dtype,
                "device_map": match.device_map,
                "quant_config": match.quant_config,
            }
            given = {key: matched.get(key) if given[key] is None else given[key] for key in given}
        double = given["quant_use_double"]
        place: dict[str, Any] = {
            "device": self._default(given["device"], self.DEFAULT_DEVICE),
            "device_map": self._default(given["device_map"], self.DEFAULT_DEVICE_MAP),
        }
        with device_guard(**place) as device:
            # On the cpu half precision is somebody's choice for this instance, not a preference.
            wish = normalize_dtype(self.DTYPE_PREFERENCE)
            preferred = torch.float32 if device.type == "cpu" and wish in HALF else wish
        with init_guard(
            **place,
            dtype=self._default(given["dtype"], preferred),
            model_type=self.DETECTOR_TYPE,
            model_id=self._model_id,
            revision=self._revision_in_use(),
            local_hfhub_variant_check_only=local_only,
            local_files_only=self._local_files_only,
            quant_config=given["quant_config"],
            quant_type=self._default(given["quant_type"], self.DEFAULT_QUANT_TYPE),
            quant_use_double=self._default(double, self.DEFAULT_QUANT_USE_DOUBLE),
        ) as chosen:
            self._chosen = chosen

    @staticmethod
    def _default(given: Any, otherwise: Any) -> Any:
        return otherwise if given is None else given

    def _from_pretrained_kwargs(self) -> dict[str, Any]:
        chosen = self._chosen
        kwargs: dict[str, Any] = {
            "revision": self._revision_in_use(),
            _dtype_keyword(self.DETECTOR_TYPE): chosen.dtype,
            "variant": chosen.variant,
            "use_safetensors": self.use_safetensors or None,
            "local_files_only": self._local_files_only or None,
            "device_map": chosen.device_map,
            "quantization_config": chosen.quant_config,
        }
        skip = self.FROM_PRETRAINED_SKIP_KWARGS
        kept = {key: kwargs[key] for key in kwargs if kwargs[key] is not None and key not in skip}
        return kept | dict(self.FROM_PRETRAINED_ADDITIONAL_KWARGS)

    def _place(self, detector: Any) -> Any:
        """Moves the model to the chosen device and dtype, unless its loader has settled those."""
        chosen = self._chosen
        to: dict[str, Any] = {}
        if not self.SKIP_TO_DEVICE and chosen.device_map is None and chosen.quant_config is None:
            to["device"] = chosen.device
        if not self.SKIP_TO_DTYPE and chosen.quant_config is None:
            to["dtype"] = chosen.dtype
        return detector.to(**to) if to and hasattr(detector, "to") else detector

    # Looking

    @property
    def model_id(self) -> str:
        """The hub id or folder to load; set it on an instance before that loads."""
        return self._model_id

    @model_id.setter
    def model_id(self, value: str | os.PathLike[str]) -> None:
        self._model_id = os.fspath(value)

    @property
    def use_safetensors(self) -> bool:
        """Whether weights come from safetensors files only."""
        return self.USE_SAFETENSORS

    @use_safetensors.setter
    def use_safetensors(self, value: bool) -> None:
        if not value:
            raise ValueError(
                "use_safetensors: expected True, other weight files run code when they are "
                "opened; a class that must read them sets USE_SAFETENSORS = False"
            )

    @property
    def classname(self) -> str:
        return type(self).__name__

    @property
    def is_loaded(self) -> bool:
        return self._is_loaded

    @property
    def detector(self) -> Any:
        """The model, loaded when it is not yet.

        Outside any ``with`` it is freed after the next call, or by ``free()``.
        """
        return self._part("_detector")

    @property
    def processor(self) -> Any:
        """What ``_load_processor`` returned; loads the model when it is not loaded yet."""
        return self._part("_processor")

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
        return self._chosen.variant

    @property
    def quant_config(self) -> Any:
        return self._chosen.quant_config

    @property
    def extra_info(self) -> dict[str, Any]:
        """Free for the subclass's own use; emptied when the model is freed."""
        return self._extra_info
