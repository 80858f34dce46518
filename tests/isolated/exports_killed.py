"""Writers of an export are killed at named points and at random times, while others read it.

Children are forks of a process that has imported everything, so that hundreds can die in seconds.
Prints how many died before and after the exchange. `fallback`: no exchange in one step.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch

import tiny_exports
from opguard import _C
from opguard.exports import hashing, store

SIZE = 50_000


def no_exchange(first: str, second: str) -> None:
    if not os.path.lexists(second):
        raise FileNotFoundError(errno.ENOENT, "none", second)
    raise OSError(errno.EINVAL, "this file system cannot", first)


def dies(owner: object, name: str, *, after: bool) -> None:
    real = getattr(owner, name)

    def deadly(*args: object, **kwargs: object) -> object:
        if not after:
            os._exit(9)
        real(*args, **kwargs)
        os._exit(9)

    setattr(owner, name, deadly)


def writer(folder: Path, generation: int, prepare=None) -> int:
    """Starts a process that makes that generation, and returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        if prepare is not None:
            prepare()
        tiny_exports.get(folder, generation, size=SIZE)
    except BaseException as error:
        print(f"writer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


POINTS = [
    (owner, name, after)
    for owner, name in (
        (tiny_exports, "save"),
        (hashing, "hash_files"),
        (store, "_write_json"),
        (store, "_sync_tree"),
        (store, "_exchange"),
        (store, "_sync"),
        (store, "_remove"),
        (os, "rename"),
        (store.Path, "rename"),
        (store.shutil, "rmtree"),
    )
    for after in (False, True)
]


def whole(folder: Path, generation: int, where: str) -> int:
    """Checks what a killed writer of `generation` left: that one or the one before, readable."""
    for found in (generation - 1, generation):
        try:
            model = tiny_exports.get(folder, found, size=SIZE, only_load_export=True)
        except FileNotFoundError:
            continue
        assert tiny_exports.generation_of(model) == found, where
        assert tiny_exports.stands(folder) == found, where
        return found
    raise AssertionError(f"no export stands after {where}: {list(folder.parent.iterdir())}")


def at_points(folder: Path) -> dict[str, int]:
    ends = {"old": 0, "new": 0}
    for owner, name, after in POINTS:
        current = tiny_exports.stands(folder)
        child = writer(folder, current + 1, lambda o=owner, n=name, a=after: dies(o, n, after=a))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), f"{name}: {code}"
        found = whole(folder, current + 1, f"{name} after={after}")
        assert code == 9 or found == current + 1
        ends["new" if found > current else "old"] += 1
    return ends


def at_random(folder: Path, seconds: float) -> dict[str, int]:
    ends = {"old": 0, "new": 0, "killed": 0, "reads": 0}
    begin = time.monotonic()
    longest = time_of_one(folder)
    while time.monotonic() - begin < seconds:
        current = tiny_exports.stands(folder)
        child = writer(folder, current + 1)
        until = time.monotonic() + random.random() * 1.2 * longest
        while time.monotonic() < until:
            if FALLBACK:  # a reader between the two renames finds none; only what stays counts
                time.sleep(0.0005)
                continue
            assert tiny_exports.stands(folder) in (current, current + 1)
            ends["reads"] += 1
        os.kill(child, signal.SIGKILL)
        ends["killed"] += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        ends["new" if whole(folder, current + 1, "SIGKILL") > current else "old"] += 1
    return ends


def time_of_one(folder: Path) -> float:
    begin = time.monotonic()
    child = writer(folder, tiny_exports.stands(folder) + 1)
    assert os.waitpid(child, 0)[1] == 0
    return time.monotonic() - begin


def main() -> None:
    folder = ARGUMENTS.folder / "models--killed"
    assert os.waitpid(writer(folder, 1), 0)[1] == 0
    points = at_points(folder)
    print("points", points)
    randomly = at_random(folder, ARGUMENTS.seconds)
    print("random", randomly)
    assert points["old"] >= 5, points
    assert points["new"] >= 1, points
    assert randomly["killed"] >= 5, randomly
    assert randomly["old"] >= 3, randomly
    # The next writer leaves nothing of the dead ones behind.
    last = tiny_exports.stands(folder) + 1
    assert os.waitpid(writer(folder, last), 0)[1] == 0
    assert tiny_exports.stands(folder) == last
    left = sorted(path.name for path in ARGUMENTS.folder.iterdir())
    assert left == [".locks", folder.name], left


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--fallback", action="store_true")
    ARGUMENTS = parser.parse_args()
    FALLBACK = ARGUMENTS.fallback
    if FALLBACK:
        _C.exchange_paths = no_exchange  # type: ignore[assignment]
    torch.set_num_threads(1)
    logging.getLogger("opguard").setLevel(logging.ERROR)
    seed = random.randrange(1 << 30)
    print("seed", seed)
    random.seed(seed)
    main()
