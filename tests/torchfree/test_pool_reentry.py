"""Leases when Python runs inside a call of ours: finalizers, callbacks, conversions."""

from __future__ import annotations

import contextvars
import copy
import gc
import sys
import threading
import types
import weakref

import pytest


@pytest.fixture
def seat(C):
    ledger = C.Ledger()
    unit = ledger.add_unit(ledger.add_pool(100), 1)
    owner = ledger.add_owner()
    for name in ledger.request(owner, (unit,)).load:
        ledger.loaded(name)
    ledger.leave(owner, (unit,))
    return C.Seat(ledger, (unit,))


@pytest.fixture
def by_hand():
    """The collector runs when the test says so."""
    gc.collect()
    before = gc.get_threshold()
    gc.disable()
    yield
    gc.set_threshold(*before)
    gc.enable()


def leases(seat):
    return [seat.ledger.unit(unit).leases for unit in seat.units]


def test_an_owner_that_dies_is_not_listed_to_who_is_told(C, seat):
    listed = []
    context = contextvars.copy_context()
    owner = context.run(C.pool_owner, seat.ledger)
    told = weakref.ref(owner, lambda gone: listed.append(C.pool_owners(seat.ledger)))
    del context, owner
    gc.collect()
    assert told() is None
    assert listed == [[]]


@pytest.mark.parametrize("value", ["text", None, 3])
def test_a_context_in_which_somebody_set_the_owner_to_nonsense(C, seat, value):
    """Code that carries contexts over sets whatever variables it finds."""

    def use():
        C.pool_owner(seat.ledger)
        for variable in contextvars.copy_context():
            if variable.name == "opguard.pool_owner":
                variable.set(value)
        with C.Lease(seat):
            assert leases(seat) == [1]

    contextvars.copy_context().run(use)
    assert leases(seat) == [0]


def test_who_holds_is_known_again_after_two_other_ledgers(C):
    """A lease held in one ledger is its thread's own whatever the thread asks of others."""
    held, *others = [C.Ledger() for _ in range(3)]
    owner = C.pool_owner(held)
    held.request(owner.id, (held.add_unit(held.add_pool(100), 1),))
    for other in others:
        C.pool_owner(other)
        assert C.pool_owner(held) is owner


def test_units_that_change_while_a_lease_is_adopted(C, seat):
    unit = seat.units[0]
    owner = C.pool_owner(seat.ledger)
    assert seat.ledger.enter(owner.id, (unit,))

    class Changes:
        def __index__(self):
            seat.units = (unit,) * 1000
            return 0

    lease = C.Lease(seat)
    lease.adopt(owner, ((Changes(), 0),))
    assert owner.held[0][0] == (unit,)
    lease.__exit__(None, None, None)
    seat.units = (unit,)
    assert leases(seat) == [0]


def test_what_is_adopted_with_nonsense_is_not_adopted(C, seat):
    owner = C.pool_owner(seat.ledger)
    lease = C.Lease(seat)
    for extra in (1, (1,), ((0, "bytes"),)):
        with pytest.raises(TypeError):
            lease.adopt(owner, extra)
    assert lease.entered == 0
    assert owner.held == ()


def test_a_forgotten_lease_tells_by_a_function_of_its_own_cycle(C, seat, by_hand):
    told = []

    def forget():
        def after():
            told.append(len(seat.units))  # needs the function's globals

        lease = C.Lease(seat, None, None, after)
        lease.__enter__()
        after.lease = [lease]

    forget()
    assert leases(seat) == [1]
    gc.collect()
    assert told == [1]
    assert leases(seat) == [0]


def test_a_forgotten_generator_leaves_the_lease_once(C, seat, by_hand, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    told = []

    def forget():
        lease = C.Lease(seat, None, None, lambda: told.append(1))

        def use(cycle):
            with lease:
                yield

        cycle = []
        running = use(cycle)
        cycle += (lease, running)
        next(running)

    forget()
    gc.collect()
    assert leases(seat) == [0]
    assert seat.leases == 0
    assert (told, unraisable) == ([1], [])
    with pytest.raises(RuntimeError):
        C.Lease(seat).__exit__(None, None, None)


def test_a_module_collected_while_its_method_is_made(C, seat, by_hand):
    class Model:
        def forward(self):
            """Nobody calls it."""

    pairs = [(i, i) for i in range(5000)]  # empties the free list: the next pair is allocated
    for spare in range(60):
        model = Model()
        model.itself = model
        forward = C.LeasedForward(seat, Model.forward, model)
        del model
        garbage = [[] for _ in range(spare)]
        pairs += [(i, spare) for i in range(50)]
        gc.set_threshold(1, 1, 1)
        gc.enable()
        wrapped = forward.__wrapped__
        gc.disable()
        if isinstance(wrapped, types.MethodType):
            assert wrapped.__self__.itself is wrapped.__self__
        del garbage, wrapped


def test_a_lease_that_two_threads_share_is_left_by_whom_it_is_left(C, seat):
    """The first to come is the first to go; who is still inside is the one that holds it."""
    lease, entered, go = C.Lease(seat), threading.Event(), threading.Event()

    def first():
        owners.append(C.pool_owner(seat.ledger))
        with lease:
            entered.set()
            go.wait(10)

    owners = []
    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with lease:
        go.set()
        thread.join()
        mine = C.pool_owner(seat.ledger)
        assert lease.entered == 1
        assert seat.ledger.holders(seat.units[0]) == ((mine.id, 1),)
        assert (len(mine.held), owners[0].held) == (1, ())
    assert (lease.entered, leases(seat)) == (0, [0])


def test_a_forgotten_lease_in_a_cycle_of_its_own_seat_is_given_back(C, seat, by_hand):
    def forget():
        own = C.Seat(seat.ledger, seat.units)
        lease = C.Lease(own)
        own.enter_slow = lambda *given: lease
        lease.__enter__()

    forget()
    assert leases(seat) == [1]
    gc.collect()
    assert leases(seat) == [0]


@pytest.mark.parametrize("road", ["adopt", "drive", "deepcopy"])
def test_a_keeper_that_goes_while_it_is_asked(C, seat, road):
    """Looking a method up runs code, which may drop who has it."""

    class Keeper:
        @property
        def gone(self):
            forward.keeper = None
            raise AttributeError

        adopt = drive = deepcopy = gone

        def __getattr__(self, name):
            asked.append(name)
            return lambda *given: found.append(self)

    asked, found = [], []
    forward = C.LeasedForward(
        None if road == "adopt" else seat, lambda: (x for x in ()), None, Keeper()
    )
    if road == "deepcopy":
        copy.deepcopy(forward)
    elif road == "drive":
        assert forward() is None
    else:
        with pytest.raises(RuntimeError, match="has none"):
            forward()
    assert asked == [road]
    assert type(found[0]) is Keeper
