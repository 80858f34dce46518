"""``OpGuardBase``: a model with everything a guarded call of it needs, as a class to subclass.

A subclass says what differs (which model, how inputs become tensors and outputs become answers);
loading, placing, modes, detaching, scrubbing and freeing are here, through the guards.

What a class declares and what is chosen from it is in ``_contract``, who holds the model and when
it is loaded and freed in ``_lifecycle``; here are the constructor and the call.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, ClassVar

from opguard._attributes import check_switches
from opguard._instances import not_made
from opguard._lifecycle import Lifecycle
from opguard._routing import Routes, near_miss
from opguard.detaching import detach_to_cpu
from opguard.guards.calling import Guard

__all__ = ["OpGuardBase"]

# Answers that are yet to be worked out.
UNFINISHED = frozenset({GeneratorType, CoroutineType, AsyncGeneratorType, map, filter})


class OpGuardBase(Lifecycle):
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

    A copy, or what a pickle is read to, is the same class made with the same arguments, of the same
    ``model_id``; it is not loaded, and has nothing that was set on the instance afterwards.

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
        local_files_only_on_refresh: make it anew without the network.
        instance_to_match: take device, device map, dtype and quantization from this instance.
        flags: instead of ``DEFAULT_FLAGS``: True makes a call return ``(answer, flags)``. Flags are
            int64 (samples, words): which samples met a NaN or Inf, and in which modules; see
            :mod:`opguard.flags`. On the CPU, unless the answer is not detached.
        pool: True lets :mod:`opguard.pools` move the model: it is loaded once, takes memory only
            while it is used or nobody else needs the bytes, and stays until ``free()`` or until
            the outermost ``with`` ends. Each call holds it; a call that runs out of memory is
            tried again after idle models have made room. Use ``.detector`` itself in
            ``with opguard.pools.auto_manage(model.detector):``.

    Raises:
        TypeError: an unknown keyword, or a class attribute of a wrong type.
        ValueError: a class attribute is missing or empty.
    """

    _routes_of_class: ClassVar[Routes]
    _routes: Routes = not_made()

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
        local_files_only_on_refresh: bool = False,
        instance_to_match: OpGuardBase | None = None,
        flags: bool | None = None,
        pool: bool = False,
        **unknown: Any,
    ) -> None:
        given = locals()
        cls = type(self)
        defaults = OpGuardBase.__init__.__kwdefaults__ or {}
        if unknown:
            raise TypeError(
                f"{cls.__name__}(): expected keywords of OpGuardBase, got "
                f"{near_miss(unknown, defaults)}"
            )
        check_switches(cls.__name__, given, defaults)
        self._check_class()
        if "_routes_of_class" not in cls.__dict__:
            cls._routes_of_class = Routes.of(cls, OpGuardBase)
        self._routes = cls._routes_of_class
        self._prepare()
        self._model_id = os.fspath(cls.MODEL_ID)
        self._keep_warm = keep_warm
        self._sanitizes = sanitize_all_exceptions
        self._detach = detach_outputs and not self.NEED_GRADS
        self._flags = self.DEFAULT_FLAGS if flags is None else flags
        self._pool = pool
        self._local_files_only = local_files_only
        self._only_load_export = only_load_export
        self._force_export_refresh = force_export_refresh
        self._local_files_only_on_refresh = local_files_only_on_refresh
        self._settings = {
            name: given[name] for name in defaults if given[name] is not defaults[name]
        }
        if self._settings.pop("instance_to_match", None) is not None:
            self._match(instance_to_match)
            self._forget_match(instance_to_match)
        copied = self.__dict__.pop("_copied", None)
        self.__dict__ |= copied or {}
        handled = sys.exception()
        try:
            self._choose()
            if keep_warm and copied is None:
                self._load()
        except BaseException as error:
            self._scrub(error, handled)
            raise

    # What a subclass overrides

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

    def example_inputs(self) -> dict[str, Any]:
        """Returns keywords with which this model can be called, for ``opguard profile``."""
        name = type(self).__name__
        raise NotImplementedError(
            f"{name}.example_inputs: expected a method that returns the keywords of a call, the "
            f"class has none; define it, such as: return {{'input_raw': ...}}"
        )

    # Calling

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on ``input_raw`` under guard and returns what ``_postprocess`` makes.

        Raises:
            TypeError: an unknown or missing keyword, or a class that is not callable.
        """
        routes, given = self._routes, kwargs.keys()
        fits = routes.accepted is None or given <= routes.accepted
        if args or not (fits and given >= routes.required and self.IS_CALLABLE):
            raise self._refusal(args, kwargs)
        handled = sys.exception()
        before = None
        try:
            self._join()
            try:
                if self._records:
                    before = self._note_before(kwargs)
                result = self._guarded(kwargs) if self._pooled is None else self._in_pool(kwargs)
            except BaseException:
                self._leave_quietly()
                raise
            self._leave()
            return result
        except BaseException as error:
            self._scrub(error, handled)
            if os.environ.get("OPGUARD_REPRO_DIR"):
                self._write_bundle(kwargs, error, before)
            raise

    def _guarded(self, kwargs: dict[str, Any]) -> Any:
        # A frame of its own: the guard, which knows the model, is gone before the model is freed.
        settings, models = self._guarding
        with Guard(*settings):
            result = self._caller(**kwargs) if self._check is None else self._flagged(kwargs)
            if type(result) in UNFINISHED:
                raise self._unfinished(result)
        return detach_to_cpu(result, models=models) if self._detach else result

    def _in_pool(self, kwargs: dict[str, Any]) -> Any:
        """As `_guarded`, with the model where it runs, and again while idle models make room."""
        with self._pooled.lease():
            while True:
                handled = sys.exception()
                try:
                    return self._pooled.call(self._guarded, kwargs)
                except Exception as error:
                    self._scrub(error, handled)  # what the failed call held is free again
                    if not self._pooled.make_room(error):
                        raise

    def _flagged(self, kwargs: dict[str, Any]) -> Any:
        check = self._check
        with check.collect():
            result = self._caller(**kwargs)
            return result if type(result) in UNFINISHED else (result, check.flags)

    @staticmethod
    def _note_before(kwargs: dict[str, Any]) -> Any:
        from opguard._bundle import capture

        return capture(kwargs)

    def _write_bundle(self, kwargs: dict[str, Any], error: BaseException, before: Any) -> None:
        from opguard._bundle import write

        write(self, kwargs, error, before)

    def _unfinished(self, result: Any) -> TypeError:
        """Closes what would run after the call, without its guard, and load the model again."""
        with contextlib.suppress(Exception):
            result.close()  # a coroutine that is only dropped warns that nobody awaited it
        kind, way = type(result).__name__, "return list(...) of it"
        if kind not in ("generator", "map", "filter"):
            way = "write the steps with def, not async def"
        return TypeError(
            f"{type(self).__name__}(): expected the steps to return a finished answer, got a "
            f"{kind}, which would run after the call without its guard; {way}"
        )

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
        missing = self._routes.required - kwargs.keys()
        if missing and kwargs.keys() <= accepted:
            return TypeError(f"{name}(): expected {'=..., '.join(sorted(missing))}=..., got none")
        wrong = near_miss(kwargs.keys() - accepted, accepted)
        return TypeError(
            f"{name}(): expected keywords that a step names ({', '.join(sorted(accepted))}), "
            f"got {wrong}"
        )
