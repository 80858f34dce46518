"""Patches and pools: what is patched stays in, what patches take is counted, and all of it goes."""

from __future__ import annotations

import asyncio
import gc
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from opguard.pools import (
    AutoManageCommitObjectProxy,
    CallableCommit,
    CommitObjectProxy,
    CommitWithAutoManage,
    DeltaCommit,
    LeaseTimeout,
    PatchedWeightsChanged,
    PatchFailed,
    PoolRefused,
    _patched,
    auto_manage,
    manage,
)
from pools_kit import MIB, fresh_pools, tiny, until


class Doubles(DeltaCommit):
    """Doubles every weight."""

    def deltas(self, obj):
        modules = [obj] if isinstance(obj, nn.Module) else list(vars(obj).values())
        return {p: self.delta for module in modules for p in module.parameters()}

    @staticmethod
    def delta(source, out):
        torch.mul(source, 2, out=out)


@pytest.fixture
def pools(tmp_path):
    with fresh_pools(tmp_path, "6MiB") as management:
        yield management


def leases(handle):
    return handle.seat.leases


def flag(obj):
    obj.patched = True
    return lambda: delattr(obj, "patched")


def settled(management):
    gc.collect()
    management.drain()
    return management.pool("cpu").used


# --- leases ---------------------------------------------------------------------------------------


def test_a_proxy_that_is_entered_by_hand_and_dropped_keeps_no_lease_and_no_patch(pools):
    model = tiny()
    handle = manage(model)
    before = model[0].weight.clone()
    keeper = CommitObjectProxy(model)
    proxy = CommitObjectProxy(model, [Doubles()])
    proxy.__enter__()
    assert leases(handle) > 0
    del proxy
    assert leases(handle) == 0
    assert torch.equal(model[0].weight, before)
    assert keeper.applied == ()


@pytest.mark.parametrize("commit", [Doubles(), CallableCommit(flag)], ids=["weights", "function"])
@pytest.mark.parametrize("kind", [CommitObjectProxy, AutoManageCommitObjectProxy])
def test_a_managed_object_is_in_while_it_is_patched_and_free_to_go_after(pools, kind, commit):
    model = tiny(2)
    handle = manage(model)
    weight = model[0].weight.clone()
    proxy = kind(model, [commit])
    assert not handle.loaded
    for error in (None, KeyError, KeyboardInterrupt):
        handle.offload()
        pools.free()
        assert not handle.loaded
        try:
            with proxy as obj:
                assert obj is model
                assert handle.loaded
                assert leases(handle) > 0
                if error is not None:
                    raise error
        except (KeyError, KeyboardInterrupt):
            pass
        assert leases(handle) == 0
        assert torch.equal(model[0].weight, weight)
        assert pools.free() >= 2 * MIB


def test_an_automatic_proxy_manages_its_object_and_its_clones_are_automatic_too(pools):
    model = tiny(1)
    proxy = AutoManageCommitObjectProxy(model, priority=3)
    assert proxy.am.obj is model
    assert proxy.am.priority == 3
    clones = [
        proxy.clone(),
        proxy.clone_and_add_commit(Doubles()),
        proxy.clone_and_add_callable_commit(flag),
        AutoManageCommitObjectProxy(proxy.am),
    ]
    for clone in clones:
        assert type(clone) is AutoManageCommitObjectProxy
        assert clone.base is model
        assert clone.am.entry is proxy.am.entry
    assert proxy.am.priority == 3
    with clones[1], clones[2]:
        assert model.patched
    assert leases(proxy.am) == 0


def test_nested_and_failing_blocks_leave_no_lease(pools):
    model = tiny(1)
    handle = manage(model)
    weight = model[0].weight.clone()

    def fails(obj):
        raise OSError("cannot")

    outer = CommitObjectProxy(model, [Doubles()])
    bad = outer.clone_and_add_callable_commit(fails)
    for _ in range(2):
        with outer:
            with pytest.raises(PatchFailed, match="cannot"):
                bad.__enter__()
            with CommitObjectProxy(model):
                assert torch.equal(model[0].weight, weight)
            assert torch.equal(model[0].weight, weight * 2)
        assert leases(handle) == 0
    with pytest.raises(PatchFailed):
        bad.__enter__()
    assert leases(handle) == 0
    assert torch.equal(model[0].weight, weight)


def test_what_does_not_fit_is_refused_with_the_commit_and_the_holders(pools):
    model, other = tiny(2), tiny(3, seed=1)
    handle, theirs = manage(model, name="ours"), manage(other, name="theirs")
    weight = model[0].weight.clone()
    proxy = CommitObjectProxy(model, [Doubles()], timeout=0)
    with theirs.lease():
        with pytest.raises(PatchFailed) as failed:
            proxy.__enter__()
        assert isinstance(failed.value.__cause__, LeaseTimeout)
        assert any("'theirs'" in line for line in failed.value.__cause__.holders)
        assert torch.equal(model[0].weight, weight)
        assert leases(handle) == 0
    with proxy:
        assert torch.equal(model[0].weight, weight * 2)


def test_who_holds_a_patched_model_is_told_by_the_line_of_the_block(pools):
    model, other = tiny(2), tiny(4, seed=1)
    manage(model, name="unet")
    theirs = manage(other)

    def serve():
        for block in (CommitObjectProxy(model, [Doubles()]), auto_manage(CommitObjectProxy(model))):
            with block, pytest.raises(PoolRefused) as refused, theirs.lease(timeout=0):
                pass
            lines = [line for line in refused.value.holders if "'unet'" in line]
            assert "test_pools_patches_managed.py:" in lines[0]
            assert "in serve" in lines[0]

    pools.pool("cpu").budget = 5 * MIB
    serve()


def test_a_patch_that_can_never_fit_is_refused_at_once(pools):
    model = tiny(4)
    handle = manage(model)
    with pytest.raises(PatchFailed) as failed:
        CommitObjectProxy(model, [Doubles()]).__enter__()
    assert isinstance(failed.value.__cause__, PoolRefused)
    assert leases(handle) == 0


def test_parts_and_sets_of_managed_modules_are_leased_by_their_weights(pools):
    one, two, three = tiny(1), tiny(1, seed=1), tiny(1, seed=2)
    handles = [manage(one), manage(two), manage(three)]
    pipeline = SimpleNamespace(unet=one, vae=two)
    with CommitObjectProxy(pipeline, [Doubles()]):
        assert [leases(h) > 0 for h in handles] == [True, True, False]
    with CommitObjectProxy(three[0], [Doubles()]):
        assert [leases(h) > 0 for h in handles] == [False, False, True]
    assert [leases(h) for h in handles] == [0, 0, 0]


def test_a_commit_may_need_a_model_of_its_own(pools):
    model, control = tiny(1), tiny(1, seed=1)
    handle = manage(control)
    for inner in (None, CallableCommit(flag)):
        commit = CommitWithAutoManage(control, inner)
        with CommitObjectProxy(model, [commit]):
            assert handle.loaded
            assert leases(handle) == 1
            assert hasattr(model, "patched") == (inner is not None)
        assert leases(handle) == 0
        assert not hasattr(model, "patched")
    failing = CommitWithAutoManage(handle, CallableCommit(lambda obj: None))
    with pytest.raises(PatchFailed, match="must return a callable"):
        CommitObjectProxy(model, [failing]).__enter__()
    assert leases(handle) == 0


def test_tasks_wait_for_bytes_without_blocking_their_loop(pools):
    model, other = tiny(3), tiny(3, seed=1)
    handle, theirs = manage(model), manage(other)
    weight = model[0].weight.clone()
    order = []

    async def hold():
        async with theirs.lease():
            order.append("theirs")
            await asyncio.sleep(0.05)
            order.append("still theirs")

    async def patch():
        await asyncio.sleep(0.01)
        async with CommitObjectProxy(model, [CallableCommit(flag)], timeout=5):
            order.append("patched")
            assert torch.equal(model[0].weight, weight)

    async def main():
        await asyncio.gather(hold(), patch(), tick())

    async def tick():
        await asyncio.sleep(0.02)
        order.append("tick")

    pools.pool("cpu").budget = 4 * MIB
    asyncio.run(main())
    assert order == ["theirs", "tick", "still theirs", "patched"]
    assert leases(handle) == leases(theirs) == 0


def test_threads_that_patch_several_models_keep_the_budget(pools):
    models = [tiny(1, seed=i) for i in range(4)]
    for model in models:
        manage(model)
    weights = [m[0].weight.clone() for m in models]
    errors = []

    def work(seed):
        try:
            for step in range(8):
                at = (seed + step) % 4
                with CommitObjectProxy(models[at], [Doubles()], timeout=20):
                    assert pools.pool("cpu").used <= 6 * MIB
                    assert torch.equal(models[at][0].weight, weights[at] * 2)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for model, weight in zip(models, weights, strict=True):
        assert torch.equal(model[0].weight, weight)
    assert sum(leases(manage(model)) for model in models) == 0


def test_a_managed_proxy_is_its_object_with_the_commits(pools):
    model = tiny(2)
    proxy = CommitObjectProxy(model, [Doubles()])
    handle, own = manage(proxy), manage(model)
    assert handle.obj is proxy
    assert pools.pool("cpu").used == 0
    with handle.lease():
        assert own.loaded
        assert handle.loaded
        assert leases(own) == 1
    weight = model[0].weight.clone()
    for thing in (proxy, handle):
        with auto_manage(thing, offload="exit") as inside:
            assert inside.obj is proxy
            assert own.loaded
            assert torch.equal(model[0].weight, weight * 2)
        assert leases(own) == 0
        assert torch.equal(model[0].weight, weight)
    until(lambda: not own.loaded)

    async def main():
        async with auto_manage(proxy, timeout=5):
            assert torch.equal(model[0].weight, weight * 2)

    asyncio.run(main())
    handle.priority = 4
    assert own.priority == 4
    assert leases(own) == 0
    with pytest.raises(KeyError), auto_manage(proxy):
        raise KeyError
    assert torch.equal(model[0].weight, weight)


# --- patches that stay --------------------------------------------------------------------------


def resting(model, *commits):
    proxy = CommitObjectProxy(model, commits)
    proxy.apply_commit_stack()
    return proxy


def test_a_patch_that_stays_lets_its_model_go_and_comes_back_with_it(pools):
    model, other = tiny(2), tiny(5, seed=1)
    handle, theirs = manage(model), manage(other)
    weight = model[0].weight.clone()
    objects = [id(p) for p in model.parameters()]
    proxy = resting(model, Doubles())
    assert torch.equal(model[0].weight, weight * 2)
    assert leases(handle) == 0
    assert settled(pools) == 4 * MIB
    for _ in range(2):
        with theirs.lease():
            assert not handle.loaded
            assert pools.pool("cpu").used == 5 * MIB
            assert torch.equal(model[0].weight, weight)
            assert _arenas_of(model) == 0
        with handle.lease():
            assert torch.equal(model[0].weight, weight * 2)
            assert pools.pool("cpu").used == 4 * MIB
    assert [id(p) for p in model.parameters()] == objects
    proxy.revert_commit_stack()
    assert torch.equal(model[0].weight, weight)
    assert settled(pools) == 2 * MIB
    with handle.lease():
        assert torch.equal(model[0].weight, weight)


def _arenas_of(model):
    """Bytes of patched weights that a model's parameters point at."""
    states = [_patched._states.get(id(p)) for p in model.parameters()]
    levels = [level for state in states if state for level in state.levels]
    return sum(level.tensor.nbytes for level in levels if level.tensor is not None)


def test_blocks_on_a_patch_that_stays_give_it_back_and_it_may_go_again(pools):
    model, other = tiny(1), tiny(6, seed=1)
    handle, theirs = manage(model), manage(other)
    weight = model[0].weight.clone()
    first, second = Doubles(), Doubles()
    proxy = resting(model, first)
    more, bare = proxy.clone_and_add_commit(second), CommitObjectProxy(model)
    for inside in (more, bare, proxy):
        with theirs.lease():
            assert not handle.loaded
        with inside:
            factor = 2 ** len(inside.commits)
            assert torch.equal(model[0].weight, weight * factor)
            assert leases(handle) > 0
        assert leases(handle) == 0
        assert proxy.applied == (first,)
        assert torch.equal(model[0].weight, weight * 2)
    more.apply_commit_stack()
    with theirs.lease():
        assert not handle.loaded
        assert torch.equal(model[0].weight, weight)
        more.revert_commit_stack()
        assert torch.equal(model[0].weight, weight)
    with handle.lease():
        assert torch.equal(model[0].weight, weight)
    assert not handle.entry.riders


def test_a_patch_that_cannot_come_back_fails_the_load_and_the_next_one_works(pools):
    failing = []

    class Sometimes(Doubles):
        def deltas(self, obj):
            return dict.fromkeys(obj.parameters(), self.maybe)

        def maybe(self, source, out):
            if failing:
                raise ArithmeticError("not now")
            torch.mul(source, 2, out=out)

    model, other = tiny(1), tiny(6, seed=1)
    handle, theirs = manage(model), manage(other)
    weight = model[0].weight.clone()
    proxy = resting(model, Sometimes())
    with theirs.lease():
        pass
    failing.append(1)
    with pytest.raises(ArithmeticError, match="not now"):
        handle.lease().__enter__()
    assert not handle.loaded
    assert leases(handle) == 0
    assert torch.equal(model[0].weight, weight)
    failing.clear()
    with handle.lease():
        assert torch.equal(model[0].weight, weight * 2)
    del proxy
    gc.collect()
    assert torch.equal(model[0].weight, weight)
    assert not handle.entry.riders


def test_a_model_that_cannot_go_keeps_its_patch(pools, monkeypatch):
    model = tiny(1)
    handle = manage(model)
    weight = model[0].weight.clone()
    proxy = resting(model, Doubles())

    def full():
        raise OSError("disk full")

    monkeypatch.setattr(handle.user, "give_back", full)
    assert pools.free() == 0
    assert handle.loaded
    assert torch.equal(model[0].weight, weight * 2)
    monkeypatch.undo()
    with handle.lease():  # what would not go is asked again once it was used
        assert torch.equal(model[0].weight, weight * 2)
    pools.free()
    assert torch.equal(model[0].weight, weight)
    proxy.revert_commit_stack()
    with handle.lease():
        assert torch.equal(model[0].weight, weight)


def test_what_is_written_to_a_patch_that_stays_is_told_of_when_its_model_goes(pools):
    model = tiny(1)
    handle = manage(model)
    weight = model[0].weight.clone()
    proxy = resting(model, Doubles())
    with handle.lease():
        model[0].weight.add_(1)
    with pytest.warns(PatchedWeightsChanged) as told:
        pools.free()
    assert torch.equal(told[0].message.tensors["0.weight"], weight * 2 + 1)
    with handle.lease():
        assert torch.equal(model[0].weight, weight * 2)
    proxy.revert_commit_stack()
    assert torch.equal(model[0].weight, weight)


# --- bytes ----------------------------------------------------------------------------------------


def test_patched_weights_are_counted_kept_warm_and_given_back_when_others_need_them(pools):
    model, other = tiny(2), tiny(5, seed=1)
    manage(model)
    theirs = manage(other)
    proxy = CommitObjectProxy(model, [Doubles()])
    with proxy:
        assert pools.pool("cpu").used == 4 * MIB
        place = model[0].weight.data_ptr()
    assert pools.pool("cpu").used == 4 * MIB
    with proxy:
        assert model[0].weight.data_ptr() == place
    with theirs.lease():
        assert pools.pool("cpu").used <= 6 * MIB
    weight = model[0].weight.clone()
    with proxy:
        assert torch.equal(model[0].weight, weight * 2)
    del proxy
    pools.free()
    assert settled(pools) == 0


def test_a_model_that_is_moved_in_parts_is_patched_and_its_patch_counted(pools):
    model = tiny(3)
    manage(model, stream=True)
    x = torch.randn(2, 512)
    plain = model(x)
    proxy = CommitObjectProxy(model, [Doubles()])
    with proxy:
        assert torch.allclose(model(x), plain * 8)
        assert pools.pool("cpu").used >= 3 * MIB
    assert torch.equal(model(x), plain)


def test_a_model_whose_parts_are_elsewhere_than_where_it_runs_is_refused(pools, monkeypatch):
    model = tiny(1)
    handle = manage(model)
    weight = model[0].weight.clone()
    kind = type(handle.user)
    monkeypatch.setattr(kind, "execution_device", property(lambda self: torch.device("cuda")))
    with pytest.raises(PatchFailed, match=r"goes there in parts.*mode='hook'"):
        CommitObjectProxy(model, [Doubles()]).__enter__()
    assert leases(handle) == 0
    assert torch.equal(model[0].weight, weight)


def test_unmanaged_objects_take_nothing_of_a_pool(pools):
    manage(tiny(1, seed=5))
    model = tiny(1)
    with CommitObjectProxy(model, [Doubles()]):
        assert pools.pool("cpu").used == 0


def test_weights_changed_before_a_patch_are_what_it_is_made_of_and_come_back(pools):
    model, other = tiny(1), tiny(6, seed=1)
    handle = manage(model)
    theirs = manage(other)
    with handle.lease():
        model[0].weight.add_(1)
        weight = model[0].weight.clone()
    with theirs.lease():
        assert not handle.loaded
    with CommitObjectProxy(model, [Doubles()]):
        assert torch.equal(model[0].weight, weight * 2)
    with theirs.lease():
        pass
    assert torch.equal(model[0].weight, weight)
