"""A report as text for a terminal or a log, and as a table for a notebook."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from opguard._tables import html_table, one_line, text_table
from opguard.flags.codes import Severity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opguard.flags._reporting_found import Finding

__all__ = ["COLOURS", "as_html", "as_text", "spans"]

# From yellow to dark red: they differ in lightness too, for eyes and printers without colour.
COLOURS = {
    Severity.OK: "#8d99ae",
    Severity.WARN: "#ffd166",
    Severity.ERROR: "#ef7d22",
    Severity.CRITICAL: "#a4133c",
}
_INK = {Severity.OK: "#000", Severity.WARN: "#000", Severity.ERROR: "#000"}
_HEADS = ("location", "code", "severity", "samples", "which")
_SPANS = 6


def spans(samples: NDArray[np.int64], batch: tuple[int, ...], most: int = _SPANS) -> str:
    """Sample numbers for people: ``"all"``, or ``"0-3, 7, 9 and 12 more"``.

    Where the batch has several dimensions: ``"(0, 3), (1, 2)"``.
    """
    import numpy as np

    if samples.size == math.prod(batch) > 1:
        return "all"
    if len(batch) > 1:
        places = np.stack(np.unravel_index(samples[:most], batch), 1).tolist()
        more = samples.size - len(places)
        return ", ".join(str(tuple(each)) for each in places) + (
            f" and {more} more" if more else ""
        )
    cuts = np.flatnonzero(np.diff(samples) != 1) + 1
    begins = np.concatenate(([0], cuts))[:most].tolist()
    ends = np.concatenate((cuts, [samples.size]))[:most].tolist()
    parts = []
    for begin, end in zip(begins, ends, strict=True):
        first, last = int(samples[begin]), int(samples[end - 1])
        parts.append(f"{first}" if first == last else f"{first}-{last}")
    more = samples.size - ends[-1]
    return ", ".join(parts) + (f" and {more} more" if more else "")


def _cells(finding: Finding, batch: tuple[int, ...]) -> tuple[str, ...]:
    return (
        finding.location_name,
        finding.code_name,
        finding.severity_name,
        str(finding.samples.size),
        spans(finding.samples, batch),
    )


def as_text(
    head: Sequence[str],
    findings: Sequence[Finding],
    batch: tuple[int, ...],
    rows: int,
) -> str:
    """Head lines, then an aligned table of at most ``rows`` findings."""
    lines = [one_line(line) for line in head]
    if not findings:
        return "\n".join(lines)
    lines += text_table(_HEADS, [_cells(each, batch) for each in findings[:rows]], right={3})
    if len(findings) > rows:
        lines.append(f"  ... and {len(findings) - rows} more")
    return "\n".join(lines)


def as_html(
    head: Sequence[str],
    findings: Sequence[Finding],
    batch: tuple[int, ...],
    rows: int,
) -> str:
    """The same as an HTML table. Every name is escaped; no script, no style sheet."""
    first, *others = (escape(line) for line in head)
    lines = [f"<div><b>{first}</b>", *(f"<br>{line}" for line in others)]
    if not findings:
        return "".join([*lines, "</div>"])
    table = []
    for finding in findings[:rows]:
        name, code, severity, count, which = map(escape, _cells(finding, batch))
        chip = (
            f"background:{COLOURS[finding.severity]};color:{_INK.get(finding.severity, '#fff')};"
            "padding:0 .5em;border-radius:.6em"
        )
        table.append(
            (f"<code>{name}</code>", code, f'<span style="{chip}">{severity}</span>', count, which)
        )
    lines.append(html_table(_HEADS, table, right={3}))
    if len(findings) > rows:
        lines.append(f"... and {len(findings) - rows} more")
    return "".join([*lines, "</div>"])
