"""An MLP of three 512-wide layers with a check after each, a push and a merge: its own cost.

In one process: eager, compiled, and how long compiling takes. The last is measured in new
processes without caches. Eager code writes into flags that it made itself, as is right there;
compiled code has no use for that. What eager code without it costs is shown, too.
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
from opguard.flags.helpers import flag_nan_and_inf, flag_nan_and_inf_, push, push_

EAGER = {1: 1.12, 32: 1.05, 256: 1.02, 4096: 1.05}
COMPILED = {1: 1.12, 32: 1.05, 256: 1.02, 4096: 1.03}


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(512, 512) for _ in range(3))

    def forward(self, x: torch.Tensor, where: torch.Tensor) -> object:
        first, second, third = self.first, self.second, self.third
        x = torch.relu(first(x))
        x = torch.relu(second(x))
        return third(x), where


@tracked
class Guarded(Plain):
    def forward(self, x: torch.Tensor, where: torch.Tensor) -> object:
        first, second, third = self.first, self.second, self.third
        x = torch.relu(first(x))
        f = flag_nan_and_inf(x, first)
        x = torch.relu(second(x))
        f = flag_nan_and_inf(x, second, f)
        x = third(x)
        g = push(flag_nan_and_inf(x, third), 9, third, where=where)
        return x, err.merge(f, g)


@tracked
class InPlace(Plain):
    def forward(self, x: torch.Tensor, where: torch.Tensor) -> object:
        first, second, third = self.first, self.second, self.third
        x = torch.relu(first(x))
        f = flag_nan_and_inf(x, first)
        x = torch.relu(second(x))
        flag_nan_and_inf_(x, second, f)
        x = third(x)
        g = push_(flag_nan_and_inf(x, third), 9, third, where=where)
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
    in_place = InPlace()
    in_place.load_state_dict(plain.state_dict())
    # What an earlier opguard compiled must not be found.
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    with torch.no_grad():
        for batch, limit_eager in EAGER.items():
            x, where = torch.randn(batch, 512), torch.rand(batch) > 0.9
            torch.compiler.reset()
            fast = torch.compile(plain, fullgraph=True, dynamic=False)
            checked = torch.compile(guarded, fullgraph=True, dynamic=False)
            for kind, ours, theirs, limit in (
                ("eager", in_place, plain, limit_eager),
                ("eager, each call a new tensor", guarded, plain, None),
                ("compiled", checked, fast, COMPILED[batch]),
            ):
                yield Row(
                    f"MLP 3x512 guarded, batch {batch}, {kind}",
                    lambda m=ours, x=x, w=where: m(x, w),
                    lambda m=theirs, x=x, w=where: m(x, w),
                    limit,
                    turns=10 if batch < 4096 else 3,
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
