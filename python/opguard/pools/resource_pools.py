"""The pools: one kind of memory each, with a budget that the ledger keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from opguard._sizes import readable
from opguard.pools._budgets import device_capacity, parse_bytes

if TYPE_CHECKING:
    from opguard.pools._accelerators import Accelerator
    from opguard.pools.management import Management
    from opguard.pools.users import ResourcePoolUser

__all__ = ["AcceleratorPool", "HostPool", "ResourcePool"]


class ResourcePool(ABC):
    """One kind of memory: a name, a device, how much there is, and how much of it may be used.

    A pool of one's own is made by deriving, saying ``capacity``, and handing it to
    ``get_management().add_pool(pool)``; users then name it in ``needs``.

    Attributes:
        name: what budgets and users call it: ``"cpu"``, ``"cuda:0"``.
        device: where tensors of this pool are.
        reserve: share of the capacity that a budget of None leaves to others.
        executes: modules run here, rather than in host memory.
    """

    reserve = 0.1
    executes = False

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.device = torch.device(device)
        self._management: Management | None = None
        self._index = -1

    @abstractmethod
    def capacity(self) -> int:
        """Bytes that there are, whoever uses them."""

    @property
    def accelerator(self) -> Accelerator | None:
        """What brings modules here, where they are to run here; None for host memory."""
        return None

    def default_budget(self) -> int:
        """Bytes to use where nobody named a budget: the capacity less a reserve."""
        return int(self.capacity() * (1 - self.reserve))

    def budget_from(self, value: int | str | None) -> int:
        """Bytes of a budget as people write it; None is the default.

        Raises:
            TypeError, ValueError: for what is no number of bytes.
        """
        if value is None:
            return self.default_budget()
        whole = self.capacity() if isinstance(value, str) and "%" in value else None
        return parse_bytes(value, whole, what=f"the budget of pool {self.name!r}")

    @property
    def budget(self) -> int:
        """Bytes that users may hold together. May be set, as bytes or text, at any time.

        Where less than what is in use is set, idle users are given back before this returns, and
        those in use as soon as they are let go.
        """
        return int(self._owner().ledger.pool(self._index)[0])

    @budget.setter
    def budget(self, value: int | str | None) -> None:
        self._owner().set_budget(self, self.budget_from(value))

    @property
    def used(self) -> int:
        """Bytes in use: of users that are there, on their way in or out, and reserved."""
        return int(self._owner().ledger.pool(self._index)[1])

    @property
    def users(self) -> tuple[ResourcePoolUser, ...]:
        """Those who take from this pool, whether they are there now or not."""
        return self._owner().users_of(self)

    def _owner(self) -> Management:
        if self._management is None:
            raise LookupError(
                f"expected pool {self.name!r} to belong to a management: "
                "hand it to get_management().add_pool first"
            )
        return self._management

    def __repr__(self) -> str:
        if self._management is None:
            return f"<{type(self).__name__} {self.name!r}>"
        return (
            f"<{type(self).__name__} {self.name!r}: "
            f"{readable(self.used)} of {readable(self.budget)} used>"
        )


class HostPool(ResourcePool):
    """The memory of the machine, or of the cgroup this process is in where that has less."""

    def __init__(self, name: str = "cpu") -> None:
        super().__init__(name, "cpu")

    def capacity(self) -> int:
        return device_capacity(self.device)


class AcceleratorPool(ResourcePool):
    """The memory of one accelerator."""

    executes = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(str(device), device)

    def capacity(self) -> int:
        return device_capacity(self.device)

    @property
    def accelerator(self) -> Accelerator:
        from opguard.pools._accelerators import accelerator_for

        return accelerator_for(self.device)
