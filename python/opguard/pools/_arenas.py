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

from opguard.pools import _managed, _stacks
from opguard.pools._forks import ForkLock

__all__ = ["Chunk", "drop_chunks", "put_chunk", "rounded", "take_chunk"]

_ALIGNMENT = 64
_HUGE = 2 << 20
# A chunk is used again for a patch that needs at least this share of it.
_FITS = 0.5

_lock = ForkLock(threading.RLock)
_free: dict[int, list[Chunk]] = {}


def rounded(nbytes: int) -> int:
    """Bytes that a tensor takes in a chunk."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Chunk:
    """Memory on one device, cut into tensors from the start."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.device = nbytes, device
        self.seat: Any = None
        self.alone = True
        self._lease: Any = None
        self._flat: Tensor | None = None
        self._used = 0

    def bring_in(self) -> None:
        """Allocates; nothing is touched yet."""
        if self._flat is None:
            self._flat = _allocated(self.nbytes, self.device)

    def give_back(self) -> None:
        """Drops the memory; tensors cut from it keep it as long as they live."""
        self._flat = None

    def hold(self) -> None:
        """Brings it in, through its pool where one counts it."""
        if self.seat is None:
            self.bring_in()
            return
        lease = _managed.lease_of_seat(self.seat)
        lease.__enter__()
        self._lease = lease

    def let_go(self) -> None:
        """Nobody uses it now."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.__exit__(None, None, None)

    def leave_pool(self) -> None:
        """Somebody else's bytes count it from now on: it is not kept warm by itself."""
        self.let_go()
        self.seat, self.alone = None, False
        _managed.forget_chunk(self)

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


def take_chunk(obj: Any, nbytes: int, device: torch.device, counted: bool) -> Chunk:
    """A chunk of at least ``nbytes`` for patching ``obj``, in memory.

    Args:
        counted: whether its bytes are of the device's pool.

    Raises:
        PoolRefused: the pool cannot have these bytes.
    """
    with _lock.here:
        free = _free.get(id(obj), [])
        fitting = [
            chunk
            for chunk in free
            if chunk.device == device
            and nbytes <= chunk.nbytes <= nbytes / _FITS
            and (chunk.seat is not None) == counted
        ]
        chunk = min(fitting, key=lambda c: c.nbytes, default=None)
        if chunk is not None:
            free.remove(chunk)
            if not free:
                del _free[id(obj)]
    if chunk is None:
        chunk = Chunk(nbytes, device)
        if counted:
            chunk.seat = _managed.seat_of_chunk(chunk)
    try:
        chunk.hold()
    except BaseException:
        with _lock.here:
            if _stacks.has_record(obj):
                _free.setdefault(id(obj), []).append(chunk)
        raise
    return chunk


def put_chunk(obj: Any, chunk: Chunk) -> None:
    """Takes a chunk back; it stays warm if the object has a proxy and nobody holds its tensors."""
    clean = chunk.reset()
    if not clean or not chunk.alone or not _stacks.has_record(obj):
        chunk.give_back()
        chunk.let_go()
        return
    with _lock.here:
        _free.setdefault(id(obj), []).append(chunk)
    chunk.let_go()


def drop_chunks(obj: Any) -> None:
    """Gives back what is kept warm for an object."""
    with _lock.here:
        chunks = _free.pop(id(obj), [])
    for chunk in chunks:
        chunk.give_back()


_stacks.on_forget.append(drop_chunks)
