"""A module's weights on an accelerator while they are needed there, and at home otherwise.

What is copied back is what was changed there, as far as it can be seen without looking at the
bytes. Seen: every write that moves a tensor's version (in-place ops, ``load_state_dict``,
optimizers that are not fused), and then all tensors of that module. Assumed: weights of a module in
training mode, because fused optimizers and the statistics of batch norm move no version. Not seen,
in eval mode: writes through ``p.data``, DLPack, or a kernel of one's own. ``verify="bytes"`` sees
them all, by a checksum computed on the device.

What is taken from a parameter while it is on a GPU (``p.detach()``, a view that a model returns)
lies in memory that goes with the model. As long as there is such a tensor the model stays there.
A CUDA graph holds addresses only, which stay the same: replay it inside a lease.

Memory goes after the kernels that use it, on whatever stream they were queued. A lease does not
tell its streams, and a stream that it used need not be current when it ends; so what is waited for
is a mark over all streams, set when another model came in and this one was idle already. Only a
model that was in use since then waits for all that is queued now. The driver refuses such marks
while a CUDA graph is captured, and the capture is lost: its end is waited for, five seconds at
most, and then the model stays. Captures on streams that are not torch's own are not seen.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from opguard import _C
from opguard.pools._accelerators import Accelerator
from opguard.pools._lending import Lender
from opguard.pools._transfers import (
    Arrival,
    Master,
    Run,
    checksum,
    lay_out,
)
from opguard.pools._views import point, version_of
from opguard.pools.errors import PoolRefused

if TYPE_CHECKING:
    from opguard.pools._homes import Home, Member

__all__ = ["DeviceHome", "Lend"]

Lend = Callable[[Master], contextlib.AbstractContextManager[Master | None]]


# --- a module's weights ---------------------------------------------------------------------------


@dataclass
class _Segment:
    """What is known of one segment while its memory is on the device."""

    arrival: Arrival
    lent: contextlib.ExitStack
    views: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int | None] = field(default_factory=dict)
    sums: dict[Run, int] | None = None
    arrived: bool = False
    last_use: _C.DeviceEvent | None = None


@contextlib.contextmanager
def _always(master: Master) -> Iterator[Master | None]:
    """A master for whoever asks, kept: where nobody counts host memory."""
    try:
        master.open()
    except (MemoryError, RuntimeError):
        yield None
    else:
        yield master


class DeviceHome:
    """A home whose weights can be on an accelerator: the same verbs, and the same objects.

    Thread-safe. An error on the way in leaves everything at home, one on the way out leaves
    everything on the device.

    Args:
        home: the weights in host memory.
        accelerator: where they are brought to.
        verify: ``"bytes"`` compares checksums to see what was changed on the device; None trusts
            versions and training mode.
        lend: opens the pinned copy for a block, or says None where host memory has no room for it;
            copies then go through a small ring.

    Attributes:
        nbytes: what the weights take on the device.
        master: the pinned copy, None for devices that are not copied to by their driver.
    """

    def __init__(
        self,
        home: Home,
        accelerator: Accelerator,
        *,
        verify: str | None = None,
        lend: Lend = _always,
    ) -> None:
        if verify not in (None, "bytes"):
            raise ValueError(f"expected verify to be None or 'bytes', got {verify!r}")
        self.home = home
        self.accelerator = accelerator
        self.verify = verify
        self.lend = lend
        self._runs, self._spans, sizes = lay_out(home)
        self._place = accelerator.place(sizes)
        self._there: dict[int, _Segment] = {}
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        return self.home.name

    @property
    def nbytes(self) -> int:
        return self._place.nbytes

    @property
    def master(self) -> Master | None:
        return self._place.master

    @property
    def segments(self) -> list[tuple[int, int]]:
        """What can be moved by itself, as bytes of the device's memory one after the other."""
        ends = list(accumulate(self._place.sizes, initial=0))
        return list(pairwise(ends))

    # --- coming -----------------------------------------------------------------------------------

    def prefetch(self, segment: int | None = None) -> None:
        """Starts copying, and does not wait; `bring_in` then finds the bytes on their way.

        Raises:
            torch.OutOfMemoryError: the device has no room.
            PoolFileChanged: the file at home is not the one that was written.
        """
        begun: list[int] = []
        with self._lock:
            try:
                for index in self._of(segment):
                    if index not in self._there:
                        begun.append(index)
                        self._there[index] = self._begin(index)
            except BaseException:
                self._undo(begun)
                raise

    def bring_in(self, segment: int | None = None, *, stream: int | None = None) -> None:
        """Copies the weights over and points the parameters there.

        Args:
            segment: only this one.
            stream: a stream (``Stream.cuda_stream``) that is to wait for the copy in place of this
                thread: for whoever runs the module on that stream and no other.

        Raises:
            torch.OutOfMemoryError: the device has no room.
            PoolFileChanged: the file at home is not the one that was written.
            RuntimeError: the driver failed.
        """
        with self._lock:
            new = [i for i in self._of(segment) if i not in self._there or not self.is_in(i)]
            self.prefetch(segment)
            try:
                for index in new:
                    self._finish(index, None if self.accelerator.host_computes else stream)
            except BaseException:
                self._undo(new)
                raise

    def is_in(self, segment: int) -> bool:
        """Whether the parameters of a segment point to the device."""
        there = self._there.get(segment)
        return there is not None and there.arrived

    def _begin(self, index: int) -> _Segment:
        home, place, spans = self.home, self._place, self._spans[index]
        place.take(index)
        lent = contextlib.ExitStack()
        try:
            master = place.master and lent.enter_context(self.lend(place.master))
            home.check(index)
            if master is None:
                home.bring_in(index)
            elif index not in master.filled or home.changed(index):
                home.bring_in(index)
                master.fill(index, spans)
            arrival = place.send(index, spans, master)
            home.give_back(index)
            return _Segment(arrival, lent)
        except BaseException:
            # What may still be copied into is kept, and used by the next that comes in.
            with lent, contextlib.suppress(RuntimeError):
                place.settle()
                place.drop(index)
            raise

    def _finish(self, index: int, stream: int | None) -> None:
        there = self._there[index]
        if stream is None:
            there.arrival.wait()
            there.lent.close()
        else:
            there.arrival.hold(stream)
        with torch.inference_mode(False), torch.no_grad():
            if self.verify == "bytes":
                there.arrival.wait()
                self._place.still()
                there.sums = {run: checksum(self._place.flat(run)) for run in self._runs[index]}
            tensors = self._tensors()
            for run in self._runs[index]:
                flat = self._place.flat(run)
                for member in run.members:
                    there.views[member.name] = run.shown(member, flat)
            there.arrived = True
            for name, tensor in tensors.items():
                self._point(tensor, self._base(name), there.views.get(name))
                there.versions[name] = version_of(tensor)

    def _undo(self, begun: Sequence[int]) -> None:
        """Back home with what came in half; whatever fails meanwhile, the parameters are there."""
        for index in begun:
            there = self._there.pop(index, None)
            if there is not None:
                self._point_home(there)
                there.views.clear()
                with there.lent, contextlib.suppress(RuntimeError):
                    # Nobody has seen it yet but the copy, and checksums where there are some.
                    if self.verify is None:
                        self._place.settle()
                    else:
                        self._place.rest()
                    self._place.drop(index)

    # --- going ------------------------------------------------------------------------------------

    def unused_since(self, mark: _C.DeviceEvent | None, segment: int | None = None) -> None:
        """Tells `give_back` what to wait for, in place of all that is queued when it is called.

        Args:
            mark: was recorded when nobody used the weights any more, and nobody has since. None
                takes that back.
            segment: only this one.
        """
        for index in self._of(segment):
            there = self._there.get(index)
            if there is not None:
                there.last_use = mark

    def _rest(self, there: _Segment) -> None:
        """Wait for all that may use a segment's memory."""
        if there.last_use is None or there.sums is not None:
            self._place.rest()
        else:
            there.arrival.wait()
            there.last_use.wait()

    def give_back(self, segment: int | None = None) -> int:
        """Points the parameters home and gives the device's memory back; changes go home first.

        Returns:
            Bytes written to the file.

        Raises:
            PoolRefused: somebody still has a tensor of the device's memory, or a CUDA graph is
                being captured that waiting would spoil; all is as it was.
            OSError, RuntimeError: what was changed could not be copied or written.
        """
        written = 0
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for index in self._of(segment):
                if index in self._there:
                    written += self._go(index)
                else:
                    more = self.home.give_back(index)
                    if more and self.master is not None:
                        self.master.filled.discard(index)
                    written += more
        return written

    def _go(self, index: int) -> int:
        there = self._there[index]
        written = 0
        if there.arrived:
            self._refuse_viewed(index, there)
        self._rest(there)
        if there.arrived:
            changed = self._changed_runs(index, there)
            if changed:
                written = self._fetch(index, changed)
            self._point_home(there)
        try:
            there.lent.close()
            self._place.drop(index)
        except BaseException:
            for name, tensor in self._tensors().items():
                self._point(tensor, self._base(name), there.views.get(name))
            raise
        there.views.clear()
        del self._there[index]
        return written

    def _fetch(self, index: int, changed: Sequence[Run]) -> int:
        """Copy changed runs home and into the file."""
        with contextlib.ExitStack() as stack:
            master = self._place.master
            if master is not None and index in master.filled and master.memory is not None:
                master = stack.enter_context(self.lend(master))
            else:
                master = None
            for run in changed:
                self._place.fetch(run, master)
        return self.home.give_back(index)

    def _refuse_viewed(self, index: int, there: _Segment) -> None:
        if self._place.copies_outlive:
            return
        tensors = self._tensors()
        for run in self._runs[index]:
            storage = self._place.flat(run).untyped_storage()
            # Ours, Python's handle of it, the views kept here, and the parameters.
            expected = 2 + len(run.members)
            for member in run.members:
                tensor = tensors.get(member.name)
                view = there.views[member.name]
                expected += tensor is not None and tensor.data_ptr() == view.data_ptr()
            more = torch._C._storage_Use_Count(storage._cdata) - expected
            if more > 0:
                raise PoolRefused(
                    f"expected {self.name} to be in nobody's use, but {more} tensors outside of it "
                    f"share the memory of {run.members[0].name} on {self.accelerator.device}: drop "
                    "or clone what was taken from its weights (views, detach(), state_dict())"
                )

    # --- what was changed -------------------------------------------------------------------------

    def changed(self, segment: int | None = None) -> int:
        """Bytes that would be compared, and copied where they differ, if it were given back."""
        total = 0
        with self._lock:
            for index in self._of(segment):
                there = self._there.get(index)
                if there is not None and there.arrived:
                    if there.sums is not None:
                        self._place.rest()
                    total += sum(run.nbytes for run in self._changed_runs(index, there))
                else:
                    total += self.home.changed(index)
        return total

    def _changed_runs(self, index: int, there: _Segment) -> list[Run]:
        if there.sums is not None:
            sums = ((run, checksum(self._place.flat(run))) for run in self._runs[index])
            return [run for run, found in sums if there.sums[run] != found]
        tensors = self._tensors()
        moved = {
            name
            for name, before in there.versions.items()
            if before is None or (name in tensors and version_of(tensors[name]) != before)
        }
        owners = {_owner(name) for name in moved} | self._training()
        return [
            run
            for run in self._runs[index]
            if any(m.name in moved or _owner(m.name) in owners for m in run.members)
        ]

    def _training(self) -> set[str]:
        """Modules whose tensors may be written without a version moving."""
        module = self.home.module
        return (
            {name for name, part in module.named_modules() if _may_train(part)} if module else set()
        )

    # --- tensors ----------------------------------------------------------------------------------

    @property
    def members(self) -> list[Member]:
        return self.home.members

    def tensors(self) -> list[tuple[Member, Tensor]]:
        """The module's tensors as they are now; those that were replaced are left out."""
        return self.home.tensors()

    def base(self, tensor: Tensor) -> Tensor:
        """The module's own weights for one of its tensors, on the device while they are there."""
        base = self.home.base(tensor)
        with self._lock:
            for member, other in self.home.tensors():
                if other is tensor and self.is_in(member.segment):
                    return self._there[member.segment].views.get(member.name, base)
        return base

    def astray(self) -> list[str]:
        """Names of tensors that point neither home nor to the device: patched, or moved."""
        ours, astray = self.addresses(), set(self.home.astray())
        return [
            name
            for name, tensor in self._tensors().items()
            if name in astray and tensor.data_ptr() not in ours
        ]

    def addresses(self) -> set[int]:
        """Where the tensors that are on the device now begin."""
        with self._lock:
            there = tuple(self._there.values())
            return {view.data_ptr() for segment in there for view in segment.views.values()}

    def _tensors(self) -> dict[str, Tensor]:
        return {member.name: tensor for member, tensor in self.home.tensors()}

    def _base(self, name: str) -> Tensor:
        return self.home.member(name).base

    @staticmethod
    def _point(tensor: Tensor, here: Tensor, there: Tensor | None) -> None:
        """Let a tensor that points here point there; one that points elsewhere is its owner's."""
        if there is not None and tensor.data_ptr() == here.data_ptr():
            point(tensor, there)

    def _point_home(self, there: _Segment) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self._tensors().items():
                view = there.views.get(name)
                if view is not None:
                    self._point(tensor, view, self._base(name))

    # --- the rest of a home -----------------------------------------------------------------------

    def _of(self, segment: int | None) -> Sequence[int]:
        return range(len(self._runs)) if segment is None else (segment,)

    def resident(self, segment: int | None = None) -> int:
        """Bytes on the device."""
        return sum(self._place.sizes[index] for index in self._of(segment) if index in self._there)

    def raise_if_broken(self) -> None:
        """PoolFileChanged if bytes were read at home that the file no longer has."""
        self.home.raise_if_broken()

    def release(self) -> None:
        """Puts the weights into ordinary host memory and closes; the parameters stay the same."""
        self.give_back()
        self._close_place()
        self.home.release()

    def close(self) -> None:
        """Removes the file. Tensors that point home or to the device stay good while they live."""
        with contextlib.suppress(RuntimeError):  # still used by somebody, or the device broke down
            self.give_back()
        self._close_place()
        self.home.close()

    def _close_place(self) -> None:
        if self.master is not None:
            self.master.close()
        if isinstance(self.lend, Lender):
            self.lend.close()
        self._there, self._runs, self._spans = {}, [], []


def _owner(name: str) -> str:
    return name.partition("::")[0].rpartition(".")[0]


def _may_train(module: nn.Module) -> bool:
    parameters = (p for p in module._parameters.values() if p is not None)
    own = any(p.requires_grad for p in parameters)
    return module.training and (own or any(b is not None for b in module._buffers.values()))
