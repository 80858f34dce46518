"""Random histories of a ledger, brought to an end by brute force.

Whoever nothing is in the way of gives everything back, until nobody is left. Whoever still waits
then was let into a deadlock, and so was who is told of one after it was told to wait; a request
that was refused as a deadlock, and could be granted then, was refused wrongly. The same with turns,
which one owner has at a time and others wait for outside of the ledger, which is told of that; as
turns are passed on without asking it, it may tell one later there.
"""

from __future__ import annotations

import random

import pytest

GRANTED, WAIT, _, DEADLOCK = range(4)


class World:
    """A ledger whose loads end at once, and what each owner holds and waits for."""

    def __init__(self, C, plan):
        self.C = C
        self.ledger = C.Ledger()
        for budget in plan.budgets:
            self.ledger.add_pool(budget)
        self.units = [self.ledger.add_unit(pool, nbytes) for pool, nbytes in plan.units]
        self.owners, self.above, self.thread = [], {0: 0}, {0: 0}
        for parent, thread in plan.owners:
            above = 0 if parent is None else self.owners[parent]
            owner = self.ledger.add_owner(above, thread)
            self.owners.append(owner)
            self.above[owner], self.thread[owner] = above, thread
        self.held = {owner: [] for owner in self.owners}
        self.waiting = {}
        self.turns = [None] * plan.turns  # who has each
        self.queued = []  # (owner, turn, flags) in the order in which they came

    def asks(self):
        return [*self.waiting.values(), *self.queued]

    def kept(self, ask):
        """Who cannot finish before ask: not one above, if it ends or has the turn."""
        owner, can = ask[0], self.turns[ask[1]] if len(ask) == 3 else None
        while owner and (owner != can or owner == ask[0]):
            yield owner
            owner = 0 if ask[-1] & self.C.POOL_ENDS else self.above[owner]

    def stops(self, ask, owner):
        """Whether owner can do nothing before ask, (owner, ..., flags)."""
        blocks = ask[-1] & self.C.POOL_BLOCKS_THREAD and self.thread[owner]
        return bool(blocks and self.thread[ask[0]] == self.thread[owner])

    def is_free(self, owner, also=()):
        return not any(
            owner in self.kept(ask) or self.stops(ask, owner) for ask in [*self.asks(), *also]
        )

    def waits(self, *more):
        """What the ledger is told: each waits for who has the turn, and for those before it."""
        told, before = [], {turn: [owner] for turn, owner in enumerate(self.turns)}
        for owner, turn, flags in [*self.queued, *more]:
            told += [number for holder in before[turn] for number in (owner, holder, flags)]
            before[turn].append(owner)
        return tuple(told)

    def take_turn(self, owner, turn, flags):
        """Whether the owner waits for the turn, which it may have at once; None: it must not."""
        if self.turns[turn] in (None, owner):
            self.turns[turn] = owner
            return False
        if not self.ledger.set_waits(self.waits((owner, turn, flags)), owner):
            return None
        self.queued.append((owner, turn, flags))
        return True

    def give_turns(self, owner):
        for turn, has in enumerate(self.turns):
            if has == owner:
                after = next((ask for ask in self.queued if ask[1] == turn), None)
                self.turns[turn] = None if after is None else after[0]
                if after is not None:
                    self.queued.remove(after)
                self.ledger.set_waits(self.waits())

    def fulfil(self, ask, answer):
        for unit in answer.evict:
            self.ledger.evicted(unit)
        for unit in answer.load:
            self.ledger.loaded(unit)
        self.held[ask[0]].append(ask[1:3])

    def pump(self):
        while tickets := self.ledger.pump():
            for ticket in tickets:
                answer, ask = self.ledger.take(ticket), self.waiting.pop(ticket)
                if answer.verdict == GRANTED:
                    self.fulfil(ask, answer)
                else:
                    assert self.turns, f"{ask} was told to wait, then refused"

    def step(self, kind, index, picked, extra, flags):
        """One thing that an owner does, if it can act: the verdict of a request."""
        owner = self.owners[index]
        units = tuple(self.units[i] for i in picked)
        acts = not any(ask[0] == owner or self.stops(ask, owner) for ask in self.asks())
        verdict = None
        if kind == "leave" and self.held[owner] and self.is_free(owner):
            self.ledger.leave(owner, *self.held[owner].pop(0))
        elif kind == "give" and self.is_free(owner):
            self.give_turns(owner)
        elif kind == "turn" and acts:
            flags &= self.C.POOL_BLOCKS_THREAD
            waits = self.take_turn(owner, picked[0] % len(self.turns), flags)
            verdict = DEADLOCK if waits is None else WAIT if waits else GRANTED
        elif kind == "enter" and acts and self.ledger.enter(owner, units):
            self.held[owner].append((units, ()))
        elif kind == "request" and acts:
            ask = (owner, units, extra, flags)
            answer = self.ledger.request(owner, units, extra, 0, flags)
            verdict = answer.verdict
            if verdict == GRANTED:
                self.fulfil(ask, answer)
            elif verdict == WAIT:
                self.waiting[answer.ticket] = ask
        if kind != "enter":
            self.pump()
        return verdict

    def drain(self, chance, also=()):
        self.pump()
        while able := [
            owner
            for owner in self.owners
            if (self.held[owner] or owner in self.turns) and self.is_free(owner, also)
        ]:
            owner = chance.choice(able)
            while self.held[owner]:
                self.ledger.leave(owner, *self.held[owner].pop())
            self.give_turns(owner)
            self.pump()

    def is_hopeless(self, step, seed):
        """Whether what this step asks for cannot be had when everybody has given what they can."""
        kind, index, picked, extra, flags = step
        owner, turn = self.owners[index], picked[0] % max(len(self.turns), 1)
        units = tuple(self.units[i] for i in picked)
        ask = (owner, units, extra, flags)
        if kind == "turn":
            ask = (owner, turn, flags & self.C.POOL_BLOCKS_THREAD)
        # Whose thread it would stop could do nothing with what they wait for.
        stopped = [other for other in self.asks() if self.stops(ask, other[0])]
        self.drain(random.Random(seed), [ask, *stopped])
        if kind == "turn":
            return self.turns[turn] is not None or bool(self.asks())
        answer = self.ledger.request(owner, units, extra, 0, flags | self.C.POOL_TRY)
        return answer.verdict != GRANTED or bool(self.asks())


class Plan:
    """What there is, and what is tried."""

    def __init__(self, C, chance, turns=0):
        self.turns = turns
        pools = chance.choice((1, 1, 2))
        self.budgets = [chance.randint(3, 10) for _ in range(pools)]
        self.units = [
            (chance.randrange(pools), chance.randint(1, 5)) for _ in range(chance.randint(2, 6))
        ]
        self.owners = [
            (chance.randrange(i) if i and chance.random() < 0.4 else None, chance.randrange(4))
            for i in range(chance.randint(2, 6))
        ]
        kinds = ("request",) * 7 + ("enter", "leave", "leave")
        kinds += (("turn",) * 6 + ("give",)) * bool(turns)
        self.steps = []
        for _ in range(chance.randint(3, 14 + 4 * turns)):
            picked = chance.sample(range(len(self.units)), chance.randint(1, 2))
            extra = ((chance.randrange(pools), chance.randint(1, 4)),)
            self.steps.append(
                (
                    chance.choice(kinds),
                    chance.randrange(len(self.owners)),
                    picked,
                    extra if chance.random() < 0.2 else (),
                    chance.choice((0, 0, C.POOL_BLOCKS_THREAD))
                    | chance.choice((0, 0, C.POOL_ENDS)),
                )
            )


@pytest.mark.parametrize("begin", range(0, 4000, 500))
def test_nobody_waits_for_ever_or_is_refused_for_nothing(C, begin):
    for seed in range(begin, begin + 500):
        check(C, seed, turns=0)


@pytest.mark.parametrize("begin", range(0, 3000, 500))
def test_nor_where_they_also_wait_outside_of_the_ledger(C, begin):
    for seed in range(begin, begin + 500):
        check(C, seed, turns=1 + seed % 2)


def check(C, seed, turns):
    plan = Plan(C, random.Random(seed), turns)
    world = World(C, plan)
    verdicts = [world.step(*step) for step in plan.steps]
    world.drain(random.Random(seed))
    assert not world.asks(), f"seed {seed}: waits for ever"
    for i, verdict in enumerate(verdicts):
        if verdict == DEADLOCK:
            again = World(C, plan)
            for step in plan.steps[:i]:
                again.step(*step)
            assert again.is_hopeless(plan.steps[i], seed), f"seed {seed}: step {i} for nothing"
