"""An MLP of three 512-wide layers with a check after each, a push and a merge: its own cost.

In one process and thread: eager, compiled, and how long compiling takes. The last is measured in
new processes without caches.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from harness import Row

from opguard.flags import err, tracked
from opguard.flags.helpers import flag_nan_and_inf, push

EAGER = {1: 1.12, 32: 1.05, 256: 1.02, 4096: 1.05}
COMPILED = {1: 1.12, 32: 1.05, 256: 1.02, 4096: 1.03}


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(512, 512) for _ in range(3))

    def forward(self, x: torch.Tensor, where: torch.Tensor) -> object:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        return self.third(x), where


@tracked
class Guarded(Plain):
    def forward(self, x: torch.Tensor, where: torch.Tensor) -> object:
        x = torch.relu(self.first(x))
        f = flag_nan_and_inf(x, self.first)
        x = torch.relu(self.second(x))
        f = flag_nan_and_inf(x, self.second, f)
        x = self.third(x)
        g = push(flag_nan_and_inf(x, self.third), 9, self.third, where=where)
        return x, err.merge(f, g)


def _pair() -> tuple[Plain, Guarded]:
    plain, guarded = Plain(), Guarded()
    guarded.load_state_dict(plain.state_dict())
    return plain, guarded


def _compile_seconds(name: str) -> Callable[[], float]:
    def run() -> float:
        environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        found = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, name],
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return float(found.stdout)

    return run


def _compile_once(name: str) -> float:
    torch.set_num_threads(1)
    model = dict(zip(("plain", "guarded"), _pair(), strict=True))[name]
    x, where = torch.randn(256, 512), torch.zeros(256, dtype=torch.bool)
    with torch.no_grad():
        torch.compile(lambda v: v * 2 + 1)(x)  # the toolchain is warm
        begin = time.perf_counter()
        torch.compile(model, fullgraph=True)(x, where)
    return time.perf_counter() - begin


def rows() -> Iterator[Row]:
    plain, guarded = _pair()
    with torch.no_grad():
        for batch, limit_eager in EAGER.items():
            x, where = torch.randn(batch, 512), torch.rand(batch) > 0.9
            torch.compiler.reset()
            fast = torch.compile(plain, fullgraph=True, dynamic=False)
            checked = torch.compile(guarded, fullgraph=True, dynamic=False)
            for kind, ours, theirs, limit in (
                ("eager", guarded, plain, limit_eager),
                ("compiled", checked, fast, COMPILED[batch]),
            ):
                yield Row(
                    f"MLP 3x512 guarded, batch {batch}, {kind}",
                    lambda m=ours, x=x, w=where: m(x, w),
                    lambda m=theirs, x=x, w=where: m(x, w),
                    limit,
                )
    yield Row(
        "MLP 3x512 guarded: time to compile",
        _compile_seconds("guarded"),
        _compile_seconds("plain"),
        1.15,
        self_timed=True,
    )


if __name__ == "__main__":
    print(_compile_once(sys.argv[1]))
