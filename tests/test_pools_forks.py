"""What other threads were in the middle of when a process forked is not waited for in the child."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest
import torch

from opguard import pools
from pools_kit import MIB, fresh_pools, tiny

X = torch.ones(1, 512)


@pytest.fixture
def cpu(tmp_path):
    with fresh_pools(tmp_path, 8 * MIB) as management:
        yield management


class Slow(pools.DeltaCommit):
    """Adds one, once it is let go."""

    def __init__(self, inside, go_on):
        self.inside, self.go_on = inside, go_on

    def deltas(self, obj):
        return {obj[0].weight: self.delta}

    def delta(self, source, out):
        self.inside.set()
        assert self.go_on.wait(20)
        torch.add(source, 1, out=out)


def patching(inside, go_on):
    """Another thread computes patched weights; the child patches another model."""
    model, other = tiny(1), tiny(1, seed=1)
    done = threading.Event()
    done.set()

    def work():
        with pools.CommitObjectProxy(model, [Slow(inside, go_on)]):
            pass

    def in_child():
        before = other(X)
        with pools.CommitObjectProxy(other, [Slow(threading.Event(), done)]):
            assert not torch.equal(other(X), before)
        assert torch.equal(other(X), before)

    return work, in_child


def hooking(inside, go_on):
    """Another thread attaches a hook; the child attaches one to another model."""
    model, other = tiny(1), tiny(1, seed=1)
    hook = pools.AutoManageHook(model)

    def work():
        pools.manage(model)
        original = pools.hooks.Mark.install

        def install(mark, *args):
            if mark.module() is model:
                inside.set()
                assert go_on.wait(20)
            original(mark, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pools.hooks.Mark, "install", install)
            hook.attach()

    def in_child():
        other_hook = pools.AutoManageHook(other).attach()
        other(X)
        other_hook.remove()

    return work, in_child


def refreshing(inside, go_on):
    """Another thread looks at the components of a pipeline that got a new one."""
    pipe = {"a": tiny(1)}
    handle = pools.manage(pipe)
    management = pools.get_management()
    manage = management.manage

    def slowly(obj, **options):
        inside.set()
        assert go_on.wait(20)
        return manage(obj, **options)

    def work():
        pipe["b"] = tiny(1, seed=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(management, "manage", slowly)
            with handle.lease():
                pass

    def in_child():
        go_on.set()
        with handle.lease():
            assert handle.loaded

    return work, in_child


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("what", [patching, hooking, refreshing])
def test_a_child_does_not_wait_for_what_another_thread_was_doing(cpu, what):
    inside, go_on = threading.Event(), threading.Event()
    work, in_child = what(inside, go_on)
    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.alarm(5)
            in_child()
            os._exit(0)
        os._exit(1)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        go_on.set()
        thread.join(10)
