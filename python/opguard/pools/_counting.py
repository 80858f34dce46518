"""What is counted on the way: of each user, and what was used when."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Recorder", "Stats"]

KEPT_EVENTS = 4096


class Stats:
    """What is counted of one user. Only who moves it writes; a wait may lose a race, no more."""

    def __init__(self) -> None:
        self.misses = 0
        self.evictions = 0
        self.bytes_in = 0
        self.written_back = 0
        self.waited = 0.0
        self.seconds_loading = 0.0
        self.trouble: str | None = None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around a load."""
        started = time.perf_counter()
        try:
            yield
            self.misses += 1
        finally:
            self.seconds_loading += time.perf_counter() - started


class Recorder:
    """What was used when. Appending to a deque is one step; no lock."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.events: deque[tuple[float, str, int]] = deque(maxlen=KEPT_EVENTS)
        self.peaks: dict[str, int] = {}

    def note(self, pool: str, used: int) -> None:
        self.events.append((time.monotonic() - self._start, pool, used))
        if used > self.peaks.get(pool, 0):
            self.peaks[pool] = used
