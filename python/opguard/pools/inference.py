"""How much memory a call takes beside the weights: measured once for each shape, then known.

A flat guess is wrong for every model but one: too large and models are evicted for nothing, too
small and a call runs out of memory with its weights already there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from opguard.pools._budgets import parse_bytes

if TYPE_CHECKING:
    from opguard.pools.management import Management

__all__ = ["Estimator", "InferenceMemory", "measure_peak"]

Estimator = int | str | Callable[..., int] | None

# Shapes remembered for one model; a server that sees more starts to forget the oldest.
REMEMBERED = 1024
# Values of plain arguments (a step's number, a seed) measured for tensors of the same shapes. After
# that the largest stands for all: most such values change nothing.
VARIANTS = 16


def measure_peak(
    function: Callable[..., Any], *args: Any, device: torch.device, **kwargs: Any
) -> tuple[Any, int | None]:
    """Returns (what ``function(*args, **kwargs)`` returned, the most bytes it held at once).

    On an accelerator these are the bytes of torch's caching allocator, whose peak statistics this
    resets. On the CPU each allocation that torch makes in the calling thread, or in threads it
    hands work to, is counted. None where nothing could be measured: somebody's profiler runs, or
    this torch has no way to ask.
    """
    if device.type == "cpu":
        return _on_cpu(function, args, kwargs)
    backend = getattr(torch, device.type, None)
    if backend is None or not hasattr(backend, "reset_peak_memory_stats"):
        return function(*args, **kwargs), None
    backend.reset_peak_memory_stats(device)
    before = backend.memory_allocated(device)
    result = function(*args, **kwargs)
    return result, max(0, backend.max_memory_allocated(device) - before)


def _on_cpu(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, int | None]:
    stop = _start_counting()
    if stop is None:
        return function(*args, **kwargs), None
    try:
        result = function(*args, **kwargs)
    finally:
        sizes = stop()
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return result, peak


def _start_counting() -> Callable[[], list[int]] | None:
    """Begins to note allocations; what it returns ends that and gives sizes, frees negative.

    By torch's old profiler: the one beside it starts a tracer of its own that takes a second and
    writes to the terminal.
    """
    autograd: Any = torch.autograd
    try:
        config = autograd.ProfilerConfig(
            autograd.ProfilerState.CPU,
            False,  # shapes
            True,  # memory
            False,  # stacks
            False,  # flops
            False,  # modules
            torch._C._profiler._ExperimentalConfig(),
        )
        autograd._enable_profiler_legacy(config)
    except (AttributeError, TypeError, RuntimeError):
        return None

    def stop() -> list[int]:
        events = autograd._disable_profiler_legacy()
        return [
            event.cpu_memory_usage()
            for thread in events
            for event in thread
            if event.kind() == "memory_alloc"
        ]

    return stop


class InferenceMemory:
    """What calls of one model take beside its weights, by the shapes of their inputs.

    Args:
        estimator: None measures the first call of each shape; bytes (an int, or text such as
            ``"64MiB"``) are taken as they are; a function is called as
            ``estimator(model, *args, **kwargs)`` and returns bytes.
    """

    def __init__(self, estimator: Estimator = None) -> None:
        self._fixed = (
            parse_bytes(estimator, what="the memory of a call")
            if isinstance(estimator, int | str)
            else None
        )
        self._function = estimator if callable(estimator) else None
        self._known: dict[Hashable, dict[Hashable, int]] = {}
        self._lock = threading.RLock()  # a finalizer may call the model

    @property
    def largest(self) -> int:
        """The most bytes that a call was known to take, 0 before any."""
        with self._lock:
            return max(
                (nbytes for variants in self._known.values() for nbytes in variants.values()),
                default=self._fixed or 0,
            )

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        management: Management,
        device: torch.device,
        model: Any = None,
    ) -> Any:
        """Returns ``function(*args, **kwargs)``, its memory taken from the device's pool meanwhile.

        The first call of a shape is measured and takes nothing from the pool.

        Raises:
            PoolRefused: where the pool cannot give that much beside the weights.
        """
        nbytes = self.estimate(model, args, kwargs)
        if nbytes is None:
            result, peak = measure_peak(function, *args, device=device, **kwargs)
            if peak is not None:
                self.learn(args, kwargs, peak)
            return result
        if nbytes == 0:
            return function(*args, **kwargs)
        reserved = management.reserve(str(device), nbytes)
        try:
            return function(*args, **kwargs)
        finally:
            management.release(reserved)

    def estimate(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """Bytes that this call will take, None when its shape has not been seen."""
        if self._fixed is not None:
            return self._fixed
        if self._function is not None:
            return parse_bytes(self._function(model, *args, **kwargs), what="the memory of a call")
        tensors, plain = _keys(args, kwargs)
        with self._lock:
            variants = self._known.get(tensors, {})
            if len(variants) >= VARIANTS:
                return variants.get(plain, max(variants.values()))
            return variants.get(plain)

    def learn(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], nbytes: int) -> None:
        """Remembers what a call of this shape took; the larger of two measurements stays."""
        tensors, plain = _keys(args, kwargs)
        with self._lock:
            variants = self._known.setdefault(tensors, {})
            if plain in variants or len(variants) < VARIANTS:
                variants[plain] = max(nbytes, variants.get(plain, 0))
            while len(self._known) > REMEMBERED:
                del self._known[next(iter(self._known))]


def _keys(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Hashable, Hashable]:
    """What decides how much memory a call takes: (shapes, dtypes and modes, plain arguments)."""
    tensors: list[Hashable] = [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")]
    plain: list[Hashable] = []
    pending: list[tuple[Any, int]] = [(kwargs, 0), (args, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, torch.Tensor):
            tensors.append((tuple(value.shape), value.dtype, value.device))
        elif value is None or isinstance(value, bool | int | float | str):
            plain.append(value)
        elif depth < 8 and isinstance(value, Mapping):
            names = sorted(value, key=str)
            plain.append(tuple(map(str, names)))
            pending += ((value[name], depth + 1) for name in reversed(names))
        elif depth < 8 and isinstance(value, list | tuple):
            tensors.append(len(value))
            pending += ((item, depth + 1) for item in reversed(value))
        else:
            shape = getattr(value, "shape", None)
            tensors.append((type(value), tuple(shape) if isinstance(shape, tuple) else None))
    return tuple(tensors), tuple(plain)
