"""Whose bytes are where: the ledger decides, this asks it, waits, and has the users move.

One management a process. From the bottom up: ``_books`` the tables and the ledger, ``_moving`` who
moves bytes, ``_members`` who is managed and how they enter, and here the pools and the one of this
process. No file, no device and no decision is waited for under the mutex.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opguard import _C
from opguard.pools._arguments import check_folder, check_timeout
from opguard.pools._forks import ForkLock
from opguard.pools._members import Members
from opguard.pools._requests import BLOCKS_THREAD, Ask, enter
from opguard.pools._spill import SpillFolder
from opguard.pools.errors import PoolFileChanged, PoolRefused
from opguard.pools.policies import Policy, check_policy
from opguard.pools.resource_pools import AcceleratorPool, HostPool, ResourcePool
from opguard.pools.users import ResourcePoolUser

if TYPE_CHECKING:
    from opguard.pools._snapshots import Snapshot

__all__ = [
    "Management",
    "get_management",
    "initialize",
    "setup_default_pools",
]


class Management(Members):
    """The pools of this process and everything that is managed in them.

    Attributes:
        pools: by name.
        ledger: the decisions, in C.
        policy: who goes first, as it was given.
        spill_dir: where weights are written once, as it was given.
    """

    def __init__(self, spill_dir: str | Path | None = None, policy: Policy = "lru") -> None:
        super().__init__()
        check_folder(spill_dir)
        self.spill_dir = spill_dir
        self._folder: SpillFolder | None = None
        self.policy: Policy = "lru"
        self.set_policy(policy)

    # --- pools ---

    def add_pool(self, pool: ResourcePool, budget: int | str | None = None) -> ResourcePool:
        """Let users take from ``pool`` under its name. A budget of None is the pool's default."""
        nbytes = pool.budget_from(budget)
        with self._mutex:
            if pool.name in self.pools:
                raise ValueError(f"expected a pool of a new name, got {pool.name!r} again")
            pool._index = self.ledger.add_pool(nbytes)
            pool._management = self
            self.pools[pool.name] = pool
        return pool

    def set_budget(self, pool: ResourcePool, nbytes: int) -> None:
        """A pool's bytes from now on; idle users above it are given back before this returns."""
        if self.ledger.set_budget(pool._index, nbytes):
            self.pump()
        self._reclaim_above_budget(pool)
        self._reclaimer.wake()

    def set_policy(self, policy: Policy) -> None:
        """Who goes first from now on: ``"lru"``, ``"cost"``, or a callable (`Candidate` in)."""
        self.policy = check_policy(policy)
        self._rank = policy if callable(policy) else None
        self.ledger.set_policy(policy if isinstance(policy, str) else "rank")

    @property
    def folder(self) -> SpillFolder:
        with self._mutex:
            if self._folder is None:
                self._folder = SpillFolder(self.spill_dir)
            return self._folder

    def use_folder(self, spill_dir: str | Path | None) -> None:
        """Where weights are written from now on; what is written stays where it is."""
        check_folder(spill_dir)
        with self._mutex:
            self.spill_dir, self._folder = spill_dir, None

    def users_of(self, pool: ResourcePool) -> tuple[ResourcePoolUser, ...]:
        """The users that take from ``pool``."""
        entries = tuple(self.entries.values())
        return tuple(dict.fromkeys(e.user for e in entries if pool.name in e.units))

    def reserve(
        self, pool: str, nbytes: int, owner: Any = None, *, timeout: float | None = None
    ) -> Any:
        """Take bytes that are no user's, such as those of patched tensors, evicting for them.

        Returns:
            What `release` wants. Where it dies before, the bytes are given back, too.

        Raises:
            PoolRefused: where they cannot be had.
        """
        owner = _C.pool_owner(self.ledger) if owner is None else owner
        check_timeout(timeout)
        try:
            extra = ((self.pool(pool)._index, index(nbytes)),)
        except TypeError:
            raise TypeError(f"expected nbytes to reserve as an int, got {nbytes!r:.80}") from None
        lease = _C.Lease(self.seat(()), extra)
        ask = Ask(self, owner.id, (), extra=extra, timeout=timeout, flags=BLOCKS_THREAD)
        enter(ask, lease.adopt, owner)
        self._note_extra(extra)
        return lease

    def release(self, reserved: Any) -> None:
        """Give back what `reserve` took."""
        reserved.__exit__(None, None, None)
        self._note_extra(reserved.value)

    def _note_extra(self, extra: tuple[tuple[int, int], ...]) -> None:
        touched = {index for index, _ in extra}
        for pool in tuple(self.pools.values()):
            if pool._index in touched:
                self.recorder.note(pool.name, pool.used)

    def snapshot(self) -> Snapshot:
        """All figures, as plain data; see `opguard.pools.Snapshot`."""
        from opguard.pools._snapshots import take_snapshot

        self.drain()
        return take_snapshot(self)

    def close(self) -> None:
        """Let go of everything that is in nobody's use. The pools stay."""
        for entry in self.managed():
            with suppress(PoolRefused, PoolFileChanged):
                self.unmanage(entry.ref())
        self.drain()


# --- the one of this process ----------------------------------------------------------------------

_current: list[Management] = []
# A finalizer may come here while its own thread is inside.
_setting_up = ForkLock(threading.RLock)


def setup_default_pools(
    *,
    budgets: Mapping[str, int | str | None] | None = None,
    spill_dir: str | Path | None = None,
    policy: Policy = "lru",
) -> Management:
    """A pool for host memory and one for each accelerator.

    Called again, it changes budgets, policy and where new weights are written; what is managed
    stays so.

    Args:
        budgets: bytes by name of pool, as ``{"cpu": "256MiB", "cuda:0": "80%"}``. None, for one or
            for all, is the device's memory (its cgroup's where that is less) less a reserve.
        spill_dir: folder for the weights' files; None is ``$OPGUARD_SPILL`` or one in /var/tmp.
        policy: ``"lru"``, ``"cost"`` or a callable, see `opguard.pools.policies.check_policy`.

    Raises:
        KeyError: for a budget of a pool that there is not.
        TypeError, ValueError: for a budget, a policy or a folder that is none.
    """
    check_policy(policy)
    check_folder(spill_dir)
    if budgets is not None and not isinstance(budgets, Mapping):
        raise TypeError(
            f"expected budgets by name of pool, as {{'cpu': '256MiB'}}, got {budgets!r:.80}"
        )
    with _setting_up.here:
        fresh = None if _current else {pool.name: pool for pool in _default_pools()}
        management = _current[0] if _current else Management(spill_dir, policy)
        pools: Mapping[str, ResourcePool] = management.pools or fresh or {}
        wanted = _by_pool(budgets or {}, pools)
        nbytes = {name: pool.budget_from(wanted.get(name)) for name, pool in pools.items()}
        for name, pool in pools.items():
            if name not in management.pools:
                management.add_pool(pool, nbytes[name])
            elif name in wanted or not wanted:
                management.set_budget(pool, nbytes[name])
        management.set_policy(policy)
        if spill_dir is not None and spill_dir != management.spill_dir:
            management.use_folder(spill_dir)
        _current[:] = [management]
    return management


def _default_pools() -> list[ResourcePool]:
    pools: list[ResourcePool] = [HostPool()]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != "cpu":
        for index in range(torch.accelerator.device_count()):
            pools.append(AcceleratorPool(torch.device(accelerator.type, index)))
    return pools


def _by_pool(
    budgets: Mapping[str, int | str | None], pools: Mapping[str, ResourcePool]
) -> dict[str, int | str | None]:
    found: dict[str, int | str | None] = {}
    for given, budget in budgets.items():
        name = str(given)  # a torch.device, too
        key = name if name in pools else f"{name}:0"
        if key not in pools:
            raise KeyError(f"expected budgets for the pools {sorted(pools)}, got {name!r}")
        if key in found:
            raise ValueError(f"expected one budget for each pool, got {key!r} twice")
        found[key] = budget
    return found


def initialize() -> Management:
    """The same with defaults, unless pools were set up already. ``manage`` does it by itself."""
    return _current[0] if _current else setup_default_pools()


def current_management() -> Management | None:
    """The management of this process, None where nobody set pools up."""
    return _current[0] if _current else None


def get_management() -> Management:
    """The management of this process, set up with defaults if nobody did."""
    return _current[0] if _current else initialize()


_threads_at_fork: set[int] = set()


def _before_fork() -> None:
    _threads_at_fork.clear()
    _threads_at_fork.update(set(sys._current_frames()) - {threading.get_ident()})


def _after_fork() -> None:
    for management in _current:
        management.forked(_threads_at_fork)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
