"""Streamed models and pipelines on an accelerator: an emulated one, and torch's own copies."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from emulated_pool import Emulated, EmulatedPool, emulated_accelerator
from opguard.pools import auto_manage, manage, unmanage
from opguard.pools._accelerators import TorchAccelerator
from pools_kit import MIB, fresh_pools, tiny


@pytest.fixture
def emulated():
    gc.collect()
    made = Emulated()
    yield made
    gc.collect()
    assert made.count("misuse") == 0
    assert not {name: made.count(name) for name in ("used", "mapped") if made.count(name)}


@pytest.fixture(params=["arena", "torch"])
def pools(request, emulated, tmp_path):
    accelerator = emulated_accelerator(emulated)
    if request.param == "torch":
        accelerator = TorchAccelerator("cpu")
    with fresh_pools(tmp_path, "16MiB") as management:
        management.add_pool(EmulatedPool(accelerator, 3 * MIB), 3 * MIB)
        yield management


def test_a_model_larger_than_the_device(pools, emulated):
    model, x = tiny(8), torch.randn(2, 512)
    bare = copy.deepcopy(model)
    device = pools.pool("gpu:0")
    manage(model)
    for _ in range(4):
        assert torch.equal(model(x), bare(x))
        assert 0 < device.used <= device.budget
        assert emulated.count("used") <= device.budget
    with auto_manage(model):
        assert torch.equal(model(x), bare(x))
    for each in (model, bare):
        each[3].weight.add_(1)
    for _ in range(2):
        assert torch.equal(model(x), bare(x))
    unmanage(model)
    assert device.used == 0
    assert torch.equal(model(x), bare(x))


def test_components_larger_than_the_device_together(pools):
    pipe = {"a": tiny(2), "b": tiny(2, seed=1), "c": tiny(8, seed=2)}
    bares, x = copy.deepcopy(pipe), torch.randn(2, 512)
    device = pools.pool("gpu:0")
    for _ in range(3):
        with auto_manage(pipe) as handle:
            for name, bare in bares.items():
                assert torch.equal(handle.obj[name](x), bare(x))
                assert 0 < device.used <= device.budget
    unmanage(pipe)
    assert device.used == 0


def test_weights_that_are_replaced_on_the_device_are_taken_in(pools):
    for model in (tiny(2), tiny(8)):
        handle, x = manage(model), torch.ones(1, 512)
        model(x)
        with handle.lease():
            assert not any(user.astray for user in pools.snapshot().users)
            before = handle.user
        model.half()
        expected = copy.deepcopy(model)(x.half())
        assert any(user.astray for user in pools.snapshot().users)
        assert manage(model).user is not before
        assert not any(user.astray for user in pools.snapshot().users)
        with handle.lease():
            assert torch.allclose(model(x.half()), expected)
            assert 0 < pools.pool("gpu:0").used <= 3 * MIB
        unmanage(model)


def test_hooks_of_a_block_find_its_weights_on_the_device(pools):
    """As those of weight_norm, which compute the weight before each forward."""
    model, x = tiny(8), torch.ones(1, 512)
    seen: list[bool] = []
    for layer in model:
        layer.register_forward_pre_hook(lambda at, _: seen.append(is_there(at.weight)))
    bare = tiny(8)(x)
    user = manage(model).user

    def is_there(weight: torch.Tensor) -> bool:
        return weight.data_ptr() in user.home.addresses()

    for _ in range(2):
        assert torch.equal(model(x), bare)
    assert seen == [True] * 16
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), bare)
    assert seen[16:] == [False] * 8
    unmanage(model)
    assert all(layer._compiled_call_impl is None for layer in model)
    assert torch.equal(model(x), bare)
