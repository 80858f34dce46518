"""Memory for patched tensors, kept warm: the first touch of a page costs more than the patch.

A chunk is the memory of one patch. Taken back, it stays for the next one as long as the patched
object has a proxy. Chunks of a managed object are users of its pool like models: counted, in use
while patched, and given back when others need the bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import Any

import torch
from torch import Tensor

from opguard.pools import _stacks

__all__ = ["Chunk", "drop_chunks", "put_chunk", "rounded", "take_chunk"]

_ALIGNMENT = 64
_HUGE = 2 << 20
# A chunk is used again for a patch that needs at least this share of it.
_FITS = 0.5

_lock = threading.RLock()
_free: dict[int, list[Chunk]] = {}


def rounded(nbytes: int) -> int:
    """Bytes that a tensor takes in a chunk."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Chunk:
    """Memory on one device, cut into tensors from the start."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.device = nbytes, device
        self.lease: Any = None
        self._flat: Tensor | None = None
        self._used = 0

    def bring_in(self) -> None:
        """Allocates; nothing is touched yet."""
        if self._flat is None:
            self._flat = _allocated(self.nbytes, self.device)

    def give_back(self) -> None:
        """Drops the memory; tensors cut from it keep it as long as they live."""
        self._flat = None

    def cut(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of the same shape, dtype and, where dense, strides."""
        assert self._flat is not None, "a chunk is brought in before it is cut"
        nbytes = like.numel() * like.element_size()
        flat = self._flat[self._used : self._used + nbytes].view(like.dtype)
        self._used += rounded(nbytes)
        return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride())

    def reset(self) -> bool:
        """Makes all of it free to be cut again; False if somebody holds a tensor of it."""
        self._used = 0
        if self._flat is None:
            return True
        storage = self._flat.untyped_storage()
        return bool(torch._C._storage_Use_Count(storage._cdata) <= 2)


def _allocated(nbytes: int, device: torch.device) -> Tensor:
    if device.type != "cpu" or nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, -(-nbytes // _HUGE) * _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes)


def take_chunk(obj: Any, nbytes: int, device: torch.device) -> Chunk:
    """A chunk of at least ``nbytes`` for patching ``obj``, brought in.

    Raises:
        PoolRefused: the object is managed, and its pool cannot have these bytes.
    """
    with _lock:
        free = _free.get(id(obj), [])
        fitting = [c for c in free if c.device == device and nbytes <= c.nbytes <= nbytes / _FITS]
        chunk = min(fitting, key=lambda c: c.nbytes, default=None)
        if chunk is not None:
            free.remove(chunk)
            if not free:
                del _free[id(obj)]
    if chunk is None:
        chunk = Chunk(nbytes, device)
    chunk.bring_in()
    return chunk


def put_chunk(obj: Any, chunk: Chunk) -> None:
    """Takes a chunk back; it stays warm if the object has a proxy and nobody holds its tensors."""
    clean = chunk.reset()
    with _lock:
        if clean and _stacks.has_record(obj):
            _free.setdefault(id(obj), []).append(chunk)
            return
    chunk.give_back()


def drop_chunks(obj: Any) -> None:
    """Gives back what is kept warm for an object."""
    with _lock:
        chunks = _free.pop(id(obj), [])
    for chunk in chunks:
        chunk.give_back()


_stacks.on_forget.append(drop_chunks)
