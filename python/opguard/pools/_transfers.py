"""Memory of an accelerator for one module, and how bytes get there and back.

A place has room for the module's weights by segment. `ArenaPlace` has addresses reserved for good
on a GPU and memory behind them while it is needed; `TorchPlace` asks torch for tensors, on anything
that torch calls a device. Neither knows of parameters: it is told buffers of host memory.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opguard import _C
from opguard.pools._storages import ALIGNMENT, Leaf, storages_of
from opguard.pools._views import bytes_of, shown
from opguard.pools.errors import PoolRefused

if TYPE_CHECKING:
    from opguard.pools._homes import Home, Member

__all__ = ["ArenaPlace", "Master", "Place", "Run", "Span", "TorchPlace", "checksum", "lay_out"]

CHUNK = 1 << 20  # words of eight bytes that a checksum looks at together
PATIENCE = 5.0  # seconds to wait for the end of a capture before memory is kept


@dataclass(frozen=True, eq=False)
class Run:
    """Bytes that one or more tensors of the module share.

    Attributes:
        segment: index into the home's segments.
        at: first byte in the segment's place.
        host: the same bytes at home, a flat tensor of uint8.
        begin: bytes of the home's torch storage before ``host``.
        members: the tensors.
    """

    segment: int
    at: int
    host: Tensor
    begin: int
    members: tuple[Member, ...]

    @property
    def nbytes(self) -> int:
        return self.host.numel()

    def shown(self, member: Member, flat: Tensor) -> Tensor:
        """A tensor like the member's at home, over ``flat`` instead of ``host``."""
        return shown(member.base, flat, self.begin)


@dataclass(frozen=True, eq=False)
class Span:
    """One piece of host memory that is one piece of a segment's place too."""

    at: int
    memory: memoryview

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


def lay_out(home: Home) -> tuple[list[list[Run]], list[list[Span]], list[int]]:
    """Where the home's bytes go: runs, spans and bytes of each segment.

    The order is that of the home's addresses, so that what is one piece there stays one.
    """
    runs: list[list[Run]] = []
    spans: list[list[Span]] = []
    sizes: list[int] = []
    for segment in range(len(home.segments)):
        found, end = _runs_of(home, segment)
        runs.append(found)
        spans.append(_spans_of(home, found))
        sizes.append(end)
    return runs, spans, sizes


def _runs_of(home: Home, segment: int) -> tuple[list[Run], int]:
    members = {id(m.base): m for m in home.members if m.segment == segment}
    leaves = [Leaf(member.name, member.base) for member in members.values()]
    found: list[Run] = []
    end = 0
    for storage in sorted(storages_of(leaves), key=lambda one: one.address):
        at = -(-end // ALIGNMENT) * ALIGNMENT
        inside = tuple(members[id(leaf.tensor)] for leaf in storage.leaves)
        host = bytes_of(storage.leaves[0].tensor, storage.start, storage.nbytes)
        found.append(Run(segment, at, host, storage.start, inside))
        end = at + storage.nbytes
    return found, end


def _spans_of(home: Home, runs: Sequence[Run]) -> list[Span]:
    """Runs that lie in our file one after the other, as they do in the place, are one span."""
    first = home.map.address if home.map is not None else 0
    last = first + home.map.nbytes if home.map is not None else 0
    groups: list[list[Run]] = []
    for run in runs:
        address = run.host.data_ptr()
        before = groups[-1][-1] if groups else None
        together = before is not None and first <= before.host.data_ptr() and address < last
        if together and before and address - before.host.data_ptr() == run.at - before.at:
            groups[-1].append(run)
        else:
            groups.append([run])
    return [_span(home, group, first) for group in groups]


def _span(home: Home, group: list[Run], first: int) -> Span:
    if len(group) == 1 or home.map is None:
        return Span(group[0].at, _buffer(group[0].host))
    start = group[0].host.data_ptr() - first
    stop = group[-1].host.data_ptr() + group[-1].nbytes - first
    whole: Any = home.map  # types know of the buffer protocol since Python 3.12
    return Span(group[0].at, memoryview(whole).cast("B")[start:stop])


def _buffer(flat: Tensor) -> memoryview:
    array: Any = flat.numpy()
    return memoryview(array)


# --- the pinned copy ------------------------------------------------------------------------------


class Master:
    """A copy of a module's weights in pinned host memory, which may be there or not.

    A cache: it is filled from the home when it is needed and can go at any time that nobody copies.

    Attributes:
        nbytes: what it takes while it is there.
    """

    def __init__(self, driver: _C.DeviceDriver, sizes: Sequence[int]) -> None:
        self._driver = driver
        self.starts: list[int] = []
        end = 0
        for size in sizes:
            self.starts.append(end)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.nbytes = end
        self.memory: _C.PinnedMemory | None = None
        self.filled: set[int] = set()

    def open(self) -> None:
        """Pin memory for it, unless there is some. MemoryError where the host has none."""
        if self.memory is None and self.nbytes:
            self.filled = set()
            self.memory = _C.PinnedMemory(self._driver, self.nbytes)

    def close(self) -> None:
        """Give its memory back, after the copies that are under way."""
        memory, self.memory = self.memory, None
        if memory is not None:
            memory.close()

    def fill(self, segment: int, spans: Sequence[Span]) -> None:
        """Copy a segment in from the home."""
        assert self.memory is not None
        for span in spans:
            self.memory.fill(self.starts[segment] + span.at, span.memory)
        self.filled.add(segment)


# --- places ---------------------------------------------------------------------------------------


class Arrival(ABC):
    """A copy that is under way."""

    @abstractmethod
    def wait(self) -> None:
        """Block this thread until the bytes are there."""

    @abstractmethod
    def hold(self, stream: int) -> None:
        """Let a stream wait for them instead, where it can."""


class _Arrived(Arrival):
    def wait(self) -> None:
        pass

    def hold(self, stream: int) -> None:
        pass


class _Coming(Arrival):
    def __init__(self, driver: _C.DeviceDriver) -> None:
        self._driver = driver
        self._event = driver.copies()

    def wait(self) -> None:
        self._event.wait()

    def hold(self, stream: int) -> None:
        # A graph cannot wait for what is not captured with it, and would be lost by trying.
        if self._driver.capturing():
            self._event.wait()
        else:
            self._event.hold(stream)


class Place(ABC):
    """Room on an accelerator for the segments of one module.

    Attributes:
        device: what torch calls the accelerator.
        sizes: bytes a segment takes while it is there.
        copies_outlive: whether tensors over the place are good after its memory went.
    """

    device: torch.device
    sizes: list[int]
    copies_outlive = True
    master: Master | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    @abstractmethod
    def take(self, segment: int) -> None:
        """Memory for a segment. torch.OutOfMemoryError where there is none, and nothing changed."""

    @abstractmethod
    def drop(self, segment: int) -> None:
        """Give a segment's memory back; nothing that is queued uses it."""

    @abstractmethod
    def flat(self, run: Run) -> Tensor:
        """The run's bytes there, of uint8; the same address each time where that can be had."""

    @abstractmethod
    def send(self, segment: int, spans: Sequence[Span], master: Master | None) -> Arrival:
        """Start copying a segment's bytes in, from its master if that is given."""

    @abstractmethod
    def fetch(self, run: Run, master: Master | None) -> int:
        """Copy a run's bytes home, where they differ. Returns bytes written."""

    @abstractmethod
    def rest(self) -> None:
        """Wait for what was queued on the accelerator up to now, on every stream.

        PoolRefused where that would spoil a CUDA graph that is being captured.
        """

    def still(self) -> None:
        """Wait until no CUDA graph is captured that torch's own work and waits would spoil.

        PoolRefused where this thread captures it, or it takes too long.
        """
        if _this_thread_captures(self.device):
            raise PoolRefused(
                "expected weights to come and go outside of the capture of a CUDA graph, this "
                f"thread captures one on {self.device}; hold the lease around the capture"
            )

    def settle(self) -> None:
        """Wait for the copies that were sent and fetched."""
        self.rest()


def _this_thread_captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class ArenaPlace(Place):
    """Addresses of a GPU, reserved once and for as many bytes as the module has."""

    copies_outlive = False

    def __init__(
        self, driver: _C.DeviceDriver, device: torch.device, sizes: Sequence[int], kind: int = 2
    ) -> None:
        unit = driver.granularity
        self._driver = driver
        self.device = device
        self._kind = kind
        self.sizes = [-(-size // unit) * unit for size in sizes]
        self.starts = [sum(self.sizes[:index]) for index in range(len(sizes))]
        self.arena = _C.DeviceArena(driver, max(1, self.nbytes))
        self.master = Master(driver, sizes)
        self._flats: dict[Run, Tensor] = {}
        self._taken: set[int] = set()

    def take(self, segment: int) -> None:
        start = self.starts[segment]
        end = start + self.sizes[segment]
        if start == end or segment in self._taken:
            return
        try:
            self.arena.map(start, end)
        except MemoryError:
            # What torch's allocator keeps for later is as good as free, to torch alone. Giving it
            # back waits for the whole device.
            if self.device.type == "cuda" and not self._driver.capturing():
                torch.cuda.empty_cache()
            try:
                self.arena.map(start, end)
            except MemoryError as error:
                raise torch.OutOfMemoryError(str(error)) from error
        self._taken.add(segment)

    def drop(self, segment: int) -> None:
        if segment in self._taken:
            self.arena.unmap(self.starts[segment], self.starts[segment] + self.sizes[segment])
            self._taken.discard(segment)

    def flat(self, run: Run) -> Tensor:
        if run not in self._flats:
            start = self.starts[run.segment] + run.at
            capsule = self.arena.dlpack(start, run.nbytes, self._kind)
            made: Tensor = torch.utils.dlpack.from_dlpack(capsule)
            self._flats[run] = made
        return self._flats[run]

    def send(self, segment: int, spans: Sequence[Span], master: Master | None) -> Arrival:
        start = self.starts[segment]
        try:
            if master is not None and master.memory is not None:
                size = max((span.at + span.nbytes for span in spans), default=0)
                if size:
                    self.arena.copy_in(start, master.memory, master.starts[segment], size)
            else:
                for span in spans:
                    self.arena.stage_in(start + span.at, span.memory)
            return _Coming(self._driver)
        except BaseException:
            # Some of it may be under way into memory that is about to go.
            with contextlib.suppress(RuntimeError):
                self.settle()
            raise

    def fetch(self, run: Run, master: Master | None) -> int:
        if not run.nbytes:
            return 0
        start = self.starts[run.segment] + run.at
        target = _buffer(run.host)
        if master is None or master.memory is None:
            return self.arena.stage_out(start, target)
        at = master.starts[run.segment] + run.at
        # Were the copy to fail half way, the master would be neither the old nor the new.
        whole = run.segment in master.filled
        master.filled.discard(run.segment)
        self.arena.copy_out(start, master.memory, at, run.nbytes)
        self.settle()
        if whole:
            master.filled.add(run.segment)
        return master.memory.pour(at, target)

    def rest(self) -> None:
        self.still()
        self._driver.work().wait()

    def still(self) -> None:
        until = time.monotonic() + PATIENCE
        while self._driver.capturing():
            super().still()
            if time.monotonic() > until:
                raise PoolRefused(
                    f"expected no CUDA graph to be captured on {self.device}, one has been for "
                    f"{PATIENCE:g} s: waiting for the kernels that use the memory would spoil it"
                )
            time.sleep(0.001)

    def settle(self) -> None:
        self._driver.copies().wait()


class TorchPlace(Place):
    """Tensors of torch's own, for devices whose driver is not spoken to here."""

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        self.device = device
        self.sizes = list(sizes)
        self._flats: dict[int, Tensor] = {}

    def take(self, segment: int) -> None:
        self.still()
        size = self.sizes[segment]
        self._flats[segment] = torch.empty(size, dtype=torch.uint8, device=self.device)

    def drop(self, segment: int) -> None:
        self._flats.pop(segment, None)

    def flat(self, run: Run) -> Tensor:
        return self._flats[run.segment][run.at : run.at + run.nbytes]

    def send(self, segment: int, spans: Sequence[Span], master: Master | None) -> Arrival:
        for span in spans:
            source = torch.frombuffer(span.memory, dtype=torch.uint8)
            self._flats[segment][span.at : span.at + span.nbytes].copy_(source)
        self.rest()
        return _Arrived()

    def fetch(self, run: Run, master: Master | None) -> int:
        there = self.flat(run).to("cpu")
        if torch.equal(there, run.host):
            return 0
        run.host.copy_(there)
        return run.nbytes

    def rest(self) -> None:
        if self.device.type != "cpu":
            self.still()
            torch.accelerator.synchronize(self.device)


# --- looking at bytes -----------------------------------------------------------------------------


def checksum(flat: Tensor) -> int:
    """64 bits of all bytes and where they stand, computed where they are.

    Every change of one word shows; several together stay unseen with a probability of 2**-64.
    """
    count = flat.numel() // 8 * 8
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    words = torch.empty(0, dtype=torch.int64, device=flat.device)
    words.set_(flat.untyped_storage(), flat.storage_offset() // 8, (count // 8,), (1,))
    for start in range(0, count // 8, CHUNK):
        total += _mixed(words[start : start + CHUNK], start)
    if count < flat.numel():
        total += _mixed(flat[count:].to(torch.int64), -8)
    return int(total)


def _mixed(words: Tensor, start: int) -> Tensor:
    """Sum of the words, each stirred together with its place by multiplying and shifting."""
    places = torch.arange(start, start + words.numel(), dtype=torch.int64, device=words.device)
    stirred = places.mul_(-7046029254386353131).add_(words)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        stirred ^= (stirred >> shift) & ((1 << (64 - shift)) - 1)
        stirred *= factor
    stirred ^= (stirred >> 31) & ((1 << 33) - 1)
    return stirred.sum()
