"""The model of an ``OpGuardBase`` in the pools: leased for each call, evicted for others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from opguard.guards.calling import _is_oom

__all__ = ["Pooled"]


class Pooled:
    """A detector's handle in :mod:`opguard.pools`, and what its calls took beside the weights.

    Args:
        name: what reports and messages call it.
        detector: the model, on the CPU or where it runs.
    """

    def __init__(self, name: str, detector: Any) -> None:
        from opguard import pools
        from opguard.pools.inference import InferenceMemory

        self._handle = pools.manage(detector, name=name)
        self._management = pools.get_management()
        self._memory = InferenceMemory()

    def lease(self) -> Any:
        return self._handle.lease()

    def call(self, function: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any]) -> Any:
        """Returns ``function(kwargs)``, the memory of such calls taken from the pool meanwhile."""
        device = self._handle.get_execution_device()
        return self._memory.call(
            function, (kwargs,), {}, management=self._management, device=device
        )

    def make_room(self, error: BaseException) -> bool:
        """Whether ``error`` means that memory ran out, and idle models have now given some back."""
        if not _is_oom(error):
            return False
        from opguard.pools.oom import make_room

        return make_room(error)

    def close(self) -> None:
        """Gives the model back to its owner; an error of that is no reason to keep it."""
        from opguard import pools

        with contextlib.suppress(pools.PoolError, OSError):
            pools.unmanage(self._handle)
