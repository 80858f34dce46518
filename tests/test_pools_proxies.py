"""Stacks of commits: an object always has exactly the stack that its blocks say."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from opguard.pools import _stacks
from opguard.pools.commits import AttributeCommit, CallableCommit, CommitABC
from opguard.pools.errors import Deadlock, LeaseTimeout, PatchFailed
from opguard.pools.proxies import CommitObjectProxy


class Thing:
    """What is patched: ``log`` is what is on it, bottom first."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.done: list[str] = []


class Failures:
    """Makes the operations of these numbers, counted over all commits, fail half way."""

    def __init__(self, numbers: set[int] = frozenset(), error: type[BaseException] = OSError):
        self.numbers, self.error, self.count = numbers, error, 0

    def __call__(self, what: str) -> None:
        self.count += 1
        if self.count - 1 in self.numbers:
            raise self.error(what)


class Push(CommitABC):
    """Puts its name on the log; every step checks that it is done to what it expects."""

    def __init__(self, name: str, failures: Failures | None = None, key: str | None = None):
        self.name, self.failures, self.squash_key = name, failures or Failures(), key

    def apply(self, obj):
        obj.log.append(self.name)
        self.failures(f"apply {self.name}")
        obj.done.append(f"+{self.name}")

    def revert(self, obj):
        assert obj.log.pop() == self.name
        self.failures(f"revert {self.name}")
        obj.done.append(f"-{self.name}")

    def squash(self, commits):
        return Together(list(commits), self.failures)

    def __repr__(self):
        return f"<Push {self.name}>"


class Together(CommitABC):
    def __init__(self, parts, failures):
        self.parts, self.failures = parts, failures

    def apply(self, obj):
        obj.log += [part.name for part in self.parts]
        self.failures("apply together")
        obj.done.append("+" + "&".join(part.name for part in self.parts))

    def revert(self, obj):
        for part in reversed(self.parts):
            assert obj.log.pop() == part.name
        self.failures("revert together")
        obj.done.append("-" + "&".join(part.name for part in self.parts))


def names(commits):
    return [commit.name for commit in commits]


# --- one proxy ------------------------------------------------------------------------------------


def test_applied_on_entry_and_reverted_on_exit_whatever_ends_the_block():
    thing = Thing()
    proxy = CommitObjectProxy(thing, [Push("a"), Push("b")])
    assert thing.log == []
    with proxy as obj:
        assert obj is thing
        assert thing.log == ["a", "b"]
    for error in (ValueError, KeyboardInterrupt, GeneratorExit, SystemExit):
        with pytest.raises(error), proxy:
            raise error
        assert thing.log == []
    assert thing.done[-4:] == ["+a", "+b", "-b", "-a"]


def test_a_generator_that_is_dropped_inside_its_block_leaves_nothing():
    thing = Thing()

    def serve():
        with CommitObjectProxy(thing, [Push("a")]):
            yield

    serving = serve()
    next(serving)
    assert thing.log == ["a"]
    del serving
    gc.collect()
    assert thing.log == []


@pytest.mark.parametrize("beside", [False, True])
def test_a_proxy_that_is_entered_by_hand_and_dropped_is_left(beside):
    thing = Thing()
    other = CommitObjectProxy(thing, [Push("b")]) if beside else None
    proxy = CommitObjectProxy(thing, [Push("a")])
    proxy.__enter__()
    proxy.__enter__()
    assert thing.log == ["a"]
    del proxy
    assert thing.log == []
    with other or CommitObjectProxy(thing, [Push("b")], timeout=1):
        assert thing.log == ["b"]
    assert thing.log == []


def test_one_that_is_dropped_inside_another_s_block_gives_that_its_stack_back():
    thing = Thing()
    with CommitObjectProxy(thing, [Push("a")]) as same:
        inner = CommitObjectProxy(thing, [Push("a"), Push("b")])
        inner.__enter__()
        assert same.log == ["a", "b"]
        outer = CommitObjectProxy(thing, [Push("c")])
        outer.__enter__()
        del inner  # not the innermost: nothing changes
        assert same.log == ["c"]
        del outer
        assert same.log == ["a"]
    assert thing.log == []


def test_who_waits_for_a_block_of_a_dropped_proxy_gets_its_turn():
    thing, waits, seen = Thing(), threading.Event(), []
    proxy = CommitObjectProxy(thing, [Push("a")])
    in_thread(proxy.__enter__).join(5)  # a thread that is gone by now
    assert thing.log == ["a"]

    def wait():
        waits.set()
        with CommitObjectProxy(thing, [Push("b")], timeout=5):
            seen.append(list(thing.log))

    thread = in_thread(wait)
    assert waits.wait(5)
    time.sleep(0.05)
    del proxy
    thread.join(5)
    assert seen == [["b"]]
    assert thing.log == []


def test_a_call_is_a_block_of_its_own():
    def shout(self, x):
        return x + "!"

    class Model:
        def __call__(self, x):
            return x

    model = Model()
    proxy = CommitObjectProxy(model, [AttributeCommit("loud", True)])
    assert proxy("x") == "x"
    assert not hasattr(model, "loud")


def test_clones_keep_their_class_their_base_and_their_own_stack():
    class Mine(CommitObjectProxy):
        pass

    thing = Thing()
    a, b = Push("a"), Push("b")
    base = Mine(thing, timeout=3)
    one = base.clone_and_add_commit(a)
    two = one.clone_and_add_commit(b)
    three = one.clone_and_add_callable_commit(lambda obj: lambda: None)
    copied = two.clone()
    assert base.commits == ()
    assert one.commits == (a,)
    assert two.commits == copied.commits == (a, b)
    assert isinstance(three.commits[1], CallableCommit)
    for proxy in (one, two, three, copied):
        assert type(proxy) is Mine
        assert proxy.base is thing
        assert proxy.timeout == 3
    assert thing.done == []


def test_what_is_no_commit_no_object_or_twice_in_a_stack_is_refused():
    commit = Push("a")
    with pytest.raises(TypeError, match="expected commits, got function"):
        CommitObjectProxy(Thing(), [lambda obj: None])
    with pytest.raises(ValueError, match="twice"):
        CommitObjectProxy(Thing(), [commit, commit])
    with pytest.raises(TypeError, match="got a proxy"):
        CommitObjectProxy(CommitObjectProxy(Thing()))
    with pytest.raises(RuntimeError, match="without having been entered"):
        CommitObjectProxy(Thing()).__exit__(None, None, None)


def test_keys_tell_base_and_ordered_commits():
    thing, other = Thing(), Thing()
    a, b = Push("a"), Push("b")
    key = CommitObjectProxy(thing, [a, b]).key
    assert key == CommitObjectProxy(thing).clone_and_add_commit(a, b).key
    gc.collect()
    keys = {
        key,
        CommitObjectProxy(thing, [b, a]).key,
        CommitObjectProxy(thing, [a]).key,
        CommitObjectProxy(other, [a, b]).key,
        CommitObjectProxy(copy.copy(thing), [a, b]).key,
        CommitObjectProxy(thing, [copy.copy(a), b]).key,
    }
    assert len(keys) == 6


def test_equal_objects_are_not_one_object():
    one, two = {"a": 1}, {"a": 1}
    fill = CallableCommit(lambda obj: (obj.update(b=2), lambda: obj.pop("b"))[1])
    with CommitObjectProxy(one, [fill]):
        assert two == {"a": 1}
        with CommitObjectProxy(two):
            assert one == {"a": 1, "b": 2}
    assert one == two


# --- several proxies ------------------------------------------------------------------------------


def test_rebase_exchanges_only_what_differs():
    thing = Thing()
    a, x, y, z = Push("a"), Push("x"), Push("y"), Push("z")
    CommitObjectProxy(thing)
    first, second = (CommitObjectProxy(thing, s) for s in ([a, x, y], [a, z]))
    first.apply_commit_stack()
    thing.done.clear()
    second.apply_commit_stack()
    assert thing.done == ["-y", "-x", "+z"]
    assert thing.log == ["a", "z"]
    assert first.applied == second.commits
    second.revert_commit_stack()
    assert thing.log == []


def test_the_inner_block_has_its_stack_and_the_outer_one_gets_its_own_back():
    thing = Thing()
    a, b, c = Push("a"), Push("b"), Push("c")
    outer, inner = CommitObjectProxy(thing, [a, b]), CommitObjectProxy(thing, [a, c])
    bare = CommitObjectProxy(thing)
    with outer:
        with inner:
            assert thing.log == ["a", "c"]
            with bare:
                assert thing.log == []
                with outer:
                    assert thing.log == ["a", "b"]
                assert thing.log == []
            assert thing.log == ["a", "c"]
        assert thing.log == ["a", "b"]
        with pytest.raises(KeyError), inner:
            raise KeyError
        assert thing.log == ["a", "b"]
    assert thing.log == []


def test_blocks_left_out_of_order_leave_the_innermost_one_its_stack():
    thing = Thing()
    outer, inner = CommitObjectProxy(thing, [Push("a")]), CommitObjectProxy(thing, [Push("b")])
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert thing.log == ["b"]
    inner.__exit__(None, None, None)
    assert thing.log == []


def test_patches_outside_of_blocks_come_back_after_a_block():
    thing = Thing()
    resting, other = CommitObjectProxy(thing, [Push("r")]), CommitObjectProxy(thing, [Push("o")])
    assert resting.apply_commit_stack() is thing
    with other:
        assert thing.log == ["o"]
        resting.revert_commit_stack()
        assert thing.log == ["o"]
        resting.apply_commit_stack()
    assert thing.log == ["r"]
    other.revert_commit_stack()
    assert thing.log == []


def test_when_all_proxies_are_gone_the_object_is_what_it_was():
    thing = Thing()
    one, two = CommitObjectProxy(thing, [Push("a")]), CommitObjectProxy(thing)
    one.apply_commit_stack()
    del one
    gc.collect()
    assert thing.log == ["a"]
    assert names(two.applied) == ["a"]
    del two
    gc.collect()
    assert thing.log == []
    assert id(thing) not in _stacks._records
    CommitObjectProxy(thing, [Push("b")]).apply_commit_stack()
    gc.collect()
    assert thing.log == []


def test_a_patch_that_could_not_be_taken_back_when_proxies_died_is_known_to_the_next(
    monkeypatch,
):
    told = []
    monkeypatch.setattr("sys.unraisablehook", told.append)
    failures = Failures({1})
    thing = Thing()
    CommitObjectProxy(thing, [Push("a", failures)]).apply_commit_stack()
    gc.collect()
    assert isinstance(told[0].exc_value, PatchFailed)
    assert thing.log == ["a"]
    fresh = CommitObjectProxy(thing)
    assert names(fresh.applied) == ["a"]
    with fresh:
        assert thing.log == []
    del fresh
    gc.collect()
    assert id(thing) not in _stacks._records


def test_a_base_is_freed_with_its_last_proxy():
    import weakref

    thing = Thing()
    gone = weakref.ref(thing)
    with CommitObjectProxy(thing, [Push("a")]):
        pass
    del thing
    gc.collect()
    assert gone() is None


# --- squash ---------------------------------------------------------------------------------------


def test_commits_that_know_how_are_made_into_one():
    thing = Thing()
    a, b, c, d = Push("a", key="k"), Push("b", key="k"), Push("c"), Push("d", key="k")
    with CommitObjectProxy(thing, [a, b, c, d]):
        assert thing.log == ["a", "b", "c", "d"]
        assert thing.done == ["+a&b", "+c", "+d"]
        thing.done.clear()
        with CommitObjectProxy(thing, [a, b, d]):
            assert thing.done == ["-d", "-c", "+d"]
            with CommitObjectProxy(thing, [a]):
                assert thing.log == ["a"]
            assert thing.log == ["a", "b", "d"]
            assert thing.done[-1] == "+b&d"
    assert thing.log == []


def test_a_squash_that_fails_names_its_commits_and_changes_nothing():
    class Never(Push):
        def squash(self, commits):
            raise ValueError("these do not go together")

    thing = Thing()
    stack = [Push("c"), Never("a", key="k"), Never("b", key="k")]
    with (
        pytest.raises(PatchFailed, match="do not go together") as caught,
        CommitObjectProxy(thing, stack),
    ):
        pass
    assert names(caught.value.patch) == ["a", "b"]
    assert thing.log == []


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_any_operation_may_fail_and_the_object_is_as_it_was(error):
    number = 0
    while True:
        failures = Failures(set(), error)
        thing = Thing()
        a, b, c, d = (Push(name, failures) for name in "abcd")
        outer, inner = CommitObjectProxy(thing, [a, b, c]), CommitObjectProxy(thing, [a, d, b])
        with outer:
            failures.numbers, failures.count = {number}, 0
            try:
                with inner:
                    assert thing.log == ["a", "d", "b"]
                    failures.numbers = set()
            except PatchFailed as failed:
                assert error is OSError
                assert isinstance(failed.__cause__, OSError)
                assert str(failed.__cause__) in {
                    f"{verb} {failed.patch.name}" for verb in ("apply", "revert")
                }
                assert "Thing, which is as it was before" in str(failed)
            except KeyboardInterrupt:
                assert error is KeyboardInterrupt
            else:
                break
            assert thing.log == ["a", "b", "c"] == names(outer.applied)
        assert thing.log == []
        with inner:
            assert thing.log == ["a", "d", "b"]
        number += 1
    assert number == 4  # c and b taken back, d and b applied


def test_leaving_may_fail_and_the_next_block_takes_back():
    failures = Failures({2})
    thing = Thing()
    proxy = CommitObjectProxy(thing, [Push("a", failures), Push("b", failures)])
    with pytest.raises(PatchFailed, match=r"Push b.*taken back from Thing"), proxy:
        pass
    assert thing.log == ["a", "b"]
    with CommitObjectProxy(thing):
        assert thing.log == []


def test_an_interrupt_in_the_block_stays_one_when_leaving_fails():
    thing = Thing()
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        CommitObjectProxy(thing, [Push("a", Failures({1}))]),
    ):
        raise KeyboardInterrupt
    assert "taken back" in caught.value.__notes__[0]
    with pytest.raises(PatchFailed) as failed, CommitObjectProxy(thing, [Push("b", Failures({1}))]):
        raise LookupError("body")
    assert isinstance(failed.value.__context__, (OSError, LookupError))


def test_a_patch_that_never_comes_off_is_given_up():
    thing = Thing()

    def stuck():
        raise OSError("never")

    commit = CallableCommit(lambda obj: (obj.log.append("s"), stuck)[1])
    proxy = CommitObjectProxy(thing, [Push("a"), commit, Push("b")])
    for _ in range(2):
        with pytest.raises(PatchFailed, match="never"), proxy:
            pass
    assert thing.log == ["a", "s", "b"]
    with pytest.raises(ValueError, match="is not applied"):
        proxy.give_up(Push("z"))
    proxy.give_up(proxy.commits[2])
    proxy.give_up(commit)
    thing.log[:] = ["a"]
    with CommitObjectProxy(thing):
        assert thing.log == []


def test_two_failures_at_once_are_both_told_and_recovery_is_possible():
    failures = Failures({3, 4})
    thing = Thing()
    outer = CommitObjectProxy(thing, [Push("a", failures), Push("b", failures)])
    inner = CommitObjectProxy(thing, [outer.commits[0], Push("c", failures)])
    with outer:
        with pytest.raises(PatchFailed, match="Push c") as caught:
            inner.__enter__()
        assert "Push a" in caught.value.__notes__[0]
        assert thing.log == names(outer.applied) == ["a"]
    assert thing.log == []
    with outer, inner:
        assert thing.log == ["a", "c"]


stacks = st.lists(st.integers(0, 5), max_size=4, unique=True)
programs = st.recursive(
    st.tuples(st.sampled_from(["block", "rest", "drop"]), stacks, st.just([]), st.booleans()),
    lambda inner: st.tuples(
        st.just("block"), stacks, st.lists(inner, max_size=3), st.booleans()
    ),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    st.lists(programs, max_size=4),
    st.sets(st.integers(0, 40), max_size=5),
    st.sets(st.integers(0, 5)),
)
def test_the_object_is_always_what_the_model_of_its_blocks_says(steps, numbers, squashed):
    thing, failures = Thing(), Failures(numbers)
    commits = [Push(str(i), failures, "k" if i in squashed else None) for i in range(6)]
    keeper = CommitObjectProxy(thing)
    resting: list[int] = []

    def truthful():
        assert thing.log == names(keeper.applied)

    def expect(stack, before, failed):
        truthful()
        if failed is None:
            assert thing.log == [str(i) for i in stack]
        elif not hasattr(failed, "__notes__"):
            assert thing.log == before

    def run(step, around):
        nonlocal resting
        kind, stack, inner, raises = step
        proxy = CommitObjectProxy(thing, [commits[i] for i in stack])
        before = list(thing.log)
        if kind != "block":
            wanted = stack if kind == "rest" else []
            with attempt() as outcome:
                getattr(proxy, f"{'apply' if kind == 'rest' else 'revert'}_commit_stack")()
                resting = wanted
            if around is None:
                expect(wanted, before, outcome.error)
            else:
                assert thing.log == before
            return
        with attempt() as outcome:
            proxy.__enter__()
        expect(stack, before, outcome.error)
        if outcome.error is not None:
            return
        for one in inner:
            run(one, stack)
        before = list(thing.log)
        error = ValueError("body") if raises else None
        with attempt() as outcome:
            proxy.__exit__(type(error), error, None)
        expect(resting if around is None else around, before, outcome.error)

    for step in steps:
        run(step, None)
    failures.numbers = set()
    keeper.revert_commit_stack()
    with keeper:
        assert thing.log == []
    assert thing.log == []


@contextlib.contextmanager
def attempt():
    outcome = SimpleNamespace(error=None)
    try:
        yield outcome
    except PatchFailed as failed:
        outcome.error = failed


# --- threads and tasks ----------------------------------------------------------------------------


def in_thread(function):
    thread = threading.Thread(target=function, name="other")
    thread.start()
    return thread


def test_another_thread_waits_for_the_block():
    thing, seen = Thing(), []
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with CommitObjectProxy(thing, [Push("a")]):
            inside.set()
            leave.wait(5)
            seen.append(list(thing.log))

    holder = in_thread(hold)
    assert inside.wait(5)
    mine = CommitObjectProxy(thing, [Push("b")], timeout=0.05)
    with pytest.raises(LeaseTimeout) as late:
        mine.__enter__()
    assert "within 0.05 s" in str(late.value)
    assert "thread other" in late.value.holders[0]
    assert "test_pools_proxies.py:" in late.value.holders[0]
    assert "in hold" in late.value.holders[0]
    threading.Timer(0.05, leave.set).start()
    with CommitObjectProxy(thing, [Push("b")]):
        assert thing.log == ["b"]
        assert seen == [["a"]]
    holder.join(5)
    assert thing.log == []


def test_many_threads_and_tasks_never_see_each_others_stack():
    thing, errors = Thing(), []
    stacks = [[Push(f"{i}{j}") for j in range(i % 3)] for i in range(8)]

    def work(stack):
        try:
            proxy = CommitObjectProxy(thing, stack, timeout=20)
            for _ in range(20):
                with proxy:
                    assert thing.log == names(stack)
                    with CommitObjectProxy(thing, stack[:1]):
                        time.sleep(0)
                        assert thing.log == names(stack[:1])
                    assert thing.log == names(stack)
        except BaseException as error:
            errors.append(error)

    async def task(stack):
        proxy = CommitObjectProxy(thing, stack, timeout=20)
        for _ in range(10):
            async with proxy:
                assert thing.log == names(stack)
                await asyncio.sleep(0)
                async with CommitObjectProxy(thing):
                    await asyncio.sleep(0)
                    assert thing.log == []
                assert thing.log == names(stack)

    async def tasks():
        await asyncio.gather(*(task(stack) for stack in stacks))

    threads = [in_thread(lambda stack=stack: work(stack)) for stack in stacks]
    asyncio.run(tasks())
    for thread in threads:
        thread.join(30)
    assert not errors
    assert thing.log == []


def test_threads_that_wait_for_each_other_are_refused_at_once():
    one, two, errors = Thing(), Thing(), []
    both = threading.Barrier(2, timeout=5)

    def work(first, second):
        with CommitObjectProxy(first, [Push("a")]):
            both.wait()
            try:
                with CommitObjectProxy(second, [Push("b")]):
                    pass
            except Deadlock as error:
                errors.append(error)

    threads = [in_thread(lambda: work(one, two)), in_thread(lambda: work(two, one))]
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert len(errors) == 1
    assert "cannot let go" in str(errors[0])
    assert one.log == two.log == []


def test_a_task_that_would_block_its_own_loop_is_refused_and_one_that_awaits_is_not():
    thing = Thing()

    async def main():
        inside = asyncio.Event()

        async def hold():
            with CommitObjectProxy(thing, [Push("a")]):
                inside.set()
                await asyncio.sleep(0.05)

        holding = asyncio.create_task(hold(), name="holder")
        await inside.wait()
        with pytest.raises(Deadlock, match="task holder"):
            CommitObjectProxy(thing).__enter__()
        with pytest.raises(LeaseTimeout):
            await CommitObjectProxy(thing, timeout=0.01).__aenter__()
        waiting = asyncio.create_task(CommitObjectProxy(thing).__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with CommitObjectProxy(thing, [Push("b")]):
            assert thing.log == ["b"]
        await holding

    asyncio.run(main())
    assert thing.log == []


def test_a_block_may_be_left_by_another_thread():
    thing = Thing()
    proxy = CommitObjectProxy(thing, [Push("a")])
    proxy.__enter__()
    in_thread(lambda: proxy.__exit__(None, None, None)).join(5)
    assert thing.log == []
    in_thread(lambda: proxy("x") if callable(thing) else proxy.__enter__()).join(5)
    assert thing.log == ["a"]
    proxy.__exit__(None, None, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have():
    thing = Thing()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with CommitObjectProxy(thing, [Push("a")]):
            inside.set()
            leave.wait(10)

    holder = in_thread(hold)
    assert inside.wait(5)
    child = os.fork()
    if not child:
        try:
            with CommitObjectProxy(thing, [Push("b")], timeout=5):
                os._exit(0 if thing.log == ["b"] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    leave.set()
    holder.join(5)


def test_proxies_that_die_in_any_thread_while_others_work_leave_nothing():
    things = [Thing() for _ in range(4)]
    errors = []

    def work(seed):
        try:
            for step in range(60):
                thing = things[(seed + step) % 4]
                proxy = CommitObjectProxy(thing, [Push(f"{seed}")], timeout=20)
                cycle = [proxy]
                cycle.append(cycle)  # dies in a collection
                if step % 3:
                    with proxy:
                        assert thing.log == [f"{seed}"]
                else:
                    proxy.apply_commit_stack()
                del proxy, cycle
                if not step % 10:
                    gc.collect()
        except BaseException as error:
            errors.append(error)

    threads = [in_thread(lambda seed=seed: work(seed)) for seed in range(4)]
    for thread in threads:
        thread.join(30)
    gc.collect()
    assert not errors
    assert [thing.log for thing in things] == [[], [], [], []]
    assert not any(id(thing) in _stacks._records for thing in things)


def test_modules_are_objects_like_others():
    model = nn.Linear(2, 2)
    with CommitObjectProxy(model, [AttributeCommit("training", False)]):
        assert not model.training
    assert model.training


def test_blocks_failures_and_forgotten_stacks_leave_no_memory():
    script = Path(__file__).parent / "isolated" / "leak_commits.py"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
