"""Weights that already lie in a file of the user's, because a loader mapped it privately."""

from __future__ import annotations

import bisect
import errno
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from opguard import _C
from opguard.pools._spill_format import PAGE
from opguard.pools._storages import Storage, grain_of

__all__ = ["UserFile", "user_files_of"]

NEAR = 64 << 10  # neighbours have a gap of less between them


class _Mapping(NamedTuple):
    start: int
    end: int
    flags: str
    offset: int
    device: str
    inode: int
    path: str


@dataclass(frozen=True)
class UserFile:
    """Whole pages around storages that are neighbours, and the file they are of.

    Attributes:
        keep: the torch storages. As long as they live the map is there, and nothing else can be
            at its address.
    """

    pages: _C.SpillMap
    path: str
    device: int
    inode: int
    keep: tuple[torch.UntypedStorage, ...]

    def check(self) -> None:
        """OSError ESTALE if another file has the name now."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise OSError(errno.ESTALE, "the file is gone") from error
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            raise OSError(errno.ESTALE, "another file has its name")


def _mappings() -> list[_Mapping]:
    """All mappings of this process, by address."""
    found = []
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                fields = line.rstrip("\n").split(maxsplit=5)
                low, high = (int(part, 16) for part in fields[0].split("-"))
                path = fields[5] if len(fields) > 5 else ""
                found.append(
                    _Mapping(
                        low, high, fields[1], int(fields[2], 16), fields[3], int(fields[4]), path
                    )
                )
    except OSError:
        pass
    return found


def user_files_of(storages: list[Storage]) -> list[tuple[UserFile, list[Storage]]]:
    """The private maps of files that storages lie in; those in ordinary memory are left out.

    Left out too where the file cannot be found any more by its name: their bytes are then copied.
    Neighbours in one file are one entry, so that a checkpoint of many tensors is a few.
    """
    mappings = _mappings()
    starts = [mapping.start for mapping in mappings]
    runs: list[tuple[_Mapping, list[Storage]]] = []
    for storage in sorted(storages, key=lambda one: one.address):
        mapping = mappings[max(0, bisect.bisect(starts, storage.address) - 1)] if mappings else None
        if (
            mapping is None
            or not mapping.start <= storage.address <= mapping.end - storage.nbytes
            or "p" not in mapping.flags
            or not mapping.path.startswith("/")
        ):
            continue
        if runs and runs[-1][0] is mapping and storage.address - _end_of(runs[-1][1]) < NEAR:
            runs[-1][1].append(storage)
        else:
            runs.append((mapping, [storage]))
    files = ((_opened(mapping, run), run) for mapping, run in runs)
    return [(user_file, run) for user_file, run in files if user_file is not None]


def _end_of(storages: list[Storage]) -> int:
    return max(one.address + one.nbytes for one in storages)


def _opened(mapping: _Mapping, storages: list[Storage]) -> UserFile | None:
    """The file of a mapping, if it still has that name."""
    try:
        fd = os.open(mapping.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        major, minor = (int(part, 16) for part in mapping.device.split(":"))
        if (found.st_dev, found.st_ino) != (os.makedev(major, minor), mapping.inode):
            return None
        first = storages[0].address // PAGE * PAGE
        offset = mapping.offset + first - mapping.start
        size = _end_of(storages) - first
        pages = _C.SpillMap(fd, offset, size, None, first, grain_of(storages))
        kept = tuple(one.leaves[0].tensor.untyped_storage() for one in storages)
        return UserFile(pages, mapping.path, found.st_dev, found.st_ino, kept)
    except OSError:
        return None
    finally:
        os.close(fd)
