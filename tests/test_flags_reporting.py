"""Flags to look at: text, HTML, picture, data frame and counters say what the flags hold."""

from __future__ import annotations

import html
import html.parser
import itertools
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opguard.flags as og
from checkout import TESTS
from opguard.flags import (
    ErrorConfig,
    ErrorLocation,
    FlagCounters,
    FlagsError,
    FlagsLayoutError,
    check,
    check_model,
    check_ops,
    err,
    flags,
)

WIDTHS = {torch.int64: 4, torch.float64: 4, torch.int32: 2, torch.float32: 2}


@pytest.fixture(autouse=True)
def fresh():
    """Locations that other tests named would have those names here."""
    ErrorLocation.reset()
    yield
    ErrorLocation.reset()


def put(f, samples, code, location, severity=None):
    where = torch.zeros(f.shape[0], dtype=torch.bool)
    where[samples] = True
    return err.push(f, code, location, severity, where=where)


def example():
    f = put(err.new_t(256), [7], err.INF, "enc.ff.2")
    f = put(f, [7, 31, 32, 33], err.NAN, "head")
    return put(f, slice(None), err.FALLBACK_VALUE, "head")


def read_slowly(f):
    """(sample, slot, code, severity, location) of each error, slot by slot."""
    width = WIDTHS[f.dtype]
    bits = {4: torch.int64, 2: torch.int32}[width]
    rows = f.contiguous().view(bits).tolist()
    found = []
    for sample, words in enumerate(rows):
        slots = [word >> 16 * part & 0xFFFF for word in words for part in range(width)]
        for slot, value in enumerate(slots):
            if value:
                found.append((sample, slot, value >> 2 & 0xF, value & 3, value >> 6))
    return found


NUMBERS = ["sample", "slot", "code", "severity", "location"]


@st.composite
def any_flags(draw):
    dtype = draw(st.sampled_from(list(WIDTHS)))
    samples, words = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    slot = st.one_of(st.just(0), st.integers(0, 0xFFFF))
    bits = draw(st.lists(slot, min_size=samples * words * 4, max_size=samples * words * 4))
    pieces = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(samples, words * 4)
    f = pieces[:, : words * WIDTHS[dtype]].contiguous().view(dtype)
    return f[:: draw(st.sampled_from([1, 2]))]


# --- words ----------------------------------------------------------------------------------------


def test_a_report_says_what_is_where_in_which_samples():
    assert str(flags.report(example())) == (
        "256 of 256 samples with errors: 256xFALLBACK_VALUE, 4xNAN, 1xINF at 2 locations\n"
        "first failure: INF at enc.ff.2 in sample 7 of 256\n"
        "  location  code            severity  samples  which\n"
        "  enc.ff.2  INF             CRITICAL        1  7\n"
        "  head      NAN             CRITICAL        4  7, 31-33\n"
        "  head      FALLBACK_VALUE  WARN          256  all"
    )
    assert str(flags.report(err.new_t(3))) == "no errors in 3 samples"
    assert str(flags.report(err.new_t(0))) == "no errors in 0 samples"
    one = put(err.new_t(1), [0], err.NAN, "head")
    assert str(flags.report(one)).startswith("1 of 1 sample with errors: 1xNAN at 1 location\n")


def test_numbers_of_a_report():
    r = og.report(example())
    assert (r.samples, r.bad, r.errors) == (256, 256, 261)
    first, second, third = r.findings
    assert (first.location_name, first.code_name, first.domain) == ("enc.ff.2", "INF", "NUMERIC")
    assert (second.severity_name, second.errors, second.samples.tolist()) == (
        "CRITICAL",
        4,
        [7, 31, 32, 33],
    )
    assert third.samples.tolist() == list(range(256))


def test_many_samples_and_many_locations_are_counted_not_listed():
    f = err.new_t(100)
    f = put(f, range(0, 100, 2), err.NAN, "head")
    assert str(og.report(f)).endswith("50  0, 2, 4, 6, 8, 10 and 44 more")
    for place in range(60):
        f = put(f, [place], err.NAN, f"layer.{place}")
    text = str(og.report(f, rows=10))
    assert len(text.splitlines()) == 14
    assert text.endswith("\n  ... and 51 more")
    assert len(str(og.report(f, rows=100)).splitlines()) == 64


def test_an_error_twice_in_a_sample_is_two_errors_in_one_sample():
    config = ErrorConfig(accumulation=og.AccumulationConfig(dedupe=og.Dedupe.NONE))
    f = err.new_t(2, config=config)
    for _ in range(3):
        f = err.push(f, err.NAN, "a", config=config, where=torch.tensor([False, True]))
    (finding,) = og.report(f).findings
    assert (finding.errors, finding.samples.tolist()) == (3, [1])


@settings(deadline=None, max_examples=60)
@given(any_flags())
def test_every_reading_is_that_of_the_slots(f):
    expected = read_slowly(f)
    r = og.report(f)
    assert (r.samples, r.errors) == (f.shape[0], len(expected))
    assert r.bad == len({each[0] for each in expected})
    groups = {}
    for sample, _, code, severity, location in expected:
        groups.setdefault((location, code, severity), []).append(sample)
    assert [
        ((each.location, each.code, each.severity), each.errors, each.samples.tolist())
        for each in r.findings
    ] == [(key, len(samples), sorted(set(samples))) for key, samples in sorted(groups.items())]
    frame = r.to_dataframe()
    assert list(frame[NUMBERS].itertuples(index=False, name=None)) == expected
    names = [error for errors in flags.unpack_all(f) for error in errors]
    for column in ("severity_name", "code_name", "location_name"):
        assert frame[column].tolist() == [getattr(error, column) for error in names]
    counters = FlagCounters()
    counters.add(f)
    assert sum(count for _, count in errors_in(counters.text())) == len(expected)


def test_a_report_is_of_the_flags_as_they_were():
    """One reading serves the text, the table, the picture and the frame."""
    f = example()
    r = og.report(f)
    f.zero_()
    assert str(r).startswith("256 of 256")
    assert "enc.ff.2" in r._repr_html_()
    assert len(r.to_dataframe()) == 261
    assert r.plot().get_title(loc="left") == "256 of 256 samples with errors"


def test_whatever_has_flags_is_taken():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    seen = []
    with check_model(model, on_flag=lambda event: seen.append(str(og.report(event)))) as c:
        model(torch.tensor([[1.0, 2, 3], [float("nan"), 1, 1]]))
        told = str(og.report(c))
    assert told == str(og.report(c.flags)) == seen[0]
    assert "1 of 2 samples" in told
    assert re.search(r"^  0 +NAN +CRITICAL +1  1$", told, re.M)
    assert len(og.to_dataframe(c)) == len(og.to_dataframe(c.flags)) > 0
    assert og.prometheus(c) == og.prometheus(c.flags)
    assert og.plot(c).get_title(loc="left") == "1 of 2 samples with errors"


def test_a_users_check_says_its_message_with_the_values_of_the_first_bad_sample():
    x = torch.tensor([[1.0], [5.0], [7.0]])
    with check_ops(x) as c:
        check(x[:, 0] < 4, "norm is <{norm}> & more", norm=x[:, 0])
    text = str(og.report(c))
    assert re.search(
        r"^  norm is <5.*> & more at test_flags_reporting\.py:\d+ .* 2  1-2$", text, re.M
    )
    assert "norm is &lt;5" in og.report(c.flags)._repr_html_()


def test_a_checked_block_names_the_line_that_made_the_first():
    x = torch.tensor([[1.0], [0.0], [2.0]])
    with check_ops(x) as c:
        y = x.log()
        y - y
    r = og.report(c)
    assert r.first.code_name == "INF"
    assert r.first.samples == (1,)
    lines = str(r).splitlines()
    assert lines[1] == str(r.first) == str(og.first_failure(c))
    assert re.search(r"aten::log at test_flags_reporting\.py:\d+ ", lines[1])
    assert str(og.report(c.flags)) == str(r)
    # The words are in the table as well, which is escaped.
    assert html.escape(lines[1]) in r._repr_html_()


def test_the_first_of_many_errors_is_found_at_once():
    """Of flags that nobody remembers: what stands behind no other in any sample."""
    f = put(err.new_t(4), [0, 1], err.INF, "b")
    f = put(f, [0, 1, 2], err.NAN, "c")
    f = put(f, [3], err.NAN, "a")
    assert og.report(f).first == og.first_failure(f)
    assert (og.report(f).first.location_name, og.report(f).first.samples) == ("b", (0, 1))
    assert og.report(err.new_t(2)).first is None


def readme(begin):
    """The Python block of the README that begins with these words."""
    blocks = re.findall(r"```python\n(.*?)```", (TESTS.parent / "README.md").read_text(), re.S)
    (lines,) = [block for block in blocks if block.startswith(begin)]
    return lines


class Halves(torch.nn.Module):
    def forward(self, x):
        return x.log()


def test_the_readmes_lines_on_check_ops_run(capsys):
    names = {"model": Halves(), "x": torch.tensor([[1.0, 2.0], [1.0, -1.0]])}
    exec(readme("from opguard.flags import check_ops"), names)
    told = capsys.readouterr().out
    assert "first failure: NAN at aten::log at test_flags_reporting.py:" in told
    assert "in Halves.forward in sample 1 of 2" in told


def test_the_readmes_lines_on_guarded_tensors_run(capsys):
    x = torch.tensor([[1.0, 2.0], [1.0, float("nan")], [3.0, 1.0]])
    names = {"model": torch.nn.Linear(2, 4), "x": x}
    exec(readme("from opguard.flags import flag_nan_and_inf, guard"), names)
    # NaN sorts first, and its flags with it.
    assert "tensor([ True, False, False])" in capsys.readouterr().out
    assert names["best"].take_ok().shape == (2,)


def test_samples_of_several_dimensions_are_told_by_their_index():
    class Grid(torch.Tensor):
        batch_dims = (1, 0)
        flags = put(err.new_t(12), [0, 5], err.NAN, "a")  # rows by dim 1, then dim 0

    grid = torch.zeros(3, 4, 2).as_subclass(Grid)
    assert str(og.report(grid)).endswith("2  (0, 0), (1, 2)")
    Grid.flags = put(err.new_t(12), range(11), err.NAN, "a")
    assert str(og.report(grid)).endswith("(1, 0), (1, 1), (1, 2) and 5 more")
    Grid.flags = put(err.new_t(12), range(12), err.NAN, "a")
    assert str(og.report(grid)).endswith("12  all")


def test_the_module_and_its_object_offer_the_same():
    for name in ("report", "plot", "to_dataframe", "prometheus", "first_failure"):
        assert getattr(og, name) is getattr(flags, name)
        assert name in og.__all__


@pytest.mark.parametrize("wrong", [None, [1], 3.5, {"flags": 1}], ids=repr)
def test_what_has_no_flags_is_refused_in_a_sentence(wrong):
    for call in (og.report, og.plot, og.to_dataframe, og.prometheus, FlagCounters().add):
        with pytest.raises(FlagsError, match=r"expected a flags tensor, .* got \w+$"):
            call(wrong)


def test_what_is_no_flags_tensor_is_refused_in_a_sentence():
    for call in (og.report, og.plot, og.to_dataframe, og.prometheus, FlagCounters().add):
        with pytest.raises(FlagsLayoutError, match="expected flags of shape"):
            call(torch.zeros(3, 4, dtype=torch.int16))


def test_a_report_breaks_a_graph_and_says_why():
    def fn(x):
        f = err.push(err.new(x), err.NAN, "a")
        return f, str(flags.report(f))

    torch._dynamo.reset()
    with pytest.raises(Exception, match="call it outside the compiled function"):
        torch.compile(fn, fullgraph=True, backend="eager")(torch.zeros(2))
    torch._dynamo.reset()
    _, text = torch.compile(fn, backend="eager")(torch.zeros(2))
    assert text.startswith("2 of 2 samples with errors: 2xNAN")
    torch._dynamo.reset()


def test_full_flags_are_read_faster_than_they_are_unpacked():
    config = ErrorConfig(num_slots=16)
    f = err.new_t(4096, config=config)
    for place in range(16):
        f = err.push(f, err.NAN, 100 + place, config=config)
    times = {"report": [], "unpack": []}
    for _ in range(7):
        begin = time.perf_counter()
        str(og.report(f))
        middle = time.perf_counter()
        flags.unpack_all(f)
        times["report"].append(middle - begin)
        times["unpack"].append(time.perf_counter() - middle)
    assert min(times["report"]) < 0.5 * min(times["unpack"]), times


# --- the table ------------------------------------------------------------------------------------


class Cells(html.parser.HTMLParser):
    """The texts of a table's rows, and every tag that was opened."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_table_has_the_rows_of_the_text():
    cells = Cells(og.report(example())._repr_html_())
    assert cells.rows == [
        ["location", "code", "severity", "samples", "which"],
        ["enc.ff.2", "INF", "CRITICAL", "1", "7"],
        ["head", "NAN", "CRITICAL", "4", "7, 31-33"],
        ["head", "FALLBACK_VALUE", "WARN", "256", "all"],
    ]
    assert "table" not in Cells(og.report(err.new_t(2))._repr_html_()).tags


def test_names_cannot_break_out_of_the_table():
    name = "</code><script>alert(1)</script>\"'&amp;"
    f = put(err.new_t(2), [0], err.NAN, name)
    shown = og.report(f)._repr_html_()
    cells = Cells(shown)
    assert "script" not in cells.tags
    assert cells.rows[1][0] == name


def test_names_cannot_tear_the_text():
    f = put(err.new_t(2), [0], err.NAN, "a\nb\x1b[31mc")
    text = str(og.report(f))
    assert len(text.splitlines()) == 4
    assert "a\\nb\\x1b[31mc" in text


# --- the frame ------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [example, lambda: err.new_t(4), lambda: err.new_t(0)])
def test_a_frame_has_these_columns_whatever_is_in_it(f):
    frame = og.to_dataframe(f())
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {
        "sample": "int64",
        "slot": "int64",
        "code": "int64",
        "code_name": "string",
        "domain": "string",
        "severity": "int64",
        "severity_name": "string",
        "location": "int64",
        "location_name": "string",
    }
    assert len(frame) in (0, 261)


def test_a_frame_answers_questions():
    frame = og.to_dataframe(example())
    assert frame[frame.code_name == "NAN"]["sample"].tolist() == [7, 31, 32, 33]
    counts = frame.groupby(["location_name", "code_name"]).size().to_dict()
    assert counts == {
        ("enc.ff.2", "INF"): 1,
        ("head", "NAN"): 4,
        ("head", "FALLBACK_VALUE"): 256,
    }
    assert frame.domain.value_counts().to_dict() == {"RUNTIME": 256, "NUMERIC": 5}


@pytest.mark.parametrize(
    ("missing", "call"),
    [("pandas", og.to_dataframe), ("matplotlib.figure", og.plot)],
    ids=["pandas", "matplotlib"],
)
def test_without_the_library_a_sentence_says_the_way_out(missing, call, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"is not installed; run: python -m pip install \w+, or"):
        call(example())


# --- the picture ----------------------------------------------------------------------------------


def pixels(axes):
    """The drawn picture inside the axes as (height, width) numbers of colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    box = axes.get_window_extent()
    image = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    height, width = map(int, axes.figure.canvas.get_width_height()[::-1])
    image = image.view(height, width, 4)[..., :3].int()
    top, bottom = height - int(box.y1) + 2, height - int(box.y0) - 2
    inside = image[top:bottom, int(box.x0) + 2 : int(box.x1) - 2]
    return inside[..., 0] * 65536 + inside[..., 1] * 256 + inside[..., 2]


RED, ORANGE, YELLOW = 0xA4133C, 0xEF7D22, 0xFFD166


def test_the_picture_shows_severities_where_they_are():
    f = put(err.new_t(10), [2], err.NAN, "first")
    f = put(f, [5], err.OVERFLOW, "second")
    f = put(f, [9], err.FALLBACK_VALUE, "third")
    axes = og.plot(f)
    drawn = pixels(axes)
    height, width = drawn.shape
    for row, (sample, colour) in enumerate([(2, RED), (5, ORANGE), (9, YELLOW)]):
        assert drawn[int((row + 0.5) * height / 3), int((sample + 0.5) * width / 10)] == colour
    share = (drawn == RED).float().mean().item()
    assert share == pytest.approx(1 / 30, rel=0.1)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "first  NAN",
        "second  OVERFLOW",
        "third  FALLBACK_VALUE",
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "CRITICAL",
        "ERROR",
        "WARN",
    ]


def test_one_bad_sample_of_a_hundred_thousand_is_seen_and_the_worst_wins():
    f = put(err.new_t(100_000), slice(None), err.FALLBACK_VALUE, "head")
    f = put(f, [77_777], err.NAN, "head")
    drawn = pixels(og.plot(f))
    columns = (drawn == RED).any(0).nonzero().squeeze(1)
    assert len(columns) >= 1
    assert columns.float().mean().item() == pytest.approx(0.77777 * drawn.shape[1], abs=4)


def test_hundreds_of_locations_have_names_that_do_not_overlap():
    f = err.new_t(600)
    for place in range(600):
        f = put(f, [place], err.NAN, f"encoder.layer.{place}." + "very_long." * 9 + "dense")
    axes = og.plot(f)
    drawn = pixels(axes)
    assert (drawn == RED).any(0).float().mean() > 0.9
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) > 20
    tops = sorted((box.y0, box.y1) for box in boxes)
    assert all(low[1] <= high[0] + 1 for low, high in itertools.pairwise(tops))
    assert min(box.x0 for box in boxes) >= 0


@pytest.mark.parametrize("samples", [0, 1, 5])
def test_a_picture_without_errors(samples):
    axes = og.plot(err.new_t(samples))
    pixels(axes)
    assert axes.get_title(loc="left") == f"0 of {samples} samples with errors"
    assert axes.get_legend() is None


def test_names_of_every_kind_are_drawn():
    f = put(err.new_t(2), [0], err.NAN, r"$\frac{$ broken \n")
    f = put(f, [1], err.NAN, "a\nb\x1b")
    axes = og.plot(f)
    pixels(axes)
    assert len(axes.get_yticklabels()) == 2


def test_a_picture_goes_into_given_axes_or_a_figure_of_its_own():
    from matplotlib.figure import Figure

    mine = Figure(figsize=(2, 1)).add_subplot()
    assert og.plot(example(), ax=mine) is mine
    assert og.report(example()).plot(mine) is mine
    (pixels(mine) == RED).any()
    own = og.plot(example())
    assert own.figure is not og.plot(example()).figure
    assert own._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(FlagsError, match="expected matplotlib Axes, got Figure"):
        og.plot(example(), ax=mine.figure)


def test_nothing_heavy_is_imported_and_pyplot_never():
    code = (
        "import sys, torch, opguard.flags as F\n"
        "f = F.err.push(F.err.new_t(3), F.err.NAN, 'a')\n"
        "str(F.report(f)), F.report(f)._repr_html_(), F.prometheus(f)\n"
        "assert not {'pandas', 'matplotlib', 'prometheus_client'} & sys.modules.keys()\n"
        "F.plot(f)._repr_png_()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- counters -------------------------------------------------------------------------------------

UNESCAPED = {r"\\": "\\", r"\n": "\n", r"\"": '"'}
LINE = re.compile(
    r'([a-zA-Z_:][\w:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\d+)'
)
PAIR = re.compile(r'(\w+)="((?:[^"\\\n]|\\["\\n])*)"')


def values_in(text):
    """[(name, labels, value)] of the text format, and that each name is said to be a counter."""
    assert text.endswith("\n")
    found, types = [], {}
    for line in text[:-1].split("\n"):
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            types[name] = kind
        if line.startswith("#"):
            continue
        name, inside, value = LINE.fullmatch(line).groups()
        labels = {
            key: re.sub(r'\\[\\n"]', lambda m: UNESCAPED[m[0]], quoted)
            for key, quoted in PAIR.findall(inside or "")
        }
        assert types[name] == "counter"
        found.append((name, labels, int(value)))
    return found


def errors_in(text):
    return [(labels, value) for name, labels, value in values_in(text) if "_errors_" in name]


def test_counters_by_code_severity_and_module():
    text = og.prometheus(example(), labels={"model": "m"})
    assert values_in(text) == [
        ("opguard_samples_total", {"model": "m"}, 256),
        ("opguard_bad_samples_total", {"model": "m"}, 256),
        *(
            (
                "opguard_errors_total",
                {"model": "m", "code": code, "severity": severity, "module": module},
                count,
            )
            for code, severity, module, count in [
                ("FALLBACK_VALUE", "WARN", "head", 256),
                ("INF", "CRITICAL", "enc.ff.2", 1),
                ("NAN", "CRITICAL", "head", 4),
            ]
        ),
    ]
    assert values_in(og.prometheus(err.new_t(3), namespace="svc")) == [
        ("svc_samples_total", {}, 3),
        ("svc_bad_samples_total", {}, 0),
    ]


@settings(deadline=None, max_examples=30)
@given(st.text(st.sampled_from('ab"\\\n{},= é'), min_size=1, max_size=8))
def test_labels_come_back_as_they_were(name):
    ErrorLocation.reset()
    text = og.prometheus(put(err.new_t(1), [0], err.NAN, name), labels={"own": name})
    (labels, count) = errors_in(text)[0]
    assert (labels["module"], labels["own"], count) == (name, name, 1)


def test_counters_add_up_over_calls_and_threads():
    counters = FlagCounters()
    f = example()
    threads = [
        threading.Thread(target=lambda: [counters.add(f) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert repr(counters) == "FlagCounters(51200 samples, 51200 bad, 52200 errors)"
    assert sum(count for _, count in errors_in(counters.text())) == 52200
    assert str(counters) == counters.text()


def test_a_checked_model_counts_by_itself():
    model = torch.nn.Linear(2, 2)
    counters = FlagCounters()
    with check_model(model, on_flag=counters.add):
        for value in (1.0, float("inf"), float("nan")):
            model(torch.tensor([[1.0, 1.0], [value, 1.0]]))
    assert sum(count for labels, count in errors_in(counters.text())) >= 2
    assert ("opguard_bad_samples_total", {}, 2) in values_in(counters.text())


def test_names_that_prometheus_does_not_take_are_refused():
    for namespace in ("", "1a", "a-b", "a b"):
        with pytest.raises(FlagsError, match="namespace"):
            FlagCounters(namespace)
    for label in ("", "1a", "a-b", "__own", "code", "module", "a:b"):
        with pytest.raises(FlagsError, match="labels"):
            FlagCounters(labels={label: "x"})


def test_counters_register_with_prometheus_client():
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry(auto_describe=True)
    counters = FlagCounters(labels={"model": "m\n"})
    registry.register(counters)
    counters.add(example())
    labels = {"model": "m\n", "code": "NAN", "severity": "CRITICAL", "module": "head"}
    assert registry.get_sample_value("opguard_errors_total", labels) == 4
    counters.add(example())
    assert registry.get_sample_value("opguard_errors_total", labels) == 8
    assert registry.get_sample_value("opguard_samples_total", {"model": "m\n"}) == 512
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(FlagCounters())
    theirs = values_in(re.sub(r"\.0$", "", client.generate_latest(registry).decode(), flags=re.M))

    def as_set(values):
        return {(name, tuple(sorted(labels.items())), value) for name, labels, value in values}

    assert as_set(theirs) == as_set(values_in(counters.text()))
    registry.unregister(counters)
    from prometheus_client.parser import text_string_to_metric_families

    parsed = list(text_string_to_metric_families(counters.text()))
    assert {(family.name, family.type) for family in parsed} == {
        ("opguard_samples", "counter"),
        ("opguard_bad_samples", "counter"),
        ("opguard_errors", "counter"),
    }


def test_counters_without_prometheus_client_say_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(ImportError, match="pip install prometheus-client, or serve"):
        FlagCounters().collect()
