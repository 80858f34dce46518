"""What the flag ops do to fake tensors, under autograd and under vmap; imported with opguard.

The kernels are in csrc/torch. Registered here by ``Library.impl``, which costs 0.03 ms an op, a
tenth of ``register_fake``: ``import opguard`` has 10 ms for everything.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from opguard import _C

__all__ = ["LIBRARY"]

# bits 0-15 of a key are num_slots, 21-22 the carrier (csrc/core/slots.h).
CARRIERS = (torch.int64, torch.int32, torch.float64, torch.float32)
SLOTS_A_WORD = {torch.int64: 4, torch.int32: 2, torch.float64: 4, torch.float32: 2}


def _check_flags(flags: torch.Tensor) -> None:
    if flags.dim() != 2 or flags.dtype not in SLOTS_A_WORD:
        raise ValueError(
            "expected flags of shape (N, W) and int64, int32, float64 or float32, "
            f"got {flags.dim()} dimensions of {flags.dtype}; make flags with err.new"
        )


def _check_batch(flags: torch.Tensor, other: torch.Tensor, name: str) -> None:
    samples = other.shape[0] if other.dim() else 1
    # A batch whose size the data decides is known when the graph runs, and is checked then.
    torch._check_value(  # type: ignore[no-untyped-call]
        flags.shape[0] == samples,
        lambda: (
            f"expected {name} of {flags.shape[0]} samples as flags have, got {samples}; "
            "make flags for this batch"
        ),
    )


def _check_devices(name: str, args: tuple[Any, ...]) -> None:
    # A meta tensor beside real flags brings them here, where nothing writes into what is new.
    for arg in args:
        for each in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                raise ValueError(
                    f"expected all tensors of opguard::{name} on one device, got meta and"
                    f" {each.device}; move them to the device of the flags"
                )


def _fresh(flags: torch.Tensor) -> torch.Tensor:
    return flags.new_empty(flags.shape)


def _new(x: torch.Tensor, key: int) -> torch.Tensor:
    dtype = CARRIERS[key >> 21 & 3]
    words = -(-(key & 0xFFFF) // SLOTS_A_WORD[dtype])
    return x.new_empty((x.shape[0] if x.dim() else 1, words), dtype=dtype)


def _a_sample(flags: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    _check_flags(flags)
    return flags.new_empty((flags.shape[0],), dtype=dtype)


def _check(flags: torch.Tensor, x: torch.Tensor, *_: int) -> torch.Tensor:
    _check_flags(flags)
    _check_batch(flags, x, "x")
    return _fresh(flags)


def _check_in_place(flags: torch.Tensor, x: torch.Tensor, *_: int) -> None:
    _check_flags(flags)
    _check_batch(flags, x, "x")


def _check_new(x: torch.Tensor, location: int, checks: int, key: int) -> torch.Tensor:
    return _new(x, key)


def _index_new(ids: torch.Tensor, size: int, location: int, key: int) -> torch.Tensor:
    return _new(ids, key)


def _index_clamp(
    flags: torch.Tensor, ids: torch.Tensor, *_: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _check(flags, ids), ids.new_empty(ids.shape)


def _push_all(flags: torch.Tensor, *_: int) -> torch.Tensor:
    _check_flags(flags)
    return _fresh(flags)


def _push_all_in_place(flags: torch.Tensor, *_: int) -> None:
    _check_flags(flags)


def _merge_in_place(flags: torch.Tensor, other: torch.Tensor, key: int) -> None:
    _check_flags(other)
    _check_in_place(flags, other)
    ours = flags.shape[1] * SLOTS_A_WORD[flags.dtype]
    theirs = other.shape[1] * SLOTS_A_WORD[other.dtype]
    torch._check_value(  # type: ignore[no-untyped-call]
        ours == theirs,
        lambda: (
            f"expected flags of equally many slots to merge, got {ours} and {theirs}; "
            "make both with one num_slots"
        ),
    )


def _merge(flags: list[torch.Tensor], key: int) -> torch.Tensor:
    if not flags:
        raise ValueError("expected flags to merge, got none")
    _check_flags(flags[0])
    for other in flags[1:]:
        _merge_in_place(flags[0], other, key)
    return _fresh(flags[0])


def _gather(flags: torch.Tensor, index: torch.Tensor, key: int) -> torch.Tensor:
    _check_flags(flags)
    if index.dim() not in {1, 2} or index.dtype not in {torch.int64, torch.int32}:
        raise ValueError(
            "expected index of shape (M,) or (M, K) and int64 or int32, "
            f"got {index.dim()} dimensions of {index.dtype}"
        )
    return flags.new_empty((index.shape[0], flags.shape[1]))


def _find(flags: torch.Tensor, *_: int) -> torch.Tensor:
    return _a_sample(flags, torch.bool)


def _count(flags: torch.Tensor) -> torch.Tensor:
    return _a_sample(flags, torch.int32)


def _max_severity(flags: torch.Tensor) -> torch.Tensor:
    _check_flags(flags)
    wide = SLOTS_A_WORD[flags.dtype] == 4
    return _a_sample(flags, torch.int64 if wide else torch.int32)


def _findings(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0] if x.dim() else 1,), dtype=torch.uint8)


META = {
    "flags_check": _check,
    "flags_check_": _check_in_place,
    "flags_check_new": _check_new,
    "flags_index": _check,
    "flags_index_new": _index_new,
    "flags_index_clamp": _index_clamp,
    "flags_push": _check,
    "flags_push_": _check_in_place,
    "flags_push_all": _push_all,
    "flags_push_all_": _push_all_in_place,
    "flags_push_codes": _check,
    "flags_merge": _merge,
    "flags_merge_": _merge_in_place,
    "flags_gather": _gather,
    "flags_find": _find,
    "flags_ok": _find,
    "flags_err": _find,
    "flags_count": _count,
    "flags_max_severity": _max_severity,
    "flags_clear": _push_all,
    "row_findings": _findings,
}


def _batched(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        try:  # here, since vmap's helpers cost more than all of this module
            from opguard._flag_vmap import run
        except ImportError as error:
            raise RuntimeError(
                f"opguard::{name}: expected a torch whose vmap opguard knows, torch"
                f" {torch.__version__} is another ({error}); call it outside of vmap"
            ) from None
        return run(name, args)

    return run


def _fake(name: str) -> Callable[..., Any]:
    fake: Any = META[name]

    def run(*args: Any) -> Any:
        # Inductor asks here, with its lowerings loaded, before it lowers the op.
        if not _lowered and "torch._inductor.lowering" in sys.modules:
            _lowered.append(True)
            from opguard import _flag_lowering

            with contextlib.suppress(ImportError, AttributeError, TypeError):
                _flag_lowering.register()
        _check_devices(name, args)
        return fake(*args)

    return run


_lowered: list[bool] = []


def _register() -> Any:
    namespace: Any = torch.ops.opguard
    namespace.core = _C  # where code that Inductor generated finds the C functions
    library: Any = torch.library.Library  # untyped before torch 2.14
    library = library("opguard", "IMPL")
    for name in META:
        library.impl(name, _fake(name), "Meta")
        library.impl(name, _batched(name), "FuncTorchBatched")
        # Nothing here has a gradient. Float words would be given one, and keep the graph of what
        # made them (an x that requires grad, a checkpointed block) alive for as long as they live.
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return library


# Kept: when it goes, the kernels go.
LIBRARY = _register()
