"""Guarded code under torch.compile: one graph, modes traced, results as in eager."""

from __future__ import annotations

import pytest
import torch

from opguard.guards.calling import autocast_guard, call_guard, eval_guard, grad_guard, vram_guard
from opguard.guards.freeing import free_guard
from opguard.guards.locality import local_guard

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.layer(x))


@pytest.fixture
def graphs():
    """A backend that counts its graphs; starts from nothing compiled."""
    torch._dynamo.reset()
    made = []

    def backend(module, example):
        made.append(module)
        return module

    backend.made = made
    yield backend
    torch._dynamo.reset()


def test_with_is_one_graph(graphs):
    model, x = Net().eval(), torch.ones(2, 4)

    def function(x):
        with call_guard():
            return model(x) + 1

    compiled = torch.compile(function, backend=graphs, fullgraph=True)
    out = compiled(x)
    assert len(graphs.made) == 1
    assert not out.requires_grad
    assert torch.equal(out, model(x) + 1)
    assert torch.is_grad_enabled()
    compiled(x)
    assert len(graphs.made) == 1


@pytest.mark.parametrize(
    "guard",
    [
        call_guard,
        call_guard(),
        call_guard(inference=False),
        grad_guard(),
        vram_guard(),
        eval_guard(),
        autocast_guard(dtype="fp32"),
        autocast_guard(dtype="bf16", device_list="cpu"),
        call_guard(effective_dtype="bf16", device_list="cpu"),
        free_guard(),
        local_guard(),
    ],
)
def test_decorated_is_one_graph(graphs, guard):
    model = Net().eval()

    @guard
    def function(x, *, scale=2):
        return {"y": model(x) * scale}

    x = torch.ones(2, 4)
    out = torch.compile(function, backend=graphs, fullgraph=True)(x, scale=3)["y"]
    assert len(graphs.made) == 1
    assert torch.equal(out, function(x, scale=3)["y"])
    assert out.dtype == function(x, scale=3)["y"].dtype
    assert out.requires_grad == function(x, scale=3)["y"].requires_grad


def test_g_runs_a_model_in_eval_in_one_graph(graphs):
    model, x = Net(), torch.ones(2, 4)

    def function(x):
        with call_guard() as g:
            return g(model, x), g(x * 2)

    out, doubled = torch.compile(function, backend=graphs, fullgraph=True)(x)
    assert len(graphs.made) == 1
    assert not out.requires_grad
    assert torch.equal(doubled, x * 2)
    assert all(m.training for m in model.modules())
    model.eval()
    assert torch.equal(out, model(x))


def test_autocast_is_traced_in_a_with(graphs):
    model, x = Net(), torch.ones(2, 4)

    def function(x):
        with call_guard(effective_dtype="bf16", device_list="cpu") as g:
            inside = g(model, x)
        return inside, model.layer(x)

    inside, outside = torch.compile(function, backend=graphs, fullgraph=True)(x)
    assert len(graphs.made) == 1
    assert (inside.dtype, outside.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(inside, function(x)[0])
    assert not torch.is_autocast_enabled("cpu")


def test_guards_of_several_kinds_are_traced_in_one_process():
    # Dynamo compiles the one wrapper again for each, and takes the numbers that differ for symbols.
    x = torch.ones(3, 3)
    for guard, dtype in (
        (autocast_guard(dtype="bf16", device_list="cpu"), torch.bfloat16),
        (call_guard(effective_dtype="bf16", device_list="cpu"), torch.bfloat16),
        (call_guard(need_grads=True), torch.float32),
        (vram_guard(), torch.float32),
        (grad_guard(), torch.float32),
    ):
        function = guard(lambda x: x @ x)
        assert torch.compile(function, backend="eager", fullgraph=True)(x).dtype is dtype


@pytest.mark.parametrize("guard", [free_guard, local_guard])
def test_guards_of_what_is_no_graph_are_passed_over(graphs, guard):
    def function(x):
        with guard():
            return x + 1

    out = torch.compile(function, backend=graphs, fullgraph=True)(torch.ones(2))
    assert len(graphs.made) == 1
    assert out.tolist() == [2, 2]


def test_models_are_switched_in_the_graph(graphs):
    model, x = Net(), torch.ones(2, 4)

    def function(x):
        with call_guard(models=model):
            return model(x)

    out = torch.compile(function, backend=graphs, fullgraph=True)(x)
    assert all(m.training for m in model.modules())
    model.eval()
    assert torch.equal(out, model(x))


def test_need_grads_in_the_graph(graphs):
    model, x = Net().eval(), torch.ones(2, 4)

    def function(x):
        with torch.no_grad(), call_guard(need_grads=True):
            return model(x)

    out = torch.compile(function, backend=graphs, fullgraph=True)(x)
    assert out.requires_grad
    out.sum().backward()


def test_a_guard_around_a_compiled_call(graphs):
    """One more graph for the new mode at most; training works afterwards."""
    model, x = Net().eval(), torch.ones(2, 4)
    compiled = torch.compile(model, backend=graphs)
    for _ in range(3):
        with call_guard() as g:
            assert not g(compiled, x).requires_grad
        assert compiled(x).requires_grad
    assert len(graphs.made) <= 2
    compiled(x).sum().backward()


@pytest.mark.slow
def test_inductor_computes_the_same():
    torch._dynamo.reset()
    model, x = Net().eval(), torch.ones(2, 4)

    @call_guard
    def function(x):
        return model(x)

    out = torch.compile(function, fullgraph=True)(x)
    assert torch.allclose(out, model(x), atol=1e-6)
