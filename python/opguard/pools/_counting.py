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
        self.unmet = 0  # uses that did not find it there, or came to nothing
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
        # Seconds, pool, bytes used in it, and where one user came or went its name and its bytes.
        self.events: deque[tuple[float, str, int, str | None, int]] = deque(maxlen=KEPT_EVENTS)
        self.peaks: dict[str, int] = {}

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def note(self, pool: str, used: int, user: str | None = None, held: int = 0) -> None:
        self.events.append((self.seconds, pool, used, user, held))
        if used > self.peaks.get(pool, 0):
            self.peaks[pool] = used
