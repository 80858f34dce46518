"""Where the time of a guarded call goes: ``opguard profile CLASS``, on torch.profiler.

What is measured: the calls as a user makes them, with the model loaded; the same steps without the
guard (in inference mode or with gradients, as the class says); and which operators took the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from opguard._sizes import readable
from opguard.base import OpGuardBase
from opguard.hub import LocalFileMissing

__all__ = ["Profile", "main", "profile"]

TOP = 12


@dataclass(frozen=True)
class Profile:
    """Times are medians in seconds, memory is in bytes."""

    name: str
    device: str
    dtype: str
    calls: int
    load: float  # making the model ready, once
    call: float  # a guarded call
    bare: float | None  # the same steps without the guard; None where they failed
    peak: int | None  # most memory of the accelerator in a call; None on the cpu
    weights: int  # of the model's parameters and buffers
    trace: str | None  # file with the timeline
    operators: list[dict[str, Any]] = field(default_factory=list)

    @property
    def overhead(self) -> float | None:
        """Seconds that the guard adds to a call, None where that is not known."""
        return None if self.bare is None else self.call - self.bare

    def as_text(self) -> str:
        """Lines for a terminal."""
        rows = [
            ("model", f"{self.name} on {self.device} as {self.dtype}, {readable(self.weights)}"),
            ("load", _time(self.load)),
            ("call", f"{_time(self.call)} (median of {self.calls})"),
        ]
        if self.bare is not None and self.overhead is not None:
            rows.append(("bare", f"{_time(self.bare)}, so the guard adds {_time(self.overhead)}"))
        if self.peak is not None:
            rows.append(("peak", f"{readable(self.peak)} of {self.device}"))
        if self.trace is not None:
            rows.append(("trace", f"{self.trace} (open it in ui.perfetto.dev)"))
        lines = [f"{name:<6} {text}" for name, text in rows]
        lines += ["", f"{'operator':<44}{'calls':>8}{'own time':>12}{'share':>8}"]
        whole = sum(row["seconds"] for row in self.operators) or 1.0
        for row in self.operators[:TOP]:
            share = f"{row['seconds'] / whole:.0%}"
            own = _time(row["seconds"])
            lines.append(f"{row['operator'][:43]:<44}{row['calls']:>8}{own:>12}{share:>8}")
        return "\n".join(lines)


def _time(seconds: float) -> str:
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if abs(seconds) < 1 else f"{seconds:.2f} s"


def _synchronized(device: torch.device) -> Callable[[], None]:
    """What waits for ``device``; nothing where it works as it is told."""
    if device.type in ("cpu", "meta"):
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def _median(call: Callable[[], Any], calls: int, wait: Callable[[], None]) -> float:
    times = []
    for _ in range(calls):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _bare(model: Any, kwargs: dict[str, Any]) -> Callable[[], Any]:
    """The steps of a call without its guard, as a user would write them."""

    def call() -> Any:
        with torch.enable_grad() if model.NEED_GRADS else torch.inference_mode():
            return model._caller(**kwargs)

    return call


def _weights(model: Any) -> int:
    """Bytes of the parameters and buffers of every module in the detector."""
    detector = model.detector
    parts = getattr(detector, "components", None)
    found = [detector, *(parts.values() if isinstance(parts, dict) else ())]
    tensors = {
        id(tensor): tensor
        for part in found
        if isinstance(part, torch.nn.Module)
        for tensor in (*part.parameters(), *part.buffers())
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _operators(
    model: Any, kwargs: dict[str, Any], calls: int, trace: str | None
) -> list[dict[str, Any]]:
    from torch.profiler import ProfilerActivity, supported_activities
    from torch.profiler import profile as recording

    wanted = {ProfilerActivity.CPU}
    if model.device.type != "cpu":
        wanted |= set(supported_activities()) & {  # type: ignore[no-untyped-call]
            ProfilerActivity.CUDA,
            ProfilerActivity.XPU,
        }
    with recording(activities=sorted(wanted, key=str), acc_events=True) as events:
        for _ in range(calls):
            model(**kwargs)
    if trace is not None:
        events.export_chrome_trace(trace)
    rows = []
    for event in events.key_averages():
        on_device = getattr(event, "self_device_time_total", 0) or 0
        microseconds = on_device if len(wanted) > 1 else event.self_cpu_time_total
        row = {"operator": event.key, "calls": event.count, "seconds": microseconds * 1e-6}
        if microseconds > 0:
            rows.append(row)
    return sorted(rows, key=lambda row: -row["seconds"])


def profile(obj: Any, calls: int = 10, *, trace: str | None = None, **kwargs: Any) -> Profile:
    """Profiles calls of an OpGuardBase instance with ``kwargs``.

    Args:
        obj: the instance; it is loaded for as long as this takes, and freed as it would be.
        calls: how many calls each figure comes from, at least 1.
        trace: path of a file to write the timeline of the calls to, as JSON.
        kwargs: keywords of the call; without any, ``obj.example_inputs()`` gives them.

    Raises:
        ValueError: ``calls`` is below 1.
        NotImplementedError: no keywords, and the class has no ``example_inputs``.
    """
    if calls < 1:
        raise ValueError(f"profile: expected at least 1 call, got {calls}; give calls=10")
    if not kwargs and type(obj).example_inputs is OpGuardBase.example_inputs:
        obj.example_inputs()  # raises, before a model is loaded for nothing
    wait = _synchronized(obj.device)
    peak = None
    begin = time.perf_counter()
    with obj:
        wait()
        load = time.perf_counter() - begin
        kwargs = kwargs or obj.example_inputs()
        obj(**kwargs)  # what only the first call does is no part of the figures
        if obj.device.type not in ("cpu", "meta"):
            torch.accelerator.memory.reset_peak_memory_stats()
        call = _median(lambda: obj(**kwargs), calls, wait)
        if obj.device.type not in ("cpu", "meta"):
            peak = torch.accelerator.memory.max_memory_allocated(obj.device)
        bare = None
        with contextlib.suppress(Exception):
            # Steps that work under the guard alone (autocast, a device copy) have no bare time.
            bare = _median(_bare(obj, kwargs), calls, wait)
        return Profile(
            name=type(obj).__name__,
            device=str(obj.device),
            dtype=str(obj.dtype).removeprefix("torch."),
            calls=calls,
            load=load,
            call=call,
            bare=bare,
            peak=peak,
            weights=_weights(obj),
            trace=trace,
            operators=_operators(obj, kwargs, calls, trace),
        )


def main(
    class_name: str,
    *,
    calls: int = 10,
    input_file: str | None = None,
    trace: str | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> int:
    """``opguard profile``: returns 0, 1 where the model could not be run, 2 for wrong usage."""
    from opguard import repro
    from opguard.guards.locality import is_offline

    try:
        if calls < 1:
            raise ValueError(f"--calls: expected at least 1, got {calls}; leave it out for 10")
        if trace is not None and not os.path.isdir(os.path.dirname(trace) or "."):
            raise ValueError(f"--trace: expected a file in a folder that is there, got {trace!r}")
        kind = repro.load_class(class_name)
        bundle = repro.read(input_file) if input_file is not None else None
        settings = dict(bundle.settings) if bundle is not None else {}
        if bundle is not None and bundle.missing:
            raise ValueError(f"--input: expected every value of a call, got {bundle.missing[0]!r}")
    except (OSError, ValueError, ImportError) as error:
        return _failed(error, 2)
    if device is not None:
        settings["device_override"] = device
    if is_offline():
        settings["local_files_only"] = True  # a missing file is one sentence with its command then
    kwargs = bundle.kwargs if bundle is not None else {}
    try:
        with repro.importable(class_name):
            positional = bundle.positional if bundle is not None else ()
            found = profile(kind(*positional, **settings), calls, trace=trace, **kwargs)
    except Exception as error:
        return _failed(_missing(kind, settings) or error if _may_miss(error) else error, 1)
    shown = asdict(found) | {"overhead": found.overhead}
    print(json.dumps(shown, indent=2) if as_json else found.as_text())
    return 0


def _may_miss(error: Exception) -> bool:
    return isinstance(error, OSError) and not isinstance(error, LocalFileMissing)


def _missing(kind: Any, settings: dict[str, Any]) -> LocalFileMissing | None:
    """The sentence on a model that is not here and could not be fetched, with its command."""
    try:
        with kind(**settings | {"local_files_only": True}):
            return None
    except LocalFileMissing as missing:
        return missing
    except Exception:
        return None


def _failed(error: Exception, status: int) -> int:
    said = " ".join(str(error).split()) or type(error).__name__
    print(f"opguard profile: {said.removeprefix('profile: ')}", file=sys.stderr)
    return status
