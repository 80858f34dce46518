"""Flags to look at: in words, as a table, as a picture, as a data frame, as counters.

Each takes flags (N, words), or what has some in ``.flags``: a GuardedTensor, a ModelCheck, a
FlagEvent. Each reads them once, which waits for their device once, so all of it belongs at the edge
of a program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from opguard.flags._boundary import boundary
from opguard.flags._reporting_counters import FlagCounters
from opguard.flags._reporting_found import (
    Errors,
    Finding,
    batch_of,
    flags_of,
    read,
)
from opguard.flags._reporting_text import as_html, as_text
from opguard.flags.codes import ErrorCode, Severity
from opguard.flags.failures import first_of

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]
    from matplotlib.axes import Axes

__all__ = ["Finding", "FlagCounters", "Report", "plot", "prometheus", "report", "to_dataframe"]

_ROWS = 40


class Report:
    """What :func:`report` returns: flags as they were when it was made.

    ``str`` gives the text, Jupyter shows a table.

    Attributes:
        samples: how many samples the flags are of.
        bad: how many of them have an error.
        errors: how many errors there are.
        findings: a :class:`Finding` for each code and severity at each location, by location id.
        first: the :class:`Failure` that came first, None without errors.
    """

    @boundary
    def __init__(self, source: Any, rows: int = _ROWS) -> None:
        flags = flags_of(source)
        self._read = read(flags)
        self._rows = max(0, rows)
        self.samples = self._read.total
        self.bad = self._read.bad
        self.errors = int(self._read.value.size)
        self.findings = self._read.findings()
        self.first = first_of(flags, self._read)
        self._batch = batch_of(source, self.samples)

    @cached_property
    def _head(self) -> list[str]:
        if not self.errors:
            return [f"no errors in {_plural(self.samples, 'sample')}"]
        counts: Counter[str] = Counter()
        for each in self.findings:
            counts[each.code_name] += each.errors
        codes = ", ".join(f"{count}x{name}" for name, count in counts.most_common())
        places = len({each.location for each in self.findings})
        return [
            f"{self.bad} of {_plural(self.samples, 'sample')} with errors: {codes}"
            f" at {_plural(places, 'location')}",
            str(self.first),
        ]

    @boundary
    def __str__(self) -> str:
        return as_text(self._head, self.findings, self._batch, self._rows)

    __repr__ = __str__

    @boundary
    def _repr_html_(self) -> str:
        return as_html(self._head, self.findings, self._batch, self._rows)

    @boundary
    def plot(self, ax: Axes | None = None) -> Axes:
        """The picture of :func:`plot`."""
        return _draw(self._read, ax)

    @boundary
    def to_dataframe(self) -> pandas.DataFrame:
        """The frame of :func:`to_dataframe`."""
        return _frame(self._read)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _draw(errors: Errors, ax: Axes | None) -> Axes:
    from opguard.flags._reporting_plot import draw

    return draw(errors, ax)


def _frame(errors: Errors) -> pandas.DataFrame:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "flags.to_dataframe: expected pandas, it is not installed; run: python -m pip install"
            " pandas, or read flags.unpack_all(f)"
        ) from error
    import numpy as np

    def names(numbers: Any, name: Any) -> Any:
        """A column of names: each is made once, however many errors have it."""
        values, inverse = np.unique(numbers, return_inverse=True)
        known = np.array([name(value) for value in values.tolist()], dtype=object)
        return pandas.array(known, dtype="string").take(inverse)

    code, severity, location = errors.code, errors.severity, errors.location
    return pandas.DataFrame(
        {
            "sample": errors.sample,
            "slot": errors.slot,
            "code": code.astype(np.int64),
            "code_name": names(code, ErrorCode.name),
            "domain": names(code, ErrorCode.domain_name),
            "severity": severity.astype(np.int64),
            "severity_name": names(severity, Severity.name),
            "location": location.astype(np.int64),
            "location_name": names(location, errors.name),
        }
    )


@boundary
def report(f: Any, *, rows: int = _ROWS) -> Report:
    """Flags in words: how many samples, which errors, where.

        print(flags.report(c.flags))

        2 of 256 samples with errors: 1xINF, 1xNAN at 2 locations
        first failure: INF at enc.ff.2 in sample 7 of 256
          location  code  severity  samples  which
          enc.ff.2  INF   CRITICAL        1  7
          head      NAN   CRITICAL        1  31

    Args:
        f: flags (N, words), or an object with ``.flags``.
        rows: how many lines the table has at most.

    Raises:
        FlagsLayoutError: no flags tensor.
    """
    return Report(f, rows)


@boundary
def plot(f: Any, ax: Axes | None = None) -> Axes:
    """A picture: samples from left to right, locations with errors from top to bottom.

    A cell's colour is the worst severity there; beside a location's name stand its codes. Thousands
    of samples and hundreds of locations are drawn in as many cells as there are pixels, each with
    the worst of what it stands for.

    Args:
        f: flags (N, words), or an object with ``.flags``.
        ax: matplotlib Axes to draw into; None for a figure of its own, ``.figure`` of what is
            returned. pyplot is not used, so there is nothing to close.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return _draw(read(flags_of(f)), ax)


@boundary
def to_dataframe(f: Any) -> pandas.DataFrame:
    """A row an error, sample after sample in the order of the slots.

    Columns: ``sample``, ``slot``, ``code``, ``severity``, ``location`` (int64) and ``code_name``,
    ``domain``, ``severity_name``, ``location_name`` (string). Without errors it is empty, with the
    same columns and dtypes.

    Raises:
        ImportError: pandas is not installed.
    """
    return _frame(read(flags_of(f)))


@boundary
def prometheus(
    f: Any, *, namespace: str = "opguard", labels: Mapping[str, str] | None = None
) -> str:
    """One call's errors as counters in Prometheus' text format.

    A counter adds up: to publish many calls, keep a :class:`FlagCounters` and ``add`` to it.

    Args:
        f: flags (N, words), or an object with ``.flags``.
        namespace: what the names of the counters begin with.
        labels: more labels, the same on every line.
    """
    counters = FlagCounters(namespace, labels)
    counters.add(f)
    return counters.text()
