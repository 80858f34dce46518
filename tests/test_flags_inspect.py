"""What flags say to people: of any width, dtype and batch, whatever the configuration is."""

from __future__ import annotations

import pytest
import torch

from opguard.flags import (
    CONFIG,
    AccumulationConfig,
    Dedupe,
    ErrorConfig,
    ErrorFlags,
    FlagsError,
    FlagsLayoutError,
    UnpackedError,
    err,
    flag_nan,
    flags,
)


@pytest.fixture(autouse=True)
def no_names():
    """Locations that other tests named would have those names here."""
    from opguard.flags import ErrorLocation

    ErrorLocation.reset()
    yield
    ErrorLocation.reset()


DTYPES = [torch.int64, torch.int32, torch.float64, torch.float32]


def filled(errors, dtype=torch.int64, num_slots=16):
    """(N, W) flags from a list of [(code, location, severity), ...] a sample."""
    config = ErrorConfig(
        num_slots=num_slots, flag_dtype=dtype, accumulation=AccumulationConfig(dedupe=Dedupe.NONE)
    )
    f = err.new_t(len(errors), config=config)
    for sample, found in enumerate(errors):
        where = torch.arange(len(errors)) == sample
        for code, location, severity in found:
            f = err.push(f, code, location, severity, config, where=where)
    return f


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_slots", [1, 4, 40, 65])
def test_every_slot_is_read_whatever_the_configuration(dtype, num_slots):
    errors = [[(1 + i % 3, 1023 - i, 1 + i % 3) for i in range(num_slots)], []]
    f = filled(errors, dtype, num_slots)
    for config in (None, ErrorConfig(num_slots=2), ErrorConfig(flag_dtype=torch.float32)):
        for unpacked in (flags.unpack(f, 0, config), flags.unpack_all(f, config)[0]):
            assert [(e.code, e.location, e.severity) for e in unpacked] == errors[0]
        assert flags.unpack(f, 1, config) == []
        assert f"2 samples, {num_slots} errors" in flags.repr(f, config)
        counts = [n for codes in flags.summary(f, config).values() for n in codes.values()]
        assert sum(counts) == num_slots
    assert err.count_errors(f).tolist() == [num_slots, 0]


def test_flags_made_by_a_check_are_read_in_full():
    """1.0.4 made flags of another dtype than it read, and dropped what did not fit."""
    before = CONFIG.flag_dtype
    try:
        for dtype in DTYPES:
            CONFIG.flag_dtype = dtype
            x = torch.full((1, 2), float("nan"))
            f = flag_nan(x, 1)
            for location in (2, 3, 4, 5):
                f = flag_nan(x, location, f)
            assert f.dtype is dtype
            assert [e.location for e in flags.unpack(f)] == [1, 2, 3, 4, 5]
            assert flags.repr(f).startswith("ErrorFlags(1 samples, 5 errors: 5xNAN @ ")
    finally:
        CONFIG.flag_dtype = before


def test_unpacked_errors_have_names():
    f = filled([[(1, 42, 3), (4, 7, 1)]])
    first, second = flags.unpack(f)
    assert first == (3, 1, 42, "CRITICAL", "NAN", "Location_42")
    assert isinstance(first, UnpackedError)
    assert first._fields == (
        "severity",
        "code",
        "location",
        "severity_name",
        "code_name",
        "location_name",
    )
    assert repr(first) == "UnpackedError(CRITICAL:NAN@Location_42)"
    assert repr(second) == "UnpackedError(WARN:CODE_4@Location_7)"
    assert repr(first._replace(severity=0)) == "UnpackedError(OK)"


def test_one_line_for_a_batch():
    assert flags.repr(err.new_t(32)) == "ErrorFlags(32 samples, no errors)"
    assert flags.repr(err.new_t(0)) == "ErrorFlags(0 samples, no errors)"
    f = filled([[(2, 9, 3), (1, 8, 3)], [(1, 7, 3)], [], [(1, 6, 3), (3, 5, 2)]])
    assert flags.repr(f) == (
        "ErrorFlags(4 samples, 5 errors: 3xNAN, 1xINF, 1xOVERFLOW"
        " @ Location_5, Location_6, Location_7 +2 more)"
    )
    named = err.push(err.new_t(2), err.INF, "head.proj", where=torch.tensor([True, True]))
    assert flags.repr(named) == "ErrorFlags(2 samples, 2 errors: 2xINF @ head.proj)"


def test_summary_counts_by_location_and_code():
    assert flags.summary(err.new_t(3)) == {}
    f = filled([[(1, 3, 3), (1, 3, 1), (2, 3, 3)], [(1, 3, 3), (1, 600, 3)]])
    assert flags.summary(f) == {"Location_3": {"NAN": 3, "INF": 1}, "Location_600": {"NAN": 1}}
    assert list(flags.summary(f)) == ["Location_3", "Location_600"]


def test_pretty_print_has_a_line_an_error():
    f = filled([[(1, 42, 3), (5, 7, 1)], []])
    assert ErrorFlags.pretty_print(f, 0) == (
        "Found 2 error(s):\n"
        "  [0] CRITICAL | NUMERIC.NAN | @ Location_42\n"
        "  [1] WARN | INDEX.OUT_OF_BOUNDS | @ Location_7"
    )
    assert ErrorFlags.pretty_print(f, sample_idx=1) == "[OK] No errors"


def test_all_samples_in_one_list():
    f = filled([[(1, 1, 3)], [], [(2, 2, 3), (3, 3, 2)]])
    errors = ErrorFlags.to_errors(f)
    assert [e.location for e in errors] == [1, 2, 3]
    assert ErrorFlags.unpack_all(f) == [[errors[0]], [], [errors[1], errors[2]]]
    assert ErrorFlags.unpack_all_vectorized(f) == ErrorFlags.unpack_all(f)
    told = ErrorFlags.interpret(f, "net")
    assert [e.location_name for e in told] == ["net.Location_1", "net.Location_2", "net.Location_3"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_or_has_the_bits_of_all(dtype):
    a, b = filled([[(1, 511, 3)], []], dtype), filled([[], [(2, 1023, 3)]], dtype)
    combined = ErrorFlags.reduce_or([a, b])
    assert combined.dtype is dtype
    assert flags.unpack_all(combined) == [flags.unpack(a, 0), flags.unpack(b, 1)]
    assert flags.unpack_all(a) == [flags.unpack(a, 0), []]
    with pytest.raises(FlagsError, match="at least one"):
        ErrorFlags.reduce_or([])
    with pytest.raises(FlagsError, match="to reduce"):
        ErrorFlags.reduce_or([a, err.new_t(3)])


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match="sample"):
        flags.unpack(err.new_t(2), 2)
    for wrong in (torch.zeros(3), torch.zeros(3, 4, dtype=torch.int16), torch.zeros(3, 0)):
        for call in (flags.repr, flags.summary, flags.unpack_all, ErrorFlags.pretty_print):
            with pytest.raises(FlagsLayoutError, match="expected"):
                call(wrong)


def test_views_and_slices_are_read_as_they_are():
    f = filled([[(1, i + 1, 3)] for i in range(6)])
    assert [e.location for e in ErrorFlags.to_errors(f[::2])] == [1, 3, 5]
    assert [e.location for e in flags.unpack(f[1::2], 1)] == [4]
    assert [e.location for e in flags.unpack(f, -1)] == [6]
    assert flags.repr(f[::2]).startswith("ErrorFlags(3 samples, 3 errors: 3xNAN")
    wide = torch.zeros(2, 8, dtype=torch.int64)
    wide[:, ::2] = filled([[(1, 1, 3)], [(2, 2, 3)]])
    assert [e.location for e in ErrorFlags.to_errors(wide[:, ::2])] == [1, 2]


def test_inspection_breaks_a_graph_and_says_why():
    def fn(x):
        f = err.push(err.new(x), err.NAN, 1)
        return f, flags.repr(f)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="call it outside the compiled function"):
        torch.compile(fn, fullgraph=True, backend="eager")(torch.zeros(2))
    torch._dynamo.reset()
    _, text = torch.compile(fn, backend="eager")(torch.zeros(2))
    assert text == "ErrorFlags(2 samples, 2 errors: 2xNAN @ Location_1)"


def test_inspection_keeps_up_with_a_large_batch():
    """One vectorised pass: the errors cost, the samples without do not."""
    f = err.push(err.new_t(100_000), err.NAN, 3, where=torch.arange(100_000) % 1000 == 0)
    assert flags.summary(f) == {"Location_3": {"NAN": 100}}
    assert flags.repr(f) == "ErrorFlags(100000 samples, 100 errors: 100xNAN @ Location_3)"
    assert sum(map(len, flags.unpack_all(f))) == 100
