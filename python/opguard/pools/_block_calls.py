"""What runs around a block's forward, what usually follows it, and the thread that fetches that."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from opguard import _C

if TYPE_CHECKING:
    from opguard.pools.streaming import StreamedModule

__all__ = ["BlockForward", "Course", "prefetcher"]


class Course:
    """What ran after what: the blocks of one model in the order they were entered, by thread.

    Two blocks in a row tell the third, so that a block used in several places is followed by
    what followed it there.
    """

    def __init__(self) -> None:
        self._follows: dict[tuple[int, int], int] = {}
        self._here = threading.local()

    def entered(self, block: int) -> int | None:
        """Note that a block runs now. Returns the one that is expected after it, if any."""
        before, last = getattr(self._here, "pair", (-1, -1))
        self._follows[before, last] = block
        self._here.pair = last, block
        return self._follows.get((last, block))


class BlockForward:
    """The ``forward`` of one block's module: enter, run what was there before, leave.

    It refers to the module weakly: a cycle would keep the model until garbage is collected. In a
    copy and in a pickle the class's own ``forward`` takes its place.
    """

    def __init__(self, module: nn.Module, number: int, stream: StreamedModule) -> None:
        self._module = weakref.ref(module)
        self._own = module.__dict__.get("forward")
        self._plain = type(module).forward
        self._number = number
        self._stream = stream
        module.__dict__["forward"] = self

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What signatures are read from."""
        return self._own or types.MethodType(self._plain, self._module())

    @property
    def __name__(self) -> str:
        return "forward"

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self._plain.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream, number = self._stream, self._number
        with _C.Lease(stream.block_seat(number), None, None):
            stream.entered(number)
            try:
                if self._own is not None:
                    return self._own(*args, **kwargs)
                return self._plain(self._module(), *args, **kwargs)
            finally:
                stream.left(number)

    def remove(self) -> None:
        """Put back what was there, if this is still what runs."""
        module = self._module()
        if module is not None and module.__dict__.get("forward") is self:
            del module.__dict__["forward"]
            if self._own is not None:
                module.__dict__["forward"] = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The copy of the module is made, and has nothing in its __dict__ yet.
        copied = memo.get(id(self._module()))
        return self.__wrapped__ if copied is None else copied.forward

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module(), "forward")


_Wish = tuple[Callable[[], Callable[[int], None] | None], int]


class Prefetcher:
    """One thread a process that brings in what is expected next; started by the first wish.

    Only the latest wish counts: an older one is late anyway.
    """

    def __init__(self) -> None:
        self._wishes: queue.SimpleQueue[_Wish] = queue.SimpleQueue()
        self._process = 0
        self._lock = threading.Lock()

    def want(self, bring_in: Callable[[], Callable[[int], None] | None], number: int) -> None:
        """Have ``bring_in()(number)`` called by the thread; a failure is nobody's concern."""
        if self._process != os.getpid():
            self._start()
        self._wishes.put((bring_in, number))

    def _start(self) -> None:
        with self._lock:
            if self._process != os.getpid():  # the first time, or a fork left the thread behind
                self._wishes = queue.SimpleQueue()
                threading.Thread(
                    target=self._run, args=(self._wishes,), name="opguard-prefetch", daemon=True
                ).start()
                self._process = os.getpid()

    @staticmethod
    def _run(wishes: queue.SimpleQueue[_Wish]) -> None:
        while True:
            reference, number = wishes.get()
            bring_in = reference()
            # A failure is met again by whoever needs the block, who says so.
            with contextlib.suppress(Exception):
                if bring_in is not None and wishes.empty():  # a later wish makes this one late
                    bring_in(number)
            del reference, bring_in


prefetcher = Prefetcher()
