"""A report of pools says what the snapshot holds: text, HTML and a picture of memory over time."""

from __future__ import annotations

import html.parser
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from opguard import pools
from opguard.pools._snapshots import PoolFigures, Snapshot, UserFigures, WaitingRequest
from opguard.pools.reporting import Report
from pools_kit import MIB, Holder, Thing, fresh_pools, tiny, until

HOSTILE = 'x<script>alert(1)</script>\n\x1b[31m$\\frac{1}{0}$ & "'


def user(name, **changes):
    return replace(
        UserFigures(
            name, "cpu", "Kind", "disk", MIB, "absent", 0, False, 0, (), 0, 0, 0, 0, 0, 0.0, 0.0,
            None,
        ),
        **changes,
    )  # fmt: skip


def shot(users=(), *, events=(), moves=(), pool_figures=None, waiting=(), seconds=10.0):
    figures = pool_figures or (PoolFigures("cpu", "cpu", 4 * MIB, 0, 0),)
    return Snapshot("lru", figures, tuple(users), tuple(waiting), seconds, events, moves)


def rows_of(text):
    """{first cell: cells} of all lines that are parts of tables, cut where two spaces are."""
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    return {cells[0]: cells for cells in (re.split(r"\s{2,}", line.strip()) for line in lines)}


@pytest.fixture
def management(tmp_path):
    with fresh_pools(tmp_path, "2MiB") as management:
        yield management


def use(handle):
    with pools.auto_manage(handle):
        pass


def test_what_happened_stands_in_the_tables(management):
    a, b, c = (pools.manage(tiny(1, seed=i), name=name) for i, name in enumerate("abc"))
    c.priority, c.pinned = 3, True
    for handle in (a, b, a, c):
        use(handle)
    with pools.auto_manage(a) as held, torch.no_grad():
        held.obj[0].weight.add_(1)
    use(c)
    a.load()
    a.offload()
    pools.free()
    text = str(pools.report())
    assert text.startswith("1 of 3 users in memory, policy lru: 4 hits, 3 misses, 3.0 MiB moved in")
    found = rows_of(text)
    assert found["cpu"] == ["cpu", "cpu", "1.0 MiB", "2.0 MiB", "2.0 MiB", "1", "3"]
    #                       pool   tier    state     size   leases hits misses out  in
    assert found["a"][1:9] == ["cpu", "disk", "absent", "1.0 MiB", "0", "3", "1", "1"]
    assert found["a"][9:11] == ["1.0 MiB", "1.0 MiB"]
    assert found["b"][5:11] == ["0", "0", "1", "1", "1.0 MiB", "0 B"]
    assert found["c"][3] == "ready, pinned, priority 3"
    # Whose bytes are here comes first.
    assert text.index("\n  c ") < text.index("\n  a ") < text.index("\n  b ")


def test_who_holds_and_who_waits_is_told_by_source_line(management):
    first, second = Thing(2 * MIB), Thing(2 * MIB)
    a, b = pools.manage(first, name="first"), pools.manage(second, name="second")
    holder = Holder(a)
    waiter = Holder.__new__(Holder)
    waiter._held, waiter._let_go, waiter.error = threading.Event(), threading.Event(), None
    waiter._handles = (b,)
    waiter.thread = threading.Thread(target=waiter._run, name="waiter", daemon=True)
    waiter.thread.start()
    until(lambda: management.snapshot().waiting)
    text = str(pools.report())
    assert re.search(r"thread holder holds 'first' since pools_kit\.py:\d+ in _hold", text)
    assert "waiting, number 1: thread waiter wants 'second' (2.0 MiB)" in text
    assert "1 request waiting" in text
    holder.let_go()
    until(waiter._held.is_set)
    waiter.let_go()
    assert "waiting, number" not in str(pools.report())
    assert rows_of(str(pools.report()))["second"][11] != "0"  # waited


def test_who_would_not_go_is_told_why(management):
    def no():
        raise OSError("no space left")

    stays, goes = Thing(MIB, out=no), Thing(MIB)
    kept = [pools.manage(stays, name="stays"), pools.manage(goes, name="goes")]
    for handle in kept:
        use(handle)
    pools.free()
    assert "'stays' would not go: OSError: no space left" in str(pools.report())


def test_a_report_is_of_the_time_it_was_made(management):
    handle = pools.manage(tiny(1), name="a")
    before = pools.report()
    use(handle)
    assert str(before).startswith("0 of 1 user in memory")
    assert str(pools.report()).startswith("1 of 1 user in memory")


class Parsed(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = set(), [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"style"}
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


HARMLESS = {"div", "b", "br", "code", "table", "thead", "tbody", "tr", "th", "td"}


def hostile():
    return shot(
        [user(HOSTILE, tier=HOSTILE, holders=(HOSTILE,), trouble=HOSTILE, state="ready")],
        events=((1.0, "cpu", MIB),),
        moves=((1.0, "cpu", HOSTILE, MIB),),
        waiting=[WaitingRequest(HOSTILE, (HOSTILE,), MIB)],
        pool_figures=(PoolFigures("cpu", HOSTILE, 4 * MIB, MIB, MIB),),
    )


def test_hostile_names_tear_nothing():
    report = Report(replace(hostile(), policy=HOSTILE))
    text = str(report)
    assert text.replace("\n", "").isprintable()
    assert len(text.splitlines()) == 10
    parsed = Parsed(report._repr_html_())
    assert parsed.tags <= HARMLESS
    assert parsed.text.count("<script>alert(1)") == 9
    assert "\x1b" not in report._repr_html_()


def test_a_hostile_name_in_a_picture():
    axes = Report(hostile()).plot()
    assert axes._repr_png_().startswith(b"\x89PNG")  # mathematics would raise: 1/0 is not closed
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any(r"\x1b[31m\$" in name for name in names)


def test_many_users_are_cut_and_counted():
    report = Report(shot([user(f"m{i}") for i in range(95)]), rows=5)
    assert str(report).endswith("... and 90 more")
    assert "... and 90 more" in Parsed(report._repr_html_()).text
    assert "m5" not in rows_of(str(report))
    held = [user("m", holders=tuple(f"thread {i} holds 'm'" for i in range(9)))]
    assert str(Report(shot(held), rows=3)).count("holds") == 3


def test_html_says_what_text_says(management):
    handle = pools.manage(tiny(1), name="a")
    use(handle)
    report = pools.report()
    said = Parsed(report._repr_html_()).text
    for cells in rows_of(str(report)).values():
        assert all(cell in said for cell in cells)


def test_nothing_managed_and_no_pool():
    assert str(Report(shot())).startswith("0 of 0 users in memory")
    nothing = Snapshot("lru", (), (), (), 0.0, (), ())
    assert "0 of 0 users" in Report(nothing)._repr_html_()
    with pytest.raises(ValueError, match="at least one pool"):
        Report(nothing).plot()


# --- the picture ----------------------------------------------------------------------------------


def bands(axes):
    """{name: [(time, bottom, top)]} of what is painted, at the right of each step."""
    found = {}
    for band in axes.collections:
        (path,) = band.get_paths()
        points = path.vertices
        found[band.get_label()] = {
            "area": 0.5 * abs(sum(
                x0 * y1 - x1 * y0
                for (x0, y0), (x1, y1) in pairwise(points)
            )),
            "top": points[:, 1].max(),
            "bottom": points[:, 1].min(),
        }  # fmt: skip
    return found


def line(axes, name):
    (found,) = [each for each in axes.lines if each.get_label() == name]
    return found.get_xdata(), found.get_ydata()


def test_bands_come_and_go_with_their_models():
    axes = Report(
        shot(
            [user("a", state="ready"), user("b"), user("always", state="ready")],
            events=(
                (1.0, "cpu", 2 * MIB), (3.0, "cpu", 4 * MIB), (7.0, "cpu", 2 * MIB),
            ),
            moves=((1.0, "cpu", "a", MIB), (3.0, "cpu", "b", 2 * MIB), (7.0, "cpu", "b", 0)),
            pool_figures=(PoolFigures("cpu", "cpu", 5 * MIB, 2 * MIB, 4 * MIB),),
        )
    ).plot()  # fmt: skip
    found = bands(axes)
    # MiB times seconds, from the first event to the time of the report.
    areas = {name: round(each["area"], 6) for name, each in found.items()}
    assert areas == {"a": 9.0, "b": 8.0, "always": 9.0}
    assert max(each["top"] for each in found.values()) == 4.0
    times, used = line(axes, "used")
    assert list(times) == [1.0, 3.0, 7.0, 10.0]
    assert list(used) == [2.0, 4.0, 2.0, 2.0]
    assert set(line(axes, "budget")[1]) == {5.0}
    assert axes.get_xlim() == (1.0, 10.0)
    assert axes.get_ylim()[1] > 5.0


def test_who_went_before_it_came_was_there():
    axes = Report(
        shot([user("old")], events=((1.0, "cpu", MIB), (4.0, "cpu", 0)),
             moves=((4.0, "cpu", "old", 0),))
    ).plot()  # fmt: skip
    assert bands(axes)["old"]["area"] == 3.0


def test_a_picture_of_what_really_happened_never_crosses_the_budget(management):
    handles = [pools.manage(tiny(1, seed=i), name=f"m{i}") for i in range(5)]
    for turn in range(15):
        use(handles[turn * turn % 5])
    report = pools.report()
    axes = report.plot()
    axes._repr_png_()
    used = line(axes, "used")[1]
    assert max(used) == 2.0 == set(line(axes, "budget")[1]).pop()
    assert max(each["top"] for each in bands(axes).values()) <= 2.0
    left = {name: held for _, _, name, held in report.snapshot.moves}
    there = {user.name for user in report.snapshot.users if user.state == "ready"}
    assert {name for name, held in left.items() if held} == there
    assert len(there) == 2
    assert set(bands(axes)) == set(left) == {"m0", "m1", "m4"}


def test_bands_of_models_that_died_end(management):
    handle = pools.manage(tiny(1), name="gone")
    use(handle)
    del handle
    until(lambda: management.snapshot().moves[-1][2:] == ("gone", 0))


def test_the_largest_have_bands_and_the_others_share_one():
    names = [f"m{i:02}" for i in range(14)]
    used = [user(name, nbytes=(i + 1) * MIB, state="ready") for i, name in enumerate(names)]
    figures = (PoolFigures("cpu", "cpu", 200 * MIB, 105 * MIB, 105 * MIB),)
    events = ((1.0, "cpu", 105 * MIB), (2.0, "cpu", 105 * MIB))
    axes = Report(shot(used, events=events, pool_figures=figures)).plot()
    assert set(bands(axes)) == {*names[4:], "4 others"}
    colours = {tuple(each.get_facecolor()[0]) for each in axes.collections}
    assert len(colours) == 11


def test_bands_never_pass_what_is_used():
    """A thread that notes its move late seems to hold what another has by then."""
    axes = Report(
        shot(
            events=((1.0, "cpu", MIB), (2.0, "cpu", MIB), (3.0, "cpu", MIB)),
            moves=((1.0, "cpu", "a", MIB), (2.0, "cpu", "b", MIB), (3.0, "cpu", "a", 0)),
            pool_figures=(PoolFigures("cpu", "cpu", MIB, MIB, MIB),),
        )
    ).plot()
    assert max(each["top"] for each in bands(axes).values()) == 1.0
    assert {name: each["area"] for name, each in bands(axes).items()} == {"a": 2.0, "b": 7.0}


def test_many_models_and_moves_are_drawn_at_once():
    moves = tuple((i / 100, "cpu", f"m{i % 2000}", MIB * (i // 2000 % 2)) for i in range(4096))
    events = tuple((at, "cpu", MIB) for at, *_ in moves)
    report = Report(shot(events=events, moves=moves, seconds=41.0))
    started = time.perf_counter()
    assert len(bands(report.plot())) <= 11
    assert time.perf_counter() - started < 2


def test_pools_that_were_used_are_drawn_one_above_the_other():
    from matplotlib.figure import Figure

    figures = tuple(PoolFigures(name, name, MIB, 0, 0) for name in ("cpu", "cuda:0", "cuda:1"))
    report = Report(
        shot(
            events=((1.0, "cpu", 5), (2.0, "cuda:1", 6)),
            moves=((2.0, "cuda:1", "m", 6),),
            pool_figures=figures,
        )
    )
    titles = [axes.get_title(loc="left") for axes in report.plot().figure.axes]
    assert titles == ["cpu: memory used", "cuda:1: memory used"]
    mine = Figure().add_subplot()
    assert report.plot(mine, pool="cuda:1") is mine
    assert mine.get_title(loc="left") == "cuda:1: memory used"
    assert report.plot(pool="cuda").get_title(loc="left") == "cuda:0: memory used"
    with pytest.raises(KeyError, match=r"\['cpu', 'cuda:0', 'cuda:1'\], got 'npu'"):
        report.plot(pool="npu")
    with pytest.raises(TypeError, match="expected matplotlib Axes, got Figure"):
        report.plot(mine.figure)
    assert report.plot().figure is not report.plot().figure


def test_a_budget_of_all_memory_does_not_flatten_the_picture():
    figures = (PoolFigures("cpu", "cpu", 1 << 40, MIB, 2 * MIB),)
    axes = Report(shot(events=((1.0, "cpu", MIB),), pool_figures=figures)).plot()
    assert axes.get_ylim()[1] < 3


def test_nothing_heavy_is_imported_and_pyplot_never():
    program = (
        "import sys\n"
        "from opguard import pools\n"
        "assert 'opguard.pools.reporting' not in sys.modules\n"
        "report = pools.report()\n"
        "str(report), report._repr_html_()\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report.plot()._repr_png_()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_without_matplotlib_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib, or print pools\.report\(\)"):
        Report(shot()).plot()
