"""Which samples each element of a tensor depends on, in numpy: what GuardedTensor is held against.

A value is an int64 array of the tensor's shape; bit ``l`` of an element says that it depends on
what was recorded at location ``l``. Every sample has a location of its own, so the flags of a row
name its samples. Flags are of whole rows, so an element that joins a row gets all of its bits:
:func:`closed` is told which dimensions the rows lie along and does that.

Nothing here knows how opguard follows rows: moves are numpy's, and everything else is an OR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

Bits = Any  # np.ndarray of int64
Draw = Callable[[st.SearchStrategy], Any]


def united(bits: Bits, axes: Sequence[int] | None = None, keepdims: bool = False) -> Bits:
    """The OR along some axes, all by default."""
    axes = tuple(range(bits.ndim)) if axes is None else tuple(axes)
    return np.bitwise_or.reduce(bits, axis=axes, keepdims=keepdims) if axes else bits


def of_rows(bits: Bits, dims: Sequence[int]) -> Bits:
    """One number a row, row-major over ``dims``."""
    dims = [dim % bits.ndim for dim in dims]
    first = np.moveaxis(bits, dims, range(len(dims)))
    rows = int(np.prod(first.shape[: len(dims)], dtype=np.int64))
    return np.bitwise_or.reduce(first.reshape(rows, -1), axis=1)


def closed(bits: Bits, dims: Sequence[int]) -> Bits:
    """Every element with all bits of its row."""
    dims = {dim % bits.ndim for dim in dims} if bits.ndim else set()
    others = [dim for dim in range(bits.ndim) if dim not in dims]
    return np.broadcast_to(united(bits, others, keepdims=True), bits.shape).copy()


def is_uniform(bits: Bits, dims: Sequence[int]) -> bool:
    """Whether all elements of each row depend on the same."""
    return bool((closed(bits, dims) == bits).all())


@dataclass
class Step:
    """One op of a program: what torch runs, what the model says of it, and how exactly.

    ``kind``: "move", every row holds elements of one row; "exact", a row's flags are just what its
    elements depend on; "mix", they may be more, up to all that the inputs had.
    """

    name: str
    inputs: tuple[int, ...]
    run: Callable[..., torch.Tensor]
    model: Callable[..., Bits]  # of the inputs' bits; moves that need values get them when drawn
    kind: str


@dataclass
class Program:
    """Steps over a growing list of values, which begins with the inputs."""

    steps: list[Step] = field(default_factory=list)

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        values = list(inputs)
        for step in self.steps:
            values.append(step.run(*(values[i] for i in step.inputs)))
        return values[len(inputs) :]

    def __repr__(self) -> str:
        return "; ".join(f"{step.name}{step.inputs}" for step in self.steps)


# --- one drawn op each: (draw, x) -> (name, run, model, kind); x is the plain tensor --------------

Drawn = tuple[str, Callable[..., torch.Tensor], Callable[..., Bits], str]


def _dim(draw: Draw, x: torch.Tensor) -> int:
    return int(draw(st.integers(0, x.dim() - 1)))


def select(draw: Draw, x: torch.Tensor) -> Drawn:
    dim = _dim(draw, x)
    i = draw(st.integers(-x.shape[dim], x.shape[dim] - 1))
    return (
        f"select({dim}, {i})",
        lambda t: t.select(dim, i),
        lambda b: b.take(i, axis=dim),
        "move",
    )


def sliced(draw: Draw, x: torch.Tensor) -> Drawn:
    dim = _dim(draw, x)
    start = draw(st.integers(0, x.shape[dim] - 1))
    stop = draw(st.integers(start + 1, x.shape[dim]))
    step = draw(st.integers(1, 2))
    where = (slice(None),) * dim + (slice(start, stop, step),)
    return (
        f"slice({dim}, {start}, {stop}, {step})",
        lambda t: t[where],
        lambda b: b[where],
        "move",
    )


def picked(draw: Draw, x: torch.Tensor) -> Drawn:
    dim = _dim(draw, x)
    size = x.shape[dim]
    chosen = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
    index = torch.tensor(chosen)
    where = (slice(None),) * dim + (index,)
    runs = {
        "index": lambda t: t[where],
        "index_select": lambda t: t.index_select(dim, index),
        "take": lambda t: torch.index_select(t, dim, index),
    }
    name = draw(st.sampled_from(sorted(runs)))
    return f"{name}({dim}, {chosen})", runs[name], lambda b: b.take(chosen, axis=dim), "move"


def masked(draw: Draw, x: torch.Tensor) -> Drawn:
    keep = draw(st.lists(st.booleans(), min_size=x.shape[0], max_size=x.shape[0]))
    keep[draw(st.integers(0, len(keep) - 1))] = True
    mask = torch.tensor(keep)
    return f"x[{keep}]", lambda t: t[mask], lambda b: b[np.array(keep)], "move"


def points(draw: Draw, x: torch.Tensor) -> Drawn:
    if x.dim() < 2:
        return picked(draw, x)
    count = draw(st.integers(1, 3))
    rows, columns = (
        draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count))
        for size in x.shape[:2]
    )
    i, j = torch.tensor(rows), torch.tensor(columns)
    return f"x[{rows}, {columns}]", lambda t: t[i, j], lambda b: b[rows, columns], "move"


def flip(draw: Draw, x: torch.Tensor) -> Drawn:
    dim = _dim(draw, x)
    return f"flip({dim})", lambda t: t.flip(dim), lambda b: np.flip(b, dim), "move"


def roll(draw: Draw, x: torch.Tensor) -> Drawn:
    dim, shift = _dim(draw, x), draw(st.integers(-3, 3))
    return (
        f"roll({shift}, {dim})",
        lambda t: t.roll(shift, dim),
        lambda b: np.roll(b, shift, dim),
        "move",
    )


def permute(draw: Draw, x: torch.Tensor) -> Drawn:
    order = draw(st.permutations(range(x.dim())))
    return (
        f"permute{tuple(order)}",
        lambda t: t.permute(order),
        lambda b: b.transpose(order),
        "move",
    )


def unsqueeze(draw: Draw, x: torch.Tensor) -> Drawn:
    dim = draw(st.integers(0, x.dim()))
    return f"unsqueeze({dim})", lambda t: t.unsqueeze(dim), lambda b: np.expand_dims(b, dim), "move"


def squeeze(draw: Draw, x: torch.Tensor) -> Drawn:
    return "squeeze()", torch.squeeze, np.squeeze, "move"


def expand(draw: Draw, x: torch.Tensor) -> Drawn:
    shape = (draw(st.integers(1, 3)), *x.shape)
    return (
        f"expand{shape}",
        lambda t: t.expand(shape),
        lambda b: np.broadcast_to(b, shape).copy(),
        "move",
    )


def repeat(draw: Draw, x: torch.Tensor) -> Drawn:
    times = tuple(draw(st.integers(1, 2)) for _ in x.shape)
    return f"repeat{times}", lambda t: t.repeat(times), lambda b: np.tile(b, times), "move"


def repeat_interleave(draw: Draw, x: torch.Tensor) -> Drawn:
    dim, times = _dim(draw, x), draw(st.integers(1, 2))
    return (
        f"repeat_interleave({times}, {dim})",
        lambda t: t.repeat_interleave(times, dim),
        lambda b: b.repeat(times, dim),
        "move",
    )


def part(draw: Draw, x: torch.Tensor) -> Drawn:
    """One part of split, chunk or unbind."""
    dim = _dim(draw, x)
    size = x.shape[dim]
    name = draw(st.sampled_from(["split", "chunk", "unbind"]))
    if name == "unbind":
        i = draw(st.integers(0, size - 1))
        return f"unbind({dim})[{i}]", lambda t: t.unbind(dim)[i], lambda b: b.take(i, dim), "move"
    width = draw(st.integers(1, size))
    count = -(-size // width)
    if name == "chunk":
        width = -(-size // count)
        count = -(-size // width)
    i = draw(st.integers(0, count - 1))
    where = (slice(None),) * dim + (slice(i * width, (i + 1) * width),)
    if name == "chunk":
        run = lambda t: t.chunk(count, dim)[i]
    else:
        run = lambda t: t.split(width, dim)[i]
    return f"{name}({dim})[{i}]", run, lambda b: b[where], "move"


def merge_dims(draw: Draw, x: torch.Tensor) -> Drawn:
    if x.dim() < 2:
        return unsqueeze(draw, x)
    dim = draw(st.integers(0, x.dim() - 2))
    shape = (*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :])
    return f"reshape{shape}", lambda t: t.reshape(shape), lambda b: b.reshape(shape), "move"


def split_dim(draw: Draw, x: torch.Tensor) -> Drawn:
    """Exact for a dimension that is all batch or no batch; of merged ones rows may be united."""
    dim = _dim(draw, x)
    divisors = [n for n in range(1, x.shape[dim] + 1) if x.shape[dim] % n == 0]
    first = draw(st.sampled_from(divisors))
    shape = (*x.shape[:dim], first, x.shape[dim] // first, *x.shape[dim + 1 :])
    return f"reshape{shape}", lambda t: t.reshape(shape), lambda b: b.reshape(shape), "mix"


def sort(draw: Draw, x: torch.Tensor) -> Drawn:
    dim, down = _dim(draw, x), draw(st.booleans())
    index = torch.sort(x, dim=dim, descending=down, stable=True).indices.numpy()
    return (
        f"sort({dim})",
        lambda t: torch.sort(t, dim=dim, descending=down, stable=True)[0],
        lambda b: np.take_along_axis(b, index, dim),
        "exact",
    )


def topk(draw: Draw, x: torch.Tensor) -> Drawn:
    dim = _dim(draw, x)
    k = draw(st.integers(1, x.shape[dim]))
    index = x.topk(k, dim).indices.numpy()
    return (
        f"topk({k}, {dim})",
        lambda t: t.topk(k, dim).values,
        lambda b: np.take_along_axis(b, index, dim),
        "exact",
    )


def gather(draw: Draw, x: torch.Tensor) -> Drawn:
    dim = _dim(draw, x)
    shape = list(x.shape)
    shape[dim] = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 99))
    numbers = np.random.default_rng(seed).integers(0, x.shape[dim], shape)
    index = torch.from_numpy(numbers)
    name = draw(st.sampled_from(["gather", "take_along_dim"]))
    if name == "gather":
        run = lambda t: t.gather(dim, index)
    else:
        run = lambda t: torch.take_along_dim(t, index, dim)
    return f"{name}({dim})", run, lambda b: np.take_along_axis(b, numbers, dim), "exact"


def unary(draw: Draw, x: torch.Tensor) -> Drawn:
    runs: dict[str, Callable[..., torch.Tensor]] = {
        "relu": torch.relu,
        "sin": torch.sin,
        "double": lambda t: t * 2,
        "negate": lambda t: -t,
        "clamp": lambda t: t.clamp(-1, 1),
        "clone": torch.clone,
        "contiguous": lambda t: t.contiguous(),
        "abs_": lambda t: t.clone().abs_(),
        "out": lambda t: torch.add(t, 1, out=torch.add(t, 2)),
        "masked_fill": lambda t: t.masked_fill(t.isnan(), 7.0),
    }
    name = draw(st.sampled_from(sorted(runs)))
    return name, runs[name], lambda b: b.copy(), "move"


def reduction(draw: Draw, x: torch.Tensor) -> Drawn:
    dim, keep = _dim(draw, x), draw(st.booleans())
    runs: dict[str, Callable[..., torch.Tensor]] = {
        "sum": lambda t: t.sum(dim, keepdim=keep),
        "mean": lambda t: t.mean(dim, keepdim=keep),
        "amax": lambda t: t.amax(dim, keepdim=keep),
        "max": lambda t: t.max(dim, keepdim=keep).values,
        "logsumexp": lambda t: t.logsumexp(dim, keepdim=keep),
        "var": lambda t: t.var(dim, correction=0, keepdim=keep),
    }
    name = draw(st.sampled_from(sorted(runs)))
    return (
        f"{name}({dim}, keepdim={keep})",
        runs[name],
        lambda b: united(b, (dim,), keepdims=keep),
        "exact",
    )


def whole(draw: Draw, x: torch.Tensor) -> Drawn:
    runs: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.sum, "max": torch.max}
    name = draw(st.sampled_from(sorted(runs)))
    return f"{name}()", runs[name], united, "exact"


def linear(draw: Draw, x: torch.Tensor) -> Drawn:
    """Along the last dimension, by a plain weight."""
    width = draw(st.integers(1, 3))
    weight = torch.linspace(-1, 1, x.shape[-1] * width).reshape(width, x.shape[-1])
    runs: dict[str, Callable[..., torch.Tensor]] = {
        "linear": lambda t: torch.nn.functional.linear(t, weight),
        "matmul": lambda t: t @ weight.t(),
    }
    name = draw(st.sampled_from(sorted(runs)))

    def model(b: Bits) -> Bits:
        return united(b, (-1,), keepdims=True).repeat(width, -1)

    return f"{name}({width})", runs[name], model, "exact"


def along(draw: Draw, x: torch.Tensor) -> Drawn:
    """Ops each of whose elements depends on all, or on more than itself, along a dimension."""
    dim = _dim(draw, x)
    runs: dict[str, Callable[..., torch.Tensor]] = {
        "softmax": lambda t: t.softmax(dim),
        "cumsum": lambda t: t.cumsum(dim),
        "logcumsumexp": lambda t: t.logcumsumexp(dim),
    }
    name = draw(st.sampled_from(sorted(runs)))

    def model(b: Bits) -> Bits:
        if name == "softmax":
            return np.broadcast_to(united(b, (dim,), keepdims=True), b.shape).copy()
        return np.bitwise_or.accumulate(b, dim)

    return f"{name}({dim})", runs[name], model, "mix"


def gram(draw: Draw, x: torch.Tensor) -> Drawn:
    """Attention among the rows of the last two dimensions."""
    if x.dim() < 2:
        return whole(draw, x)

    def model(b: Bits) -> Bits:
        each = united(b, (-1,))
        return each[..., :, None] | each[..., None, :]

    return "x @ x.mT", lambda t: t @ t.mT, model, "mix"


ONE = (
    select, sliced, picked, masked, points, flip, roll, permute, unsqueeze, squeeze, expand,
    repeat, repeat_interleave, part, merge_dims, split_dim, sort, topk, gather, unary, unary,
    reduction, whole, linear, along, gram,
)  # fmt: skip


# --- and of two: (draw, x, y) -> Drawn, or None where they do not fit -----------------------------


def cat(draw: Draw, x: torch.Tensor, y: torch.Tensor) -> Drawn | None:
    dims = [
        dim
        for dim in range(x.dim())
        if x.dim() == y.dim()
        and x.shape[:dim] == y.shape[:dim]
        and x.shape[dim + 1 :] == y.shape[dim + 1 :]
    ]
    if not dims:
        return None
    dim = draw(st.sampled_from(dims))
    return (
        f"cat({dim})",
        lambda a, b: torch.cat([a, b], dim),
        lambda a, b: np.concatenate([a, b], dim),
        "join",
    )


def stack(draw: Draw, x: torch.Tensor, y: torch.Tensor) -> Drawn | None:
    if x.shape != y.shape:
        return None
    dim = draw(st.integers(0, x.dim()))
    return (
        f"stack({dim})",
        lambda a, b: torch.stack([a, b], dim),
        lambda a, b: np.stack([a, b], dim),
        "join",
    )


def _broadcasts(x: torch.Tensor, y: torch.Tensor) -> bool:
    try:
        torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        return False
    return True


def pointwise(draw: Draw, x: torch.Tensor, y: torch.Tensor) -> Drawn | None:
    if not _broadcasts(x, y):
        return None
    runs: dict[str, Callable[..., torch.Tensor]] = {
        "add": torch.add,
        "mul": torch.mul,
        "maximum": torch.maximum,
        "where": lambda a, b: torch.where(a > b, a, b),
        "lerp": lambda a, b: torch.lerp(a, b, 0.5),
    }
    name = draw(st.sampled_from(sorted(runs)))
    return name, runs[name], np.bitwise_or, "join"


def in_place(draw: Draw, x: torch.Tensor, y: torch.Tensor) -> Drawn | None:
    if not _broadcasts(x, y) or torch.broadcast_shapes(x.shape, y.shape) != x.shape:
        return None
    runs: dict[str, Callable[..., torch.Tensor]] = {
        "add_": lambda a, b: a.clone().add_(b),
        "mul_": lambda a, b: a.clone().mul_(b),
    }
    name = draw(st.sampled_from(sorted(runs)))
    return name, runs[name], np.bitwise_or, "join"


def assign(draw: Draw, x: torch.Tensor, y: torch.Tensor) -> Drawn | None:
    """``x[i] = y`` on a copy: rows that were written over may keep what they had."""
    if x.dim() == 0 or not _broadcasts(x[0], y):
        return None
    if torch.broadcast_shapes(x[0].shape, y.shape) != x[0].shape:
        return None
    i = draw(st.integers(0, x.shape[0] - 1))

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a = a.clone()
        a[i] = b
        return a

    def model(a: Bits, b: Bits) -> Bits:
        a = a.copy()
        a[i] = b
        return a

    return f"x[{i}] = y", run, model, "mix"


TWO = (cat, stack, pointwise, pointwise, in_place, assign)
