"""Patches and pools: what is patched is leased, and what patched tensors take is counted.

Nothing here imports the pools' management: where nobody has set one up, nothing is managed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from opguard.pools._arenas import Chunk
    from opguard.pools.management import Management

__all__ = ["block_lease", "lease_of_seat", "lease_owners", "seat_of_chunk", "waiting"]

_timeout: ContextVar[float | None] = ContextVar("opguard_patch_timeout", default=None)


@contextmanager
def waiting(timeout: float | None) -> Iterator[None]:
    """Leases taken inside wait so many seconds."""
    token = _timeout.set(timeout)
    try:
        yield
    finally:
        _timeout.reset(token)


def _management() -> Management | None:
    module = sys.modules.get("opguard.pools.management")
    current: list[Management] = getattr(module, "_current", [])
    return current[0] if current else None


def block_lease(obj: Any, timeout: float | None) -> Any:
    """A lease on a managed object for the time of a block, not entered; None for others."""
    management = _management()
    if management is None or management.find(obj) is None:
        return None
    from opguard.pools.wrappers import AutoManageWrapper

    return AutoManageWrapper(obj, management).lease(timeout)


def lease_owners(parameters: Iterable[Tensor]) -> ExitStack | None:
    """Leases of the managed modules that these parameters belong to, entered; None for none.

    Raises:
        PoolRefused: what they need cannot be had.
    """
    management = _management()
    if management is None or not management.entries:
        return None
    wanted = {id(parameter) for parameter in parameters}
    leases, found = ExitStack(), False
    try:
        for entry in dict.fromkeys(tuple(management.entries.values())):
            module = entry.ref()
            if isinstance(module, nn.Module) and any(id(p) in wanted for p in _tensors(module)):
                lease = block_lease(module, _timeout.get())
                lease.__enter__()
                leases.push(lease)
                found = True
    except BaseException:
        leases.close()
        raise
    return leases if found else None


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def seat_of_chunk(chunk: Chunk) -> Any:
    """Makes a chunk something that its device's pool counts and may take back while it is idle.

    Returns:
        What its leases share; None where that device has no pool.
    """
    management = _management()
    if management is None or str(chunk.device) not in management.pools:
        return None
    from opguard.pools._chunk_user import ChunkUser

    return management.add_user(ChunkUser(chunk), chunk, name="patched weights").seat


def lease_of_seat(seat: Any) -> Any:
    """A lease on what has this seat, not entered."""
    from opguard import _C

    return _C.Lease(seat, None, _timeout.get())
