"""GuardedTensor: an MLP of 3 x 512 fed with one against the same fed with a plain tensor.

Eager, compiled, with a check of every layer's result, and backwards; then single ops of small
tensors, where all that is seen is what following the rows costs a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from harness import Row

from opguard.flags import guard, tracked
from opguard.flags.helpers import flag_nan_and_inf

EAGER = {1: None, 32: None, 256: 1.5, 4096: 1.1}
COMPILED = {1: None, 32: None, 256: 1.05, 4096: 1.05}


class MLP(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (torch.nn.Linear(512, 512) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        return self.third(x)


@tracked
class Checked(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.first, self.second, self.third
        x = flag_nan_and_inf(torch.relu(first(x)), first)
        x = flag_nan_and_inf(torch.relu(second(x)), second)
        return flag_nan_and_inf(third(x), third)


def _quiet(model: Callable[[torch.Tensor], object], x: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model(x)

    return run


def _learn(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        out = model(x)
        return torch.autograd.grad(out.sum(), list(model.parameters()))

    return run


def _models() -> Iterator[Row]:
    name = "GuardedTensor through MLP 3x512"
    plain, checked = MLP(), Checked()
    for batch, limit in EAGER.items():
        x = torch.randn(batch, 512)
        g, turns = guard(x), 10 if batch < 4096 else 3
        theirs = _quiet(plain, x)
        yield Row(f"{name}, batch {batch}, eager", _quiet(plain, g), theirs, limit, turns=turns)
        label = f"{name}, every layer checked, batch {batch}, eager"
        yield Row(label, _quiet(checked, g), theirs, turns=turns)
        torch.compiler.reset()
        fast, guarded, flagged = (
            torch.compile(model, fullgraph=True, dynamic=False) for model in (plain, MLP(), checked)
        )
        theirs = _quiet(fast, x)
        label = f"{name}, batch {batch}, compiled"
        yield Row(label, _quiet(guarded, g), theirs, COMPILED[batch], turns=turns)
        label = f"{name}, every layer checked, batch {batch}, compiled"
        yield Row(label, _quiet(flagged, g), theirs, turns=turns)
    x = torch.randn(256, 512)
    yield Row(
        f"{name}, forward and backward, batch 256, eager",
        _learn(plain, guard(x)),
        _learn(plain, x),
        1.5,
        turns=5,
    )


OPS: dict[str, Callable[[torch.Tensor], object]] = {
    "relu": torch.relu,
    "x + x": lambda x: x + x,
    "x * 2": lambda x: x * 2,
    "x[3]": lambda x: x[3],
    "x[3:9]": lambda x: x[3:9],
    "x[:, 3]": lambda x: x[:, 3],
    "x[[1, 2]]": lambda x: x[[1, 2]],
    "x.view(4, 8, 16)": lambda x: x.view(4, 8, 16),
    "x.t()": lambda x: x.t(),
    "x.unbind()": lambda x: x.unbind(),
    "cat([x, x])": lambda x: torch.cat([x, x]),
    "stack([x, x])": lambda x: torch.stack([x, x]),
    "x.flip(0)": lambda x: x.flip(0),
    "x.sum(1)": lambda x: x.sum(1),
    "x.sum(0)": lambda x: x.sum(0),
    "softmax(1)": lambda x: x.softmax(1),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (16,)),
    "x @ x.t()": lambda x: x @ x.t(),
    "topk(3, 0)": lambda x: x.topk(3, 0),
    "sort(0)": lambda x: x.sort(0),
    "detach": lambda x: x.detach(),
}


# Microseconds that following the rows may take, of an op with one, two and three results to wrap.
EXTRA = {"relu": 15.0, "x.view(4, 8, 16)": 20.0, "layer_norm": 35.0}


def _single_ops() -> Iterator[Row]:
    x = torch.randn(32, 16)
    g = guard(x)
    yield Row("guard(x), x (32, 16), against x.detach()", lambda: guard(x), x.detach)
    for name, op in OPS.items():
        ours, theirs = _quiet(op, g), _quiet(op, x)
        yield Row(f"GuardedTensor (32, 16): {name}", ours, theirs, extra_us=EXTRA.get(name))


def rows() -> Iterator[Row]:
    # What an earlier opguard compiled must not be found.
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    yield from _single_ops()
    yield from _models()
