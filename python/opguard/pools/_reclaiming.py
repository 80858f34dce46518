"""The thread that gives back later what was told to go, so that telling costs microseconds."""

from __future__ import annotations

import logging
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opguard.pools._moving import Moving

__all__ = ["Reclaimer"]

logger = logging.getLogger("opguard.pools")
# Who comes back within this time finds its pages where they were. Seconds.
SOON = 0.05
LATEST = 1.0


class Reclaimer:
    """One daemon thread a management, started with the first user, and none in a forked child.

    ``wake`` may be called by finalizers: a SimpleQueue's put is made for that.
    """

    def __init__(self, management: Moving) -> None:
        self._management = management
        self._calls: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._has_thread():
            return
        with self._starting:
            thread = threading.Thread(target=self._run, name="opguard-reclaimer", daemon=True)
            if self._has_thread():  # another was first, or a finalizer came here meanwhile
                return
            self._thread = thread
            try:
                thread.start()
            except BaseException as error:
                if thread.ident is None:
                    self._thread = None
                if not isinstance(error, RuntimeError):
                    raise
                # No thread can be had now: requests give back what they need.

    def _has_thread(self) -> bool:
        return self._thread is not None

    def wake(self) -> None:
        self._calls.put(True)

    def stop(self) -> None:
        """End the thread, if it runs; the next ``start`` starts another."""
        with self._starting:
            if self._thread is not None:
                self._calls.put(False)
                self._thread.join()
                self._thread = None

    def forked(self) -> None:
        """In the child: the thread is not there, and its queue may be in any state."""
        self.__init__(self._management)  # type: ignore[misc]

    def _run(self) -> None:
        delay: float | None = None
        while True:
            if not self._wait(delay):
                return
            try:
                unfinished = self._management.reclaim_idle()
            except Exception:
                logger.exception("could not give back what was told to go")
                unfinished = True
            delay = min((delay or SOON / 2) * 2, LATEST) if unfinished else None

    def _wait(self, delay: float | None) -> bool:
        """Until called, or until the time is over. False: it is to end."""
        try:
            if not self._calls.get(timeout=delay):
                return False
        except Empty:
            return True
        time.sleep(SOON)
        while not self._calls.empty():
            if not self._calls.get():
                return False
        return True
