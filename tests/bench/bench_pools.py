"""Pools: more models than the budget holds, against what people do instead.

Eight models of 64 MiB, a budget of four, requests by Zipf's law (exponent 1.0), one sample each.
All files are in the page cache. What is compared with:

- resident: all eight in memory, what no budget allows;
- copies: an LRU that copies weights out and in, what ``.to()`` does;
- load_file: an LRU that drops weights and maps the file again, the strongest of the simple ways.
  It counts nothing, looks for no change of the file and loses what was written to the weights;
- disk_offload: accelerate's, which reads each weight at each forward.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from harness import Row
from safetensors.torch import load_file, save_file
from torch import nn

from opguard import pools

WIDTH = 1024
LAYERS = 16
MODELS = 8
HELD = 4
REQUESTS = 200
MIB = 1 << 20


class Dense(nn.Module):
    """Every request reads all 64 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Sparse(nn.Module):
    """Every request reads 64 rows of 16384."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(WIDTH * LAYERS, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bag(ids)


class Tables(nn.Module):
    """Every request reads 4 rows of each of 16 tables of 4 MiB, as recommender models do."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(8192, 128) for _ in range(LAYERS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([bag(one) for bag, one in zip(self.bags, ids, strict=True)], dim=1)


INPUT = {
    Dense: torch.randn(1, WIDTH),
    Sparse: torch.randint(0, WIDTH * LAYERS, (1, 64)),
    Tables: torch.randint(0, 8192, (LAYERS, 1, 4)),
}


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="opguard-bench-pools-", dir="/var/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _setup() -> None:
    """Four models and what rounding them to pages takes."""
    pools.setup_default_pools(budgets={"cpu": HELD * (64 * MIB + MIB)}, spill_dir=_folder())


@cache
def _models(kind: type[nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    models = [kind().eval().requires_grad_(False) for _ in range(MODELS)]
    for index, model in enumerate(models):
        save_file(dict(model.state_dict()), str(_file(kind, index)))
    return models


def _file(kind: type[nn.Module], index: int) -> Path:
    return _folder() / f"{kind.__name__}{index}.safetensors"


@cache
def _handles(kind: type[nn.Module]) -> list[Any]:
    _setup()
    torch.manual_seed(0)
    return [pools.manage(kind().eval().requires_grad_(False)) for _ in range(MODELS)]


def _timed(function: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    if before is not None:
        before()
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _drop_all(kind: type[nn.Module]) -> None:
    """Nothing is resident: the next lease brings its model in."""
    pools.get_management().free("cpu")


# --- one model ---


def _evict() -> float:
    handle = _handles(Dense)[0]
    handle.load()
    return _timed(handle.offload)


def _copy_into_warm_buffers() -> float:
    source, buffers = _warm_buffers()
    return _timed(lambda: [b.copy_(p) for b, p in zip(buffers, source, strict=True)])


@cache
def _warm_buffers() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    source = [p.detach() for p in _models(Dense)[0].parameters()]
    return source, [p.clone() for p in source]


@torch.inference_mode()
def _bring_in_and_forward() -> float:
    handle = _handles(Dense)[0]

    def request() -> None:
        with pools.auto_manage(handle) as held:
            held.obj(INPUT[Dense])

    return _timed(request, partial(_drop_all, Dense))


@torch.inference_mode()
def _load_file_and_forward() -> float:
    model = _models(Dense)[0]

    def request() -> None:
        _point(model, load_file(str(_file(Dense, 0))))
        model(INPUT[Dense])

    return _timed(request)


def _point(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name]


# --- requests ---


@cache
def _requests() -> list[int]:
    weights = 1 / torch.arange(1, MODELS + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    return torch.multinomial(weights, REQUESTS, replacement=True, generator=generator).tolist()


@torch.inference_mode()
def _serve_managed(kind: type[nn.Module]) -> float:
    handles, x = _handles(kind), INPUT[kind]

    def serve() -> None:
        for index in _requests():
            with pools.auto_manage(handles[index]) as held:
                held.obj(x)

    return _timed(serve, partial(_drop_all, kind))


@torch.inference_mode()
def _serve_resident(kind: type[nn.Module]) -> float:
    models, x = [_resident(kind, index) for index in range(MODELS)], INPUT[kind]

    def serve() -> None:
        for index in _requests():
            models[index](x)

    return _timed(serve)


@cache
def _resident(kind: type[nn.Module], index: int) -> nn.Module:
    torch.manual_seed(index)
    return kind().eval().requires_grad_(False)


def _lru(bring_in: Callable[[int], object], evict: Callable[[int], object]) -> Iterator[int]:
    """Yields the models to run, with at most HELD of them there."""
    held: OrderedDict[int, None] = OrderedDict()
    for index in _requests():
        if index not in held:
            if len(held) == HELD:
                evict(held.popitem(last=False)[0])
            bring_in(index)
        held[index] = None
        held.move_to_end(index)
        yield index
    for index in held:
        evict(index)


@torch.inference_mode()
def _serve_load_file(kind: type[nn.Module]) -> float:
    models, x = _models(kind), INPUT[kind]

    def bring_in(index: int) -> None:
        _point(models[index], load_file(str(_file(kind, index))))

    def evict(index: int) -> None:
        for parameter in models[index].parameters():
            parameter.data = torch.empty(0)

    def serve() -> None:
        for index in _lru(bring_in, evict):
            models[index](x)

    return _timed(serve)


@torch.inference_mode()
def _serve_copies(kind: type[nn.Module]) -> float:
    models, x = _models(kind), INPUT[kind]
    masters = _masters(kind)

    def bring_in(index: int) -> None:
        for parameter, master in zip(models[index].parameters(), masters[index], strict=True):
            parameter.data = master.clone()

    def evict(index: int) -> None:
        for parameter, master in zip(models[index].parameters(), masters[index], strict=True):
            master.copy_(parameter)
            parameter.data = master

    def serve() -> None:
        for index in _lru(bring_in, evict):
            models[index](x)

    return _timed(serve)


@cache
def _masters(kind: type[nn.Module]) -> list[list[torch.Tensor]]:
    return [
        [load_file(str(_file(kind, index)))[name].clone() for name, _ in model.named_parameters()]
        for index, model in enumerate(_models(kind))
    ]


@torch.inference_mode()
def _serve_disk_offload(kind: type[nn.Module]) -> float:
    models, x = _disk_offloaded(kind), INPUT[kind]

    def serve() -> None:
        for index in _requests():
            models[index](x)

    return _timed(serve)


@cache
def _disk_offloaded(kind: type[nn.Module]) -> list[nn.Module]:
    from accelerate import disk_offload

    return [
        disk_offload(
            kind().eval().requires_grad_(False),
            str(_folder() / f"accelerate-{kind.__name__}{index}"),
            execution_device=torch.device("cpu"),
        )
        for index in range(MODELS)
    ]


# --- a call, a patch ---


def _call_rows() -> Iterator[Row]:
    _setup()
    torch.manual_seed(0)
    bare, managed = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8).requires_grad_(False)
    pools.AutoManageHook(managed).attach()
    x = torch.randn(1, 8)
    managed(x)
    yield Row(
        "managed call of a Linear, already there, over a bare one",
        lambda: managed(x),
        lambda: bare(x),
        extra_us=0.5,
        turns=5,
    )


def _lora_rows() -> Iterator[Row]:
    _setup()
    torch.manual_seed(0)
    rank, model = 16, Dense().eval().requires_grad_(False)
    names = [name.removesuffix(".weight") for name, _ in model.named_parameters()]
    parts = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(shape) * 0.01
        for name in names
        for side, shape in (("A", (rank, WIDTH)), ("B", (WIDTH, rank)))
    }
    lora = pools.LoraCommit(parts, config={"r": rank, "lora_alpha": rank})
    patched = pools.CommitObjectProxy(model).clone_and_add_commit(lora)
    weights = [p.clone() for p in model.parameters()]
    pairs = [
        (
            parts[f"base_model.model.{name}.lora_B.weight"],
            parts[f"base_model.model.{name}.lora_A.weight"],
        )
        for name in names
    ]
    kept = [weight.clone() for weight in weights]

    def apply() -> float:
        with ExitStack() as block:
            return _timed(lambda: block.enter_context(patched))

    def revert() -> float:
        block = ExitStack()
        return _timed(block.close, lambda: block.enter_context(patched))

    def clone_and_add() -> float:
        def add() -> None:
            for index, (weight, (b, a)) in enumerate(zip(weights, pairs, strict=True)):
                kept[index] = weight.clone()
                weight.addmm_(b, a)

        return _timed(add)

    def copy_back() -> float:
        return _timed(lambda: [w.copy_(k) for w, k in zip(weights, kept, strict=True)])

    yield Row(
        "apply a LoRA r=16 on 64 MiB, against clone and add",
        apply,
        clone_and_add,
        1.0,
        self_timed=True,
    )
    yield Row("revert it, against copying back", revert, copy_back, 0.05, self_timed=True)


def rows() -> Iterator[Row]:
    def row(name: str, ours: Callable[[], float], theirs: Callable[[], float], limit: float) -> Row:
        return Row(name, ours, theirs, limit, self_timed=True)

    yield row(
        "evict unchanged 64 MiB, reclaim deferred, against a copy into warm buffers",
        _evict,
        _copy_into_warm_buffers,
        0.01,
    )
    yield row(
        "bring in and first forward, against load_file and first forward",
        _bring_in_and_forward,
        _load_file_and_forward,
        0.95,
    )
    yield from _call_rows()
    yield from _lora_rows()
    for kind, anchors in (
        (
            Dense,
            (
                (_serve_resident, 1 / 0.8),
                (_serve_copies, 1 / 2),
                (_serve_load_file, None),
                (_serve_disk_offload, 1 / 5),
            ),
        ),
        (
            Sparse,
            ((_serve_load_file, 1 / 4), (_serve_copies, 1 / 50), (_serve_resident, None)),
        ),
        (
            Tables,
            ((_serve_load_file, 1 / 4), (_serve_copies, None), (_serve_resident, None)),
        ),
    ):
        for anchor, limit in anchors:
            name = anchor.__name__.removeprefix("_serve_")
            yield Row(
                f"{REQUESTS} requests, {kind.__name__.lower()} models, 4 of 8 fit, against {name}",
                partial(_serve_managed, kind),
                partial(anchor, kind),
                limit,
                self_timed=True,
            )
