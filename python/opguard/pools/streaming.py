"""A model larger than its pool: each block of it is there while its forward runs.

A block (see ``_blocks``) takes the segments it uses on entry and lets them go on exit, by an
instance ``forward`` and not by hooks: torch runs no hook after a KeyboardInterrupt, and the mere
presence of hooks sends ``nn.TransformerEncoderLayer`` down another road, with other last bits.
What followed which block is learned while it runs; the next one is brought in by a thread
meanwhile, where that fits at once. A wrong guess costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opguard import _C
from opguard.pools._blocks import Block, Cut, all_storages, cut_module, storages_of
from opguard.pools._budgets import readable
from opguard.pools._homes import Home
from opguard.pools._requests import TRY, Ask, enter
from opguard.pools.errors import PoolRefused
from opguard.pools.users import ResourcePoolUser

if TYPE_CHECKING:
    from opguard.pools._books import Entry
    from opguard.pools.management import Management

__all__ = ["StreamedModule"]

# A chunk is this part of the budget: one block runs, the next comes in, others stay.
CHUNKS = 4


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
        try:
            with _C.Lease(stream.block_seat(number), None, None):
                stream.entered(number)
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


_prefetcher = Prefetcher()


def outgrows(module: nn.Module, management: Management) -> bool:
    """Whether the module is larger than the whole budget of the pool it would run in."""
    budget = management.pool(str(management.execution_device)).budget
    return sum(all_storages(module).values()) > budget


def kept_segments(cut: Cut, budget: int) -> frozenset[int]:
    """Segments that stay after use while nobody else needs the bytes.

    Blocks come round in one order, so what was used last is needed last: keeping the first ones
    and letting each of the others go at once loads the least. Room is left for the blocks around,
    for the one that runs and for the next.
    """
    room = budget - 2 * max(cut.bytes_of(block) for block in cut.blocks)
    around = {number for block in cut.blocks for number in block.around}
    kept: set[int] = set()
    ordered: Iterable[Block] = sorted(
        cut.blocks, key=lambda block: cut.blocks.index(block) not in around
    )
    for block in ordered:
        more = {segment for segment in block.segments if segment not in kept}
        need = sum(cut.sizes[segment] for segment in more)
        if need > room:
            break
        room -= need
        kept |= more
    return frozenset(kept)


def _tensors_of(module: nn.Module, cut: Cut) -> list[list[torch.Tensor]]:
    """The tensors that lie in each segment."""
    by_storage: dict[int, list[torch.Tensor]] = {}
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    for key, _ in storages_of(tensor):
                        by_storage.setdefault(key, []).append(tensor)
    return [[t for key in keys for t in by_storage[key]] for keys in cut.segments]


def _keep_apart(home: Home) -> None:
    """Make each segment a mapping of its own for the kernel.

    A page that is read brings in up to 15 neighbours on both sides, but none of another mapping.
    Neighbours whose flags differ are not joined: every second one is left out of core dumps.
    """
    pages = home.map
    if pages is None or pages.nbytes != home.nbytes or not hasattr(mmap, "MADV_DONTDUMP"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in home.segments[1::2]:
        if end > start:
            madvise(pages.address + start, end - start, mmap.MADV_DONTDUMP)


class _Segment:
    """What a segment is managed as: an object of its own, which lives as long as its model."""

    __slots__ = ("__weakref__",)


class SegmentUser(ResourcePoolUser):
    """One segment of a streamed module, as a user of its pool."""

    def __init__(self, segment: _Segment, home: Any, number: int, pool: str) -> None:
        super().__init__(segment)
        self._home = home
        self._number = number
        start, end = home.segments[number]
        self._nbytes = int(end - start)
        self._pool = pool

    def needs(self) -> Mapping[str, int]:
        return {self._pool: self._nbytes}

    def bring_in(self) -> int:
        self._home.bring_in(self._number)
        self._home.raise_if_broken()
        return self._nbytes

    def give_back(self) -> int:
        return int(self._home.give_back(self._number) or 0)

    def sweep(self) -> None:
        self._home.give_back(self._number)

    def describe(self) -> str:
        return "disk, in blocks"


class StreamedModule(ResourcePoolUser):
    """A module whose blocks are brought in one after the other; it needs nothing as a whole.

    Args:
        module: the module; its blocks' modules get an instance ``forward`` each, until `close`.
        inference_memory_estimator: see `opguard.pools.modules.TorchModuleWrapper`.
        management: whose pools it takes from.
        name: for the file, and for messages.
        trust_files: see `opguard.pools.modules.TorchModuleWrapper`.

    Raises:
        PoolRefused: where one block is larger than the budget, with figures; nothing happened.
        Unmanageable: for modules whose weights must not move.
    """

    def __init__(
        self,
        module: nn.Module,
        inference_memory_estimator: Any = None,
        *,
        management: Management,
        name: str | None = None,
        trust_files: bool = False,
    ) -> None:
        super().__init__(module)
        self.inference_memory_estimator = inference_memory_estimator
        name = name or type(module).__name__
        self._management = management
        self._device = management.execution_device
        self._pool = management.pool(str(self._device))
        self.cut = cut_module(module, max(self._pool.budget // CHUNKS, 1))
        self._check(name)
        home = Home.adopt(
            module,
            management.folder,
            name,
            segments=_tensors_of(module, self.cut),
            trust_files=trust_files,
        )
        _keep_apart(home)
        self.home: Any = self._placed(home)
        self._course = Course()
        self._kept: tuple[int, frozenset[int]] = (-1, frozenset())
        self._segments = [_Segment() for _ in self.cut.segments]
        users = {
            segment: SegmentUser(segment, self.home, number, self._pool.name)
            for number, segment in enumerate(self._segments)
        }
        self._entries = [
            management.add_user(user, segment, name=f"{name}[{number}]")
            for number, (segment, user) in enumerate(users.items())
        ]
        self._seats = [management.seat(self._units(block)) for block in self.cut.blocks]
        self._forwards = [
            BlockForward(each, number, self)
            for number, block in enumerate(self.cut.blocks)
            if block.segments and (each := block.module()) is not None
        ]

    def _placed(self, home: Any) -> Any:
        if self._device.type == "cpu":
            return home
        devices: Any = import_module("opguard.pools._devices")
        return devices.DeviceHome(home, self._device)

    def _check(self, name: str) -> None:
        block = self.cut.largest()
        need, budget = self.cut.bytes_held(block), self._pool.budget
        if need > budget:
            around = need - self.cut.bytes_of(block)
            more = f" and {readable(around)} of the modules around it" if around else ""
            raise PoolRefused(
                f"{name!r} cannot be streamed: expected blocks of at most {readable(budget)}, the "
                f"budget of pool {self._pool.name!r}, block {block.name!r} "
                f"({type(block.module()).__name__}) has {readable(need - around)}{more}; "
                "raise the budget"
            )

    def _units(self, block: Block) -> list[int]:
        return [unit for number in block.segments for unit in self._entries[number].units.values()]

    # What a user does. The segments are users of their own; the whole takes nothing.

    def needs(self) -> Mapping[str, int]:
        return {}

    def bring_in(self) -> int:
        return 0

    def give_back(self) -> int:
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of all segments, which are never there together."""
        return sum(self.cut.sizes)

    @property
    def execution_device(self) -> torch.device:
        return self._device

    @property
    def members(self) -> tuple[Entry, ...]:
        """The entries of its segments."""
        return tuple(self._entries)

    @property
    def largest_need(self) -> int:
        """Bytes that have to be free for it to run at all."""
        return self.cut.bytes_held(self.cut.largest())

    def describe(self) -> str:
        return f"disk, {len(self.cut.blocks)} blocks"

    def close(self) -> None:
        """Take the blocks' forwards off; its segments go."""
        for forward in self._forwards:
            forward.remove()
        for segment in self._segments:
            self._management.unmanage(segment)
        self._segments.clear()
        self.home.close()

    # What its blocks call

    def block_seat(self, number: int) -> Any:
        """What leases of that block share."""
        return self._seats[number]

    def entered(self, number: int) -> None:
        """A block is there and about to run: have what is expected after it brought in."""
        after = self._course.entered(number)
        if after is not None and not self._is_in(after):
            _prefetcher.want(weakref.WeakMethod(self._bring_in), after)

    def left(self, number: int) -> None:
        """A block has run: what comes round last goes first."""
        kept = self._segments_to_keep()
        for segment in self.cut.blocks[number].segments:
            if segment not in kept:
                self._management.condemn(self._entries[segment])

    def _segments_to_keep(self) -> frozenset[int]:
        budget = self._pool.budget
        if self._kept[0] != budget:
            self._kept = budget, kept_segments(self.cut, budget)
        return self._kept[1]

    def _is_in(self, number: int) -> bool:
        units = self._seats[number].units
        return all(self._management.state(unit) != 0 for unit in units)

    def _bring_in(self, number: int) -> None:
        management = self._management
        owner = _C.pool_owner(management.ledger)
        units = self._seats[number].units
        enter(Ask(management, owner.id, units, flags=TRY))
        if management.ledger.leave(owner.id, units, ()):
            management.pump()
