"""One short test of each promise, on tiny models made here."""

import weakref

import pytest
import torch

import opguard

pytestmark = pytest.mark.smoke


class Fails(torch.nn.Module):
    """A layer whose activation is remembered weakly before it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.activation: weakref.ref[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activation = x * 2
        self.activation = weakref.ref(activation)
        return activation @ torch.ones(3, 3)


def test_a_guarded_call_is_eval_without_grad_and_detached():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    x = torch.ones(2, 4)
    with opguard.call_guard() as g:
        first, second = g(model, x), g(model, x)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not first.is_inference()
    assert model.training


def test_a_decorated_function_is_guarded():
    model = torch.nn.Linear(4, 4)

    @opguard.call_guard()
    def run(x):
        assert not torch.is_grad_enabled()
        return model(x)

    assert run(torch.ones(1, 4)).shape == (1, 4)
    assert torch.is_grad_enabled()


def test_a_failure_leaves_nothing_alive_and_says_what_was():
    model = Fails()
    with pytest.raises(RuntimeError) as info, opguard.call_guard() as g:
        g(model, torch.ones(2, 4))
    assert model.activation is not None
    assert model.activation() is None
    notes = "\n".join(info.value.__notes__)
    assert "activation" in notes
    assert "[2, 4]" in notes


def test_detach_keeps_types_and_sharing():
    x = torch.ones(3, requires_grad=True) * 2
    out = opguard.detach_to_cpu({"a": (x, [x])})
    assert out["a"][0] is out["a"][1][0]
    assert not out["a"][0].requires_grad


def test_sanitize_an_exception():
    def fails():
        held = torch.ones(5)
        seen.append(weakref.ref(held))
        raise ValueError("no", held)

    seen = []
    try:
        fails()
    except ValueError as error:
        kept = opguard.sanitize_exception(error)
    assert seen[0]() is None
    assert kept.args[0] == "no"


def test_local_guard_opens_no_socket():
    import socket

    with opguard.local_guard(), pytest.raises(OSError), socket.socket() as s:  # noqa: PT011
        s.connect(("203.0.113.1", 9))
