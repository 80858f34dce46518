"""opguard.flags against reading the bytes once, and TorchGuard 1.0.4 where it is installed.

``OPGUARD_BENCH_THREADS=2`` runs the rows of large tensors with two threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row
from theirs import torchguard

from opguard.flags import ErrorConfig, err, flags, tracked
from opguard.flags.helpers import (
    find,
    flag_nan_and_inf,
    flag_nan_and_inf_,
    push,
)

THREADS = int(os.environ.get("OPGUARD_BENCH_THREADS", "1"))


def _scans() -> Iterator[Row]:
    torch.set_num_threads(THREADS)
    base = torch.randn(4096, 4096)
    # The bytes' time: x.sum(1) of f32, over as many bytes as the checked tensor has.
    for dtype, faster in (
        (torch.float32, 25),
        (torch.float64, None),
        (torch.float16, None),
        (torch.bfloat16, 40),
    ):
        x = base.to(dtype)
        f = flag_nan_and_inf(x, 1)
        two = torch.cat([base, base]) if x.element_size() == 8 else base
        like = two.reshape(-1)[: x.numel() * x.element_size() // 4]
        rows = like.reshape(-1, 4096)
        ours = lambda x=x, f=f: flag_nan_and_inf_(x, 1, f)
        yield Row(f"flag_nan_and_inf_ {dtype}, x.sum(1) a byte", ours, lambda r=rows: r.sum(1), 1.1)
        if faster:
            theirs = lambda x=x: torch.isfinite(x).all(1)
            yield Row(f"flag_nan_and_inf_ {dtype}, isfinite.all", ours, theirs, 1 / faster)


def _small(tg: Any) -> Iterator[Row]:
    x = torch.randn(32, 512)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    tied, theirs_model = tracked(Model)(), tg.tracked(Model)()
    for name, ours_at, theirs_at in (
        ("an int", 5, 5),
        ("a module", tied.layer, theirs_model.layer),
    ):
        theirs = lambda at=theirs_at: tg.flag_nan_and_inf(x, at)
        f = flag_nan_and_inf(x, 5)
        yield Row(
            f"(32, 512), new flags, location {name}",
            lambda at=ours_at: flag_nan_and_inf(x, at),
            theirs,
            1 / 200,
        )
        yield Row(
            f"(32, 512), flags given, location {name}",
            lambda at=ours_at, f=f: flag_nan_and_inf(x, at, f),
            lambda at=theirs_at, f=f: tg.flag_nan_and_inf(x, at, f),
            1 / 200,
        )
        yield Row(
            f"(32, 512), in place, location {name}",
            lambda at=ours_at, f=f: flag_nan_and_inf_(x, at, f),
            theirs,
            1 / 300,
        )


Calls = tuple[str, Callable[[], object], Callable[[], object], float]


def _calls(tg: Any, batch: int, slots: int) -> Iterator[Calls]:
    mine, theirs = ErrorConfig(num_slots=slots), tg.ErrorConfig(num_slots=slots)
    small = batch == 32 and slots in {4, 16}
    where = torch.arange(batch) % 3 == 0
    f = push(err.new_t(batch, config=mine), 1, 5, where=where, config=mine)
    g = push(err.new_t(batch, config=mine), 9, 7, where=~where, config=mine)
    yield (
        "push",
        lambda: push(f, 9, 7, where=where, config=mine),
        lambda: tg.push(f, 9, 7, where=where, config=theirs),
        50,
    )
    yield (
        "merge(2)",
        lambda: err.merge(f, g, config=mine),
        lambda: tg.err.merge(f, g, config=theirs),
        20,
    )
    code = 8 if small else 10
    yield "find", lambda: find(1, f, mine), lambda: tg.find(1, f, theirs), code
    yield (
        "has_code",
        lambda: err.has_code(f, 1, mine),
        lambda: tg.err.has_code(f, 1, theirs),
        code,
    )
    yield (
        "max_severity",
        lambda: err.max_severity(f, mine),
        lambda: tg.err.max_severity(f, theirs),
        6 if small else 10,
    )
    yield (
        "unpack",
        lambda: flags.unpack(f, 0, mine),
        lambda: tg.flags.unpack(f, 0, theirs),
        5 if small else 10,
    )
    yield (
        "new_t",
        lambda: err.new_t(batch, config=mine),
        lambda: tg.err.new_t(batch, config=theirs),
        1,
    )
    yield "is_ok", lambda: err.is_ok(f), lambda: tg.err.is_ok(f), 1


def rows() -> Iterator[Row]:
    threads = torch.get_num_threads()
    try:
        yield from _scans()
    finally:
        torch.set_num_threads(threads)
    tg = torchguard()
    if tg is None:
        return
    yield from _small(tg)
    for batch in (32, 4096):
        for slots in (4, 16, 256):
            for name, ours, theirs, faster in _calls(tg, batch, slots):
                yield Row(f"{name}, batch {batch}, {slots} slots", ours, theirs, 1 / faster)
