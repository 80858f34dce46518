"""Slope of allocated blocks over the guards of loading, freeing and seeding, and who_holds.

Run alone: prints the slope and exits 1 where it grows. Nothing is collected within a turn.
"""

from __future__ import annotations

import contextlib
import gc
import sys

import torch

from opguard.guards.freeing import free_guard, model_guard
from opguard.guards.initial import init_guard
from opguard.guards.loading import cache_guard, load_guard
from opguard.guards.locality import local_guard
from opguard.guards.reproducible import deterministic_guard, seed_guard
from opguard.holders import who_holds

MODEL = torch.nn.Linear(2, 2)
X = torch.ones(1, 2)


def fails() -> None:
    held = torch.ones(3)
    raise LookupError(held)


@local_guard()
def decorated() -> int:
    return 1


@seed_guard(seed=1)
def numbers():
    yield from range(3)


def turn() -> None:
    with init_guard(device="cpu", dtype="bf16"), deterministic_guard(), seed_guard():
        decorated()
    list(numbers())
    for settings in ({}, {"local_files_only": True}):
        with load_guard(**settings) as load:
            load(lambda: MODEL)
        with contextlib.suppress(LookupError), load_guard(**settings) as load:
            load(fails)
    with cache_guard() as load:
        load(lambda: MODEL)
    with free_guard(run_gc_and_clear_cache=False):
        pass
    keep = {"run_gc_and_clear_cache": False}
    for loader in (lambda: MODEL, fails):
        with (
            contextlib.suppress(LookupError),
            model_guard(load_guard_kwargs={"loader_fn": loader}, free_guard_kwargs=keep) as g,
        ):
            g(X)


def ask() -> None:
    # A third of a second each: asked less often.
    who_holds("cpu", limit=1)


def blocks(run, turns: int) -> int:
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(turns):
        run()
    gc.collect()
    return sys.getallocatedblocks() - before


def main() -> int:
    gc.disable()
    worst = 0.0
    for run, turns in ((turn, 100), (ask, 4)):
        blocks(run, turns)
        few, many = blocks(run, turns), blocks(run, turns * 4)
        slope = (many - few) / (turns * 3)
        print(f"leak_loading: {run.__name__} {slope:+.2f} blocks a turn")
        worst = max(worst, slope)
    return 1 if worst > 2 else 0


if __name__ == "__main__":
    sys.exit(main())
