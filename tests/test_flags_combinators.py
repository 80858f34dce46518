"""Values and flags together: filters, maps, chains, guards, recovery, replacement."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from opguard.flags import (
    CONFIG,
    IS,
    BatchMismatchError,
    CodeError,
    ErrorConfig,
    ErrorLocation,
    FlagsError,
    FlagsLayoutError,
    LocationError,
    SeverityError,
    err,
    find,
    fix,
    flags,
    get_config,
    push,
    push_,
    set_config,
)

NAN, INF = math.nan, math.inf
DTYPES = [torch.int64, torch.int32, torch.float64, torch.float32]
VALUES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e5m2, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.fixture(params=DTYPES, ids=str)
def carrier(request):
    before = get_config()
    set_config(ErrorConfig(flag_dtype=request.param))
    yield request.param
    set_config(before)


def bad_rows(*rows, n=4):
    where = torch.zeros(n, dtype=torch.bool)
    where[list(rows)] = True
    return err.push(err.new_t(n), err.NAN, 1023, where=where)


def same_bits(a, b):
    words = {4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype is b.dtype and torch.equal(a.view(words), b.view(words))


# --- filters --------------------------------------------------------------------------------------


def test_filters_take_samples(carrier):
    f = bad_rows(1, 2)
    z = torch.arange(8).reshape(4, 2)
    assert err.take_ok(f, z).tolist() == [[0, 1], [6, 7]]
    assert err.take_err(f, z).tolist() == [[2, 3], [4, 5]]
    ok, bad = err.partition(f, z)
    assert torch.equal(ok, err.take_ok(f, z))
    assert torch.equal(bad, err.take_err(f, z))
    (ok1, ok2), (bad1, bad2) = err.partition_many(f, z, z[:, 0])
    assert torch.equal(ok1, ok)
    assert torch.equal(bad1, bad)
    assert (ok2.tolist(), bad2.tolist()) == ([0, 6], [2, 4])
    assert err.partition_many(f) == ((), ())
    for got, rows in ((err.get_ok(f), [0, 3]), (err.get_err(f), [1, 2])):
        assert same_bits(got, f[rows].clone())
    assert (bool(err.any_err(f)), bool(err.has_any(f)), bool(err.all_ok(f))) == (True, True, False)
    assert err.any_err(f).shape == err.all_ok(f).shape == ()


@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_filling_keeps_the_dtype(dtype):
    f = bad_rows(0, n=3)
    z = torch.tensor([0, 1, 1]).to(dtype)
    for fill in (0.0, 1, True, 1.0):
        got = err.take_ok_p(f, z, fill)
        assert got.dtype is dtype
        assert got.to(torch.complex64).tolist() == [complex(fill), 1, 1]
        got = err.take_err_p(f, z, fill=fill)
        assert got.dtype is dtype
        assert got.to(torch.complex64).tolist() == [0, complex(fill), complex(fill)]
    recovered, _ = err.recover_with_fallback(f, z, 1.0, 1)
    assert recovered.dtype is dtype
    assert recovered.to(torch.complex64).tolist() == [1, 1, 1]


def test_large_integers_stay_exact():
    big = torch.tensor([2**62 + 1, -(2**63), 2**63 - 1])
    assert err.take_ok_p(bad_rows(0, n=3), big, -1).tolist() == [-1, -(2**63), 2**63 - 1]
    assert err.take_ok_p(bad_rows(0, n=3), big, 2**62 + 3).tolist()[0] == 2**62 + 3
    assert err.replace(big, 5, targets=[2**62 + 1]).tolist() == [5, -(2**63), 2**63 - 1]
    assert err.replace(big, 5, targets=[2**62]).tolist() == big.tolist()


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.int64, 0.5),
        (torch.int64, NAN),
        (torch.int32, INF),
        (torch.uint8, -1),
        (torch.uint8, 256),
        (torch.int8, 128),
        (torch.bool, 2),
        (torch.float16, 1e6),
        (torch.float32, 1e39),
        (torch.float32, 1j),
        (torch.float8_e4m3fn, INF),
        (torch.float32, "0"),
        (torch.int32, torch.tensor(0.5)),
    ],
    ids=str,
)
def test_a_fill_that_the_dtype_cannot_hold_is_an_error(dtype, fill):
    f, z = bad_rows(0, n=2), torch.zeros(2).to(dtype)
    for call in (
        lambda: err.take_ok_p(f, z, fill),
        lambda: err.take_err_p(f, z, fill),
        lambda: err.recover_with_fallback(f, z, fill, 1),
        lambda: err.replace(z, fill, targets=[0.0]),
    ):
        with pytest.raises(FlagsError, match="expected"):
            call()


def test_one_scalar_is_one_sample():
    f = err.push(err.new(torch.tensor(NAN)), err.NAN, 1)
    z = torch.tensor(2.5)
    assert err.take_ok_p(f, z, -1.0).item() == -1.0
    assert err.take_err_p(f, z).item() == 2.5
    assert err.take_err(f, z).tolist() == [2.5]
    assert err.take_ok(f, z).tolist() == []
    assert err.map_err(f, z, lambda v: v * 2).item() == 5.0
    assert err.recover_with_fallback(f, z, 0.0, 1)[0].item() == 0.0


def test_no_samples():
    f, z = err.new_t(0), torch.zeros(0, 3)
    assert err.take_ok_p(f, z).shape == err.take_err(f, z).shape == (0, 3)
    assert bool(err.all_ok(f))
    assert not bool(err.any_err(f))
    assert err.map_ok(f, z, torch.exp).shape == (0, 3)
    assert err.merge(f, err.push(f, err.NAN, 1)).shape == (0, 4)
    for name in ("get_first_code", "get_first_location", "get_first_severity", "count_errors"):
        assert getattr(err, name)(f).shape == (0,)


# --- gradients ------------------------------------------------------------------------------------

COMBINATORS = {
    "take_ok_p": (lambda f, z: err.take_ok_p(f, z, 2.0), lambda m, z: torch.where(m, 2.0, z)),
    "take_err_p": (err.take_err_p, lambda m, z: torch.where(m, z, 0.0)),
    "map_ok": (lambda f, z: err.map_ok(f, z, torch.exp), lambda m, z: torch.where(m, z, z.exp())),
    "map_err": (lambda f, z: err.map_err(f, z, torch.sin), lambda m, z: torch.where(m, z.sin(), z)),
    "recover": (
        lambda f, z: err.recover_with_fallback(f, z, 3.0, 1)[0],
        lambda m, z: torch.where(m, 3.0, z),
    ),
    "and_then": (
        lambda f, z: err.and_then(f, z, lambda v: (v * v, f))[0],
        lambda m, z: torch.where(m, z, z * z),
    ),
    "bind": (
        lambda f, z: err.bind(f, z, lambda v: (v * 3, f))[0],
        lambda m, z: torch.where(m, z, z * 3),
    ),
    "replace": (
        lambda f, z: err.replace(z, 0.5, targets=[err.NAN, err.INF, 7.0]),
        lambda m, z: torch.where((z == 7.0) | z.isnan() | z.isinf(), 0.5, z),
    ),
}


@pytest.mark.parametrize("name", COMBINATORS)
def test_values_and_gradients_are_wheres(name):
    ours, where = COMBINATORS[name]
    f = bad_rows(0, 2)
    mask = err.is_err(f).reshape(4, 1, 1)
    start = torch.randn(4, 3, 2)
    start[0, 0, 0], start[1, 1, 1] = 7.0, 7.0
    if name == "replace":
        start[2, 0], start[3, 0, 0] = NAN, INF
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = []
    for call in (lambda z: where(mask, z), lambda z: ours(f, z), lambda z: compiled(f, z)):
        z = start.clone().requires_grad_()
        out = call(z)
        (out * torch.arange(24.0).reshape(4, 3, 2)).sum().backward()
        results.append((out.detach(), z.grad))
    for out, grad in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(grad, results[0][1], rtol=0, atol=0)
    torch._dynamo.reset()


def test_a_fallback_tensor_gets_its_gradient():
    f, z = bad_rows(1, 3), torch.randn(4, 2)
    for shape in ((), (2,), (1, 2), (4, 2), (4, 1)):
        fallback = torch.ones(shape, requires_grad=True)
        out, g = err.recover_with_fallback(f, z, fallback, "rescue")
        assert torch.equal(out[[1, 3]], torch.ones(2, 2))
        assert torch.equal(out[[0, 2]], z[[0, 2]])
        out.sum().backward()
        assert fallback.grad.sum().item() == 4.0
        assert err.has_fallback(g).tolist() == [False, True, False, True]


# --- maps and chains ------------------------------------------------------------------------------


def test_maps_give_fn_the_whole_batch_and_keep_their_samples():
    f, z = bad_rows(1), torch.arange(4.0)
    seen = []

    def fn(value):
        seen.append(value)
        return value + 10

    assert err.map_ok(f, z, fn).tolist() == [10, 1, 12, 13]
    assert err.map_err(f, z, fn).tolist() == [0, 11, 2, 3]
    assert all(value is z for value in seen)
    assert err.map_err(f, z, lambda _: torch.tensor(-1.0)).tolist() == [0, -1, 2, 3]
    ids = torch.arange(4)
    assert err.map_ok(f, ids, lambda v: v * 2).dtype is torch.int64
    for wrong in (lambda v: v[:2], lambda v: v.reshape(1, 4, 1), lambda v: 3):
        with pytest.raises(FlagsError, match="what map_ok's fn returns"):
            err.map_ok(f, z, wrong)


def test_map_err_flags_touches_only_samples_with_errors(carrier):
    f = bad_rows(1, 3)

    def add_context(f):
        return err.push(f, err.SATURATED, location=510, severity=err.WARN)

    got = err.map_err_flags(f, add_context)
    assert got.dtype is carrier
    assert err.has_code(got, err.SATURATED).tolist() == [False, True, False, True]
    assert same_bits(got[[1, 3]], add_context(f)[[1, 3]].clone())
    assert err.count_errors(got).tolist() == [0, 2, 0, 2]
    with pytest.raises(FlagsError, match="map_err_flags' fn"):
        err.map_err_flags(f, lambda f: f[:2])


def test_and_then_freezes_and_bind_collects(carrier):
    f, z = bad_rows(0), torch.arange(4.0)

    def step(value):
        where = torch.tensor([True, True, False, False])
        return value + 100, err.push(err.new(value), err.INF, 510, where=where)

    value, g = err.and_then(f, z, step)
    assert value.tolist() == [0, 101, 102, 103]
    assert [[e.code_name for e in s] for s in flags.unpack_all(g)] == [["NAN"], ["INF"], [], []]
    value, g = err.bind(f, z, step)
    assert value.tolist() == [0, 101, 102, 103]
    assert [[e.code_name for e in s] for s in flags.unpack_all(g)] == [
        ["NAN", "INF"],
        ["INF"],
        [],
        [],
    ]
    assert g.dtype is carrier
    assert same_bits(f, bad_rows(0))


def test_chains_take_flags_of_another_dtype():
    """fn's flags may have another word; the result has the first's."""
    other = ErrorConfig(flag_dtype=torch.float32)
    f = bad_rows(0)

    def step(value):
        return value, err.from_code(err.INF, 511, 4, config=other)

    for chain in (err.and_then, err.bind):
        _, g = chain(f, torch.zeros(4), step)
        assert g.dtype is torch.int64
        assert err.has_inf(g)[1:].all()


def test_guards_record_where_the_predicate_fails(carrier):
    z = torch.tensor([1.0, -1.0, 2.0, -2.0])
    f = err.guard(err.new(z), z, lambda v: v > 0, err.SATURATED, "relu", severity=err.CRITICAL)
    g = err.ensure_mask(err.new(z), z > 0, err.SATURATED, "relu", err.CRITICAL)
    h = err.push(err.new(z), err.SATURATED, "relu", err.CRITICAL, where=z < 0)
    assert same_bits(f, g)
    assert same_bits(f, h)
    assert err.has_critical(f).tolist() == [False, True, False, True]
    assert same_bits(err.ensure_mask(err.new(z), (z > 0).to(torch.uint8), err.INF, 1),
                     err.ensure_mask(err.new(z), z > 0, err.INF, 1))  # fmt: skip


def test_strings_and_modules_are_locations_everywhere(carrier):
    """Everything that takes a location takes a name, and names it the same."""
    f, z = bad_rows(0, n=2), torch.zeros(2, 3)
    ok = torch.tensor([False, False])
    layer = nn.Linear(1, 1)
    layer._fx_path = "head"
    for place, name in (("enc.proj", "enc.proj"), (layer, "head"), (None, "Unknown"), (77, None)):
        made = [
            err.push(f, err.INF, place),
            err.push(f, torch.tensor([2, 2]), place),
            err.push_scalar(f, err.INF, place),
            err.ensure_mask(f, ok, err.INF, place),
            err.guard(f, z, lambda v: v.sum(1) > 0, err.INF, place),
            err.merge(f, err.from_code(err.INF, place, 2)),
        ]
        for g in made:
            assert same_bits(g, made[0])
        recovered = err.recover_with_fallback(f, z, 0.0, place)[1]
        fixed = fix(z, f, place)[1]
        assert same_bits(recovered, fixed)
        for g, code in ((made[0], "INF"), (recovered, "FALLBACK_VALUE")):
            found = flags.unpack(g, 0)[1]
            assert found.code_name == code
            if name:
                assert found.location_name == name
    assert ErrorLocation.get("enc.proj") > 0


def test_recover_takes_a_float_and_fix_the_whole_sample():
    z = torch.tensor([[1.0, NAN, 3.0], [4.0, 5.0, 6.0]])
    f = err.push(err.new(z), err.OVERFLOW, 1, where=torch.tensor([True, False]))
    for value, g in (err.recover_with_fallback(f, z, 0.5, 3), fix(z, f, 3, fallback=0.5)):
        assert value.tolist() == [[0.5, 0.5, 0.5], [4.0, 5.0, 6.0]]
        assert [(e.code_name, e.severity_name, e.location) for e in flags.unpack(g, 0)] == [
            ("OVERFLOW", "ERROR", 1),
            ("FALLBACK_VALUE", "WARN", 3),
        ]
        assert flags.unpack(g, 1) == []
    ids = torch.arange(2)
    assert fix(ids, f, 1)[0].dtype is torch.int64


def test_first_slot(carrier):
    f = err.push(err.new_t(2), err.OVERFLOW, 1023, where=torch.tensor([True, False]))
    f = err.push(f, err.NAN, 3)
    for name, expected in (
        ("get_first_code", [3, 1]),
        ("get_first_location", [1023, 3]),
        ("get_first_severity", [2, 3]),
    ):
        got = getattr(err, name)(f)
        assert got.dtype is torch.int32
        assert got.tolist() == expected


# --- replace --------------------------------------------------------------------------------------


def test_codes_numbers_and_names_are_different_targets():
    x = torch.tensor([1.0, 2.0, NAN, INF, -INF, 999.0])

    def replaced(*targets):
        return [i for i, v in enumerate(err.replace(x, -5.0, targets=targets).tolist()) if v == -5]

    assert replaced(err.NAN) == [2]
    assert replaced(err.INF) == [3, 4]
    assert replaced(err.NAN, err.INF) == [2, 3, 4]
    assert replaced(1.0) == [0]
    assert replaced(2.0) == [1]
    assert replaced("nan") == replaced(NAN) == [2]
    assert replaced("inf") == [3, 4]
    assert replaced("posinf") == replaced(INF) == [3]
    assert replaced("neginf") == replaced(-INF) == [4]
    assert replaced(999, float("inf")) == [3, 5]
    assert replaced(True) == [0]
    assert replaced(5) == []
    assert type(err.NAN) is type(err.INF) is int
    default = err.replace(x, targets=[err.NAN, err.INF])
    assert default.tolist() == [1.0, 2.0, 0.0, 0.0, 0.0, 999.0]


@pytest.mark.parametrize("targets", [["nann"], ["NAN"], [], "both", [None], [[1.0]]])
def test_an_unknown_target_is_an_error(targets):
    with pytest.raises(FlagsError, match="expected"):
        err.replace(torch.zeros(2), targets=targets)


def test_replace_never_changes_its_argument_and_keeps_dtypes():
    for dtype in (torch.int32, torch.int64, torch.uint8, torch.bool):
        ids = torch.tensor([0, 1, 1]).to(dtype)
        got = err.replace(ids, 1, targets=[0, "nan", err.INF, 0.5, 300])
        assert got.dtype is dtype
        assert got.tolist() == [1, 1, 1]
        assert ids.tolist() == [0, 1, 1]
        same = err.replace(ids, targets=[err.NAN])
        assert same.tolist() == ids.tolist()
        assert same.data_ptr() != ids.data_ptr()
    assert err.replace(torch.arange(3), 9, targets=[1.0, 2.0]).tolist() == [0, 9, 9]
    for dtype in (torch.float16, torch.bfloat16, torch.complex64):
        x = torch.tensor([NAN, 1.0]).to(dtype)
        got = err.replace(x, targets=[err.NAN])
        assert got.dtype is dtype
        assert got.tolist() == [0, 1]


# --- bad input ------------------------------------------------------------------------------------


def test_batches_that_differ_are_an_error():
    """1.0.4 flagged three samples for one that was looked at."""
    f, z = err.new_t(3), torch.zeros(1, 2)
    for call in (
        lambda: err.take_ok(f, z),
        lambda: err.take_err_p(f, z),
        lambda: err.partition(f, z),
        lambda: err.map_ok(f, z, torch.exp),
        lambda: err.and_then(f, z, lambda v: (v, f)),
        lambda: err.and_then(f, torch.ones(3), lambda v: (v, err.from_code(err.NAN, 1, 1))),
        lambda: err.and_then(f, torch.ones(3), lambda v: (v, err.from_code(err.NAN, 1, 2))),
        lambda: err.bind(f, torch.ones(3), lambda v: (v, err.from_code(err.NAN, 1, 1))),
        lambda: err.push(f, err.NAN, 1, where=torch.tensor([True])),
        lambda: err.push(f, torch.tensor([1, 2]), 1),
        lambda: err.ensure_mask(f, torch.tensor([True, False]), err.NAN, 1),
        lambda: err.guard(f, z, lambda v: v.sum(1) > 0, err.NAN, 1),
        lambda: err.recover_with_fallback(f, z, 0.0, 1),
        lambda: err.merge(f, err.new_t(1)),
        lambda: fix(z, f, 1),
    ):
        with pytest.raises(BatchMismatchError, match="expected"):
            call()


def test_a_predicate_that_gives_no_mask_is_an_error():
    with pytest.raises(FlagsError, match=r"what guard's predicate returns, .* got bool"):
        err.guard(err.new_t(3), torch.ones(3), lambda v: False, err.NAN, 1)


@pytest.mark.parametrize("code", [16, -1, "NAN", 1.5, None, torch.tensor([1, 2])], ids=repr)
def test_what_is_no_code_is_an_error(code):
    f = err.new_t(3)
    for call in (
        lambda: err.has_code(f, code),
        lambda: err.clear(f, code),
        lambda: err.from_code(code, 1, 3),
        lambda: find(code, f),
        lambda: push(f, code, 1),
        lambda: push_(f, code, 1),
        lambda: IS(code, f),
    ):
        with pytest.raises(CodeError, match="expected an error code from 0 to 15, got"):
            call()


def test_numbers_out_of_range_are_an_error_and_spill_nowhere():
    """1.0.4 wrote them over the neighbouring fields and slots."""
    f = err.push(err.new_t(2), err.NAN, 5)
    before = f.clone()
    ok = torch.zeros(2, dtype=torch.bool)
    for bad, error in (
        (lambda **k: err.push(f, err.NAN, **{"location": 1024, **k}), LocationError),
        (lambda **k: err.push(f, err.NAN, **{"location": -1, **k}), LocationError),
        (lambda **k: err.push(f, 16, 1, **k), CodeError),
        (lambda **k: err.push(f, -1, 1, **k), CodeError),
        (lambda **k: err.push(f, torch.tensor([1, 16]), 1, **k), CodeError),
        (lambda **k: err.push(f, err.INF, 1, severity=7, **k), SeverityError),
        (lambda **k: err.push(f, torch.tensor([1, 2]), 1, severity=4, **k), SeverityError),
        (lambda **k: err.push_scalar(f, err.NAN, 1024), LocationError),
        (lambda **k: err.from_code(err.NAN, 1024, 2), LocationError),
        (lambda **k: err.from_code(16, 1, 2), CodeError),
        (lambda **k: err.ensure_mask(f, ok, err.NAN, 5000), LocationError),
        (lambda **k: err.recover_with_fallback(f, torch.zeros(2), 0.0, 1024), LocationError),
        (lambda **k: err.has_code(f, 16), CodeError),
        (lambda **k: err.find(-1, f), CodeError),
        (lambda **k: err.has_code(f, "NAN"), CodeError),
        (lambda **k: err.new_t(-1), FlagsLayoutError),
        (lambda **k: err.from_code(err.NAN, 1, -1), FlagsLayoutError),
        (lambda **k: err.clear(f, 99), CodeError),
    ):
        with pytest.raises(error, match="expected") as caught:
            bad()
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)
    assert torch.equal(f, before)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3), torch.zeros(3, 4, dtype=torch.int16), torch.zeros(3, 0), torch.ones(())],
)
def test_what_is_no_flags_tensor_is_an_error(wrong):
    z = torch.zeros(3)
    for call in (
        lambda: err.is_ok(wrong),
        lambda: err.push(wrong, err.NAN, 1),
        lambda: err.take_ok_p(wrong, z),
        lambda: err.get_err(wrong),
        lambda: err.get_first_code(wrong),
        lambda: err.map_err_flags(wrong, lambda f: f),
        lambda: err.merge(err.new_t(3), wrong),
        lambda: err.count_errors(wrong),
        lambda: err.clear(wrong, 1),
    ):
        with pytest.raises(FlagsLayoutError, match="expected"):
            call()


def test_functions_without_an_underscore_never_change_flags(carrier):
    f, z = bad_rows(0, 3), torch.zeros(4)
    before = f.clone()
    err.push(f, err.INF, 1)
    err.push(f, torch.tensor([1, 2, 3, 5]), 1)
    err.push_scalar(f, err.INF, 2)
    err.merge(f, err.from_code(err.INF, 1, 4))
    err.clear(f, err.NAN)
    err.recover_with_fallback(f, z, 0.0, 2)
    err.guard(f, z, lambda v: v > 0, err.INF, 2)
    err.bind(f, z, lambda v: (v, err.from_code(err.INF, 1, 4)))
    err.map_err_flags(f, lambda g: err.push(g, err.INF, 1))
    assert same_bits(f, before)


# --- carriers -------------------------------------------------------------------------------------


def test_flush_to_zero_and_nan_patterns_lose_nothing():
    """Float words hold denormals and NaN patterns; every operation reads them as integers."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-to-zero")
    before = get_config()
    try:
        for dtype in (torch.float32, torch.float64):
            set_config(ErrorConfig(flag_dtype=dtype))
            f = err.from_code(1, 5, 1)
            assert err.is_err(f).tolist() == [True]
            assert not err.is_ok(f).any()
            assert [e.location for e in flags.unpack(f)] == [5]
            for location in (510, 511, 1022, 1023):
                f = err.push(f, err.NAN, location)
            f = err.map_err_flags(err.get_err(err.merge(f, f)), lambda g: g.clone())
            assert [e.location for e in flags.unpack(f)] == [5, 510, 511, 1022, 1023]
            assert err.count_errors(f).tolist() == [5]
            assert bool(err.has_any(f))
    finally:
        set_config(before)
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_carrier_says_the_same_as_int64(dtype):
    """All of err on flags of one dtype and of another: equal answers, bit-equal slots."""
    results = []
    z = torch.tensor([[1.0, NAN], [2.0, 3.0], [INF, 0.0]])
    for flag_dtype in (torch.int64, dtype):
        config = ErrorConfig(flag_dtype=flag_dtype, num_slots=4)
        f = err.new(z, config)
        f = err.push(f, err.NAN, 510, config=config, where=z.isnan().any(1))
        f = err.push(f, torch.tensor([0, 5, 2]), 1022, config=config)
        g = err.push_scalar(err.new(z, config), err.SATURATED, 3, config=config)
        f = err.merge(f, g, config=config)
        f = err.ensure_mask(f, torch.tensor([True, False, True]), err.INF, 4, config=config)
        f = err.clear(f, err.OUT_OF_BOUNDS)
        value, f = err.recover_with_fallback(f, z, 0.0, 9, config=config)
        assert f.dtype is flag_dtype
        answers = [value, f.view(torch.uint8)]
        answers += [getattr(err, n)(f) for n in ("is_ok", "is_err", "has_nan", "has_inf", "all_ok")]
        answers += [getattr(err, n)(f) for n in ("has_fallback", "has_critical", "count_errors")]
        answers += [getattr(err, n)(f) for n in ("get_first_code", "get_first_location")]
        answers += [err.has_domain(f, d) for d in range(4)] + [err.has_code(f, 2)]
        answers += [err.max_severity(f).long(), err.get_ok(f).view(torch.uint8)]
        results.append(answers)
    for ours, expected in zip(results[1], results[0], strict=True):
        assert ours.dtype is expected.dtype
        assert torch.equal(ours, expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.booleans(), max_size=9),
    extra=st.lists(st.integers(0, 3), max_size=2),
    dtype=st.sampled_from(VALUES),
    flag_dtype=st.sampled_from(DTYPES),
    fill=st.sampled_from([0, 1, 1.0]),
)
def test_partitions_and_fills_of_any_batch(rows, extra, dtype, flag_dtype, fill):
    where = torch.tensor(rows, dtype=torch.bool)
    config = ErrorConfig(flag_dtype=flag_dtype)
    f = err.push(err.new(where, config), err.OVERFLOW, 1, where=where)
    z = torch.randint(0, 2, (len(rows), *extra)).to(dtype)
    ok, bad = err.partition(f, z)
    plain = z.to(torch.complex64)
    assert torch.equal(ok.to(torch.complex64), plain[~where])
    assert torch.equal(bad.to(torch.complex64), plain[where])
    mask = where.reshape(-1, *[1] * len(extra))
    filled = torch.tensor(fill, dtype=torch.complex64)
    assert torch.equal(
        err.take_ok_p(f, z, fill).to(torch.complex64), torch.where(mask, filled, plain)
    )
    assert torch.equal(
        err.take_err_p(f, z, fill).to(torch.complex64), torch.where(mask, plain, filled)
    )


def test_everything_static_compiles_in_one_graph(carrier):
    """Each call of the README's list of compiled-safe operations, together, equal to eager."""

    def fn(x):
        f = err.new(x)
        f = err.push(f, err.NAN, 42, where=x.isnan().any(-1))
        f = err.push(f, torch.full((4,), 9), "codes", err.WARN)
        f = err.push_scalar(f, err.OVERFLOW, "all")
        f = err.merge(f, err.from_code(err.INF, 3, 4))
        x = err.replace(x, 0.5, targets=[err.NAN, err.INF, 3.0])
        x, f = err.recover_with_fallback(f, x, 0.0, "rescue")
        f = err.guard(f, x, lambda v: v.sum(-1) > 0, err.SATURATED, "guard")
        f = err.clear(f, err.OVERFLOW)
        x, f = err.and_then(f, x, lambda v: (v * 2, err.new(v)))
        x, f = err.bind(f, x, lambda v: (v + 1, err.from_code(err.UNKNOWN, 1023, 4)))
        f = err.map_err_flags(f, lambda g: err.push(g, err.CLAMPED, 510))
        x = err.map_err(f, err.map_ok(f, x, torch.exp), torch.sin)
        asked = [err.is_ok(f), err.is_err(f), err.all_ok(f), err.any_err(f), err.has_nan(f)]
        asked += [err.has_inf(f), err.has_critical(f), err.has_fallback(f), err.count_errors(f)]
        asked += [err.has_domain(f, 2), err.has_code(f, err.OOB), err.max_severity(f)]
        asked += [err.get_first_code(f), err.get_first_location(f), err.get_first_severity(f)]
        return err.take_ok_p(f, x, 1), err.take_err_p(f, x, 2), f, asked

    torch._dynamo.reset()
    x = torch.randn(4, 3)
    x[1, 1], x[2, 0] = NAN, INF
    expected = fn(x)
    got = torch.compile(fn, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=0)
    assert same_bits(got[2], expected[2])
    for a, b in zip(got[3], expected[3], strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)


def test_readmes_clean_filter_compiles_where_shapes_may_vary():
    def fn(x):
        f = err.push(err.new(x), err.NAN, 1, where=x.isnan().any(-1))
        return err.take_ok(f, x), err.take_err(f, x)

    torch._dynamo.reset()
    x = torch.randn(4, 3)
    x[1, 1] = NAN
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        ok, bad = torch.compile(fn, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(ok, x[[0, 2, 3]])
    assert bad.shape == (1, 3)


def test_config_is_taken_for_one_call():
    small = ErrorConfig(num_slots=1)
    f = err.new_t(1)
    for location in (1, 2):
        f = err.push(f, err.NAN, location, config=small)
    assert [e.location for e in flags.unpack(f)] == [1]
    g = err.guard(f, torch.zeros(1), lambda v: v > 0, err.INF, 3, config=small)
    _, h = err.recover_with_fallback(f, torch.zeros(1), 0.0, 3, config=small)
    assert torch.equal(f, g)
    assert torch.equal(f, h)
    assert CONFIG.num_slots == 16
