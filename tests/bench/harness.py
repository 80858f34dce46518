"""Interleaved timing: ours and theirs in turn, many short rounds, one ratio a row.

Machines are noisy, so a row is never an absolute time: each round times both sides back to back,
and the figure is the median of the rounds' ratios. Where a few percent count, a round is several
short turns of both, and its ratio that of their fastest (``turns``).
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
    turns: int = 1  # of each side in a round; the fastest counts
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
    return max(1, int(ROUND_SECONDS / row.turns / once))


def _time(row: Row, function: Callable[[], object], loops: int) -> float:
    if row.self_timed:
        return float(function())  # type: ignore[arg-type]
    begin = time.perf_counter()
    for _ in range(loops):
        function()
    return (time.perf_counter() - begin) / loops


def measure(row: Row, rounds: int = 25) -> Figure:
    """Times one row; the collector is off meanwhile, as in timeit."""
    sides = [(function, _loops(row, function)) for function in (row.ours, row.theirs)]
    rounds = 7 if row.self_timed else rounds
    pairs = []
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            best = [float("inf"), float("inf")]
            for _ in range(row.turns):
                for side in (0, 1) if turn % 2 == 0 else (1, 0):
                    function, loops = sides[side]
                    best[side] = min(best[side], _time(row, function, loops))
            pairs.append((best[0] / row.per * 1e6, best[1] / row.per * 1e6))
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
