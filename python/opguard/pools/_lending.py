"""Host memory for copies to an accelerator, as a user of the host's pool like any other.

A pinned copy of a model's weights is a cache. It takes its bytes from the pool ``"cpu"`` while it
is there, goes by itself when others need them, and where they cannot be had at once the weights are
copied through a small ring instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from opguard import _C
from opguard.pools.errors import PoolRefused
from opguard.pools.users import ResourcePoolUser

if TYPE_CHECKING:
    from opguard.pools._homes import Home
    from opguard.pools._transfers import Master
    from opguard.pools.management import Management

__all__ = ["Lender", "PinnedCopy", "home_for"]

HOST = "cpu"


class PinnedCopy(ResourcePoolUser):
    """The pinned copy of one model's weights, in host memory."""

    def __init__(self, master: Master) -> None:
        super().__init__(master)
        self._nbytes = master.nbytes

    def needs(self) -> dict[str, int]:
        return {HOST: self._nbytes}

    def bring_in(self) -> int:
        self.obj.open()
        return 0

    def give_back(self) -> int:
        master = self.obj
        if master is not None:
            master.close()
        return 0

    def close(self) -> None:
        self.give_back()

    def describe(self) -> str:
        return "pinned copy"


class Lender:
    """Opens a master for a block, in bytes that the ledger has found without waiting.

    Args:
        management: whose pool ``"cpu"`` they are from. Without one nothing is lent.
        name: of the model.
    """

    def __init__(self, management: Management, name: str) -> None:
        self._management = management
        self._name = name
        self._master: Master | None = None

    @contextlib.contextmanager
    def __call__(self, master: Master) -> Iterator[Master | None]:
        lease = self._lease(master)
        try:
            if lease is not None:
                lease.__enter__()
        except (PoolRefused, MemoryError, RuntimeError):
            # No room among those in use, or none that can be pinned: the ring needs neither.
            lease = None
        try:
            yield None if lease is None else master
        finally:
            if lease is not None:
                lease.__exit__(None, None, None)

    def _lease(self, master: Master) -> Any:
        management = self._management
        if HOST not in management.pools or not master.nbytes:
            return None
        entry = management.find(master)
        if entry is None:
            entry = management.add_user(PinnedCopy(master), name=f"{self._name}, pinned")
            self._master = master
        return _C.Lease(entry.seat, master, 0.0)

    def close(self) -> None:
        """The model goes: its copy does too."""
        master, self._master = self._master, None
        if master is not None:
            self._management.unmanage(master)


def home_for(home: Home, management: Management, name: str, verify: str | None = None) -> Any:
    """The home itself, or around it the one that brings weights to where modules run."""
    accelerator = management.execution_pool.accelerator
    if accelerator is None:
        return home
    from opguard.pools._devices import DeviceHome

    try:
        return DeviceHome(home, accelerator, verify=verify, lend=Lender(management, name))
    except BaseException:
        home.release()
        raise
