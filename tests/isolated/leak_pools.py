"""Whether leases leak: blocks kept per lease, call, owner and hook, by slope."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import sys
import threading

import torch
from slope import report

from opguard import _C
from opguard.pools.hooks import AutoManageHook

LEDGER = _C.Ledger()
UNIT = LEDGER.add_unit(LEDGER.add_pool(1000), 10)
X = torch.ones(1, 2)


def load(seat: _C.Seat, owner: _C.Owner, timeout: float | None) -> None:
    for unit in LEDGER.request(owner.id, seat.units).load:
        LEDGER.loaded(unit)


SEAT = _C.Seat(LEDGER, (UNIT,), load)
SLOW = _C.Seat(LEDGER, (UNIT,), load)
SLOW.slow = True
LOOP = asyncio.new_event_loop()


class Handle:
    seat = SEAT

    def __init__(self, obj: torch.nn.Module) -> None:
        self.obj = obj

    def get_execution_device(self) -> torch.device:
        return torch.device("cpu")


MODEL = torch.nn.Linear(2, 2)
AutoManageHook(Handle(MODEL)).attach()


def leases() -> None:
    for seat in (SEAT, SLOW):
        lease = _C.Lease(seat, [])
        with lease, lease:
            _C.pool_owner(LEDGER).held
        lease.__enter__()  # dies entered


def failing() -> None:
    with contextlib.suppress(ValueError), _C.Lease(SEAT):
        raise ValueError


def calls() -> None:
    MODEL(X)
    with contextlib.suppress(TypeError):
        MODEL(X, X)


def hooks() -> None:
    model = torch.nn.Linear(2, 2)
    with AutoManageHook(Handle(model)):
        model(X)
        copy.deepcopy(model)


def dropped() -> None:
    model = torch.nn.Linear(2, 2)
    AutoManageHook(Handle(model), methods=("extra_repr",)).attach()


async def use() -> None:
    async with _C.Lease(SEAT):
        await asyncio.sleep(0)
    await asyncio.create_task(asyncio.sleep(0))


def tasks() -> None:
    LOOP.run_until_complete(use())


def threads() -> None:
    thread = threading.Thread(target=leases)
    thread.start()
    thread.join()


if __name__ == "__main__":
    sys.exit(report(60, 260, leases, failing, calls, hooks, dropped, tasks, threads))
