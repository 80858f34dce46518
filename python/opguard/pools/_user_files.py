"""Weights that already lie in a file of the user's, because a loader mapped it privately."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from opguard import _C
from opguard.pools._spill import PAGE
from opguard.pools._storages import Storage

__all__ = ["UserFile", "user_file_of"]


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
    """Whole pages around one storage, and the file they are of.

    Attributes:
        keep: the torch storage. As long as it lives the map is there, and nothing else can be at
            its address.
    """

    pages: _C.SpillMap
    path: str
    device: int
    inode: int
    keep: torch.UntypedStorage

    def check(self) -> None:
        """OSError ESTALE if another file has the name now."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise OSError(errno.ESTALE, "the file is gone") from error
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            raise OSError(errno.ESTALE, "another file has its name")


def _mapping_of(start: int, end: int) -> _Mapping | None:
    """The mapping that holds these bytes, as the kernel lists it."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                fields = line.rstrip("\n").split(maxsplit=5)
                low, high = (int(part, 16) for part in fields[0].split("-"))
                if low <= start and end <= high:
                    path = fields[5] if len(fields) > 5 else ""
                    return _Mapping(
                        low, high, fields[1], int(fields[2], 16), fields[3], int(fields[4]), path
                    )
    except OSError:
        pass
    return None


def user_file_of(storage: Storage) -> UserFile | None:
    """The file that a storage is privately mapped from; None if it is in ordinary memory.

    None too where the file cannot be found any more by its name: its bytes are then copied.
    """
    start, end = storage.address, storage.address + storage.nbytes
    mapping = _mapping_of(start, end)
    if mapping is None or "p" not in mapping.flags or not mapping.path.startswith("/"):
        return None
    try:
        fd = os.open(mapping.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        major, minor = (int(part, 16) for part in mapping.device.split(":"))
        if (found.st_dev, found.st_ino) != (os.makedev(major, minor), mapping.inode):
            return None
        first = start // PAGE * PAGE
        offset = mapping.offset + first - mapping.start
        pages = _C.SpillMap(fd, offset, end - first, None, first)
        kept = storage.leaves[0].tensor.untyped_storage()
        return UserFile(pages, mapping.path, found.st_dev, found.st_ino, kept)
    except OSError:
        return None
    finally:
        os.close(fd)
