"""Where a module's weights live for good: in a file, mapped privately.

A parameter is pointed at the map once and not again by moving: with its pages away it reads the
same bytes, only slower. What is changed through it is in pages of this process, which the kernel
tells apart, and goes into the file before they are given back.

What cannot be followed: memory that was taken from a parameter before it was adopted (``p.data``,
``p.detach()``, a NumPy array of it, unless the module keeps it as an attribute) still is the memory
of before; writes to it do not reach the model. And nobody may change the weights while they are
adopted.
"""

from __future__ import annotations

import contextlib
import errno
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opguard import _C
from opguard.pools._forks import ForkLock, forks
from opguard.pools._spill import SpillFile, SpillFolder
from opguard.pools._spill_format import BLOCK, PAGE, Piece
from opguard.pools._storages import (
    ALIGNMENT,
    Leaf,
    Storage,
    grain_of,
    inner_leaves,
    leaves_of,
    refuse,
    storages_of,
    tensor_called,
)
from opguard.pools._user_files import UserFile, user_files_of
from opguard.pools._views import bytes_of, point, shown
from opguard.pools.errors import PoolError, PoolFileChanged

__all__ = ["Home", "Member"]


@dataclass(frozen=True)
class Member:
    """A tensor of the module and where its bytes are at home.

    Attributes:
        name: of the parameter or buffer; ``name::inner`` inside a tensor subclass.
        base: a tensor over the home, of the same shape and strides, whatever the module's own
            points at now.
        segment: index into ``Home.segments``.
        address: of the first element at home; ``base`` itself goes elsewhere by share_memory.
    """

    name: str
    base: Tensor
    segment: int
    address: int


@dataclass(frozen=True)
class _Part:
    """Whole pages of one map that come and go together."""

    pages: _C.SpillMap
    start: int
    end: int
    segment: int
    user_file: UserFile | None = None


class Home:
    """The weights of one module in a file of ours, brought in and given back by whole pages.

    Use ``Home.adopt``. Thread-safe but for ``close``: whoever gives back while somebody computes
    makes that slow, and never wrong.

    Attributes:
        name: for messages.
        nbytes: what the weights take when they are in memory, in whole pages.
        segments: [(start, end)] in bytes, page-aligned, one after the other: what bring_in and
            give_back can move by itself.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self.nbytes = 0
        self.segments: list[tuple[int, int]] = []
        self._module = weakref.ref(module)
        self._members: dict[str, Member] = {}
        self._names: dict[int, str] = {}
        self._parts: list[_Part] = []
        self._file: SpillFile | None = None
        self._folder: SpillFolder | None = None
        self._map: _C.SpillMap | None = None
        self._here: set[int] = set()  # segments that were brought in
        self._forks = forks()
        self._lock = ForkLock()

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        folder: SpillFolder,
        name: str,
        *,
        segments: Sequence[Iterable[Tensor]] | None = None,
        trust_files: bool = False,
    ) -> Home:
        """Writes the module's weights to a file and points its tensors there.

        Afterwards nothing of them is in memory. An error leaves the module as it was.

        Args:
            module: on any device; afterwards its tensors are in host memory. Parameters stay the
                same objects.
            folder: where the file goes.
            name: for messages and the file's name.
            segments: tensors that are to come and go together, one group each; what is in no
                group, or in several, is in the last and the first of them.
            trust_files: weights that ``safetensors`` has mapped stay in the user's file, which is
                looked at whenever they are brought in. What is changed in them stays in memory.

        Raises:
            Unmanageable: weights that must not be moved; the message has the reason.
            OSError: the file cannot be written.
        """
        refuse(module)
        leaves = leaves_of(module)
        self = cls(module, name)
        storages = storages_of(leaves)
        with torch.inference_mode(False), torch.no_grad():
            groups = _grouped(storages, segments)
            theirs = self._trusted(groups) if trust_files else []
            known = set(map(id, theirs))
            ours = [[one for one in group if id(one) not in known] for group in groups]
            bases = self._spill(ours, folder)
            for storage in theirs:
                bases.update((id(leaf), leaf.tensor.detach()) for leaf in storage.leaves)
            self._lay_out(len(groups))
            self._take(leaves, groups, bases)
        return self

    # --- coming and going -------------------------------------------------------------------------

    def check(self, segment: int | None = None) -> None:
        """A look at the files, reading nothing of them.

        Raises:
            PoolFileChanged: one is not as it was mapped.
        """
        for part in self._of(segment):
            self._check(part)

    def bring_in(self, segment: int | None = None) -> None:
        """Reads the pages in, after a look at whether the file is as it was.

        Raises:
            PoolFileChanged: it is not.
            OSError: it cannot be read. After any error no page is in.
        """
        parts = self._of(segment)
        self.check(segment)
        for part in parts:
            try:
                part.pages.populate(part.start, part.end)
            except OSError as error:
                with contextlib.suppress(OSError, PoolFileChanged):
                    self.give_back(segment)
                raise self._said(error, part, "read") from error
        self._here.update(part.segment for part in parts)
        if segment is not None:
            for part in parts:
                self._trim(part)

    def give_back(self, segment: int | None = None) -> int:
        """Writes what was changed to the file and gives all pages to the kernel.

        In a forked child, and in a user's file, changed pages stay in memory instead.

        Returns:
            Bytes written.

        Raises:
            OSError: they could not be written, e.g. for a full disk; they are still in memory.
            PoolFileChanged: the file was cut or written by somebody else.
        """
        written = 0
        parts = self._of(segment)
        self._here.difference_update(part.segment for part in parts)
        with self._lock.here:
            for part in parts:
                try:
                    if self._forks != forks() and part.pages is self._map:
                        written += self._leave_file(part)
                    elif part.user_file is not None:
                        part.pages.check()
                    written += part.pages.give_back(part.start, part.end)
                except OSError as error:
                    raise self._said(error, part, "write") from error
        return written

    def resident(self, segment: int | None = None) -> int:
        """Bytes of the pages that this process holds."""
        return sum(part.pages.resident(part.start, part.end) for part in self._of(segment))

    def changed(self, segment: int | None = None) -> int:
        """Bytes of the pages that were changed and are in no file yet."""
        return sum(part.pages.changed(part.start, part.end) for part in self._of(segment))

    def raise_if_broken(self) -> None:
        """PoolFileChanged if bytes were read that a file no longer has: zeros were computed with.

        For the end of a lease.
        """
        for part in self._parts:
            if part.pages.broken:
                raise self._said(OSError(errno.ESTALE, ""), part, "read")

    # --- tensors ----------------------------------------------------------------------------------

    @property
    def map(self) -> _C.SpillMap | None:
        """The map of our file; None where all weights are in the user's."""
        return self._map

    @property
    def module(self) -> nn.Module | None:
        """The module while it lives."""
        return self._module()

    def member(self, name: str) -> Member:
        """One of `members` by its name."""
        return self._members[name]

    @property
    def members(self) -> list[Member]:
        """The tensors that were adopted, each object once."""
        return list(self._members.values())

    def tensors(self) -> list[tuple[Member, Tensor]]:
        """The module's tensors as they are now; those that were replaced by others are left out."""
        module = self._module()
        if module is None:
            return []
        found = {}
        for member in self._members.values():
            tensor = tensor_called(module, member.name)
            if tensor is not None and self._names.get(id(tensor)) == member.name:
                found[member.name] = (member, tensor)
        if len(found) < len(self._members):
            # Layers put around a module's own, and parametrizations, give tensors other names.
            for leaf in leaves_of(module):
                name = self._names.get(id(leaf.tensor))
                if name is not None and name not in found:
                    found[name] = (self._members[name], leaf.tensor)
        return list(found.values())

    def base(self, tensor: Tensor) -> Tensor:
        """A tensor over the home for one of the module's, wherever that points now.

        Raises:
            PoolError: it is none of those that were adopted.
        """
        module = self._module()
        name = self._names.get(id(tensor))
        if module is None or name is None or tensor_called(module, name) is not tensor:
            raise PoolError(
                f"expected a parameter or buffer of {self.name}, got another tensor of shape "
                f"{tuple(tensor.shape)}; pass the module's own, not a copy or view of it"
            )
        return self._members[name].base

    def astray(self) -> list[str]:
        """Names of tensors that do not point here now: patched, or moved by their owner."""
        return [
            member.name
            for member, tensor in self.tensors()
            if tensor.numel() and tensor.data_ptr() != member.address
        ]

    def release(self) -> None:
        """Puts the weights into ordinary memory and closes; the parameters stay the same."""
        with torch.inference_mode(False), torch.no_grad():
            fresh: dict[int, Tensor] = {}
            for member, tensor in self.tensors():
                if tensor.data_ptr() == member.base.data_ptr():
                    point(tensor, _copied(member.base, fresh))
        self.close()

    def close(self) -> None:
        """Removes the file. Tensors that point here stay readable as long as they live."""
        self._parts, self._map = [], None
        self._members, self._names = {}, {}
        if self._file is not None:
            self._file.close()
            self._file = None

    # --- inside -----------------------------------------------------------------------------------

    def _of(self, segment: int | None) -> list[_Part]:
        return [part for part in self._parts if segment is None or part.segment == segment]

    def _check(self, part: _Part) -> None:
        try:
            part.pages.check()
            if part.user_file is not None:
                part.user_file.check()
        except OSError as error:
            raise self._said(error, part, "read") from error

    def _trim(self, part: _Part) -> None:
        """Gives back what the kernel, which maps blocks, has mapped beside the part."""
        if self._forks != forks():
            return
        for other in self._parts:
            if other.pages is part.pages and other.segment not in self._here:
                start = max(other.start, part.start - BLOCK)
                end = min(other.end, part.end + BLOCK)
                if start < end:
                    with contextlib.suppress(OSError):  # their own coming and going will tell
                        other.pages.give_back(start, end)

    def _trusted(self, groups: list[list[Storage]]) -> list[Storage]:
        """The storages that lie in a user's file already; makes the parts for their pages."""
        found = []
        for index, group in enumerate(groups):
            in_memory = [storage for storage in group if storage.device.type == "cpu"]
            for user_file, storages in user_files_of(in_memory):
                pages = user_file.pages
                self._parts.append(_Part(pages, 0, pages.nbytes, index, user_file))
                found += storages
        return found

    def _spill(self, groups: list[list[Storage]], folder: SpillFolder) -> dict[int, Tensor]:
        """Writes the storages and maps the file; a tensor over the map for the id of each leaf."""
        pieces: list[Piece] = []
        ranges: list[tuple[int, int]] = []
        places: list[tuple[Storage, int]] = []
        end = 0
        for group in groups:
            start = end
            for storage in group:
                end = -(-end // ALIGNMENT) * ALIGNMENT
                pieces.append(Piece(storage.name, storage.nbytes, end, _reader(storage)))
                places.append((storage, end))
                end += storage.nbytes
            end = -(-end // PAGE) * PAGE
            ranges.append((start, end))
        if not places:
            return {}
        self._folder, self.nbytes = folder, end
        self._file = file = folder.write(self.name, pieces, end, {"format": "pt"})
        try:
            grain = grain_of(storage for storage, _ in places)
            pages = _C.SpillMap(file.fd, file.offset, end, grain=grain)
        except OSError as error:
            file.close()
            raise self._said(error, None, "map") from error
        file.let_go()
        self._map = pages
        for index, (start, stop) in enumerate(ranges):
            if stop > start:
                self._parts.append(_Part(pages, start, stop, index))
        bases: dict[int, Tensor] = {}
        for storage, at in places:
            flat = torch.frombuffer(pages, dtype=torch.uint8, count=storage.nbytes, offset=at)
            for leaf in storage.leaves:
                bases[id(leaf)] = shown(leaf.tensor, flat, storage.start)
        return bases

    def _lay_out(self, count: int) -> None:
        """Sizes of the segments, as if they lay one after the other."""
        end = 0
        for index in range(count):
            start = end
            end += sum(-(-(p.end - p.start) // PAGE) * PAGE for p in self._of(index))
            self.segments.append((start, end))
        self.nbytes = end

    def _take(
        self, leaves: list[Leaf], groups: list[list[Storage]], bases: dict[int, Tensor]
    ) -> None:
        """Points the tensors at the home, and gives its pages back; all or none."""
        segment_of = {
            id(leaf): index
            for index, group in enumerate(groups)
            for storage in group
            for leaf in storage.leaves
        }
        pointed: list[tuple[Tensor, Tensor]] = []
        try:
            for leaf in leaves:
                base = bases.get(id(leaf))
                if base is None:  # without elements
                    continue
                before = leaf.tensor.detach()
                if before.data_ptr() != base.data_ptr():
                    point(leaf.tensor, base)
                    pointed.append((leaf.tensor, before))
                self._members[leaf.name] = Member(
                    leaf.name, base, segment_of[id(leaf)], base.data_ptr()
                )
                self._names[id(leaf.tensor)] = leaf.name
            self.give_back()
        except BaseException:
            for tensor, before in pointed:
                point(tensor, before)
            self.close()
            raise

    def _leave_file(self, part: _Part) -> int:
        """After a fork the child reads our file: changes go into a copy of it."""
        file, folder, pages = self._file, self._folder, self._map
        if file is None or folder is None or pages is None or not pages.writable:
            return 0
        if not pages.changed(part.start, part.end):
            return 0
        fresh = folder.copy(file, pages.fileno())
        try:
            written = pages.move(fresh.fd)
        except BaseException:
            fresh.close()
            raise
        fresh.let_go()
        self._file, self._forks = fresh, forks()
        file.close()
        return written

    def _said(self, error: OSError, part: _Part | None, verb: str) -> Exception:
        """The error as one that says whose weights, and what to do."""
        if error.errno == errno.ESTALE:
            user_file = None if part is None else part.user_file
            where = "their spill file" if user_file is None else user_file.path
            return PoolFileChanged(
                f"expected the weights of {self.name} in {where} as they were mapped, the file was "
                "cut, written or replaced since; load the model again"
            )
        if error.errno == errno.ENOMEM:
            return MemoryError(
                f"expected memory to {verb} the weights of {self.name}, {self.nbytes} bytes, the "
                "kernel has none for this process (see ulimit -v, vm.max_map_count and "
                "vm.overcommit_memory)"
            )
        way_out = "what was changed in them is still in memory"
        if verb == "map":
            way_out = "set OPGUARD_SPILL or spill_dir to a folder whose files can be mapped"
        message = f"expected to {verb} the weights of {self.name}: {error.strerror}; {way_out}"
        return type(error)(error.errno, message)


# --- tensors over memory --------------------------------------------------------------------------


def _reader(storage: Storage) -> Any:
    """How the file's writer gets at the bytes; a device's are copied when they are asked for."""

    def memory() -> tuple[int, object]:
        if storage.device.type == "cpu":
            return storage.address, storage
        flat = bytes_of(storage.leaves[0].tensor, storage.start, storage.nbytes).cpu()
        return flat.data_ptr(), flat

    return memory


def _copied(base: Tensor, fresh: dict[int, Tensor]) -> Tensor:
    """The same view of a copy of its storage; tensors of one storage share the copy."""
    storage = base.untyped_storage()
    if storage._cdata not in fresh:
        fresh[storage._cdata] = bytes_of(base, 0, storage.nbytes()).clone()
    return shown(base, fresh[storage._cdata])


def _grouped(
    storages: list[Storage], segments: Sequence[Iterable[Tensor]] | None
) -> list[list[Storage]]:
    """The storages by segment, in order; what no segment names comes last."""
    if segments is None:
        return [storages]
    of = {id(leaf.tensor): index for index, one in enumerate(storages) for leaf in one.leaves}
    taken: set[int] = set()
    groups: list[list[Storage]] = []
    for segment in segments:
        group = []
        for tensor in segment:
            for leaf in inner_leaves("", tensor):
                index = of.get(id(leaf.tensor))
                if index is not None and index not in taken:
                    taken.add(index)
                    group.append(storages[index])
        groups.append(group)
    rest = [one for index, one in enumerate(storages) if index not in taken]
    return [*groups, rest]
