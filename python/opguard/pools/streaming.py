"""A model larger than its pool: each block of it is there while its forward runs.

A block (see ``_blocks``) takes the segments it uses on entry and lets them go on exit, by an
instance ``forward`` and not by hooks: torch runs no hook after a KeyboardInterrupt, and the mere
presence of hooks sends ``nn.TransformerEncoderLayer`` down another road, with other last bits.
Where a block has hooks when it is managed, they run inside a lease as well.
What followed which block is learned while it runs; the next one is brought in by a thread
meanwhile, where that fits at once. A wrong guess costs time and nothing else.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opguard import _C
from opguard._sizes import readable
from opguard.pools._block_calls import BlockCall, BlockForward, Course, prefetcher, untraced
from opguard.pools._blocks import Cut, bytes_of, cut_module
from opguard.pools._books import ABSENT, LOADING, READY
from opguard.pools._forks import ForkLock
from opguard.pools._homes import Home
from opguard.pools._lending import home_for
from opguard.pools._marks import CALL
from opguard.pools._module_user import Estimate, ModuleUser
from opguard.pools._requests import TRY, Ask, enter
from opguard.pools.errors import PoolRefused
from opguard.pools.users import ResourcePoolUser

if TYPE_CHECKING:
    from opguard.pools._books import Entry
    from opguard.pools.management import Management

__all__ = ["StreamedModule"]

# A chunk is this part of the budget: one block runs, the next comes in, others stay.
CHUNKS = 4
# Calls of a cut module after which is looked for weights that were read while absent.
LOOKS = 3


def outgrows(module: nn.Module, management: Management) -> bool:
    """Whether the module is larger than the whole budget of the pool it would run in."""
    return bytes_of(module) > management.execution_pool.budget


def kept_segments(cut: Cut, budget: int) -> frozenset[int]:
    """Segments that stay after use while nobody else needs the bytes.

    Blocks come round in one order, so what was used last is needed last: keeping the first ones
    and letting each of the others go at once loads the least. Room is left for the blocks around,
    for the one that runs and for the next.
    """
    room = budget - 2 * max(map(cut.bytes_of, cut.blocks), default=0)
    around = {number for block in cut.blocks for number in block.around}
    kept: set[int] = set()
    for number in sorted(range(len(cut.blocks)), key=lambda number: number not in around):
        block = cut.blocks[number]
        more = {segment for segment in block.segments if segment not in kept}
        need = sum(cut.sizes[segment] for segment in more)
        if need > room:
            break
        room -= need
        kept |= more
    return frozenset(kept)


def _keep_apart(home: Home) -> bool:
    """Make each segment a mapping of its own for the kernel. False: they are not all.

    A page that is read brings in up to 15 neighbours on both sides, but none of another mapping.
    Neighbours whose flags differ are not joined: every second one is left out of core dumps.
    """
    pages = home.map
    if pages is None or pages.nbytes != home.nbytes or not hasattr(mmap, "MADV_DONTDUMP"):
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in home.segments[1::2]:
        if end > start:
            madvise(pages.address + start, end - start, mmap.MADV_DONTDUMP)
    return True


class _Segment:
    """What a segment is managed as: an object of its own, which lives as long as its model."""

    __slots__ = ("__weakref__",)


class SegmentUser(ResourcePoolUser):
    """One segment of a streamed module, as a user of its pool."""

    def __init__(self, segment: _Segment, stream: StreamedModule, number: int, pool: str) -> None:
        super().__init__(segment)
        self._stream = weakref.ref(stream)
        self._home = home = stream.home
        self._number = number
        start, end = home.segments[number]
        self._nbytes = int(end - start)
        self._pool = pool

    def needs(self) -> Mapping[str, int]:
        return {self._pool: self._nbytes}

    def bring_in(self) -> int:
        stream = self._stream()
        if stream is not None:
            stream.warn_of_strays(self._number, again=False)
        try:
            self._home.bring_in(self._number)
        except torch.OutOfMemoryError:
            # The budget has room and the device has not: others of ours make it.
            if stream is None or not stream.make_room(self._nbytes):
                raise
            self._home.bring_in(self._number)
        self.raise_if_broken()
        return self._nbytes

    def give_back(self) -> int:
        return int(self._home.give_back(self._number) or 0)

    def unused_since(self, mark: Any) -> None:
        if not isinstance(self._home, Home):
            self._home.unused_since(mark, self._number)

    def raise_if_broken(self) -> None:
        self._home.raise_if_broken()

    def sweep(self) -> None:
        stream = self._stream()
        if stream is not None and self._home.resident(self._number):
            stream.was_read(self._number)
        self._home.give_back(self._number)

    def strays(self) -> Sequence[str]:
        stream = self._stream()
        return () if stream is None else stream.strays(self._number)

    @property
    def may_stay(self) -> bool:
        stream = self._stream()
        return stream is not None and stream.keeps(self._number)

    def describe(self) -> str:
        return "disk, in blocks"


class StreamedModule(ModuleUser):
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

    stream = True

    def __init__(
        self,
        module: nn.Module,
        inference_memory_estimator: Estimate | None = None,
        *,
        management: Management,
        name: str | None = None,
        trust_files: bool = False,
        verify: str | None = None,
    ) -> None:
        super().__init__(module, inference_memory_estimator, management, name, trust_files)
        self.cut, tensors = cut_module(module, max(self._pool.budget // CHUNKS, 1))
        self._check()
        self.closed = False
        self._segments: list[_Segment] = []
        self._course = Course()
        self._wish = -1
        self._fetching = ForkLock()
        self._fetcher = 0
        self.home = Home.adopt(
            module, management.folder, self._name, segments=tensors, trust_files=trust_files
        )
        try:
            self._set_up(verify)
        except BaseException:
            self.close()
            raise

    def _set_up(self, verify: str | None) -> None:
        name, management, blocks = self._name, self._management, self.cut.blocks
        # Where segments share pages, and on accelerators, what is in memory tells of no reader.
        self._learns = _keep_apart(self.home) and not self._pool.executes
        self.home = home_for(self.home, management, name, verify)
        sizes = (end - start for start, end in self.home.segments[: len(self.cut.sizes)])
        self.cut = replace(self.cut, sizes=tuple(sizes))
        self._check()
        self._segments += (_Segment() for _ in self.cut.sizes)
        self._entries = [
            management.add_user(
                SegmentUser(segment, self, number, self._pool.name),
                segment,
                name=f"{name}[{number}]",
            )
            for number, segment in enumerate(self._segments)
        ]
        self._outer = {number for block in blocks for number in block.around}
        # By block; the last is the one to take, leases of those before it keep what they have.
        self._seats: list[list[Any]] = [[] for _ in blocks]
        self._settle()
        for number, block in enumerate(blocks):
            if block.segments or number in self._outer:
                module = self._module_of(number)
                BlockForward(module, number, self)
                if BlockCall.is_needed(module):
                    BlockCall(module, number, self)

    def _settle(self) -> None:
        """What each block takes and what stays: at the start, and for each budget anew."""
        self._budget = self._pool.budget
        self._kept = kept_segments(self.cut, self._budget)
        self._taken = [set(block.segments) for block in self.cut.blocks]
        looks = LOOKS * self._learns
        self._looks = [looks * (number in self._outer) for number in range(len(self._taken))]
        for number in range(len(self._taken)):
            self._seat(number)
        infos = [self._management.unit(unit) for unit in self._units(range(len(self._entries)))]
        if any(info and info.pinned for info in infos):
            for entry in self._entries:
                self._management.update(entry, pin=True)  # those that may stay, now

    def _seat(self, number: int) -> None:
        """Have leases of a block take what it takes now."""
        held = [seat for seat in self._seats[number] if seat.leases]
        self._seats[number] = [*held, self._management.seat(self._units(self._taken[number]))]

    def _runs(self, number: int) -> bool:
        return any(seat.leases for seat in self._seats[number])

    def _module_of(self, number: int) -> nn.Module:
        module = self.cut.blocks[number].module()
        assert module is not None  # whoever manages the model holds it
        return module

    def _check(self) -> None:
        block, need, budget = self.cut.largest(), self.largest_need, self._pool.budget
        if block is not None and need > budget:
            around = need - self.cut.bytes_of(block)
            more = f" and {readable(around)} of the modules around it" if around else ""
            raise PoolRefused(
                f"{self._name!r} cannot be streamed: expected blocks of at most "
                f"{readable(budget)}, the budget of pool {self._pool.name!r}, block {block.name!r} "
                f"({type(block.module()).__name__}) has {readable(need - around)}{more}; "
                "raise the budget"
            )

    def _units(self, segments: Iterable[int]) -> list[int]:
        return [
            unit for number in sorted(segments) for unit in self._entries[number].units.values()
        ]

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
    def members(self) -> tuple[Entry, ...]:
        """The entries of its segments."""
        return tuple(self._entries)

    @property
    def largest_need(self) -> int:
        """Bytes that have to be free for it to run at all."""
        block = self.cut.largest()
        return 0 if block is None else self.cut.bytes_held(block)

    def describe(self) -> str:
        return f"disk, {len(self.cut.blocks)} blocks"

    def close(self) -> None:
        """Take the blocks' forwards off; its segments go."""
        self.closed = True
        for block in self.cut.blocks:
            module = block.module()
            forward = None if module is None else module.__dict__.get("forward")
            if isinstance(forward, BlockForward):
                forward.remove()
            if module is not None and isinstance(module._compiled_call_impl, BlockCall):
                module.__dict__.pop(CALL)
        self.pause()
        for segment in self._segments:
            with suppress(PoolRefused):  # held by a call of a part that outlives the model
                self._management.unmanage(segment)
        self._segments.clear()
        self.home.close()

    def pause(self) -> None:
        """Bring in nothing more that nobody has asked for; returns when none is on its way."""
        self._wish = -1
        # Who fetches may bury models on the way, this one too.
        if self._fetcher != threading.get_ident():
            with self._fetching.here:
                return

    def make_room(self, nbytes: int) -> int:
        """Have idle users of its pool give back that much. Returns bytes that came free."""
        return self._management.free(self._pool.name, nbytes)

    # What its blocks call

    @untraced
    def block_seat(self, number: int) -> Any:
        """What leases of that block share."""
        if self._budget != self._pool.budget:
            self._settle()
        return self._seats[number][-1]

    def keeps(self, segment: int) -> bool:
        """Whether it may stay after use; all of them together cannot."""
        return segment in self._kept

    @untraced
    def entered(self, number: int) -> None:
        """A block is there and about to run: have what is expected after it brought in."""
        if not self._taken[number]:
            return
        after = self._course.entered(number)
        if after is not None and not self._is_in(after):
            self._wish = after
            prefetcher.want(weakref.WeakMethod(self._bring_in), after)

    @untraced
    def left(self, number: int) -> None:
        """A block has run: what comes round last goes first."""
        if self._looks[number]:
            self._looks[number] -= 1
            self._look(number)
        for segment in self.cut.blocks[number].segments:
            if not self.keeps(segment):
                self._management.condemn(self._entries[segment])

    def was_read(self, segment: int) -> None:
        """Somebody read an absent segment: a block around its own that runs takes it from now on.

        So weights that are used without their module's forward are found, where the system tells
        what is in memory, and are within the budget from the next call on.
        """
        for number, block in enumerate(self.cut.blocks if self._learns else ()):
            outer = block.around[-1] if block.around else -1
            if segment in block.segments and outer >= 0 and self._runs(outer):
                if not self._runs(number) and self._has_room(outer, segment):
                    self._taken[outer].add(segment)
                    self._seat(outer)
                return

    def _look(self, outer: int) -> None:
        """At the end of one of its first calls: which blocks inside were read while absent."""
        for block in self.cut.blocks:
            if block.around and block.around[-1] == outer:
                for segment in block.segments:
                    units = self._entries[segment].units.values()
                    absent = all(self._management.state(unit) == ABSENT for unit in units)
                    if absent and self.home.resident(segment):
                        self.was_read(segment)

    def _has_room(self, outer: int, segment: int) -> bool:
        """Whether every block still fits where ``outer`` takes the segment as well."""
        sizes, room = self.cut.sizes, self._pool.budget
        for number, block in enumerate(self.cut.blocks):
            if number == outer or outer in block.around:
                held = {segment}.union(*(self._taken[each] for each in (number, *block.around)))
                if sum(sizes[each] for each in held) > room:
                    return False
        return True

    def _is_in(self, number: int) -> bool:
        infos = map(self._management.unit, self._seats[number][-1].units)
        # What was told to go is about to, unless it is taken again.
        return all(i and i.state in (LOADING, READY) and not i.condemned for i in infos)

    def _bring_in(self, number: int) -> None:
        with self._fetching.here:
            if self._wish != number:  # paused, or another one is wanted by now
                return
            self._fetcher = threading.get_ident()
            try:
                self._fetch(number)
            finally:
                self._fetcher = 0

    def _fetch(self, number: int) -> None:
        management = self._management
        owner = _C.pool_owner(management.ledger)
        units = self._seats[number][-1].units
        enter(Ask(management, owner.id, units, flags=TRY))
        if management.ledger.leave(owner.id, units, ()):
            management.pump()
