"""Memory that a ledger keeps of what is over, by slope; exits 1 on a leak."""

from __future__ import annotations

import contextlib
import sys

from slope import report

from opguard import _C

LEDGER = _C.Ledger()
LEDGER.add_pool(100)


def turn() -> None:
    one, two = LEDGER.add_owner(0, 1), LEDGER.add_owner(0, 2)
    child = LEDGER.add_owner(one)
    units = tuple(LEDGER.add_unit(0, 40) for _ in range(4))
    for unit in LEDGER.request(one, units[:2], ((0, 5),)).load:
        LEDGER.loaded(unit)
    ticket = LEDGER.request(two, units[2:3]).ticket
    cancelled = LEDGER.request(two, units[3:]).ticket
    LEDGER.waiting()
    LEDGER.request(child, units)
    with contextlib.suppress(ValueError):
        LEDGER.leave(two, units)
    with contextlib.suppress(TypeError):
        LEDGER.request(two, (units[0], None))
    LEDGER.leave(one, units[:2], ((0, 5),))
    assert LEDGER.pump() == (ticket, cancelled)
    LEDGER.cancel(cancelled)
    answer = LEDGER.take(ticket)
    for unit in answer.evict:
        LEDGER.evicted(unit)
    LEDGER.failed(answer.load[0])
    LEDGER.leave(two, answer.load)
    for unit in units:
        LEDGER.remove_unit(unit)
    for owner in (one, two, child):
        LEDGER.drop_owner(owner)
    assert LEDGER.pool(0) == (100, 0)
    assert LEDGER.units(0) == ()


def whole() -> None:
    other = _C.Ledger()
    other.add_pool(1000)
    owner = other.add_owner()
    units = tuple(other.add_unit(0, 1) for _ in range(50))
    other.request(owner, units)
    other.request(owner, (), ((0, 2000),))


def ids_stay_small() -> None:
    """C's own memory is no block of Python's: slots that are used again show in the ids."""
    unit, owner = LEDGER.add_unit(0, 1), LEDGER.add_owner()
    assert unit & 0xFFFFFF <= 8, unit
    assert owner & 0xFFFFFF <= 8, owner
    LEDGER.remove_unit(unit)
    LEDGER.drop_owner(owner)


if __name__ == "__main__":
    sys.exit(report(100, 400, turn, whole, ids_stay_small))
