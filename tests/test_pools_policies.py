"""Who goes first when bytes are needed: by policy, priority, pins; never who is in use."""

from __future__ import annotations

import pytest

from opguard import pools
from pools_kit import MIB, Thing, fresh_pools


@pytest.fixture
def cpu(tmp_path):
    with fresh_pools(tmp_path, 3 * MIB) as management:
        yield management


def use(*handles):
    for handle in handles:
        with handle.lease():
            pass


def things(*nbytes):
    return [pools.manage(Thing(n)) for n in nbytes]


def loaded(handles):
    return [handle.loaded for handle in handles]


def test_by_default_the_longest_unused_goes(cpu):
    a, b, c, d = things(*[MIB] * 4)
    use(a, b, c, a, d)
    assert loaded([a, b, c, d]) == [True, False, True, True]


def test_only_as_many_go_as_are_needed(cpu):
    a, b, c, d = things(MIB, MIB, MIB, 2 * MIB)
    use(a, b, c, d)
    assert loaded([a, b, c, d]) == [False, False, True, True]


def test_eviction_repeats_itself(cpu):
    """The same uses lead to the same victims, run after run."""
    seen = set()
    for _ in range(5):
        handles = things(*[MIB] * 5)
        use(*handles[:3], handles[1], handles[3], handles[0], handles[4])
        seen.add(tuple(loaded(handles)))
        cpu.free()
    assert seen == {(True, False, False, True, True)}


def test_a_lower_priority_goes_first(cpu):
    a, b, c, d = things(*[MIB] * 4)
    a.priority, c.priority = 1, 1
    use(a, c, b, d)
    assert loaded([a, b, c, d]) == [True, False, True, True]


def test_a_pinned_one_stays(cpu):
    a, b, c, d = things(*[MIB] * 4)
    a.pinned = True
    use(a, b, c, d)
    assert loaded([a, b, c, d]) == [True, False, True, True]
    a.pinned = False
    use(b, c)
    assert not a.loaded


def test_one_in_use_stays(cpu):
    a, b, c, d = things(*[MIB] * 4)
    with a.lease():
        use(b, c, d)
        assert loaded([a, b, c, d]) == [True, False, True, True]


def test_one_told_to_go_goes_before_all_others(cpu):
    a, b, c, d = things(*[MIB] * 4)
    use(a, b, c)
    c.offload()
    use(d)
    assert loaded([a, b, c, d]) == [True, True, False, True]


def test_by_cost_what_is_used_often_stays(cpu):
    pools.setup_default_pools(budgets={"cpu": 3 * MIB}, policy="cost")
    often, once, other, new = things(*[MIB] * 4)
    use(*[often] * 9, once, other, new)
    assert often.loaded
    assert loaded([once, other, new]).count(False) == 1


def test_ones_own_policy_is_asked_about_those_who_can_go(cpu):
    asked = []

    def largest_name_first(candidate):
        asked.append(candidate)
        return -ord(candidate.name[-1])

    pools.setup_default_pools(budgets={"cpu": 3 * MIB}, policy=largest_name_first)
    a, b, c, d = (pools.manage(Thing(MIB), name=name) for name in "abcd")
    use(a, b)
    with c.lease():
        use(d)
    assert loaded([a, b, c, d]) == [True, False, True, True]
    last = {candidate.name: candidate for candidate in asked[-2:]}
    assert set(last) == {"a", "b"}, "neither who is in use nor who is not there"
    assert (last["a"].pool, last["a"].nbytes, last["a"].uses) == ("cpu", MIB, 1)
    assert cpu.snapshot().policy == "largest_name_first"


def test_a_policy_that_raises_leaves_nothing_half_done(cpu):
    def broken(candidate):
        raise ZeroDivisionError(candidate.name)

    a, b = things(MIB, 3 * MIB)
    use(a)
    pools.setup_default_pools(budgets={"cpu": 3 * MIB}, policy=broken)
    with pytest.raises(ZeroDivisionError):
        b.load()
    assert cpu.pool("cpu").used == MIB
    pools.setup_default_pools(budgets={"cpu": 3 * MIB})
    use(b)


@pytest.mark.parametrize("policy", ["mru", None, 3])
def test_what_is_no_policy_is_refused(cpu, policy):
    with pytest.raises(ValueError, match=r"'lru', 'cost'"):
        pools.setup_default_pools(policy=policy)
    assert cpu.policy == "lru"
