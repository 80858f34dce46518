"""What runs on a GPU: detaching many small tensors, checks; no rows without a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from harness import Row

if TYPE_CHECKING:
    from opguard.pools._devices import DeviceHome
    from opguard.pools._spill import SpillFolder

CALLS = 20


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """Seconds of device time a call, by events."""

    def run() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        function()
        begin.record()
        for _ in range(CALLS):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / CALLS

    return run


def scan_rows() -> list[Row]:
    """One read pass: half the bytes that a copy moves, so 85% of its bandwidth is 0.5 / 0.85."""
    from opguard.flags import err, flag_nan_and_inf, flag_nan_and_inf_

    found = []
    for shape, dtype in (
        ((65536, 4096), torch.bfloat16),
        ((65536, 4096), torch.float32),
        ((16, 16 << 20), torch.bfloat16),
        ((1 << 20, 64), torch.bfloat16),
    ):
        x = torch.randn(shape, device="cuda", dtype=dtype)
        f, other = err.new_t(shape[0], device="cuda"), torch.empty_like(x)
        name = f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
        limit = 0.5 / 0.85 if shape == (65536, 4096) and dtype == torch.bfloat16 else None
        found.append(
            Row(
                f"flag_nan_and_inf, {name} / device copy",
                timed(lambda x=x, f=f: flag_nan_and_inf(x, 1, f)),
                timed(lambda x=x, other=other: other.copy_(x)),
                limit=limit,
                self_timed=True,
            )
        )
        across = x.view(-1)[: 4096 * 4096].view(4096, 4096).t()
        if shape == (65536, 4096):
            g = err.new_t(4096, device="cuda")
            found.append(
                Row(
                    f"flag_nan_and_inf_, (4096, 4096).t() {dtype} / clone",
                    timed(lambda x=across, f=g: flag_nan_and_inf_(x, 1, f)),
                    timed(across.clone),
                    self_timed=True,
                )
            )
    return found


class Guarded(torch.nn.Module):
    def __init__(self, *, guard: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(3))
        self.guard = guard

    def forward(self, x: torch.Tensor) -> object:
        from opguard.flags import err, flag_nan_and_inf

        if not self.guard:
            for layer in self.layers:
                x = layer(x).relu()
            return x
        f = flag_nan_and_inf(x, 1)
        for i, layer in enumerate(self.layers):
            x = layer(x).relu()
            f = flag_nan_and_inf(x, 2 + i, f)
        f = err.push(f, err.SATURATED, 9, where=x.amax(1) > 1e4)
        return x, err.merge(f, flag_nan_and_inf(x, 10))


def mlp_rows() -> list[Row]:
    found = []
    for batch in (256, 4096, 65536):
        x = torch.randn(batch, 512, device="cuda", dtype=torch.bfloat16)
        ours = torch.compile(Guarded(guard=True).cuda().bfloat16(), mode="reduce-overhead")
        theirs = torch.compile(Guarded(guard=False).cuda().bfloat16(), mode="reduce-overhead")
        found.append(
            Row(
                f"guarded MLP 3x512, batch {batch}, compiled / unguarded",
                timed(torch.no_grad()(lambda x=x, m=ours: m(x))),
                timed(torch.no_grad()(lambda x=x, m=theirs: m(x))),
                limit=1.03,
                self_timed=True,
            )
        )
    return found


# --- pools ----------------------------------------------------------------------------------------

POOL_BYTES = 4 << 30
SIDE = 8192  # of a layer's weight, of bfloat16
KEPT: list[torch.nn.Module] = []
EVICT_SECONDS = 0.005  # vLLM's sleep level 1 copies at 2 GB/s: 2 s for as many bytes


def clocked(function: Callable[[], object], after: Callable[[], object]) -> Callable[[], float]:
    """Seconds of the thread's time, what is queued included; ``after`` is not counted."""

    def run() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        took = time.perf_counter() - begin
        after()
        return took

    return run


def buffers() -> tuple[torch.Tensor, torch.Tensor]:
    """Pinned host memory and device memory of torch's own."""
    host = torch.empty(POOL_BYTES, dtype=torch.uint8, pin_memory=True)
    return host, torch.empty(POOL_BYTES, dtype=torch.uint8, device="cuda")


def managed_gpu(folder: SpillFolder) -> DeviceHome:
    """A model of POOL_BYTES in evaluation mode, unchanged, whose pinned copy is there."""
    from opguard.pools._accelerators import accelerator_for
    from opguard.pools._devices import DeviceHome
    from opguard.pools._homes import Home

    count = POOL_BYTES // (SIDE * SIDE * 2)
    with torch.device("meta"):
        layers = [
            torch.nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16) for _ in range(count)
        ]
    model = torch.nn.Sequential(*layers).eval().requires_grad_(False).to_empty(device="cpu")
    for number, weight in enumerate(model.parameters()):
        weight.fill_(number)
    home = DeviceHome(Home.adopt(model, folder, "bench"), accelerator_for(torch.device("cuda", 0)))
    home.bring_in()
    home.give_back()
    KEPT.append(model)  # homes hold their modules weakly
    return home


def pool_rows() -> list[Row]:
    """Bring in against one pinned copy of as many bytes; evict against 5 ms."""
    from opguard.pools._spill import SpillFolder

    if torch.cuda.mem_get_info()[0] < 3 * POOL_BYTES:
        return []
    home = managed_gpu(SpillFolder(None))
    source, target = buffers()

    def evict() -> float:
        home.bring_in()
        return clocked(home.give_back, lambda: None)()

    return [
        Row(
            "pool: bring in 4 GiB / one pinned cudaMemcpyAsync",
            clocked(home.bring_in, home.give_back),
            clocked(lambda: target.copy_(source, non_blocking=True), lambda: None),
            limit=1 / 0.9,
            self_timed=True,
        ),
        Row("pool: evict 4 GiB / 5 ms", evict, lambda: EVICT_SECONDS, limit=1.0, self_timed=True),
    ]


def rows() -> list[Row]:
    if not torch.cuda.is_available():
        return []
    from torch.utils._pytree import tree_map

    from opguard import detach_to_cpu

    tensors = [torch.randn(16, device="cuda") for _ in range(1000)]
    return [
        Row(
            "detach_to_cpu, 1000 small CUDA tensors / tree_map(detach().cpu())",
            lambda: detach_to_cpu(tensors),
            lambda: tree_map(lambda t: t.detach().cpu(), tensors),
            limit=0.2,
        ),
        *scan_rows(),
        *mlp_rows(),
        *pool_rows(),
    ]
