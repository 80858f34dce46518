"""Modules as users: what is refused with a reason, parts of others, copies, training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from opguard import pools
from opguard.pools import TorchModuleWrapper
from pools_kit import MIB, fresh_pools, tiny

PAGE = 4096


@pytest.fixture
def cpu(tmp_path):
    with fresh_pools(tmp_path, "8MiB") as management:
        yield management


def test_a_module_is_managed_by_its_wrapper(cpu):
    model = tiny(1)
    handle = pools.manage(model, inference=100)
    assert type(handle.user) is TorchModuleWrapper
    assert handle.user.inference_memory_estimator == 100
    assert handle.user.nbytes == MIB
    assert handle.user.obj is model
    assert handle.get_execution_device() == torch.device("cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Linear(4, 4, device="meta"),
        lambda: torch.jit.freeze(torch.jit.script(tiny(1))),
    ],
    ids=["meta", "frozen"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_must_not_move_is_refused(cpu, make):
    with pytest.raises(pools.Unmanageable):
        pools.manage(make())
    assert cpu.entries == {}


def test_a_module_without_weights_is_managed_for_nothing(cpu):
    with pools.auto_manage(torch.nn.ReLU()) as handle:
        assert handle.loaded
        assert cpu.pool("cpu").used == 0


def test_a_part_of_a_managed_module_is_not_managed_twice(cpu):
    """Its bytes would be counted twice, and both would point its weights somewhere."""
    model = tiny(2)
    pools.manage(model, name="whole")
    with pytest.raises(pools.Unmanageable, match="whole"):
        pools.manage(model[0])
    part = tiny(2)
    pools.manage(part[0], name="part")
    with pytest.raises(pools.Unmanageable, match="part"):
        pools.manage(part)


def test_a_copy_is_a_model_of_its_own(cpu):
    model = tiny(1)
    handle = pools.manage(model)
    with handle.lease():
        other = copy.deepcopy(model)
        third = pickle.loads(pickle.dumps(model))
    x = torch.randn(1, 512)
    for one in (other, third):
        assert cpu.find(one) is None
        with torch.no_grad():
            one[0].weight.zero_()
        assert one(x).abs().sum() == 0
        with pools.auto_manage(one):
            assert one(x).abs().sum() == 0
    with handle.lease():
        assert model(x).abs().sum() > 0


def test_weights_that_are_swapped_for_others_are_the_users_affair_until_managed_again(cpu):
    model = tiny(1)
    handle = pools.manage(model)
    model[0].weight = torch.nn.Parameter(torch.ones(512, 512), requires_grad=False)
    with pytest.warns(pools.WeightsAstray), handle.lease():
        assert model(torch.ones(1, 512))[0, 0] == 512
    cpu.free()
    with handle.lease():
        assert model(torch.ones(1, 512))[0, 0] == 512
    pools.unmanage(model)
    with pools.auto_manage(model):
        assert model(torch.ones(1, 512))[0, 0] == 512


@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_change_any_more_is_refused_in_a_second_manage(cpu, streamed):
    model = tiny(2)
    pools.manage(model, stream=streamed)
    pools.manage(model, stream=streamed, trust_files=False, verify="bytes")
    for option in ({"stream": not streamed}, {"trust_files": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: expected .*unmanage it first"):
            pools.manage(model, **option)


def test_training_under_a_lease_is_kept(cpu):
    model = tiny(1).train().requires_grad_(True)
    expected = copy.deepcopy(model)
    handle = pools.manage(model)
    x = torch.randn(4, 512)
    for module in (model, expected):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        for _ in range(3):
            with handle.lease():
                optimizer.zero_grad()
                module(x).square().mean().backward()
                optimizer.step()
            cpu.free()
    with handle.lease():
        assert torch.equal(model[0].weight, expected[0].weight)


def test_state_dicts_are_read_and_loaded_at_any_time(cpu):
    model = tiny(1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    handle = pools.manage(model)
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"])
    model.load_state_dict({name: value * 2 for name, value in state.items()})
    cpu.free()
    with handle.lease():
        assert torch.equal(model[0].weight, state["0.weight"] * 2)


def test_many_dtypes_and_odd_sizes(cpu):
    model = torch.nn.Module()
    dtypes = (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64)
    for n, dtype in enumerate(dtypes):
        model.register_buffer(f"b{n}", torch.randn(3 + 101 * n).to(dtype), persistent=n % 2 == 0)
    model.register_buffer("none", torch.empty(0))
    model.register_parameter("scalar", torch.nn.Parameter(torch.tensor(3.5)))
    before = {name: value.clone() for name, value in model.named_buffers()}
    with pools.auto_manage(model):
        assert 0 < cpu.pool("cpu").used <= PAGE * (len(dtypes) + 2)
    cpu.free()
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name])
    assert model.scalar.item() == 3.5
