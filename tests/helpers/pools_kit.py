"""Pools for one test: host memory alone, a folder of its own, users that do as they are told."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from opguard.pools import (
    AutoManageWrapper,
    DeltaCommit,
    ResourcePoolUser,
    manage,
    management,
    register_user,
)
from opguard.pools.management import Management
from opguard.pools.policies import Policy
from opguard.pools.resource_pools import HostPool

MIB = 1 << 20


@contextlib.contextmanager
def fresh_pools(
    folder: Path, cpu: int | str = "4MiB", *, policy: Policy = "lru"
) -> Iterator[Management]:
    """A management of the CPU alone in place of this process's, whatever devices there are."""
    before = management._current[:]
    own = Management(folder, policy)
    own.add_pool(HostPool(), cpu)
    management._current[:] = [own]
    try:
        yield own
    finally:
        own.stop()
        for entry in set(own.entries.values()):
            with contextlib.suppress(Exception):
                entry.user.close()
        management._current[:] = before


@contextlib.contextmanager
def settled_pools(folder: Path, cpu: int) -> Iterator[Management]:
    """Fresh ones in which, when the test is over, nobody waits and nothing is leased."""
    with fresh_pools(folder, cpu) as management:
        yield management
        until(lambda: not management.drain())
        assert management.ledger.waiting() == ()
        assert all(not management.ledger.holders(unit) for unit in management.entries)


def tiny(mib: int = 1, *, seed: int = 0) -> torch.nn.Sequential:
    """A model of that many MiB: square layers of one MiB each."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.nn.Linear(512, 512, bias=False) for _ in range(mib)]
    for layer in layers:
        layer.weight.data.normal_(0, 0.05, generator=generator)
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)


class Thing:
    """Something to manage that holds no memory: what its user does is set on it."""

    def __init__(self, nbytes: int = MIB, **does: Callable[[], object]) -> None:
        self.nbytes = nbytes
        self.does = does
        self.log: list[str] = []


class ThingUser(ResourcePoolUser):
    """Notes what it is told, and does what its thing says: sleep, wait, fail."""

    closed = False

    def _do(self, what: str) -> None:
        obj = self.obj
        if obj is not None:
            obj.log.append(what)
            obj.does.get(what, lambda: None)()

    def needs(self) -> dict[str, int]:
        return {"cpu": self.obj.nbytes}

    def bring_in(self) -> None:
        self._do("in")

    def give_back(self) -> None:
        self._do("out")

    def close(self) -> None:
        self.closed = True


register_user(Thing, ThingUser)


def managed(*nbytes: int, **does: Callable[[], object]) -> list[AutoManageWrapper]:
    """Handles on things of so many bytes each: thing0, thing1 and so on."""
    return [manage(Thing(n, **does), name=f"thing{i}") for i, n in enumerate(nbytes)]


def elsewhere(function: Callable[[], object], seconds: float = 5, after: str = "") -> None:
    """Call it in another thread, within seconds; ``after`` says what went before, for messages."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"hangs {after}"
    assert failed == [], after


class Adds(DeltaCommit):
    """Adds one to the first parameter of a model."""

    def deltas(self, obj: torch.nn.Module) -> Any:
        return {next(obj.parameters()): lambda source, out: torch.add(source, 1, out=out)}


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait until ``condition()``; a test that waits longer than that has failed."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


class Holder:
    """A thread that holds a lease until it is told to let go."""

    def __init__(self, *handles: object) -> None:
        self._handles = handles
        self._held = threading.Event()
        self._let_go = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="holder", daemon=True)
        self.thread.start()
        assert self._held.wait(5)

    def _run(self) -> None:
        try:
            self._hold(self._handles)
        except BaseException as error:
            self.error = error
            self._held.set()

    def _hold(self, handles: tuple[object, ...]) -> None:
        if not handles:
            self._held.set()
            assert self._let_go.wait(20)
            return
        with handles[0].lease(5):
            self._hold(handles[1:])

    def let_go(self) -> None:
        self._let_go.set()
        self.thread.join(5)
        assert not self.thread.is_alive()
        assert self.error is None, self.error
