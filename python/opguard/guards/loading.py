"""Loads models under guard: off the network where asked, in eval mode, nothing left of a failure.

`load(loader, *args, **kwargs)` calls the loader and returns what it made. A loader is anything that
returns a model: `Model.from_pretrained`, a function, a processor's `from_pretrained` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from opguard.devices import DeviceLike
from opguard.guards._base import Guard
from opguard.guards.calling import _modules
from opguard.guards.freeing import Releasing
from opguard.guards.locality import (
    Naming,
    enter_local,
    is_local,
    is_offline,
    leave_local,
    missing_file,
)
from opguard.guards.quantizing import settle
from opguard.hub import LocalFileMissing

if TYPE_CHECKING:
    from opguard.guards import _exports

__all__ = ["Load", "cache_guard", "load_guard"]

Loader = Callable[..., Any]


def _check_loader(loader: object) -> Loader:
    if loader is None:
        raise TypeError(
            "load: expected a loader, got none; pass one as load(loader, ...) or loader_fn="
        )
    if isinstance(loader, torch.nn.Module) or not callable(loader):
        raise TypeError(
            "loader: expected a callable that returns a model, such as Model.from_pretrained, "
            f"got {type(loader).__name__}"
        )
    return loader


class Load:
    """Calls loaders by the settings of the guard that made it, inside that guard's block."""

    __slots__ = ("_detach", "_exports", "_kwargs", "_loader", "_open", "_train")

    def __init__(
        self,
        loader: Loader | None,
        kwargs: Mapping[str, Any] | None,
        exports: _exports.Settings,
        *,
        train: bool | None,
        detach: bool,
    ) -> None:
        self._loader = loader
        self._kwargs = dict(kwargs or {})
        self._exports = exports
        self._train = train
        self._detach = detach
        self._open = True

    def __call__(self, loader: Loader | None = None, /, *args: Any, **kwargs: Any) -> Any:
        """Returns what `loader(*args, **kwargs)` makes; without one, the guard's `loader_fn`."""
        if not self._open:
            raise RuntimeError("load: expected a call inside the guard's block, it has been left")
        chosen = _check_loader(self._loader if loader is None else loader)
        named = self._kwargs | kwargs
        if is_local() and getattr(chosen, "__name__", "") == "from_pretrained":
            # Some libraries look at this before they look at whether they are offline.
            named.setdefault("local_files_only", True)
        from opguard.guards import _exports

        loaded = _exports.load(chosen, args, named, self._exports)
        return self._finished(loaded)

    def _finished(self, loaded: Any) -> Any:
        settle(loaded)
        modules = _modules(loaded) or ()
        if self._train is not None:
            for module in modules:
                module.train(self._train)
        if self._detach and not modules and isinstance(loaded, torch.Tensor | dict | list | tuple):
            from opguard.detaching import detach_to_cpu

            return detach_to_cpu(loaded)
        return loaded

    def _close(self) -> None:
        self._open = False
        self._loader = None
        self._kwargs = {}


class cache_guard(Guard):
    """Enters to `load(loader, *args, **kwargs)`, which keeps an export of what was loaded.

    Without `base_export_name` nothing is kept: the loader is called. With it, a model that has
    `save_pretrained` is saved as safetensors in a folder of that name, written aside and renamed,
    with a readable `metadata.json`; the next load with the same loader, arguments, revision, source
    files and library versions reads that folder instead, and any other makes it anew.

    only_load_export: a missing or different export is an error. force_export_refresh: made anew.
    local_files_only_on_refresh: making it anew opens no connection.
    """

    def __init__(
        self,
        *,
        loader_fn: Loader | None = None,
        loader_params_obj: Any = None,
        loader_kwargs: Mapping[str, Any] | None = None,
        base_export_name: str | None = None,
        only_load_export: bool = False,
        force_export_refresh: bool = False,
        local_files_only_on_refresh: bool = False,
        use_safetensors: bool = True,
    ) -> None:
        from opguard.guards import _exports

        self._loader = loader_fn
        self._kwargs = _exports.parameters_of(loader_params_obj) | dict(loader_kwargs or {})
        self._exports = _exports.Settings(
            base_export_name,
            only_load_export,
            force_export_refresh,
            local_files_only_on_refresh,
            use_safetensors,
        )
        self._load: Load | None = None

    def _enter(self) -> Load:
        self._load = Load(self._loader, self._kwargs, self._exports, train=None, detach=False)
        return self._load

    def _exit(self, error: BaseException | None) -> None:
        if self._load is not None:
            self._load._close()


class load_guard(Naming, Releasing):
    """Enters to `load(loader, *args, **kwargs)`, which loads under guard and returns the model.

    The model comes back in eval mode (`train_mode=True`: in train mode) and stays so. With
    `local_files_only` nothing in the block reaches the network (see `local_guard`). What is missing
    is one sentence then, as it is under HF_HUB_OFFLINE, and always of a folder. When the block
    fails, nothing the loader made stays alive because of it; devices of `device_list` (None: all)
    are waited for and, where they hold less than before, their caches emptied.
    `garbage_collect_on_exception` collects cycles as well. The parameters of
    exports are `cache_guard`'s. `detach_outputs`: a loader that returns tensors and no module has
    them detached and brought to the cpu.
    """

    def __init__(
        self,
        *,
        loader_fn: Loader | None = None,
        device_list: Iterable[DeviceLike] | None = None,
        local_files_only: bool = False,
        train_mode: bool = False,
        loader_kwargs: Mapping[str, Any] | None = None,
        base_export_name: str | None = None,
        only_load_export: bool = False,
        force_export_refresh: bool = False,
        local_files_only_on_refresh: bool = False,
        use_safetensors: bool = True,
        sanitize_all_exceptions: bool = True,
        detach_outputs: bool = True,
        garbage_collect_on_exception: bool = False,
    ) -> None:
        from opguard.guards import _exports

        self._loader = loader_fn
        self._device_list = device_list
        self.local_files_only = bool(local_files_only)
        self.train_mode = bool(train_mode)
        self._kwargs = dict(loader_kwargs or {})
        self.sanitize_all_exceptions = bool(sanitize_all_exceptions)
        self.detach_outputs = bool(detach_outputs)
        self._collect = bool(garbage_collect_on_exception)
        self._exports = _exports.Settings(
            base_export_name,
            only_load_export,
            force_export_refresh,
            local_files_only_on_refresh,
            use_safetensors,
        )
        self._load: Load | None = None

    def _enter(self) -> Load:
        super()._enter()
        self._load = Load(
            self._loader,
            self._kwargs,
            self._exports,
            train=self.train_mode,
            detach=self.detach_outputs,
        )
        if self.local_files_only:
            enter_local()
        return self._load

    def _exit(self, error: BaseException | None) -> None:
        if self.local_files_only:
            leave_local()
        if self._load is not None:
            self._load._close()
        super()._exit(error)

    def _missing(self, error: BaseException | None) -> LocalFileMissing | None:
        if error is None:
            return None
        # Also where the user has turned the hub off, by HF_HUB_OFFLINE.
        return missing_file(error, folders_only=not (self.local_files_only or is_offline()))

    def _collects(self, error: BaseException | None) -> bool:
        return self._collect and error is not None
