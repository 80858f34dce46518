"""Patches and pools: what is patched is leased, and what patched tensors take is counted.

Where nobody has set pools up, nothing is managed, and nothing here sets them up.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from opguard import _C

if TYPE_CHECKING:
    from opguard.pools._arenas import Chunk
    from opguard.pools._books import Entry
    from opguard.pools.management import Management

__all__ = [
    "block_lease",
    "lease_of_seat",
    "lease_owners",
    "ledger_owner",
    "seat_of_chunk",
    "waiting",
]

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
    from opguard.pools.management import current_management

    return current_management()


def ledger_owner() -> tuple[Management, _C.Owner] | None:
    """The thread or task that calls, as the pools know it; None where nobody set them up."""
    management = _management()
    return None if management is None else (management, _C.pool_owner(management.ledger))


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
    wanted = {id(parameter): parameter for parameter in parameters}
    leases, found = ExitStack(), False
    try:
        for entry in _owners(management, wanted):
            lease = block_lease(entry.ref(), _timeout.get())
            lease.__enter__()
            leases.push(lease)
            found = True
            _refuse_parts(entry, wanted)
    except BaseException:
        leases.close()
        raise
    return leases if found else None


def _refuse_parts(entry: Entry, wanted: Mapping[int, Tensor]) -> None:
    """A module that is moved in parts is not where it runs, and neither would its patch be."""
    device = entry.user.execution_device
    for tensor in _tensors(entry.ref()):
        if id(tensor) in wanted and tensor.device.type != device.type:
            raise ValueError(
                f"expected {entry.name!r} on {device} to patch its weights, and it goes there in "
                "parts: patch it with hooks (LoraCommit has mode='hook'), or manage it with "
                "stream=False"
            )


def _owners(management: Management, wanted: Container[int]) -> list[Entry]:
    """The modules that are managed and have one of these tensors."""
    found = []
    for entry in dict.fromkeys(management.managed()):
        module = entry.ref()
        if isinstance(module, nn.Module) and any(id(p) in wanted for p in _tensors(module)):
            found.append(entry)
    return found


class Parking:
    """A patch that goes and comes with the module it is on, and counts as part of it."""

    def __init__(self, management: Management, entry: Entry, rider: Any, chunk: Chunk) -> None:
        self._management, self._entry, self._rider = management, entry, rider
        self._unit, self._nbytes = entry.units[str(chunk.device)], chunk.nbytes
        entry.riders.append(rider)
        self._grow(self._nbytes)
        chunk.leave_pool()

    def leave(self) -> None:
        """The patch is off."""
        self._entry.riders.remove(self._rider)
        self._grow(-self._nbytes)

    def _grow(self, nbytes: int) -> None:
        management = self._management
        info = management.unit(self._unit)
        if info is not None and management.ledger.set_unit(
            self._unit, "nbytes", info.nbytes + nbytes
        ):
            management.pump()


def park(rider: Any, states: Iterable[Iterable[Tensor]], chunk: Chunk) -> Parking | None:
    """Lets a patched module go with its patch; None where it is in parts or is not counted."""
    management = _management()
    if management is None or chunk.seat is None:
        return None
    wanted = {id(parameter) for parameters in states for parameter in parameters}
    owners = _owners(management, wanted)
    if len(owners) != 1 or str(chunk.device) not in owners[0].units:
        return None
    return Parking(management, owners[0], rider, chunk)


def forget_chunk(chunk: Chunk) -> None:
    """A chunk is counted no more."""
    management = _management()
    if management is not None:
        management.unmanage(chunk)


def _tensors(module: Any) -> Iterator[Tensor]:
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
    return _C.Lease(seat, None, _timeout.get())
