"""Managed modules that are given other weights: said, shown, and taken in when managed again."""

from __future__ import annotations

import copy
import random
import threading
import warnings

import pytest
import torch
from torch import nn

from opguard import pools
from pools_kit import MIB, Adds, fresh_pools, tiny


@pytest.fixture
def management(tmp_path):
    with fresh_pools(tmp_path, "4MiB") as management:
        yield management


def another_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.ones(512, 512), requires_grad=False)


def another_layer(model: nn.Module) -> None:
    model[0] = nn.Linear(512, 512).requires_grad_(False)


def other_state(model: nn.Module) -> None:
    model.load_state_dict(tiny(len(model), seed=5).state_dict(), assign=True)


CHANGES = {
    nn.Module.half: 3,
    nn.Module.double: 3,
    nn.Module.share_memory: 3,
    other_state: 3,
    another_parameter: 1,
    another_layer: 1,
}


def x_for(model: nn.Module) -> torch.Tensor:
    return torch.linspace(-1, 1, 512, dtype=model[1].weight.dtype).reshape(1, 512)


def use(model: nn.Module, handle: pools.AutoManageWrapper) -> torch.Tensor:
    with handle.lease():
        return model(x_for(model))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_weights_are_said_shown_and_taken_in(management, change, stream):
    model = tiny(3)
    handle = pools.manage(model, name="net", priority=3, stream=stream or None)
    use(model, handle)
    change(model)
    expected = copy.deepcopy(model)(x_for(model))
    management.free()
    if not (stream and change is another_layer):  # of that block no lease is taken any more
        with pytest.warns(pools.WeightsAstray, match=r"'net'.*0\.weight.*manage it again") as told:
            assert torch.allclose(use(model, handle), expected)
        assert len(told[0].message.names) == CHANGES[change]
    management.free()
    assert torch.allclose(use(model, handle), expected)  # said once
    assert sum(len(user.astray) for user in management.snapshot().users) == CHANGES[change]
    assert "other weights than it was managed with" in str(pools.report())
    assert pools.manage(model).entry is handle.entry
    assert not any(user.astray for user in management.snapshot().users)
    management.free()
    assert management.pool("cpu").used == 0
    assert torch.allclose(use(model, handle), expected)
    assert handle.priority == 3
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert nbytes <= sum(user.nbytes for user in management.snapshot().users) < nbytes + 8192


def test_a_model_that_grew_beyond_its_pool_is_streamed_from_then_on(management):
    model = tiny(3)
    hook = pools.AutoManageHook(model).attach()
    handle = pools.manage(model, name="net")
    model.double()
    pools.manage(handle)
    assert handle.user.stream
    x = x_for(model)
    assert torch.allclose(model(x), copy.deepcopy(model)(x))
    assert 0 < management.pool("cpu").used <= 4 * MIB
    model.float()
    pools.manage(model)
    assert not handle.user.stream
    assert not any("forward" in vars(each) for each in model.modules())
    model(x.float())
    assert hook.attached
    assert handle.loaded


def test_in_use_they_are_not_taken_in(management):
    model = tiny(1)
    handle = pools.manage(model)
    with handle.lease():
        model.half()
        with pytest.warns(pools.WeightsAstray):
            pools.manage(model)
        with pools.auto_manage(model):  # of what is there nobody asks
            pass
        assert handle.user.nbytes == MIB
    pools.manage(model)
    assert handle.user.nbytes == MIB // 2


def test_pinned_they_are_taken_in_and_pinned_again(management):
    model = tiny(2)
    handle = pools.manage(model, pin=True)
    use(model, handle)
    model.half()
    pools.manage(model)
    assert handle.pinned
    assert handle.user.nbytes == MIB
    use(model, handle)
    management.free()
    assert handle.loaded


def test_pinned_they_stay_pinned_when_two_take_them_in(management, monkeypatch):
    model = tiny(2)
    handle = pools.manage(model, pin=True)
    model.half()
    first, second, go_on = threading.Event(), threading.Event(), threading.Event()
    renewed, condemn = management._renewed, management.condemn

    def slowly(entry):
        first.set()
        assert go_on.wait(10)
        return renewed(entry)

    def noted(entry):
        (second if first.is_set() else threading.Event()).set()
        condemn(entry)

    monkeypatch.setattr(management, "_renewed", slowly)
    monkeypatch.setattr(management, "condemn", noted)
    threads = []
    for reached in (first, second):
        threads.append(threading.Thread(target=pools.manage, args=(model,)))
        threads[-1].start()
        assert reached.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert handle.pinned
    assert handle.user.nbytes == MIB


def test_what_a_patch_takes_counts_on_after_they_are_taken_in(management):
    model = tiny(2)
    handle = pools.manage(model)
    (unit,) = handle.entry.all_units
    proxy = pools.CommitObjectProxy(model, [Adds()])
    proxy.apply_commit_stack()
    patched = management.nbytes(unit)
    assert patched > handle.user.nbytes
    model[1].weight = nn.Parameter(model[1].weight.detach() * 2, requires_grad=False)
    want = model(x_for(model)).clone()
    pools.manage(model)
    assert management.nbytes(unit) == patched
    assert torch.equal(use(model, handle), want)
    proxy.revert_commit_stack()
    assert management.nbytes(unit) == handle.user.nbytes


def test_components_of_a_pipeline_are_taken_in(management):
    pipe = {"a": tiny(1), "b": tiny(1, seed=1)}
    handle = pools.manage(pipe)
    for part in pipe.values():
        part.half()
    pools.manage(pipe)
    with handle.lease():
        assert management.pool("cpu").used == MIB


@pytest.mark.parametrize("stream", [False, True])
def test_taken_in_while_others_come_and_go(management, stream):
    model = tiny(2)
    handle = pools.manage(model, stream=stream)
    stop, wrong = threading.Event(), []
    pause = random.Random(3).random

    def work() -> None:
        while not stop.is_set():
            try:
                with pools.auto_manage(model, timeout=10):
                    model(torch.zeros(1, 512))
            except BaseException as error:
                wrong.append(error)
            management.free()
            stop.wait(pause() * 0.005)

    threads = [threading.Thread(target=work) for _ in range(3)]
    renewed = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pools.WeightsAstray)
        for thread in threads:
            thread.start()
        for _ in range(15):
            other_state(model)
            pools.manage(model)
            renewed.add(handle.user)
        stop.set()
        for thread in threads:
            thread.join(20)
        pools.manage(model)
    assert not wrong
    assert len(renewed) > 1
    assert not any(user.leases or user.astray for user in management.snapshot().users)
    management.free()
    assert management.pool("cpu").used == 0
    use(model, handle)


def test_what_cannot_be_taken_in_is_managed_no_more(management):
    model = tiny(1)
    handle = pools.manage(model)
    model.to("meta")
    with pytest.raises(pools.Unmanageable, match="meta"):
        pools.manage(model)
    assert management.find(model) is None
    with pytest.raises(pools.PoolError, match="let go of"):
        handle.lease()


def test_patches_and_what_gives_weights_other_names_are_no_strangers(management):
    model = tiny(1)
    handle = pools.manage(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pools.CommitObjectProxy(model, [Adds()]):
            assert pools.manage(model).entry is handle.entry
            assert not management.snapshot().users[0].astray
        torch.nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
        management.free()
        use_again = model(torch.ones(1, 512))
        with handle.lease():
            assert torch.equal(model(torch.ones(1, 512)), use_again)
    assert not any(user.astray for user in management.snapshot().users)


def test_a_look_at_each_weight_costs_less_than_the_pages_of_a_small_one(management):
    """What every miss pays for: kept below a microsecond a weight."""
    from time import perf_counter

    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(200)))
    user = pools.manage(model).user

    def seconds() -> float:
        started = perf_counter()
        user.warn_of_strays(again=False)
        return perf_counter() - started

    assert min(seconds() for _ in range(50)) < 200 * 5e-6  # fivefold, for a busy machine
