"""Flags to look at, of 4096 samples with every slot full, against unpacking them."""

from __future__ import annotations

from collections.abc import Iterator

from harness import Row

from opguard.flags import ErrorConfig, err, prometheus, report, to_dataframe
from opguard.flags.inspection import flags


def rows() -> Iterator[Row]:
    config = ErrorConfig(num_slots=16)
    f = err.new_t(4096, config=config)
    for place in range(1, 17):
        f = err.push(f, err.NAN, place, config=config)

    def unpacked() -> object:
        return flags.unpack_all(f)

    yield Row("report of 4096 x 16 errors, text", lambda: str(report(f)), unpacked, 0.3)
    yield Row("  as a table", lambda: report(f)._repr_html_(), unpacked, 0.3)
    yield Row("  as counters", lambda: prometheus(f), unpacked, 0.3)
    yield Row("  as a data frame", lambda: to_dataframe(f), unpacked, 1.25)
