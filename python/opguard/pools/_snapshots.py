"""All figures as plain data. Imported when somebody asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opguard.pools.policies import name_of_policy

if TYPE_CHECKING:
    from opguard.pools._books import Entry
    from opguard.pools.management import Management

__all__ = ["PoolFigures", "Snapshot", "UserFigures", "WaitingRequest", "take_snapshot"]

STATES = ("absent", "loading", "ready", "evicting")


@dataclass(frozen=True)
class PoolFigures:
    """One pool: bytes that may be used, are used, and were used at most."""

    name: str
    device: str
    budget: int
    used: int
    peak: int


@dataclass(frozen=True)
class UserFigures:
    """One user in one pool.

    Attributes:
        tier: where it comes from and goes to, in the user's words.
        state: ``"absent"``, ``"loading"``, ``"ready"`` or ``"evicting"``.
        nbytes: bytes while it is there.
        holders: one line for each lease.
        hits: leases that found it there; ``misses``: times it was brought in.
        bytes_in: moved in, ``bytes_written_back``: changed and written, both since it is managed.
        seconds_waited: for bytes, ``seconds_loading``: bringing in.
        trouble: the last exception that kept it from going, if any.
        astray: weights that were replaced by others, which are outside of every budget.
    """

    name: str
    pool: str
    kind: str
    tier: str
    nbytes: int
    state: str
    priority: int
    pinned: bool
    leases: int
    holders: tuple[str, ...]
    hits: int
    misses: int
    evictions: int
    bytes_in: int
    bytes_written_back: int
    seconds_waited: float
    seconds_loading: float
    trouble: str | None
    astray: tuple[str, ...] = ()


@dataclass(frozen=True)
class WaitingRequest:
    """One request in the queue, in order of coming."""

    owner: str
    wants: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Snapshot:
    """All of it at one time.

    Attributes:
        seconds: since the start, when this was read.
        events: the last (seconds since the start, name of pool, bytes used), oldest first.
        moves: those of them in which one user came or went: (seconds since the start, name of pool,
            name of user, bytes it had there from then on).
    """

    policy: str
    pools: tuple[PoolFigures, ...]
    users: tuple[UserFigures, ...]
    waiting: tuple[WaitingRequest, ...]
    seconds: float
    events: tuple[tuple[float, str, int], ...]
    moves: tuple[tuple[float, str, str, int], ...]


def take_snapshot(management: Management) -> Snapshot:
    """Read everything once. What changes meanwhile may be seen before or after its change."""
    pools = tuple(
        PoolFigures(
            pool.name,
            str(pool.device),
            pool.budget,
            used := pool.used,
            max(used, management.recorder.peaks.get(pool.name, 0)),
        )
        for pool in tuple(management.pools.values())
    )
    users = tuple(
        figures
        for unit, entry in management.entries.copy().items()
        if (figures := _user(management, unit, entry)) is not None
    )
    recorder = management.recorder
    events = recorder.events.copy()  # one step, unlike tuple, which may collect garbage first
    return Snapshot(
        name_of_policy(management.policy),
        pools,
        users,
        _waiting(management),
        recorder.seconds,
        tuple((at, pool, used) for at, pool, used, _user, _held in events),
        tuple((at, pool, user, held) for at, pool, _used, user, held in events if user is not None),
    )


def _user(management: Management, unit: int, entry: Entry) -> UserFigures | None:
    from opguard.pools._holders import holder_lines

    info = management.unit(unit)
    if info is None:
        return None
    stats = entry.stats
    return UserFigures(
        name=entry.name,
        pool=next((name for name, u in entry.units.items() if u == unit), ""),
        kind=type(entry.user).__name__,
        tier=entry.user.describe(),
        nbytes=info.nbytes,
        state=STATES[info.state],
        priority=info.priority,
        pinned=bool(info.pinned),
        leases=info.leases,
        holders=holder_lines(management, management.holders(unit)),
        hits=max(0, info.uses - stats.unmet),
        misses=stats.misses,
        evictions=stats.evictions,
        bytes_in=stats.bytes_in,
        bytes_written_back=stats.written_back,
        seconds_waited=stats.waited,
        seconds_loading=stats.seconds_loading,
        trouble=stats.trouble,
        astray=tuple(entry.user.strays()),
    )


def _waiting(management: Management) -> tuple[WaitingRequest, ...]:
    from opguard.pools._holders import owner_name

    return tuple(
        WaitingRequest(
            owner_name(management, owner),
            tuple(management.name_of(unit) for unit in units),
            need,
        )
        for _ticket, owner, units, need in management.ledger.waiting()
    )
