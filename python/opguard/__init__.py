"""Guarded PyTorch inference: nothing leaks, not after an exception, an OOM, a Ctrl-C.

    with opguard.call_guard() as g:
        y = g(model, x)          # eval, no grad; y is detached, on the CPU, an ordinary tensor

Subclass :class:`OpGuardBase` to wrap a model once and for all. The guards, alone or composed:

- choosing: ``device_guard dtype_guard variant_guard quant_guard``, together ``init_guard``
- loading: ``local_guard eval_guard vram_guard cache_guard``, together ``load_guard``
- calling: ``eval_guard autocast_guard grad_guard vram_guard``, together ``call_guard``
- cleaning up: ``free_guard``; everything at once: ``model_guard``
- repeating: ``seed_guard deterministic_guard``
"""

from typing import TYPE_CHECKING, Any

from opguard import _runtime as _runtime  # first: a missing or old torch is one clear sentence
from opguard._ipython import load_ipython_extension, unload_ipython_extension
from opguard.base import OpGuardBase
from opguard.detaching import detach_to_cpu, register_detach
from opguard.guards.calling import (
    AwaitInsideGuardWarning,
    autocast_guard,
    call_guard,
    eval_guard,
    grad_guard,
    vram_guard,
)
from opguard.guards.freeing import free_guard, model_guard
from opguard.guards.initial import (
    device_guard,
    dtype_guard,
    init_guard,
    quant_guard,
    variant_guard,
)
from opguard.guards.loading import cache_guard, load_guard
from opguard.guards.locality import LocalFileMissing, local_guard
from opguard.guards.reproducible import deterministic_guard, seed_guard
from opguard.sanitizing import ObjectSummary, TensorSummary, sanitize_exception

if TYPE_CHECKING:
    from opguard.holders import who_holds

__version__ = "0.1.0"

__all__ = [
    "AwaitInsideGuardWarning",
    "LocalFileMissing",
    "ObjectSummary",
    "OpGuardBase",
    "TensorSummary",
    "autocast_guard",
    "cache_guard",
    "call_guard",
    "detach_to_cpu",
    "deterministic_guard",
    "device_guard",
    "dtype_guard",
    "eval_guard",
    "free_guard",
    "grad_guard",
    "init_guard",
    "load_guard",
    "load_ipython_extension",
    "local_guard",
    "model_guard",
    "quant_guard",
    "register_detach",
    "sanitize_exception",
    "seed_guard",
    "unload_ipython_extension",
    "variant_guard",
    "vram_guard",
    "who_holds",
]


def __getattr__(name: str) -> Any:
    # A seventh of the time that importing opguard takes, and few programs ask.
    if name == "who_holds":
        from opguard.holders import who_holds

        globals()[name] = who_holds
        return who_holds
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
