"""Interleaved timing: ours and theirs in turn, many short rounds, one ratio a row.

Machines are noisy, so a row is never an absolute time: each round times both sides back to back,
and the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class Row:
    """One line of the table: ``ours`` against ``theirs``, and what must be reached.

    ``limit`` bounds the ratio ours/theirs, or with ``extra_us`` the difference in microseconds
    a call; ``per`` divides both sides (frames, tensors, steps of one call).
    """

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    limit: float | None = None
    extra_us: float | None = None
    per: int = 1
    self_timed: bool = False  # the callables return seconds themselves; few rounds


@dataclass(frozen=True)
class Figure:
    row: Row
    ours_us: float
    theirs_us: float
    ratio: float
    extra_us: float

    @property
    def reached(self) -> bool:
        if self.row.limit is not None:
            return self.ratio <= self.row.limit
        return self.row.extra_us is None or self.extra_us <= self.row.extra_us


def _loops(row: Row, function: Callable[[], object]) -> int:
    if row.self_timed:
        return 1
    function()
    begin = time.perf_counter()
    function()
    once = max(time.perf_counter() - begin, 1e-7)
    return max(1, int(ROUND_SECONDS / once))


def _time(row: Row, function: Callable[[], object], loops: int) -> float:
    if row.self_timed:
        return float(function())  # type: ignore[arg-type]
    begin = time.perf_counter()
    for _ in range(loops):
        function()
    return (time.perf_counter() - begin) / loops


def measure(row: Row, rounds: int = 25) -> Figure:
    """Times one row; the collector is off meanwhile, as in timeit."""
    ours_loops, theirs_loops = _loops(row, row.ours), _loops(row, row.theirs)
    rounds = 7 if row.self_timed else rounds
    pairs = []
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn % 2:
                theirs = _time(row, row.theirs, theirs_loops)
                ours = _time(row, row.ours, ours_loops)
            else:
                ours = _time(row, row.ours, ours_loops)
                theirs = _time(row, row.theirs, theirs_loops)
            pairs.append((ours / row.per * 1e6, theirs / row.per * 1e6))
    finally:
        gc.enable()
    return Figure(
        row,
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b if b else float("inf") for a, b in pairs),
        statistics.median(a - b for a, b in pairs),
    )


def show(figure: Figure) -> str:
    row = figure.row
    if row.limit is not None:
        verdict = f"{figure.ratio:5.2f}x of <= {row.limit}x"
    elif row.extra_us is not None:
        verdict = f"{figure.extra_us:+6.2f} us of <= {row.extra_us} us"
    else:
        verdict = f"{figure.ratio:5.2f}x"
    mark = "ok  " if figure.reached else "MISS"
    return f"{mark} {verdict}  {row.name}  ({figure.ours_us:.2f} against {figure.theirs_us:.2f} us)"
