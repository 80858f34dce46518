"""Every accumulation policy through the public functions, against the readable model."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flags_model as model
from opguard.flags import (
    AccumulationConfig,
    Dedupe,
    ErrorConfig,
    FlagsLayoutError,
    Order,
    Priority,
    err,
    flags,
)

DTYPES = [torch.int64, torch.int32, torch.float64, torch.float32]
policies = st.builds(
    ErrorConfig,
    num_slots=st.integers(1, 9) | st.sampled_from([16, 17, 300]),
    accumulation=st.builds(
        AccumulationConfig,
        st.sampled_from(Priority),
        st.sampled_from(Order),
        st.sampled_from(Dedupe),
    ),
    flag_dtype=st.sampled_from(DTYPES),
    default_severity=st.integers(1, 3),
)
codes = st.integers(0, 15)
# Few locations, so that errors meet; and the ends of the range.
locations = st.sampled_from([0, 1, 2, 3, 511, 512, 1022, 1023])
severities = st.none() | st.integers(0, 3)


def policy_of(config):
    accumulation = config.accumulation
    return model.Policy(
        num_slots=config.num_slots,
        priority=int(accumulation.priority),
        order=int(accumulation.order),
        dedupe=int(accumulation.dedupe),
        carrier=DTYPES.index(config.flag_dtype),
    )


def slot_of(config, code, location, severity):
    if severity is None:
        severity = model.severity_by_code(code, config.default_severity)
    return model.slot_of(location, code, severity)


def agrees(f, rows):
    """Slots and every question about them."""
    assert model.to_rows(f) == rows
    assert err.count_errors(f).tolist() == [model.count(row) for row in rows]
    assert err.max_severity(f).tolist() == [model.max_severity(row) for row in rows]
    assert err.is_ok(f).tolist() == [not any(row) for row in rows]
    assert err.is_err(f).tolist() == [any(row) for row in rows]
    for code in (0, 1, 5, 13, 15):
        found = [model.find(row, 0x3C, code << 2) for row in rows]
        assert err.has_code(f, code).tolist() == err.find(code, f).tolist() == found
    for domain in range(4):
        found = [model.find(row, 0x30, domain << 4) for row in rows]
        assert err.has_domain(f, domain).tolist() == found
    assert err.has_critical(f).tolist() == [model.find(row, 3, 3) for row in rows]
    assert [
        [(e.severity, e.code, e.location) for e in sample] for sample in flags.unpack_all(f)
    ] == [[(slot & 3, slot >> 2 & 15, slot >> 6) for slot in row if slot] for row in rows]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), config=policies, samples=st.integers(0, 5) | st.sampled_from([33, 70]))
def test_any_sequence_of_recordings_is_the_models(data, config, samples):
    policy = policy_of(config)
    f, rows = err.new_t(samples, config=config), model.new(samples, policy)
    masks = st.lists(st.booleans(), min_size=samples, max_size=samples)
    for _ in range(data.draw(st.integers(0, 12))):
        kind = data.draw(st.sampled_from(["push", "all", "codes", "ensure", "clear", "merge"]))
        before = f.clone()
        location, severity = data.draw(locations), data.draw(severities)
        code = data.draw(codes)
        where = data.draw(masks)
        mask = torch.tensor(where, dtype=torch.bool)
        slot = slot_of(config, code, location, severity)
        pushed = [model.push(row, slot, policy) for row in rows]
        if kind == "push":
            g = err.push(f, code, location, severity, config, where=mask)
            after = [p if w else r for p, r, w in zip(pushed, rows, where, strict=True)]
        elif kind == "all":
            g, after = err.push_scalar(f, code, location, severity, config), pushed
        elif kind == "codes":
            each = data.draw(st.lists(codes, min_size=samples, max_size=samples))
            dtype = data.draw(st.sampled_from([torch.int64, torch.uint8, torch.int16]))
            given_codes = torch.tensor(each, dtype=dtype)
            g = err.push(f, given_codes, location, severity, config, where=mask)
            after = [
                model.push(r, slot_of(config, c, location, severity), policy) if w else r
                for r, c, w in zip(rows, each, where, strict=True)
            ]
        elif kind == "ensure":
            g = err.ensure_mask(f, mask, code, location, severity, config)
            after = [r if w else p for p, r, w in zip(pushed, rows, where, strict=True)]
        elif kind == "clear":
            g, after = err.clear(f, code, config), [model.clear(row, code) for row in rows]
        else:
            others = []
            for _ in range(data.draw(st.integers(1, 2))):
                other, other_rows = err.new_t(samples, config=config), model.new(samples, policy)
                for _ in range(data.draw(st.integers(0, 4))):
                    c, loc, sev = data.draw(codes), data.draw(locations), data.draw(severities)
                    other = err.push(other, c, loc, sev, config)
                    slot = slot_of(config, c, loc, sev)
                    other_rows = [model.push(row, slot, policy) for row in other_rows]
                others.append((other, other_rows))
            g, after = err.merge(f, *(other for other, _ in others), config=config), rows
            for _, other_rows in others:
                after = [model.merge(a, b, policy) for a, b in zip(after, other_rows, strict=True)]
        assert model.to_rows(f) == model.to_rows(before), "the given flags were changed"
        f, rows = g, after
        assert f.dtype is config.flag_dtype
    agrees(f, rows)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), config=policies, priority=policies)
def test_rows_with_holes_and_other_configurations(data, config, priority):
    """Flags as another program left them: any bits, any width, another limit."""
    policy = policy_of(config)
    slots = st.just(0) | st.builds(model.slot_of, locations, codes, st.integers(0, 3))
    samples = data.draw(st.integers(1, 4))
    full = st.lists(slots, min_size=min(policy.capacity, 20), max_size=min(policy.capacity, 20))
    rows = [data.draw(full) for _ in range(samples)]
    rows = [row + [0] * (policy.capacity - len(row)) for row in rows]
    f = model.to_flags(rows, policy)
    agrees(f, rows)
    other = policy_of(priority)
    code, location = data.draw(codes), data.draw(locations)
    g = err.push(f, code, location, config=priority)
    slot = slot_of(priority, code, location, None)
    assert model.to_rows(g) == [model.push(row, slot, other) for row in rows]
    merged = err.merge(f, f.flip(0), config=priority)
    expected = [model.merge(a, b, other) for a, b in zip(rows, rows[::-1], strict=True)]
    assert model.to_rows(merged) == expected


# --- what 1.0.4 got wrong, one by one -------------------------------------------------------------


def shown(f):
    return [(e.code_name, e.location, e.severity_name) for e in flags.unpack(f)]


def pushed(config, *errors, severity=None):
    f = err.new_t(1, config=config)
    for code, location in errors:
        f = err.push(f, code, location, severity, config)
    return f


def config_of(num_slots=16, priority=0, order=0, dedupe=3, dtype=torch.int64):
    return ErrorConfig(num_slots, AccumulationConfig(priority, order, dedupe), flag_dtype=dtype)


def test_clear_leaves_no_hole_that_the_next_push_miscounts():
    f = pushed(None, (err.NAN, 1), (err.INF, 2), (err.OVERFLOW, 3))
    g = err.push(err.clear(f, err.NAN), err.OUT_OF_BOUNDS, 4)
    assert [(name, place) for name, place, _ in shown(g)] == [
        ("INF", 2),
        ("OVERFLOW", 3),
        ("OUT_OF_BOUNDS", 4),
    ]


def test_merge_is_pushing_the_younger_errors():
    """The oldest stay, as with push; nothing twice; no mild error in place of a severe one."""
    two = config_of(2)
    f = pushed(two, (err.NAN, 1), (err.NAN, 2))
    assert [
        place for _, place, _ in shown(err.merge(f, pushed(two, (err.NAN, 3)), config=two))
    ] == [
        1,
        2,
    ]
    once = pushed(None, (err.NAN, 1))
    assert shown(err.merge(once, once)) == [("NAN", 1, "CRITICAL")]
    severe = config_of(1, Priority.SEVERITY, Order.LAST)
    f = pushed(severe, (err.NAN, 1))
    assert shown(err.merge(f, pushed(severe, (err.ZERO_OUTPUT, 2)), config=severe)) == shown(f)
    assert shown(err.merge(pushed(severe, (err.ZERO_OUTPUT, 2)), f, config=severe)) == shown(f)


def test_a_warning_never_evicts_a_critical_error():
    config = config_of(4, Priority.SEVERITY, Order.LAST)
    f = pushed(config, *((err.NAN, place) for place in range(1, 5)))
    assert shown(err.push(f, err.ZERO_OUTPUT, 9, config=config)) == shown(f)
    mild = pushed(config, *((err.ZERO_OUTPUT, place) for place in range(1, 5)))
    assert shown(err.push(mild, err.NAN, 9, config=config))[0] == ("NAN", 9, "CRITICAL")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_num_slots_bounds_every_policy(dtype, num_slots):
    """1.0.4 kept what fits the words under LIFO."""
    for priority, order, dedupe in itertools.product(Priority, Order, (Dedupe.NONE, Dedupe.UNIQUE)):
        config = config_of(num_slots, priority, order, dedupe, dtype)
        f = pushed(config, *((err.NAN, place) for place in range(1, 9)))
        assert err.count_errors(f).tolist() == [num_slots]
        assert len(flags.unpack(f)) == num_slots


def test_location_and_order_decide_who_stays():
    places = (5, 900, 1, 40, 1023)
    kept = {}
    for order in Order:
        config = config_of(2, Priority.LOCATION, order)
        kept[order] = sorted(
            p for _, p, _ in shown(pushed(config, *((err.NAN, p) for p in places)))
        )
    assert kept == {Order.FIRST: [1, 5], Order.LAST: [900, 1023]}
    lowest = config_of(1, Priority.SEVERITY, Order.FIRST)
    assert shown(pushed(lowest, (err.NAN, 1), (err.ZERO_OUTPUT, 2))) == [("ZERO_OUTPUT", 2, "WARN")]
    newest = config_of(2, Priority.CHRONO, Order.LAST)
    assert [p for _, p, _ in shown(pushed(newest, *((err.NAN, p) for p in places)))] == [1023, 40]
    oldest = config_of(2)
    assert [p for _, p, _ in shown(pushed(oldest, *((err.NAN, p) for p in places)))] == [5, 900]


def test_dedupe_groups_by_what_it_says():
    errors = ((err.NAN, 1), (err.NAN, 2), (err.INF, 1), (err.NAN, 1))
    counts = {dedupe: len(shown(pushed(config_of(dedupe=dedupe), *errors))) for dedupe in Dedupe}
    assert counts == {Dedupe.NONE: 4, Dedupe.CODE: 2, Dedupe.LOCATION: 2, Dedupe.UNIQUE: 3}
    f = err.push(err.new_t(1), err.NAN, 1, err.WARN)
    assert shown(err.push(f, err.NAN, 1)) == [("NAN", 1, "CRITICAL")]
    assert shown(err.push(err.push(f, err.NAN, 1), err.NAN, 1, err.WARN)) == [
        ("NAN", 1, "CRITICAL")
    ]


def test_find_and_has_code_read_every_slot():
    f = pushed(None, (err.INF, 1), (err.INF, 2), (err.NAN, 3))
    two = config_of(2)
    assert err.find(err.NAN, f, two).tolist() == err.has_code(f, err.NAN, two).tolist() == [True]
    assert err.has_nan(f, two).tolist() == err.has_critical(f, two).tolist() == [True]


def test_code_zero_and_severity_zero_record_nothing():
    f = pushed(None, (err.NAN, 1))
    for g in (
        err.push(f, err.OK, 2),
        err.push(f, err.INF, 2, severity=0),
        err.push(f, torch.tensor([0]), 2),
        err.push(f, torch.tensor([2]), 2, severity=0),
        err.push_scalar(f, err.OK, 2),
    ):
        assert torch.equal(f, g)
    assert err.from_code(err.OK, 2, 3).count_nonzero() == 0


def test_merge_wants_at_least_one_and_equal_capacities():
    with pytest.raises(ValueError, match="at least one"):
        err.merge()
    f = pushed(None, (err.NAN, 1))
    assert err.merge(f) is f
    with pytest.raises(FlagsLayoutError, match="slots"):
        err.merge(f, err.new_t(1, config=config_of(8)))
    other = pushed(config_of(dtype=torch.float32), (err.INF, 1023))
    merged = err.merge(f, other)
    assert merged.dtype is torch.int64
    assert [place for _, place, _ in shown(merged)] == [1, 1023]
    assert err.merge(other, f).dtype is torch.float32
