"""Who holds the model of an ``OpGuardBase``, and with that when it is loaded and freed.

``with`` blocks and running calls are counted as its users under one lock. The first user loads,
the last one frees, so that no thread frees under another. Whether it is loaded is a flag of its
own and never judged by an object's truth value.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch

from opguard._contract import HALF, Contract
from opguard._instances import not_made
from opguard.guards._base import _sanitize
from opguard.guards.calling import _call_settings
from opguard.guards.freeing import Releasing
from opguard.guards.loading import load_guard
from opguard.guards.locality import check_config

__all__ = ["Lifecycle"]


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


class Lifecycle(Contract):
    """Loads for the first user of the model and frees after the last."""

    # On the class, so that __del__ of a half-made instance finds them.
    _is_loading: bool = False
    _records: bool = False  # whether calls note what a repro bundle needs
    _users: int = 0
    _coming: int = 0
    _detector: Any = None
    _processor: Any = None
    _told: frozenset[str] | None = None  # names of what the constructor set
    _guarding: tuple[tuple[Any, ...], tuple[torch.nn.Module, ...]]
    _keep_warm: bool
    _sanitizes: bool = True
    _detach: bool
    _flags: bool = False
    _check: Any = None  # the checks on the loaded model, where flags are asked for
    _pool: bool = False
    _pooled: Any = None  # the loaded model's place in the pools, where it was asked for
    _lock: Any = not_made()
    _door: Any = not_made()
    _entries: list[tuple[int, BaseException | None]]
    _free_wanted: bool
    _extra_info: dict[str, Any] = not_made()
    _force_export_refresh: bool

    def _prepare(self) -> None:
        self._lock = threading.RLock()
        self._door = threading.Lock()
        self._entries = []
        self._free_wanted = False
        self._extra_info = {}

    # What a subclass overrides

    def _load_detector(self, **kwargs: Any) -> Any:
        """Returns the model, placed on ``self.device`` as ``self.dtype``.

        The default calls ``DETECTOR_TYPE.from_pretrained`` with the model id, the revision, the
        dtype, the variant, the device map, the quantization config and the locality, less
        ``FROM_PRETRAINED_SKIP_KWARGS``, plus ``FROM_PRETRAINED_ADDITIONAL_KWARGS`` and
        ``kwargs``; a ``DETECTOR_TYPE`` without ``from_pretrained`` gets the model id alone.
        """
        loader = getattr(self._detector_type, "from_pretrained", None)
        if loader is None:
            detector = self._detector_type(str(self.model_id), **kwargs)
        else:
            kwargs = self._from_pretrained_kwargs() | kwargs
            check_config(self._detector_type, str(self.model_id), kwargs)
            detector = loader(str(self.model_id), **kwargs)
        return self._place(detector)

    def _load_processor(self) -> Any:
        """Returns what the steps need beside the model (a tokenizer ...); None by default."""
        return None

    def _export_identity(self) -> Mapping[str, Any]:
        """Returns what changes the weights beside the class attributes and the settings.

        What a loader reads beside its source, such as a switch in ``os.environ``, which nobody
        else can see, or the digest of an adapter's file whose path it puts together: another
        value, and the export is made anew. Files that class attributes name are seen without it.
        The values are what JSON can hold.
        """
        return {}

    # Users

    def __enter__(self) -> Self:
        handled = sys.exception()
        try:
            self._join()
        except BaseException as error:
            self._scrub(error, handled)  # in this frame, or the traceback would keep its self
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
            if not self._entries:
                raise RuntimeError(
                    f"{type(self).__name__}.__exit__: expected a with block that was entered, "
                    "there is none; use with, or call __enter__ first"
                )
            here = threading.get_ident()
            mine = [i for i, entry in enumerate(self._entries) if entry[0] == here]
            _, handled = self._entries.pop(mine[-1] if mine else -1)
            if not self._entries:
                self._free_wanted = True
        self._leave_block(error, handled)

    def lazy_loader_context(self) -> Held:
        """A block in which the model is loaded; after it as after a call: freed, or kept warm.

        ``with model:`` frees at its end also what ``keep_warm`` would keep.
        """
        return Held(self)

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
        if self._is_loaded:  # the common case: nothing to wait for
            with self._lock:
                if self._is_loaded:
                    self._users += 1
                    return
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
            kept = self._keep_warm or self._coming or self._pooled is not None
            if not self._users and (self._free_wanted or not kept):
                self._free()

    def _leave_quietly(self) -> None:
        """Leaves while a failure is under way, which a failure to clean up must not hide."""
        with contextlib.suppress(Exception):
            self._leave()

    def _leave_block(self, error: BaseException | None, handled: BaseException | None) -> None:
        if error is None:
            self._leave()
        else:
            self._scrub(error, handled)
            self._leave_quietly()

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
        from opguard._exporting import Loading

        # Weights made in somebody's inference mode could never be part of a graph.
        with (
            torch.inference_mode(False),
            load_guard(
                device_list=self._chosen.device_list,
                local_files_only=self._local_files_only or self._only_load_export,
                sanitize_all_exceptions=self._sanitizes,
            ) as load,
        ):
            self._processor, self._detector = Loading(self, load).run()
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
        if self._flags:
            self._check = self._check_model()
        if self._pool:
            from opguard._pooled import Pooled

            self._pooled = Pooled(type(self).__name__, self._detector)
        self._records = bool(os.environ.get("OPGUARD_REPRO_DIR"))

    def _check_model(self) -> Any:
        """Puts checks on every module that the detector is, or is made of."""
        from opguard.flags.checking import check_parts

        check = check_parts(self._detector)
        if check is None:
            raise TypeError(
                f"{type(self).__name__}(flags=True): expected a detector that is a torch.nn.Module "
                f"or has some, got {type(self._detector).__name__}; leave flags out"
            )
        return check

    def _forget(self) -> None:
        if self._check is not None:
            self._check.remove()
            self._check = None
        if self._pooled is not None:
            self._pooled.close()
            self._pooled = None
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
    def extra_info(self) -> dict[str, Any]:
        """Free for the subclass's own use; emptied when the model is freed."""
        return self._extra_info


class Held:
    """Keeps a model loaded for a block, see ``lazy_loader_context``."""

    def __init__(self, owner: Lifecycle) -> None:
        self._owner = owner
        self._handled: list[BaseException | None] = []

    def __enter__(self) -> Any:
        handled = sys.exception()
        try:
            self._owner._join()
        except BaseException as error:
            self._owner._scrub(error, handled)
            raise
        self._handled.append(handled)
        return self._owner

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._handled:
            raise RuntimeError(
                "lazy_loader_context.__exit__: expected a block that was entered, there is none; "
                "use with, or call __enter__ first"
            )
        self._owner._leave_block(error, self._handled.pop())
