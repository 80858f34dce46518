"""Random histories of a ledger, brought to an end by brute force.

Whoever nothing is in the way of gives everything back, until nobody is left. Whoever still waits
then was let into a deadlock, and so was who is told of one after it was told to wait; a request
that was refused as a deadlock, and could be granted then, was refused wrongly.
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

    def kept(self, ask):
        """Owners that cannot finish before the request ask: those above may, where it ends."""
        owner = ask[0]
        while owner:
            yield owner
            owner = 0 if ask[3] & self.C.POOL_ENDS else self.above[owner]

    def stops(self, ask, owner):
        """Whether owner can do nothing before the request ask, (owner, units, extra, flags)."""
        blocks = ask[3] & self.C.POOL_BLOCKS_THREAD and self.thread[owner]
        return bool(blocks and self.thread[ask[0]] == self.thread[owner])

    def is_free(self, owner, also=()):
        return not any(
            owner in self.kept(ask) or self.stops(ask, owner)
            for ask in [*self.waiting.values(), *also]
        )

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
                assert answer.verdict == GRANTED, f"{ask} was told to wait, then refused"
                self.fulfil(ask, answer)

    def step(self, kind, index, picked, extra, flags):
        """One thing that an owner does, if it can act: the verdict of a request."""
        owner = self.owners[index]
        units = tuple(self.units[i] for i in picked)
        acts = not any(ask[0] == owner or self.stops(ask, owner) for ask in self.waiting.values())
        verdict = None
        if kind == "leave" and self.held[owner] and self.is_free(owner):
            self.ledger.leave(owner, *self.held[owner].pop(0))
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
        while able := [o for o in self.owners if self.held[o] and self.is_free(o, also)]:
            owner = chance.choice(able)
            while self.held[owner]:
                self.ledger.leave(owner, *self.held[owner].pop())
            self.pump()


class Plan:
    """What there is, and what is tried."""

    def __init__(self, C, chance):
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
        self.steps = []
        for _ in range(chance.randint(3, 14)):
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
        plan = Plan(C, random.Random(seed))
        world = World(C, plan)
        verdicts = [world.step(*step) for step in plan.steps]
        world.drain(random.Random(seed))
        assert not world.waiting, f"seed {seed}: waits for ever"
        for i, verdict in enumerate(verdicts):
            if verdict == DEADLOCK:
                again = World(C, plan)
                for step in plan.steps[:i]:
                    again.step(*step)
                _, index, picked, extra, flags = plan.steps[i]
                units = tuple(again.units[k] for k in picked)
                ask = (again.owners[index], units, extra, flags)
                again.drain(random.Random(seed), [ask])
                answer = again.ledger.request(*ask[:3], 0, flags | C.POOL_TRY)
                refused = answer.verdict != GRANTED or again.waiting
                assert refused, f"seed {seed}: step {i} was refused for nothing"
