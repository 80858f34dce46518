"""Many models, little memory: which model is on which device now, and what is patched into it."""

from opguard.pools.errors import (
    Deadlock,
    LeaseTimeout,
    PatchFailed,
    PoolError,
    PoolFileChanged,
    PoolRefused,
    Unmanageable,
)

__all__ = [
    "Deadlock",
    "LeaseTimeout",
    "PatchFailed",
    "PoolError",
    "PoolFileChanged",
    "PoolRefused",
    "Unmanageable",
]
