"""What runs around a block's forward, what usually follows it, and the thread that fetches that."""

from __future__ import annotations

import copy
import os
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from opguard import _C
from opguard.pools._forks import ForkLock
from opguard.pools._marks import BODIES, CALL, Orphan, driven, pickles_itself
from opguard.pools.errors import PoolError

if TYPE_CHECKING:
    from opguard.pools.streaming import StreamedModule

__all__ = ["BlockCall", "BlockForward", "Course", "prefetcher", "untraced"]


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


_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function, *, inside: bool = True) -> _Function:
    """Have Dynamo leave a function alone: what it compiles breaks at each lease.

    As ``torch.compiler.disable`` does, which takes a second to import. A torch without this switch
    looks at the function, and gives up after some attempts.

    Args:
        inside: the same for what the function calls.
    """
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "a block of a streamed model takes a lease"
    with suppress(AttributeError):
        switch: Any = torch._C._dynamo.eval_frame
        skip, trace = switch._FrameAction.SKIP, switch._FrameAction.DEFAULT
        strategy = switch._FrameExecStrategy(skip, skip if inside else trace)
        switch.set_code_exec_strategy(marked.__code__, strategy)
    return function


class BlockForward:
    """The ``forward`` of one block's module: enter, run what was there before, leave.

    It refers to the module weakly: a cycle would keep the model until garbage is collected. With
    its stream closed, and in a copy, which is a model of its own, it runs what was there before
    and takes itself off.
    """

    def __init__(self, module: nn.Module, number: int, stream: StreamedModule | None) -> None:
        self._module = weakref.ref(module)
        self._own = _own_forward(module)
        self._number = number
        self._stream = stream
        module.__dict__["forward"] = self

    @property
    @untraced
    def __wrapped__(self) -> Callable[..., Any]:
        """What it stands for: the instance's own, or the class's bound to the module."""
        if self._own is not None:
            return self._own
        module = self._module()
        if module is None:
            raise ReferenceError("expected the module of this forward to be alive, it is gone")
        return _class_forward(module)

    def __getattr__(self, name: str) -> Any:
        """``__code__``, ``__self__`` and the like of what it stands for."""
        if name == "__globals__":  # what torch.jit.script asks for first
            raise AttributeError(
                f"expected a function to script, got the forward of a block of a streamed "
                f"{type(self._module()).__name__}, which takes a lease; script the model before it "
                "is managed, or unmanage it first"
            )
        return getattr(self.__wrapped__, name)

    @partial(untraced, inside=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream, number, entered = self._stream, self._number, False
        if stream is not None and not stream.closed:
            seat = stream.block_seat(number)
            try:
                with _C.Lease(seat, None, None):
                    entered = True
                    stream.entered(number)
                    try:
                        result = self.__wrapped__(*args, **kwargs)
                    finally:
                        stream.left(number)
            except PoolError:
                if entered or not stream.closed:
                    raise
            else:
                if isinstance(result, BODIES):
                    return driven(_C.Lease(seat, None, None), result)
                return result
        forward = self.__wrapped__  # closed, it may be just now
        self.remove()
        return forward(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there, if this is still what runs."""
        module = self._module()
        if module is not None and module.__dict__.get("forward") is self:
            del module.__dict__["forward"]
            if self._own is not None:
                module.__dict__["forward"] = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        made = memo.get(id(self._module()))
        if not isinstance(made, nn.Module):  # its class copies what is in it before it is made
            return Orphan("forward")
        return BlockForward(made, self._number, None)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._own is not None:
            return itemgetter(0), ((self._own,),)  # itself: nothing of ours in the pickle
        module = self._module()
        if pickles_itself(type(module)):
            return Orphan, ("forward",)
        return getattr, (module, "forward")


class BlockCall:
    """A lease around a block's hooks as well: those of ``weight_norm`` read weights.

    It stands where a module's compiled call would, which torch leaves out of copies.
    """

    def __init__(self, module: nn.Module, number: int, stream: StreamedModule) -> None:
        self._module = weakref.ref(module)
        self._number = number
        self._stream = stream
        module.__dict__[CALL] = self

    @partial(untraced, inside=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        stream, entered = self._stream, False
        if not stream.closed:
            try:
                with _C.Lease(stream.block_seat(self._number), None, None):
                    entered = True
                    return module._call_impl(*args, **kwargs)
            except PoolError:
                if entered or not stream.closed:
                    raise
        return module._call_impl(*args, **kwargs)

    @staticmethod
    def is_needed(module: nn.Module) -> bool:
        """Whether it has hooks; what is compiled has its own call."""
        hooked = module._forward_pre_hooks or module._forward_hooks
        return bool(hooked) and module._compiled_call_impl is None


def _class_forward(module: nn.Module) -> Callable[..., Any]:
    """The ``forward`` that the module's class has now, whatever kind of method that is."""
    kind = type(module)
    found: Any = next(vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base))
    bind: Any = getattr(type(found), "__get__", None)
    try:
        return cast("Callable[..., Any]", found if bind is None else bind(found, module, kind))
    except AttributeError:  # that of scripted modules always raises this
        return cast("Callable[..., Any]", module.__getattr__("forward"))


def _own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The ``forward`` that somebody gave this very module; what a copy or ours left is none."""
    own = module.__dict__.get("forward")
    while isinstance(own, BlockForward):
        own = own._own
    return None if own is None or own == _class_forward(module) else own


_Wish = tuple[Callable[[], Callable[[int], None] | None], int]


class Prefetcher:
    """One thread a process that brings in what is expected next; started by the first wish.

    Only the latest wish counts: an older one is late anyway.
    """

    def __init__(self) -> None:
        self._wishes: queue.SimpleQueue[_Wish] = queue.SimpleQueue()
        self._process = 0
        self._lock = ForkLock(threading.RLock)

    def want(self, bring_in: Callable[[], Callable[[int], None] | None], number: int) -> None:
        """Have ``bring_in()(number)`` called by the thread; a failure is nobody's concern."""
        if self._process != os.getpid():
            self._start()
        self._wishes.put((bring_in, number))

    def _start(self) -> None:
        with self._lock.here:
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
            with suppress(Exception):
                if bring_in is not None and wishes.empty():  # a later wish makes this one late
                    bring_in(number)
            del reference, bring_in


prefetcher = Prefetcher()
