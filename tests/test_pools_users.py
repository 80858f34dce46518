"""Users of one's own: which class manages what, what they are called for, how they may fail."""

from __future__ import annotations

import gc

import pytest

from opguard import pools
from opguard.pools.users import make_user, register_lazily
from pools_kit import MIB, Thing, ThingUser, fresh_pools, until


@pytest.fixture
def cpu(tmp_path):
    with fresh_pools(tmp_path, "4MiB") as management:
        yield management


class Base:
    pass


class Derived(Base):
    pass


class Plain(pools.ResourcePoolUser):
    def needs(self):
        return {"cpu": MIB}

    def bring_in(self):
        return 5

    def give_back(self):
        return 3


class Special(Plain):
    def __init__(self, obj, inference_memory_estimator=None, *, name=None):
        super().__init__(obj)
        self.inference_memory_estimator = inference_memory_estimator
        self.named = name


def test_the_abstract_class_says_what_is_missing():
    with pytest.raises(TypeError, match="bring_in"):
        pools.ResourcePoolUser(Base())
    with pytest.raises(TypeError, match="capacity"):
        pools.ResourcePool("x")


def test_the_nearest_type_decides(cpu):
    pools.register_user(Base, Plain)
    assert type(make_user(Derived())) is Plain
    pools.register_user(Derived, Special)
    assert type(make_user(Derived())) is Special
    assert type(make_user(Base())) is Plain


def test_what_is_registered_must_be_a_type_and_a_factory():
    with pytest.raises(TypeError, match="expected a type"):
        pools.register_user("Base", Plain)
    with pytest.raises(TypeError, match="expected a callable"):
        pools.register_user(Base, None)


def test_options_reach_the_factory_that_names_them(cpu):
    pools.register_user(Derived, Special)
    obj = Derived()
    user = pools.manage(obj, inference=7, name="mine").user
    assert (user.inference_memory_estimator, user.named) == (7, "mine")
    pools.manage(obj, inference=9)
    assert user.inference_memory_estimator == 9
    with pytest.raises(TypeError, match=r"among .*'name'.*got 'stream', which Special does not"):
        pools.manage(Derived(), stream=True)


def test_a_factory_may_be_any_callable(cpu):
    pools.register_user(Base, lambda obj, **options: Plain(obj))
    assert isinstance(pools.manage(Base(), stream=True).user, Plain)
    pools.register_user(Base, lambda obj: 3)
    with pytest.raises(TypeError, match="to return a ResourcePoolUser, got int"):
        pools.manage(Base())
    pools.register_user(Base, Plain)


def test_a_type_of_a_library_that_is_not_there_is_known_by_name(cpu):
    kind = type("Strange", (), {"__module__": "stranger.inner"})
    register_lazily("stranger", "Strange", lambda: Plain)
    assert isinstance(pools.manage(kind()).user, Plain)
    other = type("Strange", (), {"__module__": "another"})
    with pytest.raises(pools.Unmanageable):
        pools.manage(other())


def test_what_cannot_be_held_weakly_is_refused(cpu):
    class Slotted:
        __slots__ = ()

    pools.register_user(Slotted, lambda obj: Plain(Base()))
    with pytest.raises(pools.Unmanageable, match="Slotted"):
        pools.manage(Slotted())


def test_what_a_user_moved_is_counted(cpu):
    pools.register_user(Base, Plain)
    handle = pools.manage(Base())
    with handle.lease():
        pass
    cpu.free()
    figures = cpu.snapshot().users[0]
    assert (figures.bytes_in, figures.bytes_written_back) == (5, 3)
    assert figures.kind == "Plain"


def test_a_user_that_says_nonsense_of_what_it_moved_is_in_nobodys_way(cpu):
    class Odd(Thing):
        pass

    class OddUser(ThingUser):
        def bring_in(self):
            return "many"

        def give_back(self):
            return "some"

    pools.register_user(Odd, OddUser)
    odd = Odd(3 * MIB)
    with pools.manage(odd).lease():
        pass
    with pools.manage(Thing(3 * MIB)).lease():  # it has to go for this
        assert cpu.pool("cpu").used == 3 * MIB
    figures = next(user for user in cpu.snapshot().users if user.kind == "OddUser")
    assert (figures.bytes_in, figures.bytes_written_back) == (3 * MIB, 0)


@pytest.mark.parametrize("needs", [None, {"cpu": "1MiB"}, {"cpu": 0.5}, [("cpu", 1)]])
def test_needs_are_bytes_by_name_of_pool(cpu, needs):
    class Needy(Thing):
        pass

    class NeedyUser(ThingUser):
        def needs(self):
            return needs

    pools.register_user(Needy, NeedyUser)
    with pytest.raises(TypeError, match=r"needs\(\) of NeedyUser.*bytes by name of pool"):
        pools.manage(Needy())


def test_a_user_of_two_pools_has_all_or_nothing(cpu):
    class Slots(pools.ResourcePool):
        def capacity(self):
            return 2

    class Both(Plain):
        def needs(self):
            return {"cpu": MIB, "slots": 1}

    class Wide:
        pass

    cpu.add_pool(Slots("slots"), 2)
    pools.register_user(Wide, Both)
    wide = [pools.manage(Wide()) for _ in range(3)]
    with wide[0].lease(), wide[1].lease():
        assert (cpu.pool("cpu").used, cpu.pool("slots").used) == (2 * MIB, 2)
        with pytest.raises(pools.PoolRefused):
            wide[2].load(0)
        assert (cpu.pool("cpu").used, cpu.pool("slots").used) == (2 * MIB, 2)
    wide[2].load(5)
    assert wide[2].loaded
    wide[2].offload()


def test_a_user_that_takes_from_no_known_pool_is_refused(cpu):
    class Lost(Plain):
        def needs(self):
            return {"moon": 1}

    pools.register_user(Base, Lost)
    with pytest.raises(KeyError, match="moon"):
        pools.manage(Base())
    assert cpu.entries == {}
    pools.register_user(Base, Plain)


def test_two_threads_that_manage_one_object_make_one_user(cpu):
    import threading
    import time

    made = []

    class Slow(Plain):
        def __init__(self, obj):
            super().__init__(obj)
            made.append(self)
            time.sleep(0.05)

    class Shared:
        pass

    pools.register_user(Shared, Slow)
    obj, handles = Shared(), []
    threads = [threading.Thread(target=lambda: handles.append(pools.manage(obj))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(made) == 1
    assert len({handle.user for handle in handles}) == 1


def test_a_factory_that_fails_can_be_tried_again(cpu):
    fails = [ValueError("not today")]

    class Picky(Plain):
        def __init__(self, obj):
            super().__init__(obj)
            if fails:
                raise fails.pop()

    pools.register_user(Base, Picky)
    obj = Base()
    with pytest.raises(ValueError, match="not today"):
        pools.manage(obj)
    assert pools.manage(obj).load().loaded
    pools.register_user(Base, Plain)


def test_clearing_up_that_fails_stops_nobody(cpu, caplog):
    class Untidy(Plain):
        def close(self):
            raise OSError("stuck")

    pools.register_user(Base, Untidy)
    obj = Base()
    pools.manage(obj, name="untidy")
    del obj
    gc.collect()
    until(lambda: not cpu.entries)
    until(lambda: "untidy" in caplog.text)
    pools.register_user(Base, Plain)


def test_an_object_is_held_weakly_and_its_handle_keeps_it(cpu):
    thing = Thing()
    handle = pools.manage(thing)
    user = handle.user
    del thing
    gc.collect()
    assert user.obj is handle.obj is not None
    del handle
    gc.collect()
    assert user.obj is None
    until(lambda: user.closed)
