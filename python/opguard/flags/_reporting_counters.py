"""Counters for Prometheus: what flags add up to over many calls."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from opguard.flags._boundary import boundary
from opguard.flags._reporting_found import Errors, flags_of, read
from opguard.flags.errors import FlagsError
from opguard.flags.locations import ErrorLocation

__all__ = ["FlagCounters"]

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_OWN = ("code", "severity", "module")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class FlagCounters:
    """Adds up the errors of many calls, for Prometheus to scrape. Thread-safe.

        counters = FlagCounters(labels={"model": "embedder"})
        check_model(model, on_flag=counters.add)   # or counters.add(c.flags) after a call
        counters.text()                            # what /metrics answers

    ``<namespace>_samples_total`` and ``<namespace>_bad_samples_total`` count the samples seen and
    those with an error, ``<namespace>_errors_total`` errors by the labels ``code``, ``severity``
    and ``module`` (the location's name). With prometheus_client installed,
    ``prometheus_client.REGISTRY.register(counters)`` publishes them beside a service's others.

    Args:
        namespace: what the names of the counters begin with.
        labels: more labels, the same on every line.

    Raises:
        FlagsError: a name that Prometheus does not take, or a label that is one of its own here.
    """

    def __init__(self, namespace: str = "opguard", labels: Mapping[str, str] | None = None) -> None:
        if not _NAME.fullmatch(namespace):
            raise FlagsError(
                "FlagCounters(namespace=...): expected a name of letters, digits, _ and : that"
                f" begins with no digit, got {namespace!r}"
            )
        self._namespace = namespace
        self._labels = {name: str(value) for name, value in (labels or {}).items()}
        for name in self._labels:
            if not _LABEL.fullmatch(name) or name in _OWN:
                raise FlagsError(
                    "FlagCounters(labels=...): expected names of letters, digits and _ other than"
                    f" {', '.join(_OWN)}, got {name!r}"
                )
        self._lock = threading.Lock()
        self._samples = 0
        self._bad = 0
        self._errors: dict[tuple[str, str, str], int] = {}

    @boundary
    def add(self, flags: Any) -> None:
        """Adds what one call found: flags, or an object with ``.flags`` such as a FlagEvent.

        Waits for the device once.
        """
        self._add(read(flags_of(flags)))

    def _add(self, errors: Errors) -> None:
        found = [
            # The place's own name: what a check says has values in it, each a label of its own.
            ((each.code_name, each.severity_name, ErrorLocation.name(each.location)), each.errors)
            for each in errors.findings()
        ]
        with self._lock:
            self._samples += errors.total
            self._bad += errors.bad
            for key, count in found:
                self._errors[key] = self._errors.get(key, 0) + count

    def _families(self) -> list[tuple[str, str, list[tuple[dict[str, str], int]]]]:
        """(name, help, [(labels, value)]) of each counter, in an order that never changes."""
        with self._lock:
            samples, bad, errors = self._samples, self._bad, sorted(self._errors.items())
        own = [(self._labels | dict(zip(_OWN, key, strict=True)), count) for key, count in errors]
        name = self._namespace
        return [
            (f"{name}_samples_total", "Samples whose flags were read.", [(self._labels, samples)]),
            (
                f"{name}_bad_samples_total",
                "Samples with at least one error.",
                [(self._labels, bad)],
            ),
            (f"{name}_errors_total", "Errors by code, severity and module.", own),
        ]

    def text(self) -> str:
        """The counters in Prometheus' text format, version 0.0.4."""
        lines = []
        for name, about, values in self._families():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} counter"]
            for labels, value in values:
                inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
                lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
        return "\n".join(lines) + "\n"

    __str__ = text

    def describe(self) -> Iterable[Any]:
        """The names that a registry of prometheus_client reserves."""
        return self._metrics(with_values=False)

    def collect(self) -> Iterable[Any]:
        """What a registry of prometheus_client asks for at each scrape."""
        return self._metrics(with_values=True)

    def _metrics(self, *, with_values: bool) -> list[Any]:
        try:
            core = importlib.import_module("prometheus_client.core")
        except ImportError as error:
            raise ImportError(
                "FlagCounters.collect: expected prometheus_client, it is not installed; run:"
                " python -m pip install prometheus-client, or serve FlagCounters.text()"
            ) from error
        metrics = []
        for name, about, values in self._families():
            labels = [*self._labels, *(_OWN if name.endswith("_errors_total") else ())]
            metric = core.CounterMetricFamily(name, about, labels=labels)
            if with_values:
                for each, value in values:
                    metric.add_metric([each[label] for label in labels], value)
            metrics.append(metric)
        return metrics

    def __repr__(self) -> str:
        with self._lock:
            errors = sum(self._errors.values())
            return f"FlagCounters({self._samples} samples, {self._bad} bad, {errors} errors)"
