"""Figures: budgets as people write them, their policies, what reports say, memory of calls."""

from __future__ import annotations

import threading

import pytest
import torch

from opguard import pools
from opguard.pools import inference
from opguard.pools._budgets import parse_bytes
from opguard.pools.oom import make_room
from opguard.pools.reporting import Report
from pools_kit import MIB, Thing, fresh_pools, managed, tiny, until


@pytest.fixture
def cpu(tmp_path):
    with fresh_pools(tmp_path, 2 * MIB) as management:
        yield management


def use(*handles):
    for handle in handles:
        with handle.lease(5):
            pass


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["9" * 400, "9e5", "99999999 TiB", 1 << 61, "1.5 GiBs", "nan", "∞"]
)
def test_what_no_memory_has_is_no_budget(cpu, text):
    with pytest.raises(ValueError, match=r"the budget of pool 'cpu'"):
        cpu.pool("cpu").budget = text
    assert cpu.pool("cpu").budget == 2 * MIB


def test_any_whole_number_is_a_number_of_bytes():
    numpy = pytest.importorskip("numpy")
    assert parse_bytes(numpy.int64(5)) == 5
    assert parse_bytes(" 1.5 GiB ") == 3 << 29


@pytest.mark.parametrize("budgets", ["256MiB", 5, ["cpu"], [("cpu", 1, 2)]])
def test_budgets_that_name_no_pool_say_what_was_expected(cpu, budgets):
    with pytest.raises(TypeError, match=r"expected budgets .*'256MiB'\}.* got"):
        pools.setup_default_pools(budgets=budgets)


def test_a_pool_is_named_by_its_device_too_and_once(cpu):
    pools.setup_default_pools(budgets={torch.device("cpu"): MIB})
    assert cpu.pool("cpu").budget == MIB
    assert cpu.pool(torch.device("cpu")) is cpu.pool("cpu")

    class Toy(pools.ResourcePool):
        def capacity(self):
            return MIB

    cpu.add_pool(Toy("toy:0"), MIB)
    with pytest.raises(ValueError, match=r"'toy:0'.* twice"):
        pools.setup_default_pools(budgets={"toy": 1, "toy:0": 2})


# --- policies -------------------------------------------------------------------------------------


def by_name(candidate):
    return -ord(candidate.name[-1])


def test_a_policy_is_asked_by_all_that_takes_victims(cpu):
    a, b = managed(MIB, MIB)
    cpu.set_policy(by_name)
    use(a, b)
    assert pools.free(nbytes=1) == MIB
    assert (a.loaded, b.loaded) == (True, False)
    cpu.free()
    use(a, b)
    cpu.pool("cpu").budget = MIB
    assert (a.loaded, b.loaded) == (True, False)


@pytest.mark.parametrize("answer", [float("nan"), None, "first", float("inf")])
def test_a_policy_that_answers_no_number_is_named(cpu, answer):
    a, b = managed(MIB, 2 * MIB)
    use(a)

    def odd(candidate):
        return answer

    cpu.set_policy(odd)
    with pytest.raises(TypeError, match=r"policy .*odd.* 'thing0'.* finite number.* got"):
        use(b)
    assert cpu.pool("cpu").used == MIB
    assert pools.free() == MIB, "giving back goes on with what it said before"


def test_a_policy_may_use_pools_itself_and_things_may_go_meanwhile(cpu):
    a, b, c = managed(MIB, MIB, MIB)
    use(a, b)
    gone = []

    def asks(candidate):
        if not gone:
            gone.append(True)
            pools.unmanage(a)
        str(pools.report())
        pools.free(nbytes=0)
        return 0.0

    cpu.set_policy(asks)
    use(c)
    assert gone
    assert c.loaded


# --- reports --------------------------------------------------------------------------------------


def test_a_hit_found_it_there(cpu):
    """Not a load that failed, not one that had to ask again, not one that waited for a load."""
    fails = [OSError("no")]

    def bring():
        if fails:
            raise fails.pop()

    a = pools.manage(Thing(MIB, **{"in": bring}), name="a")
    with pytest.raises(OSError, match="no"):
        use(a)
    use(a, a, a)
    figures = {user.name: (user.hits, user.misses) for user in cpu.snapshot().users}
    assert figures["a"] == (2, 1)
    stays = [OSError("busy")]

    def out():
        if stays:
            raise stays.pop()

    a.obj.does["out"] = out
    (b,) = managed(2 * MIB)
    with pytest.raises(pools.PoolRefused):
        use(b)
    use(b)
    go_on = threading.Event()
    slow = pools.manage(Thing(MIB, **{"in": lambda: go_on.wait(5)}), name="slow")
    threads = [threading.Thread(target=use, args=(slow,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: cpu.unit(slow.entry.all_units[0]).leases == 2)
    go_on.set()
    for thread in threads:
        thread.join(5)
    figures = {user.name: (user.hits, user.misses) for user in cpu.snapshot().users}
    assert figures["thing0"] == (0, 1)
    assert figures["slow"] == (0, 1)


def picture():
    pytest.importorskip("matplotlib")
    axes = pools.report().plot()
    axes.figure.canvas.draw()
    return axes


def bands(axes):
    legend = axes.get_legend()
    return [text.get_text().strip() for text in legend.get_texts()]


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(cpu):
    """matplotlib leaves such labels out, and a private class's name begins so."""
    use(pools.manage(Thing(MIB), name="_Net"))
    assert "_Net" in bands(picture())


def test_who_is_renamed_has_its_bytes_once(cpu):
    (a,) = managed(MIB)
    use(a)
    pools.manage(a.obj, name="new")
    cpu.free()
    level = {}
    for _, _, user, nbytes in cpu.snapshot().moves:
        level[user] = nbytes
    assert level == {"thing0": 0, "new": 0}
    assert {"thing0", "new"} <= set(bands(picture())) | {"new"}


def test_a_picture_of_one_event_and_of_none(cpu):
    assert bands(picture()) == ["budget", "used"] or bands(picture()) == ["used", "budget"]
    cpu.release(cpu.reserve("cpu", MIB))
    shot = cpu.snapshot()
    one = type(shot)(**{**shot.__dict__, "events": shot.events[:1], "moves": ()})
    Report(one).plot().figure.canvas.draw()


def test_a_policy_without_a_name_is_shown_by_its_type(cpu):
    class Odd:
        def __call__(self, candidate):
            return 0.0

        def __repr__(self):
            raise RuntimeError("no repr")

    cpu.set_policy(Odd())
    assert "policy Odd" in str(pools.report())


def test_html_of_hostile_names_is_text(cpu):
    use(pools.manage(Thing(MIB), name="<script>alert('x')</script>\n\x1b[31m\ud800"))
    html = pools.report()._repr_html_()
    assert "<script>" not in html
    assert "\x1b" not in html
    html.encode()


# --- memory of calls ------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [float("nan"), -1, None, "much"])
def test_an_estimate_that_is_none_is_called_one(answer):
    memory = inference.InferenceMemory(lambda model: answer)
    with pytest.raises((TypeError, ValueError), match="expected the memory of a call"):
        memory.estimate(None, (), {})


def test_a_finalizer_may_ask_while_its_thread_is_inside():
    memory = inference.InferenceMemory()
    memory.learn((1,), {}, 5)
    found = []

    class Sizes(dict):
        def values(self):
            found.append(memory.estimate(None, (1,), {}))
            return super().values()

    memory._known = {key: Sizes(value) for key, value in memory._known.items()}
    thread = threading.Thread(target=lambda: found.append(memory.largest), daemon=True)
    thread.start()
    thread.join(5)
    assert found == [5, 5]


def test_no_room_is_made_in_a_pool_that_there_is_not(cpu, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    use(*managed(MIB))
    error = torch.OutOfMemoryError("Tried to allocate 2.00 MiB. GPU 3 has no more")
    assert make_room(error) is False
    assert make_room(MemoryError()) is True


def test_text_says_how_much_to_free(cpu):
    use(*managed(MIB, MIB))
    assert pools.free(nbytes="0.5 MiB") == MIB
    with pytest.raises(ValueError, match="expected bytes to free"):
        pools.free(nbytes="much")


def test_another_kind_of_loop_is_told_what_to_do(cpu):
    """trio, say: no task of asyncio runs, so there is nothing to wait with."""
    handle = pools.manage(tiny(1))
    waits = handle.lease().__aenter__()
    with pytest.raises(pools.PoolError, match=r"asyncio.*`with`.* thread"):
        waits.send(None)
    assert cpu.pool("cpu").used == 0
