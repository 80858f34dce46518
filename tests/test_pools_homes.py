"""A module's weights in a file: come and go by pages, nothing changed is lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opguard.pools._homes import Home
from opguard.pools._spill import SpillFolder

PAGE = 4096


@pytest.fixture
def folder(tmp_path):
    made = SpillFolder(tmp_path)
    yield made
    made.close()


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_state(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_adopted_and_absent(folder):
    """The same objects, the same values, nothing in memory; in and out again."""
    model = small().eval()
    before, objects = state_of(model), [id(p) for p in model.parameters()]
    home = Home.adopt(model, folder, "small")
    assert [id(p) for p in model.parameters()] == objects
    assert home.resident() == 0
    assert_state(model, before)
    home.give_back()
    assert home.resident() == 0
    home.bring_in()
    assert home.resident() == home.nbytes
    assert home.nbytes <= sum(v.nbytes for v in before.values()) + 64 * len(before) + PAGE
    assert home.give_back() == 0
    assert_state(model, before)
