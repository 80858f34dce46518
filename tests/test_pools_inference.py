"""What a call takes beside the weights: measured once a shape, remembered, taken from the pool."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opguard.pools.inference import VARIANTS, InferenceMemory, measure_peak

CPU = torch.device("cpu")


def steps(x: torch.Tensor) -> torch.Tensor:
    """Holds 3 times the bytes of x at once, and returns as many as x has."""
    y = x + 1
    z = y + 1
    w = z + 1
    del y, z
    return w


@pytest.mark.parametrize("count", [1 << 16, 1 << 18])
def test_the_peak_is_what_lived_at_once(count):
    x = torch.zeros(count)
    result, peak = measure_peak(steps, x, device=CPU)
    assert torch.equal(result, x + 3)
    assert peak == pytest.approx(3 * 4 * count, rel=0.05)


def test_a_layer_is_measured_with_its_workspace():
    layer, x = nn.Linear(256, 1024), torch.zeros(64, 256)
    with torch.inference_mode():
        _, peak = measure_peak(nn.Sequential(layer, nn.GELU()), x, device=CPU)
    assert peak >= 2 * 64 * 1024 * 4


def test_an_error_ends_the_counting():
    with pytest.raises(ZeroDivisionError):
        measure_peak(lambda: 1 / 0, device=CPU)
    _, peak = measure_peak(steps, torch.zeros(1024), device=CPU)
    assert peak  # another count can begin


def test_beside_somebodys_profiler_nothing_is_measured_and_nothing_breaks():
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        result, peak = measure_peak(steps, torch.zeros(8), device=CPU)
    assert peak is None
    assert torch.equal(result, torch.full((8,), 3.0))
    assert profile is not None


class Book:
    """Stands for a management: what was reserved, and whether it was given back."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.out = 0

    def reserve(self, pool: str, nbytes: int) -> int:
        self.asked.append((pool, nbytes))
        self.out += nbytes
        return nbytes

    def release(self, reserved: int) -> None:
        self.out -= reserved


def call(memory: InferenceMemory, book: Book, *args, **kwargs):
    return memory.call(steps, args, kwargs, management=book, device=CPU)


def test_the_first_call_of_a_shape_is_measured_the_next_is_reserved():
    memory, book = InferenceMemory(), Book()
    small, large = torch.zeros(1 << 14), torch.zeros(1 << 16)
    assert torch.equal(call(memory, book, small), small + 3)
    assert book.asked == []
    call(memory, book, small)
    call(memory, book, large)
    call(memory, book, large)
    assert [pool for pool, _ in book.asked] == ["cpu", "cpu"]
    first, second = (nbytes for _, nbytes in book.asked)
    assert first == pytest.approx(3 * small.nbytes, rel=0.1)
    assert second == pytest.approx(3 * large.nbytes, rel=0.1)
    assert book.out == 0
    assert memory.largest == second


def test_what_was_reserved_comes_back_after_an_error():
    memory, book = InferenceMemory(1000), Book()
    with pytest.raises(TypeError):
        call(memory, book, "no tensor")
    assert book.asked == [("cpu", 1000)]
    assert book.out == 0


def test_bytes_text_and_functions_are_taken_as_they_are():
    x = torch.zeros(10, 3)
    assert InferenceMemory("64KiB").estimate(None, (x,), {}) == 1 << 16
    by_batch = InferenceMemory(lambda model, batch, **kwargs: 100 * len(batch) + kwargs["more"])
    assert by_batch.estimate(None, (x,), {"more": 5}) == 1005


@pytest.mark.parametrize(
    "other",
    [
        ((torch.zeros(5),), {}),
        ((torch.zeros(4, dtype=torch.float64),), {}),
        (([torch.zeros(4)],), {}),
        ((torch.zeros(4),), {"mask": torch.zeros(4)}),
        ((torch.zeros(4),), {"flag": True}),
    ],
)
def test_another_shape_dtype_or_switch_is_measured_anew(other):
    memory = InferenceMemory()
    memory.learn((torch.zeros(4),), {}, 7)
    assert memory.estimate(None, (torch.ones(4),), {}) == 7
    assert memory.estimate(None, *other) is None


def test_numbers_that_change_with_each_call_are_not_measured_for_ever():
    memory, x = InferenceMemory(), torch.zeros(4)
    for step in range(VARIANTS):
        assert memory.estimate(None, (x, step), {}) is None
        memory.learn((x, step), {}, 100 + step)
    assert memory.estimate(None, (x, 12345), {}) == 100 + VARIANTS - 1


def test_gradients_take_memory_of_their_own():
    memory, x = InferenceMemory(), torch.zeros(4)
    with torch.no_grad():
        memory.learn((x,), {}, 7)
    assert memory.estimate(None, (x,), {}) is None
