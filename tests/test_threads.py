"""Sixteen threads at once over detach, sanitize and guards: right results, nothing left on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from opguard.detaching import detach_to_cpu
from opguard.guards.calling import call_guard
from opguard.sanitizing import sanitize_exception

THREADS = 16
ROUNDS = 40


def together(work: Callable[[int], None]) -> None:
    """Runs work(0) ... work(15) at the same time; the first failure is raised here."""
    failures: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def model() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )


def test_detach_of_one_shared_value():
    shared = {"a": [torch.randn(3, requires_grad=True) * 2 for _ in range(20)], "b": torch.randn(2)}

    def work(number: int) -> None:
        for _ in range(ROUNDS):
            out = detach_to_cpu(shared)
            assert not any(t.requires_grad for t in out["a"])
            assert torch.equal(out["a"][3], shared["a"][3].detach())
            assert torch.equal(out["b"], shared["b"])

    together(work)
    assert all(t.requires_grad for t in shared["a"])


def test_detach_while_another_thread_changes_the_value():
    """A list and a dict that grow and shrink meanwhile: a result or one clear error, no crash."""
    shared: dict[object, object] = {"list": [torch.randn(2) for _ in range(50)]}
    stop = threading.Event()

    def churn() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            shared[count % 100] = torch.randn(1)
            shared.pop((count * 7) % 100, None)
            shared["list"].append(count)  # type: ignore[attr-defined]
            del shared["list"][0]  # type: ignore[attr-defined]

    thread = threading.Thread(target=churn)
    thread.start()
    try:

        def work(number: int) -> None:
            for _ in range(ROUNDS):
                try:
                    detach_to_cpu(shared)
                except (RuntimeError, TypeError) as error:
                    assert "chang" in str(error)

        together(work)
    finally:
        stop.set()
        thread.join()


def test_sanitize_in_every_thread():
    def fail(depth: int) -> None:
        held = torch.randn(4)
        if depth == 0:
            raise ValueError("deep", held)
        fail(depth - 1)

    def work(number: int) -> None:
        for _ in range(ROUNDS):
            try:
                fail(5)
            except ValueError as error:
                sanitize_exception(error)
                assert not any(isinstance(arg, torch.Tensor) for arg in error.args)
                assert len(error.__notes__) == 1

    together(work)


def test_sanitize_of_one_shared_exception():
    """One exception object seen by all, as a future's is."""

    def fail() -> None:
        held = [torch.randn(4)]
        raise ValueError("shared", held)

    caught = []
    try:
        fail()
    except ValueError as error:
        caught.append(error)

    def work(number: int) -> None:
        for _ in range(ROUNDS):
            sanitize_exception(caught[0])

    together(work)
    assert caught[0].args[0] == "shared"
    assert not isinstance(caught[0].args[1][0], torch.Tensor)


def test_guards_on_a_model_of_their_own():
    def work(number: int) -> None:
        mine = model()
        for _ in range(ROUNDS):
            with call_guard() as g:
                assert torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
                out = g(mine, torch.ones(3, 4))
                assert torch.equal(out, g(mine, torch.ones(3, 4)))
            assert torch.is_grad_enabled()
            assert all(m.training for m in mine.modules())

    together(work)


def test_guards_on_one_shared_model():
    """All want eval, so all agree; the last one out puts train back."""
    shared = model()
    expected = shared.eval()(torch.ones(3, 4)).detach()
    shared.train()

    def work(number: int) -> None:
        for _ in range(ROUNDS):
            with call_guard(models=shared) as g:
                assert not any(m.training for m in shared.modules())
                assert torch.equal(g(shared, torch.ones(3, 4)), expected)

    together(work)
    assert all(m.training for m in shared.modules())


def test_failures_in_guards():
    shared = model()

    def work(number: int) -> None:
        for _ in range(ROUNDS):
            with pytest.raises(RuntimeError) as caught, call_guard(models=shared) as g:
                g(shared, torch.ones(3, 5))
            assert caught.value.__traceback__ is not None
            assert torch.is_grad_enabled()

    together(work)
    assert all(m.training for m in shared.modules())
