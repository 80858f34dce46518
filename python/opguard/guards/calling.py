"""The guards around a call: eval, grad, autocast, memory, and all of them as `call_guard`.

Each is used three ways: ``with call_guard() as g:``, ``@call_guard()`` and ``@call_guard``. What
they return is a C object; the functions here are thin, so that torch.compile, which cannot trace a
C object, gets a Python guard that sets the same modes (and skips the sanitizing).
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypedDict, TypeVar, Unpack, cast, overload

import torch

from opguard import _C, devices

# Not used here: importing it tells the C side how tensors leave inference mode.
from opguard import detaching as _detaching  # noqa: F401
from opguard.devices import DeviceLike, DtypeLike, MemoryUse
from opguard.guards._decorate import decorate_with

__all__ = [
    "AwaitInsideGuardWarning",
    "autocast_guard",
    "call_guard",
    "eval_guard",
    "grad_guard",
    "vram_guard",
]

Guard = _C.Guard
Function = TypeVar("Function", bound=Callable[..., Any])

_CPU_ONLY = (torch.device("cpu"),)

_is_compiling = torch.compiler.is_compiling
_Module = torch.nn.Module

# What opguard._C.Guard takes first and second: see csrc/py/guards.h.
_AS_IS, _INFERENCE, _NO_GRAD, _GRAD = range(4)
_DETACH, _SANITIZE, _COLLECT_ON_EXCEPTION, _COLLECT_ON_SUCCESS, _TRAIN = 1, 2, 4, 8, 16


class AwaitInsideGuardWarning(RuntimeWarning):
    """A ``with`` of a guard held an ``await``, so other tasks ran under the guard's modes."""


class CallOptions(TypedDict, total=False):
    """The keywords of `call_guard`."""

    need_grads: bool
    inference: bool
    effective_dtype: DtypeLike | None
    device_list: Any
    sanitize_all_exceptions: bool
    detach_outputs: bool | None
    caller_fn: Callable[..., Any] | None
    models: Any
    train_mode: bool
    garbage_collect_on_exception: bool
    garbage_collect_on_success: bool
    on_oom: str | Callable[[BaseException], bool]
    keep: tuple[type[BaseException], ...]


def _call_settings(
    *,
    need_grads: bool = False,
    inference: bool = True,
    effective_dtype: DtypeLike | None = None,
    device_list: Any = None,
    sanitize_all_exceptions: bool = True,
    detach_outputs: bool | None = None,
    caller_fn: Callable[..., Any] | None = None,
    models: Any = None,
    train_mode: bool = False,
    garbage_collect_on_exception: bool = False,
    garbage_collect_on_success: bool = False,
    on_oom: str | Callable[[BaseException], bool] = "raise",
    keep: tuple[type[BaseException], ...] = (),
) -> tuple[Any, ...]:
    detach = not need_grads if detach_outputs is None else detach_outputs
    flags = (
        (_DETACH if detach else 0)
        | (_SANITIZE if sanitize_all_exceptions else 0)
        | (_COLLECT_ON_EXCEPTION if garbage_collect_on_exception else 0)
        | (_COLLECT_ON_SUCCESS if garbage_collect_on_success else 0)
        | (_TRAIN if train_mode else 0)
    )
    if caller_fn is not None and not callable(caller_fn):
        raise TypeError(
            f"caller_fn: expected a callable or None, got {type(caller_fn).__name__}; "
            f"pass what g(...) is to call"
        )
    if isinstance(models, str | bytes | int | float | torch.Tensor):
        raise TypeError(
            f"models: expected a module or a container of modules, got {type(models).__name__}; "
            f"pass models=model or models=(a, b)"
        )
    roots = _modules(models)
    return (
        _GRAD if need_grads else _INFERENCE if inference else _NO_GRAD,
        flags,
        roots,
        _autocast_arguments(effective_dtype, device_list, roots),
        _device_tuple(device_list),
        caller_fn,
        _on_oom(on_oom),
        _keep(keep),
    )


def _is_models(target: object) -> bool:
    return isinstance(target, torch.nn.Module | Mapping | list | tuple | set | frozenset)


def _finish(target: Any, options: Any, build: Callable[..., tuple[Any, ...]], models: str) -> Any:
    """The guard that ``options`` ask for, or ``target`` decorated by it."""
    if target is None:
        settings = build(**options)
    elif _is_models(target):
        settings = build(**{models: target}, **options)
    elif callable(target):
        return _finish(None, options, build, models)(target)
    else:
        raise TypeError(
            f"expected a function to decorate or models, got {type(target).__name__}; "
            f"pass options by name"
        )
    if _is_compiling():
        kind, flags, roots, autocast, _, caller, _, _ = settings
        return _traced_guard((*_traced_choices(kind, flags), roots, caller), autocast)
    return Guard(*settings)


@overload
def call_guard(target: Function, /) -> Function: ...
@overload
def call_guard(target: Any = None, /, **options: Unpack[CallOptions]) -> Any: ...
def call_guard(target: Any = None, /, **options: Any) -> Any:
    """Guards a call: modes, detached results, sanitized exceptions; ``with call_guard() as g:``.

    Inside, ``g(model, *args, **kwargs)`` runs the model in eval mode and returns what it gave,
    detached and on the cpu; ``g(value)`` detaches ``value``; ``g.memory[device]`` tells ``before``,
    ``peak`` and ``after`` in bytes (from entry where ``device_list`` is given, else from the first
    ``g(...)``). As a decorator, the guard detaches what the function returns or yields.

    Keywords, all optional:
        need_grads: grad on, also inside an outer inference mode; nothing is detached then unless
            ``detach_outputs=True``. Else inference mode, or no_grad with ``inference=False``.
        effective_dtype: autocast to it (None or float32: no autocast).
        device_list: the devices to measure, and to wait for and empty after a failure; None: all.
        models: modules, alone or in containers, kept in eval (``train_mode=True``: train) and put
            back one by one at the exit.
        detach_outputs, caller_fn: whether results are detached; what ``g(...)`` calls.
        sanitize_all_exceptions, keep: whether exceptions lose what they hold; which types do not.
        garbage_collect_on_exception, garbage_collect_on_success: run the collector at exit.
        on_oom: out of memory in ``g(...)`` or in a decorated function: "raise"; "retry", once,
            after freeing; "evict", after the least valuable idle models of `opguard.pools` were
            freed, as long as there are some; or a function of the exception, True: try again.

    Raises RuntimeError when another thread's guard holds a module in the other mode.
    """
    if _is_compiling():
        return _finish(target, options, _call_settings, "models")
    if target is None and not options:
        return Guard()
    # The two most common uses are not to pay for the parsing of the others.
    if target is None and len(options) == 1 and isinstance(options.get("models"), _Module):
        return _one_model(options["models"])
    return _finish(target, options, _call_settings, "models")


def _one_model(model: torch.nn.Module) -> Any:
    return Guard(_INFERENCE, _DETACH | _SANITIZE, (model,), None, None, None, None, None)


def grad_guard(
    target: Any = None,
    /,
    *,
    need_grads: bool = False,
    inference: bool = True,
    sanitize_all_exceptions: bool = True,
) -> Any:
    """Inference mode (``inference=False``: no_grad); with ``need_grads`` grad, wherever it is.

    Nothing is detached: what is made inside inference mode stays an inference tensor.
    """
    options = {
        "need_grads": need_grads,
        "inference": inference,
        "sanitize_all_exceptions": sanitize_all_exceptions,
        "detach_outputs": False,
    }
    return _finish(target, options, _call_settings, "models")


def eval_guard(
    target: Any = None,
    /,
    *,
    models_or_loader: Any = None,
    train_mode: bool = False,
    sanitize_all_exceptions: bool = True,
) -> Any:
    """Keeps modules in eval (``train_mode=True``: train) and puts each back as it was.

    ``models_or_loader`` is a module, a container of modules (what is none is passed over), or a
    loader: then ``g(...)`` calls it and sets what it returns.
    """
    loader = models_or_loader
    if loader is None or _is_models(loader) or _components(loader) is not None:
        caller, models = None, loader
    elif callable(loader):
        caller, models = functools.partial(_load_in_mode, loader, train_mode), None
    else:
        caller, models = None, loader
    options = {
        "train_mode": train_mode,
        "sanitize_all_exceptions": sanitize_all_exceptions,
        "detach_outputs": False,
        "caller_fn": caller,
    }
    if models is not None:
        options["models"] = models
    return _finish(target, options, _as_is_settings, "models")


def autocast_guard(
    target: Any = None,
    /,
    *,
    dtype: DtypeLike | None = None,
    enabled_override: bool | None = None,
    device_list: Any = None,
    sanitize_all_exceptions: bool = True,
) -> Any:
    """Autocasts to ``dtype`` on the device type of ``device_list`` (None: the best device).

    None is the dtype torch autocasts to there; float32 is no autocast. ``enabled_override`` has
    the last word.
    """
    device_type = _device_type(device_list, None)
    wanted = (
        torch.get_autocast_dtype(device_type) if dtype is None else devices.normalize_dtype(dtype)
    )
    enabled = wanted is not torch.float32 if enabled_override is None else enabled_override
    options = {
        "effective_dtype": wanted if enabled else None,
        "device_list": device_list,
        "sanitize_all_exceptions": sanitize_all_exceptions,
        "detach_outputs": False,
    }
    return _finish(target, options, _as_is_settings, "models")


def vram_guard(
    target: Any = None,
    /,
    *,
    device_list: Any = None,
    sanitize_all_exceptions: bool = True,
    detach_outputs: bool = True,
    caller_fn: Callable[..., Any] | None = None,
    garbage_collect_on_exception: bool = False,
    garbage_collect_on_success: bool = False,
    on_oom: str | Callable[[BaseException], bool] = "raise",
    keep: tuple[type[BaseException], ...] = (),
) -> Any:
    """Detached results, sanitized exceptions, memory given back after a failure; no modes.

    ``g(...)`` calls ``caller_fn`` where there is one, and else as in `call_guard`.
    """
    options = {
        "device_list": device_list,
        "sanitize_all_exceptions": sanitize_all_exceptions,
        "detach_outputs": detach_outputs,
        "caller_fn": caller_fn,
        "garbage_collect_on_exception": garbage_collect_on_exception,
        "garbage_collect_on_success": garbage_collect_on_success,
        "on_oom": on_oom,
        "keep": keep,
    }
    return _finish(target, options, _as_is_settings, "models")


def _as_is_settings(**options: Any) -> tuple[Any, ...]:
    return (_AS_IS, *_call_settings(**options)[1:])


_call_settings.__qualname__ = "call_guard"
call_guard.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("target", inspect.Parameter.POSITIONAL_ONLY, default=None),
        *inspect.signature(_call_settings).parameters.values(),
    ]
)


# --- settings -------------------------------------------------------------------------------------


def _components(value: object) -> Mapping[str, Any] | None:
    """The parts of a diffusers pipeline, which is no module itself."""
    found = getattr(value, "components", None)
    return found if isinstance(found, Mapping) else None


def _modules(models: Any) -> tuple[torch.nn.Module, ...] | None:
    """The modules in ``models``, in order, each once; None where there is none.

    Tokenizers, processors and whatever else has no train and eval mode of torch's are passed over.
    """
    if models is None:
        return None
    if isinstance(models, torch.nn.Module):
        return (models,)
    found: dict[int, torch.nn.Module] = {}
    seen: set[int] = set()

    def visit(value: Any) -> Iterator[Any]:
        if isinstance(value, torch.nn.Module):
            found.setdefault(id(value), value)
        elif isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            yield from value
        else:
            yield from (_components(value) or {}).values()

    pending = [models]
    while pending:
        value = pending.pop()
        if id(value) not in seen:
            seen.add(id(value))
            pending += reversed(list(visit(value)))
    return tuple(found.values()) or None


def _load_in_mode(loader: Callable[..., Any], mode: bool, *args: Any, **kwargs: Any) -> Any:
    loaded = loader(*args, **kwargs)
    for module in _modules(loaded) or ():
        module.train(mode)
    return loaded


def _device_tuple(device_list: Any) -> tuple[torch.device, ...] | None:
    if device_list is None:
        return None
    return _CPU_ONLY if device_list == "cpu" else tuple(devices.normalize_devices(device_list))


def _device_type(device_list: Any, roots: tuple[torch.nn.Module, ...] | None) -> str:
    if device_list == "cpu":
        return "cpu"
    if device_list is not None:
        kinds = [device.type for device in devices.normalize_devices(device_list)]
        return next((kind for kind in kinds if kind != "cpu"), "cpu")
    for root in roots or ():
        for parameter in root.parameters():
            if parameter.device.type != "meta":
                return parameter.device.type
    return devices.best_device().type


def _autocast_arguments(
    dtype: DtypeLike | None, device_list: Any, roots: tuple[torch.nn.Module, ...] | None
) -> tuple[str, torch.dtype] | None:
    if dtype is None:
        return None
    wanted = devices.normalize_dtype(dtype)
    if wanted is torch.float32:
        return None
    if wanted not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"effective_dtype: expected float16, bfloat16 or float32 to autocast to, got {wanted}; "
            f"convert the model instead"
        )
    return _device_type(device_list, roots), wanted


def _on_oom(wanted: Any) -> Any:
    if wanted == "raise":
        return None
    if wanted == "retry":
        return True
    if wanted == "evict":
        return _evict
    if callable(wanted):
        return wanted
    raise ValueError(
        'on_oom: expected "raise", "retry", "evict" or a function of the exception, got '
        f"{wanted!r:.80}"
    )


def _evict(error: BaseException) -> bool:
    from opguard.pools.oom import make_room

    return make_room(error)


def _keep(kinds: Any) -> tuple[type[BaseException], ...] | None:
    given = kinds if isinstance(kinds, tuple | list | set | frozenset) else (kinds,)
    for kind in given:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError(
                f"keep: expected exception types, got {kind!r:.80}; write keep=(ValueError,)"
            )
    return tuple(given) or None


# --- what the C side asks of Python ---------------------------------------------------------------


class _Autocast:
    """Autocast for one device type, which a suspended body's own autocasts survive."""

    __slots__ = ("_before", "_depth", "_device", "_dtype", "_outer", "_own")

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._outer: int | None = None
        self._depth = 0
        self._before = self._own = (False, dtype, False)

    def _read(self) -> tuple[bool, torch.dtype, bool]:
        return (
            torch.is_autocast_enabled(self._device),
            torch.get_autocast_dtype(self._device),
            torch.is_autocast_cache_enabled(),
        )

    def _write(self, state: tuple[bool, torch.dtype, bool]) -> None:
        torch.set_autocast_enabled(self._device, state[0])
        torch.set_autocast_dtype(self._device, state[1])
        torch.set_autocast_cache_enabled(state[2])

    def enter(self) -> None:
        self._before = self._read()
        self._outer = torch.autocast_increment_nesting() - 1
        self._write((True, self._dtype, self._before[2]))

    def leave(self) -> None:
        if self._outer is not None:
            self._unwind()

    def suspend(self) -> None:
        self._own = self._read()
        self._depth = self._unwind()

    def resume(self) -> None:
        self._before = self._read()
        self._outer = torch.autocast_increment_nesting() - 1
        for _ in range(self._depth - 1):
            torch.autocast_increment_nesting()
        self._write(self._own)

    def _unwind(self) -> int:
        """Back to the depth and the state before; returns how deep this was."""
        outer, self._outer = self._outer, None
        depth = 1
        while (now := torch.autocast_decrement_nesting()) > cast(int, outer):
            depth += 1
        if now == 0:
            torch.clear_autocast_cache()
        self._write(self._before)
        return depth


class _Memory(Mapping[DeviceLike, MemoryUse]):
    """What each device held, measured from when this is made until ``finish``."""

    __slots__ = ("_before", "_done")

    def __init__(self, wanted: tuple[torch.device, ...] | None) -> None:
        if wanted is None:
            best = devices.best_device()
            wanted = _CPU_ONLY if best.type == "cpu" else (best, *_CPU_ONLY)
        if wanted != _CPU_ONLY:
            devices.reset_memory_peak(wanted)
        self._before = {device: devices.memory_now(device) for device in wanted}
        self._done: dict[torch.device, tuple[int, int]] | None = None

    def _now(self, device: torch.device) -> tuple[int, int]:
        """The peak and the bytes held; cheap for the cpu, which every guarded call pays."""
        after = devices.memory_now(device)
        if device.type == "cpu":
            return max(after, devices._resident_peak()), after
        return devices.memory_peak(device), after

    def finish(self) -> None:
        self._done = {device: self._now(device) for device in self._before}

    def __getitem__(self, device: DeviceLike) -> MemoryUse:
        where = devices.normalize_device(device)
        if where not in self._before:
            raise KeyError(
                f"memory: expected one of {[str(one) for one in self._before]}, got {where}; "
                f"name it in device_list"
            )
        peak, after = self._now(where) if self._done is None else self._done[where]
        return MemoryUse(self._before[where], peak, after)

    def __iter__(self) -> Iterator[DeviceLike]:
        return iter(self._before)

    def __len__(self) -> int:
        return len(self._before)

    def __repr__(self) -> str:
        return repr({str(device): self[device] for device in self._before})


def _release(wanted: tuple[torch.device, ...] | None, collect: bool) -> None:
    """After a failure: waits for the devices, collects if asked, empties caches that hold memory.

    What the failed call held lies in the allocator's cache by now; a device whose cache is empty
    has nothing to give back.
    """
    chosen = devices.list_devices() if wanted is None else list(wanted)
    # A device whose queue ended in an error raises it here again: the user has it already.
    with suppress(Exception):
        devices.synchronize(chosen)
    if collect:
        gc.collect()
    with suppress(Exception):
        released = [device for device in chosen if devices.memory_cached(device) > 0]
        if released:
            devices.empty_cache(released)


def _is_oom(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _decorate(guard: Any, function: Any) -> Any:
    if not callable(function) and not isinstance(function, classmethod | staticmethod):
        raise TypeError(
            f"expected the guard to be entered by `with` before it is given a "
            f"{type(function).__name__}, it is not; enter it, or pass a function to be decorated"
        )
    return decorate_with(
        function,
        run=functools.partial(guard.run, function),
        step=guard.step,
        traced=_traced_run(function, guard.settings),
        again=lambda: guard,
    )


# --- inside torch.compile -------------------------------------------------------------------------


def _traced_run(function: Any, settings: tuple[Any, ...]) -> Callable[..., Any]:
    kind, flags, roots, autocast, caller = settings
    grad, train, detach = _traced_choices(kind, flags)

    def traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _traced_guard((grad, train, detach, roots, caller), autocast):
            value = function(*args, **kwargs)
        return _traced_detach(value) if detach else value

    return traced


def _traced_choices(kind: int, flags: int) -> tuple[bool | None, bool, bool]:
    """Grad on (None: as it is), train mode, and whether results are detached.

    No numbers: where guards of two kinds decorate, Dynamo takes a number for a symbol.
    """
    return None if kind == _AS_IS else kind == _GRAD, bool(flags & _TRAIN), bool(flags & _DETACH)


def _traced_detach(value: Any) -> Any:
    from torch.utils import _pytree

    return _pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.detach().cpu(), value)


class _TracedGuard:
    """A guard that torch.compile can trace: the modes alone, set by plain Python.

    Inference mode is no_grad here: a graph computes the same under both, and its results are
    ordinary tensors at once.
    """

    def __init__(self, settings: tuple[Any, ...]) -> None:
        self.grad, self.train, self.detach, self.models, self.caller = settings
        self.before = True
        self.modes: list[Any] = []

    def __enter__(self) -> Any:
        self.before = torch.is_grad_enabled()
        if self.grad is not None:
            torch._C._set_grad_enabled(self.grad)
        self.modes = _traced_switch(self.models or (), self.train)
        return self

    def __exit__(self, *error: Any) -> None:
        _traced_put_back(self.modes)
        if self.grad is not None:
            torch._C._set_grad_enabled(self.before)

    def __call__(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        if self.caller is not None:
            value = self.caller(first, *args, **kwargs)
        elif isinstance(first, torch.nn.Module):
            modes = _traced_switch((first,), self.train)
            value = first(*args, **kwargs)
            _traced_put_back(modes)
        elif callable(first):
            value = first(*args, **kwargs)
        else:
            return _traced_detach(first)
        return _traced_detach(value) if self.detach else value


def _traced_guard(settings: tuple[Any, ...], autocast: tuple[str, torch.dtype] | None) -> Any:
    guard = _TracedGuard(settings)
    return guard if autocast is None else _traced_autocast(guard, *autocast)


@contextmanager
def _traced_autocast(guard: _TracedGuard, device: str, dtype: torch.dtype) -> Iterator[Any]:
    # Dynamo traces autocast as a `with` alone, and not when it is entered by its methods.
    with guard, torch.autocast(device, dtype):
        yield guard


def _traced_switch(models: Any, mode: bool) -> list[Any]:
    changed = []
    for model in models:
        for module in model.modules():
            if module.training != mode:
                changed.append(module)
                module.training = mode
    return changed


def _traced_put_back(changed: list[Any]) -> None:
    for module in changed:
        module.training = not module.training


_C.bind_guards(
    inference_type=torch._C._InferenceMode,
    is_inference=torch.is_inference_mode_enabled,
    set_grad=torch._C._set_grad_enabled,
    is_grad=torch.is_grad_enabled,
    module_type=torch.nn.Module,
    module_train=torch.nn.Module.train,
    autocast=_Autocast,
    decorate=_decorate,
    release=_release,
    measure=_Memory,
    is_oom=_is_oom,
    await_warning=AwaitInsideGuardWarning,
)
