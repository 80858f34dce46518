"""Threads and tasks together over too little memory, for as long as OPGUARD_SOAK says in seconds.

Nested leases, exceptions, timeouts and cancellations. At each grant the budget holds and the model
is there; in the end nobody hangs, no lease is left, and every weight is what it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections import Counter

import pytest
import torch

from opguard import pools
from pools_kit import fresh_pools, until

PAGES = 16
NBYTES = PAGES * 4096
MODELS, ROOM, THREADS, TASKS = 8, 4, 16, 16


class UserError(Exception):
    pass


class Soak:
    """Eight models, room for four, and everybody who uses them."""

    def __init__(self, management, seconds: float) -> None:
        self.management = management
        self.end = time.monotonic() + seconds
        self.models = []
        for seed in range(MODELS):
            weight = torch.full((NBYTES // 4,), float(seed + 1))
            self.models.append(torch.nn.ParameterList([weight]).requires_grad_(False))
        self.handles = [pools.manage(m, name=f"model{i}") for i, m in enumerate(self.models)]
        assert all(handle.user.nbytes == NBYTES for handle in self.handles)
        self.count: Counter[str] = Counter()
        self.broken: list[str] = []
        self.using: Counter[int] = Counter()
        self.mutex = threading.Lock()

    def granted(self, at: int) -> None:
        """Called with the lease held."""
        budget, used = self.management.ledger.pool(0)
        with self.mutex:
            self.using[at] += 1
            together = len(+self.using)
            self.count["leases"] += 1
        if used > budget or together > ROOM:
            self.broken.append(f"{used} bytes of {budget}, {together} models together")
        if not self.handles[at].loaded:
            self.broken.append(f"model {at} is leased and not there")
        weight = self.models[at][0]
        if float(weight[0]) != at + 1 or float(weight[-1]) != at + 1:
            self.broken.append(f"model {at} has other weights")

    def left(self, at: int) -> None:
        with self.mutex:
            self.using[at] -= 1

    def note(self, error: BaseException) -> None:
        with self.mutex:
            self.count[type(error).__name__] += 1

    # --- threads ----------------------------------------------------------------------------------

    def nest(self, draw: random.Random, depth: int) -> None:
        at = draw.randrange(MODELS)
        timeout = draw.choice([0, 0.002, 0.02, 5])
        offload = draw.choice(["lazy", "lazy", "exit"])
        with pools.auto_manage(self.handles[at], offload=offload, timeout=timeout):
            self.granted(at)
            try:
                if draw.random() < 0.4:
                    time.sleep(draw.random() * 0.002)
                if draw.random() < 0.1:
                    raise UserError
                if depth < 4 and draw.random() < 0.5:
                    self.nest(draw, depth + 1)
            finally:
                self.left(at)

    def thread(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                self.nest(draw, 1)
            except (UserError, pools.PoolRefused) as error:
                self.note(error)
            except BaseException as error:
                self.broken.append(repr(error))
                return

    # --- tasks ------------------------------------------------------------------------------------

    async def nest_async(self, draw: random.Random, depth: int) -> None:
        at = draw.randrange(MODELS)
        timeout = draw.choice([0, 0.002, 0.02, 5])
        async with pools.auto_manage(self.handles[at], timeout=timeout):
            self.granted(at)
            try:
                await asyncio.sleep(draw.random() * 0.002)
                if draw.random() < 0.1:
                    raise UserError
                if depth < 4 and draw.random() < 0.5:
                    nested = self.nest_async(draw, depth + 1)
                    # as a task of its own, which the one that holds waits for, or directly
                    await (asyncio.ensure_future(nested) if draw.random() < 0.5 else nested)
            finally:
                self.left(at)

    async def task(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.end:
            inner = asyncio.ensure_future(self.nest_async(draw, 1))
            if draw.random() < 0.3:
                await asyncio.sleep(draw.random() * 0.005)
                inner.cancel()
            try:
                await inner
            except (UserError, pools.PoolRefused, asyncio.CancelledError) as error:
                self.note(error)
            except BaseException as error:
                self.broken.append(repr(error))
                return

    def loop(self) -> None:
        async def main() -> None:
            await asyncio.gather(*(self.task(1000 + i) for i in range(TASKS)))

        asyncio.run(main())

    def run(self) -> None:
        targets = [(self.thread, (i,)) for i in range(THREADS)]
        threads = [threading.Thread(target=f, args=a, daemon=True) for f, a in targets]
        threads.append(threading.Thread(target=self.loop, daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self.end - time.monotonic()) + 30)
        hung = [thread.name for thread in threads if thread.is_alive()]
        assert not hung, (hung, self.management.ledger.waiting(), dict(self.count))


def soak(folder, seconds: float) -> Counter[str]:
    with fresh_pools(folder, ROOM * NBYTES) as management:
        run = Soak(management, seconds)
        run.run()
        assert not run.broken, run.broken[:5]
        until(lambda: not management.drain())
        ledger = management.ledger
        until(lambda: not any(ledger.holders(unit) for unit in ledger.units(0)))
        assert ledger.waiting() == ()
        assert management.pool("cpu").used <= ROOM * NBYTES
        for at, model in enumerate(run.models):
            assert bool((model[0] == at + 1).all())
            with contextlib.suppress(KeyError):
                pools.unmanage(model)
        assert management.pool("cpu").used == 0
        return run.count


def check(count: Counter[str], seconds: float) -> None:
    print(dict(count))
    assert count["leases"] > 20 * seconds
    assert count["UserError"] > 0
    assert count["CancelledError"] > 0
    assert sum(count[name] for name in ("LeaseTimeout", "PoolRefused", "Deadlock")) > 0


def test_threads_and_tasks_for_a_moment(tmp_path):
    check(soak(tmp_path, 2.0), 2.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_threads_and_tasks_for_long(tmp_path):
    seconds = float(os.environ.get("OPGUARD_SOAK", "60"))
    check(soak(tmp_path, seconds), seconds)
