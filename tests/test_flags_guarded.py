"""GuardedTensor by itself: what it is made of, what it shares, and how it is kept and copied."""

from __future__ import annotations

import pytest
import torch

from opguard import flags as F
from opguard.flags import GuardedTensor, guard

NAN = float("nan")


@pytest.fixture
def flags():
    """Of three samples, the second with a NaN at "here"."""
    return F.flag_nan(torch.tensor([[1.0], [NAN], [2.0]]), "here")


def bad(g):
    """Which rows have errors."""
    return F.err.is_err(g.flags).tolist()


def test_flags_follow_what_is_computed(flags):
    x = torch.randn(3, 4)
    g = GuardedTensor(x, flags)
    y = torch.relu(g * 2) + guard(torch.ones(3, 4))
    assert type(y) is GuardedTensor
    assert bad(y) == [False, True, False]
    assert y.batch_dims == (0,)
    assert torch.equal(y.unwrap(), torch.relu(x * 2) + 1)
    assert type(y.unwrap()) is torch.Tensor


def test_the_data_is_shared_and_untouched(flags):
    x = torch.tensor([[-0.0], [NAN], [1.0]])
    g = GuardedTensor(x, flags)
    assert g.unwrap().data_ptr() == x.data_ptr()
    assert torch.signbit(g.unwrap())[0].item()
    assert guard(g) is g


def test_gradients_are_plain_and_those_of_the_data(flags):
    x = torch.randn(3, 4, requires_grad=True)
    (GuardedTensor(x, flags) * 3).unwrap().sum().backward()
    assert type(x.grad) is torch.Tensor
    assert torch.equal(x.grad, torch.full((3, 4), 3.0))


def test_refuses_flags_of_another_batch(flags):
    with pytest.raises(F.BatchMismatchError, match="expected flags of the 2 samples in data"):
        GuardedTensor(torch.ones(2, 1), flags)
    with pytest.raises(F.FlagsLayoutError):
        GuardedTensor(torch.ones(3, 1), torch.ones(3))
    with pytest.raises(F.FlagsError, match="without dimensions"):
        guard(torch.tensor(1.0))
