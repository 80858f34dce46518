"""Gives memory back: after a block (`free_guard`), and around a model's whole life (`model_guard`).

Memory goes back to the system only where something was released meanwhile: emptying a cache that
will be filled again costs whoever allocates next. Collecting garbage costs tens of milliseconds in
a large program, so it happens where freeing was asked for, and nowhere else by default.
"""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch

from opguard import devices
from opguard.devices import DeviceLike
from opguard.guards._base import Guard, _here, _is_compiling
from opguard.guards.initial import InitValues, init_guard

__all__ = ["free_guard", "model_guard"]

logger = logging.getLogger("opguard")


class Releasing(Guard):
    """A guard that waits for its devices when left, and after sanitizing gives memory back."""

    _device_list: Iterable[DeviceLike] | None = None
    _devices: tuple[torch.device, ...] = ()
    _before: Mapping[torch.device, int] = {}

    def _enter(self) -> Any:
        self._devices = tuple(devices.normalize_devices(self._device_list))
        # The cpu's allocator has no cache to empty.
        self._before = {
            device: devices.memory_now(device) for device in self._devices if device.type != "cpu"
        }
        return self

    def _exit(self, error: BaseException | None) -> None:
        # A device that failed would say so again here: the first report is the user's.
        try:
            devices.synchronize(self._devices)
        except RuntimeError:
            if error is None:
                raise

    def _collects(self, error: BaseException | None) -> bool:
        """Returns whether garbage is collected after the block ended with `error`."""
        raise NotImplementedError

    def _give_back(self, error: BaseException | None) -> None:
        """Collects garbage where wanted, and empties the caches of devices that hold less now."""
        if self._collects(error):
            gc.collect()
        for device, before in self._before.items():
            if devices.memory_now(device) < before:
                devices.empty_cache(device)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.in_graph and _is_compiling():
            return
        entries: list[Any] = self.__dict__.get("_entries", [])
        here = _here()
        entry = next((entry[1] for entry in reversed(entries) if entry[0] == here), self)
        try:
            super().__exit__(kind, error, trace)
        finally:
            # An error that goes on must not keep this frame's view of where it came from.
            del trace
            entry._give_back(error)


class free_guard(Releasing):
    """After the block, whether or not it raised: waits, collects garbage, gives memory back.

    Caches are emptied only on devices of `device_list` (None: all) that hold less than before.
    `run_gc_and_clear_cache=False` only waits. Yields the guard.
    """

    in_graph = True

    def __init__(
        self,
        *,
        device_list: Iterable[DeviceLike] | None = None,
        run_gc_and_clear_cache: bool = True,
    ) -> None:
        self._device_list = device_list
        self._run = bool(run_gc_and_clear_cache)

    def _collects(self, error: BaseException | None) -> bool:
        return self._run

    def _give_back(self, error: BaseException | None) -> None:
        if self._run:
            super()._give_back(error)


def _is_from_pretrained(loader: Callable[..., Any]) -> bool:
    return getattr(loader, "__name__", "") == "from_pretrained"


def _library(loader: Callable[..., Any]) -> str:
    owner = getattr(loader, "__self__", None)
    for base in getattr(owner, "__mro__", ()):
        root = str(base.__module__).partition(".")[0]
        if root in ("transformers", "diffusers"):
            return root
    return ""


def loader_arguments(
    loader: Callable[..., Any], known: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of `loader` that `known` has: all it names, or all if it takes any.

    A `from_pretrained` of transformers or diffusers gets them under its own names. What is None is
    left to the loader.
    """
    given = {name: value for name, value in known.items() if value is not None}
    if _is_from_pretrained(loader) and _library(loader):
        model_id = given.pop("model_id", None)
        given.pop("device", None)
        if "quant_config" in given:
            given["quantization_config"] = given.pop("quant_config")
        if "dtype" in given and _library(loader) == "diffusers":
            given["torch_dtype"] = given.pop("dtype")
        return (() if model_id is None else (model_id,)), given
    try:
        parameters = inspect.signature(loader).parameters
    except (TypeError, ValueError):
        return (), {}
    if any(found.kind is found.VAR_KEYWORD for found in parameters.values()):
        return (), given
    return (), {name: value for name, value in given.items() if name in parameters}


class ModelCall:
    """What `model_guard` yields: runs its model, detaches, and knows what was chosen.

    `g(*a, **k)` runs the loaded model on them in eval mode and detaches what comes out; where the
    first argument is callable, such as `g.model.generate`, that is run instead. Without a loader it
    is the `g` of `call_guard`. After the block `model` is None.
    """

    __slots__ = ("_call", "_memory", "model", "values")

    def __init__(self, call: Any, model: Any, values: InitValues) -> None:
        self._call = call
        self._memory: Any = None
        self.model = model
        self.values = values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            raise RuntimeError("model_guard: expected a call inside the block, it has been left")
        if self.model is None or (args and callable(args[0])):
            return self._call(*args, **kwargs)
        return self._call(self.model, *args, **kwargs)

    @property
    def memory(self) -> Any:
        """Bytes per device: before, peak, after."""
        return self._memory if self._call is None else self._call.memory

    def _close(self) -> None:
        with suppress(RuntimeError):  # nothing was measured
            self._memory = self._call.memory
        self._call = self.model = None


class model_guard(Guard):
    """A model's whole life in one block: chosen, loaded, called, freed.

    Takes the keywords of `init_guard`, `load_guard`, `call_guard` and `free_guard`, each as a dict.
    The loader is load_guard's `loader_fn`, or the `from_pretrained` of init_guard's `model_type`;
    it gets what init_guard chose (model_id, revision, device, dtype, variant, device_map,
    quant_config, and local_files_only) as far as it takes them, and `loader_kwargs`.
    `local_files_only` may stand in either dict; `sanitize_all_exceptions` and `keep` of the guards
    inside hold for the whole. Yields a `ModelCall`; whatever fails, in any of the four steps, is
    what the user sees.
    """

    def __init__(
        self,
        *,
        init_guard_kwargs: Mapping[str, Any] | None = None,
        load_guard_kwargs: Mapping[str, Any] | None = None,
        call_guard_kwargs: Mapping[str, Any] | None = None,
        free_guard_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._init = dict(init_guard_kwargs or {})
        self._load = dict(load_guard_kwargs or {})
        self._calling = dict(call_guard_kwargs or {})
        self._free = dict(free_guard_kwargs or {})
        self._open: list[Any] = []
        self._yielded: ModelCall | None = None
        # What the block's guards leave alone is left alone all the way out.
        self.sanitize_all_exceptions = all(
            step.get("sanitize_all_exceptions", True) for step in (self._load, self._calling)
        )
        keep = self._calling.get("keep", ())
        self.keep = (keep,) if isinstance(keep, type) else tuple(keep)

    def _enter(self) -> ModelCall:
        from opguard.guards.calling import call_guard

        local = bool(self._init.get("local_files_only") or self._load.get("local_files_only"))
        with init_guard(**self._init | {"local_files_only": local}) as values:
            pass
        listed = {"device_list": values.device_list}
        self._open = []
        free = free_guard(**listed | self._free)
        free.sanitize_all_exceptions, free.keep = self.sanitize_all_exceptions, self.keep
        free.__enter__()
        self._open.append(free)
        try:
            model = self._loaded(values, local)
            calling = call_guard(**listed | {"models": model} | self._calling)
            self._yielded = ModelCall(calling.__enter__(), model, values)
            self._open.append(calling)
        except BaseException as error:
            model = None
            self._leave(error)
            raise
        return self._yielded

    def _loaded(self, values: InitValues, local: bool) -> Any:
        from opguard.guards.loading import load_guard

        model_type = self._init.get("model_type")
        given = dict(self._load)
        loader = given.pop("loader_fn", None) or getattr(model_type, "from_pretrained", None)
        if loader is None:
            return None
        extra = dict(given.pop("loader_kwargs", None) or {})
        known = {
            "model_id": self._init.get("model_id"),
            "revision": self._init.get("revision"),
            "local_files_only": True if local else None,
            **values._asdict(),
        }
        known.pop("device_list")
        args, named = loader_arguments(loader, known)
        settings = {"device_list": values.device_list} | given | {"local_files_only": local}
        with load_guard(**settings) as load:
            model = load(loader, *args, **named | extra)
            placed = values.device_map is None and values.quant_config is None
            if _is_from_pretrained(loader) and placed and hasattr(model, "to"):
                model = model.to(values.device)
        return model

    def _exit(self, error: BaseException | None) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Exits what is open, innermost first; the model goes before the memory is given back."""
        trace = error.__traceback__ if error is not None else None
        try:
            if len(self._open) > 1:
                self._open.pop().__exit__(type(error) if error else None, error, trace)
        finally:
            del trace
            if self._yielded is not None:
                self._yielded._close()
                self._yielded = None
            if self._open:
                free = self._open.pop()
                free.__exit__(
                    type(error) if error else None, error, error.__traceback__ if error else None
                )
