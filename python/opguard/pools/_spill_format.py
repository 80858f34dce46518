"""What is in a spilled file: a safetensors header, then bytes of storages from a whole page on."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opguard.pools.errors import PoolFileChanged

__all__ = [
    "BLOCK",
    "PAGE",
    "Layout",
    "Piece",
    "allocate",
    "copy",
    "laid_out",
    "safetensors_header",
    "write",
    "write_pieces",
]

PAGE = os.sysconf("SC_PAGESIZE")
BLOCK = 2 << 20  # what one entry of a page table maps at most
CHUNK = 64 << 20  # one system call writes at most this much, so that Ctrl-C is not held up
MOST_PARTS = 1000  # below IOV_MAX


@dataclass(frozen=True)
class Piece:
    """Bytes of one storage: where they go in the file's data, and how to find them.

    ``memory()`` gives (address, what keeps it alive): what lies on a device is fetched as it is
    written, one piece at a time.
    """

    name: str
    nbytes: int
    offset: int
    memory: Callable[[], tuple[int, object]]


@dataclass(frozen=True)
class Layout:
    """Where what is in a file, in bytes; between header and data may be a hole."""

    header: int
    offset: int
    nbytes: int

    @property
    def used(self) -> int:
        return self.header + self.nbytes

    @property
    def ranges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(offset, size) of both."""
        return (0, self.header), (self.offset, self.nbytes)


def safetensors_header(
    pieces: Sequence[Piece],
    nbytes: int,
    metadata: Mapping[str, str],
    lead: int = 0,
    at_least: int = 0,
) -> bytes:
    """A header whose length is a whole number of pages; gaps between pieces have names too.

    Args:
        lead: bytes between it and the data.
        at_least: its length, in whole pages.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        start = lead + piece.offset
        if start > end:
            entries[f"~gap.{end}"] = _entry(end, start)
        end = start + piece.nbytes
        entries[piece.name] = _entry(start, end)
    if lead + nbytes > end:
        entries[f"~gap.{end}"] = _entry(end, lead + nbytes)
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = max(at_least, -(-(len(text) + 8) // PAGE) * PAGE) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def laid_out(
    pieces: Sequence[Piece], nbytes: int, metadata: Mapping[str, str]
) -> tuple[bytes, Layout]:
    """The header, and where the data begin: where a block does, if they fill one.

    Else every large folio of theirs would lie across two entries of a page table.
    """
    if nbytes < BLOCK:
        header = safetensors_header(pieces, nbytes, metadata)
        return header, Layout(len(header), len(header), nbytes)
    # No number is longer with a smaller lead, so that this is long enough.
    length = len(safetensors_header(pieces, nbytes, metadata, BLOCK))
    lead = -length % BLOCK
    header = safetensors_header(pieces, nbytes, metadata, lead, length)
    return header, Layout(length, length + lead, nbytes)


def _entry(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


def allocate(fd: int, offset: int, size: int) -> None:
    """A disk that is too small says so now, where it can."""
    try:
        os.posix_fallocate(fd, offset, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, offset + size)


def write(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view[:CHUNK], offset)
        view, offset = view[done:], offset + done


def copy(fd: int, to: int, at: int, left: int) -> None:
    while left:
        part = os.pread(fd, min(CHUNK, left), at)
        if not part:
            raise PoolFileChanged(
                f"expected {left} bytes more in a spilled file, it ends after {at}; somebody has "
                "cut it"
            )
        write(to, part, at)
        at, left = at + len(part), left - len(part)


def _memory_of(piece: Piece) -> tuple[memoryview, object]:
    address, keep = piece.memory()
    return memoryview((ctypes.c_char * piece.nbytes).from_address(address)).cast("B"), keep


def _gather(fd: int, parts: list[memoryview], offset: int) -> None:
    """All parts, one behind the other. The kernel reads the memory: a page that it cannot read,
    of a file that was cut, is an error and no signal."""
    while parts:
        try:
            done = os.pwritev(fd, parts, offset)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            raise PoolFileChanged(
                "expected the weights in memory, some are mapped from a file that is shorter "
                "now; load the model again"
            ) from error
        offset += done
        while parts and done >= len(parts[0]):
            done -= len(parts.pop(0))
        if done:
            parts[0] = parts[0][done:]


def write_pieces(fd: int, pieces: Sequence[Piece], start: int) -> None:
    """In few large calls that end on whole chunks of the file: the page cache then keeps large
    folios, which are mapped, and given back, by one entry of a page table."""
    parts: list[memoryview] = []
    kept: list[object] = []
    at = begin = start
    for piece in pieces:
        if not piece.nbytes:
            continue
        view, keep = _memory_of(piece)
        kept.append(keep)
        gap = start + piece.offset - at
        if gap:
            parts.append(memoryview(bytes(gap)))
        at += gap
        while view:
            part = view[: CHUNK - at % CHUNK]
            parts.append(part)
            view, at = view[len(part) :], at + len(part)
            if at % CHUNK == 0 or len(parts) > MOST_PARTS:
                _gather(fd, parts, begin)
                begin, parts, kept = at, [], [keep]
    _gather(fd, parts, begin)
