"""torch.ops.opguard.flags_*: every op against the slow model, every dtype and layout, refusals."""

from __future__ import annotations

import gc
import math
import threading
from typing import Any

import hypothesis
import numpy
import pytest
import torch
from hypothesis import strategies as st

import flags_model as model
import opguard  # noqa: F401  (registers the ops)
from flags_model import CRITICAL, ERROR, INF, NAN, OUT_OF_BOUNDS, Policy, slot_of

OPS = torch.ops.opguard
NAN_, POS, NEG = 1, 2, 4
BOTH = NAN_ | POS | NEG
PLAIN = Policy()
inf, nan = math.inf, math.nan

few = hypothesis.settings(
    max_examples=70,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


# --- every op against the model -------------------------------------------------------------------

policies = st.builds(
    Policy,
    num_slots=st.one_of(st.integers(1, 9), st.integers(1, 300)),
    priority=st.integers(0, 2),
    order=st.integers(0, 1),
    dedupe=st.integers(0, 3),
    carrier=st.integers(0, 3),
)
# Few values collide often, which is where policies differ; all values are there too.
small_slots = st.builds(slot_of, st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))
any_slots = st.integers(0, 0xFFFF)
slots = st.one_of(small_slots, any_slots)
samples = st.one_of(st.integers(0, 6), st.integers(0, 70))


@st.composite
def flags(draw: Any, policy: Policy, batch: int) -> list[model.Row]:
    """Rows as the ops leave them, full ones, and rows with holes, as other programs may."""
    capacity = policy.capacity
    rows = []
    for _ in range(batch):
        used = draw(st.lists(slots, max_size=min(capacity, 12)))
        row = used + [0] * (capacity - len(used))
        shape = draw(st.integers(0, 7))
        if shape == 0:
            row = [0] * (capacity - len(used)) + used
        elif shape == 1 and used:
            row = [slot + (i // len(used) << 6) & 0xFFFF for i, slot in enumerate(used * capacity)]
        rows.append(row[:capacity])
    return rows


def same_rows(ours: torch.Tensor, theirs: list[model.Row], policy: Policy) -> None:
    assert ours.dtype == policy.dtype
    assert ours.shape == (len(theirs), policy.words)
    assert ours.is_contiguous()
    assert not ours.requires_grad
    assert model.to_rows(ours) == theirs


@few
@hypothesis.given(data=st.data(), policy=policies, batch=samples)
def test_push(data, policy, batch):
    rows = data.draw(flags(policy, batch))
    slot = data.draw(slots)
    where = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    f = model.to_flags(rows, policy)
    before = f.clone()
    some = [model.push(r, slot, policy) if w else r for r, w in zip(rows, where, strict=True)]
    every = [model.push(r, slot, policy) for r in rows]
    mask = torch.tensor(where, dtype=torch.bool)
    same_rows(OPS.flags_push(f, mask, slot, policy.key), some, policy)
    same_rows(OPS.flags_push_all(f, slot, policy.key), every, policy)
    assert model.to_rows(f) == rows
    assert OPS.flags_push_(f, mask, slot, policy.key) is None
    same_rows(f, some, policy)
    f = before
    OPS.flags_push_all_(f, slot, policy.key)
    same_rows(f, every, policy)


@few
@hypothesis.given(
    data=st.data(),
    policy=policies,
    batch=samples,
    location=st.integers(0, 1023),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]),
)
def test_push_codes(data, policy, batch, location, dtype):
    severity, default = data.draw(st.integers(-1, 3)), data.draw(st.integers(0, 3))
    rows = data.draw(flags(policy, batch))
    codes = data.draw(st.lists(st.integers(0, 15), min_size=batch, max_size=batch))
    expected = []
    for row, code in zip(rows, codes, strict=True):
        level = model.severity_by_code(code, default) if severity < 0 else severity
        expected.append(model.push(row, slot_of(location, code, level), policy))
    f = model.to_flags(rows, policy)
    given = torch.tensor(codes, dtype=dtype)
    out = OPS.flags_push_codes(f, given, location, severity, default, policy.key)
    same_rows(out, expected, policy)
    assert model.to_rows(f) == rows


@few
@hypothesis.given(data=st.data(), policy=policies, batch=samples, count=st.integers(1, 4))
def test_merge(data, policy, batch, count):
    several = [data.draw(flags(policy, batch)) for _ in range(count)]
    expected = several[0]
    for other in several[1:]:
        pairs = zip(expected, other, strict=True)
        expected = [model.merge(row, younger, policy) for row, younger in pairs]
    given = [model.to_flags(rows, policy) for rows in several]
    same_rows(OPS.flags_merge(given, policy.key), expected, policy)
    assert [model.to_rows(f) for f in given] == several
    for other in given[1:]:
        assert OPS.flags_merge_(given[0], other, policy.key) is None
    same_rows(given[0], expected, policy)


@few
@hypothesis.given(
    data=st.data(),
    policy=policies,
    batch=samples,
    location=st.integers(0, 1023),
    checks=st.integers(0, 7),
)
def test_check(data, policy, batch, location, checks):
    rows = data.draw(flags(policy, batch))
    value = st.sampled_from([0.0, 1.0, nan, inf, -inf])
    values = data.draw(st.lists(st.lists(value, min_size=3, max_size=3),
                                min_size=batch, max_size=batch))  # fmt: skip
    x = torch.tensor(values).reshape(batch, 3)
    found = [model.findings(sample) for sample in values]
    pairs = list(zip(rows, found, strict=True))
    old = [model.check(row, bits, checks, location, policy) for row, bits in pairs]
    empty = model.new(batch, policy)
    made = [model.check(row, bits, checks, location, policy)
            for row, bits in zip(empty, found, strict=True)]  # fmt: skip
    f = model.to_flags(rows, policy)
    assert OPS.row_findings(x).tolist() == found
    same_rows(OPS.flags_check_new(x, location, checks, policy.key), made, policy)
    same_rows(OPS.flags_check(f, x, location, checks, policy.key), old, policy)
    assert model.to_rows(f) == rows
    assert OPS.flags_check_(f, x, location, checks, policy.key) is None
    same_rows(f, old, policy)


@few
@hypothesis.given(
    data=st.data(),
    policy=policies,
    batch=samples,
    size=st.integers(0, 9),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]),
)
def test_index(data, policy, batch, size, dtype):
    location = data.draw(st.integers(0, 1023))
    rows = data.draw(flags(policy, batch))
    least = 0 if dtype == torch.uint8 else -3
    each = st.lists(st.integers(least, 12), min_size=2, max_size=2)
    values = data.draw(st.lists(each, min_size=batch, max_size=batch))
    slot = slot_of(location, OUT_OF_BOUNDS, ERROR)
    bad = [any(not 0 <= i < size for i in sample) for sample in values]
    ids = torch.tensor(values, dtype=dtype).reshape(batch, 2)

    def expected(rows: list[model.Row]) -> list[model.Row]:
        pairs = zip(rows, bad, strict=True)
        return [model.push(row, slot, policy) if wrong else row for row, wrong in pairs]

    f = model.to_flags(rows, policy)
    same_rows(OPS.flags_index(f, ids, size, location, policy.key), expected(rows), policy)
    fresh = OPS.flags_index_new(ids, size, location, policy.key)
    same_rows(fresh, expected(model.new(batch, policy)), policy)
    out, clamped = OPS.flags_index_clamp(f, ids, size, location, policy.key)
    same_rows(out, expected(rows), policy)
    assert clamped.dtype == dtype
    assert clamped.tolist() == [[min(max(i, 0), max(size - 1, 0)) for i in s] for s in values]
    assert ids.tolist() == values


@few
@hypothesis.given(
    data=st.data(), policy=policies, batch=samples, mask=any_slots, code=st.integers(0, 15)
)
def test_queries_and_clear(data, policy, batch, mask, code):
    rows = data.draw(flags(policy, batch))
    value = data.draw(slots) & mask
    f = model.to_flags(rows, policy)
    wide = model.SLOTS_A_WORD[policy.dtype] == 4
    answers = [
        (OPS.flags_find(f, mask, value), torch.bool, [model.find(r, mask, value) for r in rows]),
        (OPS.flags_ok(f), torch.bool, [not any(r) for r in rows]),
        (OPS.flags_err(f), torch.bool, [any(r) for r in rows]),
        (OPS.flags_count(f), torch.int32, [model.count(r) for r in rows]),
        (OPS.flags_max_severity(f), torch.int64 if wide else torch.int32,
         [model.max_severity(r) for r in rows]),
    ]  # fmt: skip
    for ours, dtype, theirs in answers:
        assert ours.dtype == dtype
        assert ours.tolist() == theirs
    same_rows(OPS.flags_clear(f, code), [model.clear(r, code) for r in rows], policy)
    assert model.to_rows(f) == rows


def test_flags_wider_and_narrower_than_the_configuration():
    """An op keeps the dtype and width it is given; num_slots bounds what it puts in."""
    f = torch.zeros(2, 3, dtype=torch.int32)
    for location in range(9):
        f = OPS.flags_push_all(f, slot_of(location, NAN, CRITICAL), PLAIN.key)
    assert f.dtype == torch.int32
    assert [model.location_of(s) for s in model.to_rows(f)[0]] == [0, 1, 2, 3, 4, 5]
    narrow = Policy(num_slots=2)
    f = torch.zeros(1, 4, dtype=torch.int64)
    for location in range(9):
        OPS.flags_push_all_(f, slot_of(location, NAN, CRITICAL), narrow.key)
    assert OPS.flags_count(f).tolist() == [2]


def test_merging_flags_with_themselves_and_with_other_words():
    free = Policy(num_slots=8, dedupe=model.NONE)
    rows = [[slot_of(1, NAN, CRITICAL), slot_of(2, INF, CRITICAL)] + [0] * 6]
    f = model.to_flags(rows, free)
    expected = [model.merge(rows[0], rows[0], free)]
    assert model.to_rows(OPS.flags_merge([f, f], free.key)) == expected
    narrow = f.view(torch.int32).clone()
    merged = OPS.flags_merge([f, narrow], free.key)
    assert merged.dtype == torch.int64
    assert model.to_rows(merged) == expected
    OPS.flags_merge_(f, f, free.key)
    assert model.to_rows(f) == expected
    whole = model.to_flags([rows[0], [0] * 8, rows[0]], free)
    OPS.flags_merge_(whole[1:], whole[:2], free.key)  # overlapping memory
    assert model.to_rows(whole)[1] == rows[0]
    assert model.to_rows(whole)[2] == rows[0]


def test_many_merged_at_once():
    many = [OPS.flags_push_all(torch.zeros(3, 8, dtype=torch.int64),
                               slot_of(i, NAN, CRITICAL), Policy(32).key)
            for i in range(1, 31)]  # fmt: skip
    merged = OPS.flags_merge(many, Policy(32).key)
    assert [model.location_of(s) for s in model.to_rows(merged)[2]][:30] == list(range(1, 31))


# --- detection ------------------------------------------------------------------------------------

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]
FLOAT8 = [torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e5m2fnuz, torch.float8_e4m3fnuz,
          torch.float8_e8m0fnu]  # fmt: skip
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
            torch.uint32, torch.uint64, torch.bool]  # fmt: skip


def naive(x: torch.Tensor) -> list[int]:
    """Element by element, by torch's own tests."""
    if not x.is_floating_point() and not x.is_complex():
        return [0] * (x.shape[0] if x.dim() else 1)
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    x = x.to(torch.float64)
    x = x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
    bits = [(x.isnan(), 1), (x == inf, 2), (x == -inf, 4)]
    return sum(b.any(1).int() * value for b, value in bits).tolist()  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", FLOATS + COMPLEX, ids=str)
def test_every_float_and_place(dtype):
    """One bad element anywhere in rows of many lengths, also beside the vector widths."""
    part = torch.zeros(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
    for length in (1, 2, 3, 7, 16, 31, 33, 64, 65, 130, 257):
        x = torch.randn(9, length).to(dtype) if dtype != torch.complex32 else torch.zeros(
            9, length, dtype=dtype)  # fmt: skip
        real = torch.view_as_real(x) if dtype.is_complex else x
        flat = real.reshape(9, -1)
        for row, value in ((1, nan), (3, inf), (4, -inf), (8, -nan)):
            flat[row, torch.randint(flat.shape[1], (1,)).item()] = torch.tensor(value, dtype=part)
        flat[6, 0], flat[6, -1] = torch.finfo(part).max, torch.finfo(part).min
        expected = [0, 1, 0, 2, 4, 0, 0, 0, 1]
        assert OPS.row_findings(x).tolist() == expected


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit_pattern_of_nan(dtype):
    """Quiet and signalling, of either sign, whatever the payload; not a float compare."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    least = torch.tensor([inf], dtype=dtype).view(bits) + 1
    most = torch.tensor([-1], dtype=bits)
    sign = torch.tensor([1 << (8 * dtype.itemsize - 1)], dtype=torch.float64).neg().to(bits)
    x = torch.stack([least, most, least | sign, most ^ sign, least - 1, least - 2]).view(dtype)
    assert OPS.row_findings(x).tolist() == [1, 1, 1, 1, 2, 0]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_all_256_values_of_float8(dtype):
    x = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(256, 1)
    expected = naive(x.float())
    assert OPS.row_findings(x).tolist() == expected
    wide = x.expand(256, 70).contiguous()
    assert OPS.row_findings(wide).tolist() == expected


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_never_have_nan(dtype):
    x = torch.full((3, 5), -1).to(dtype)
    assert OPS.row_findings(x).tolist() == [0, 0, 0]
    f = OPS.flags_check_new(x, 1, BOTH, PLAIN.key)
    assert f.shape == (3, 4)
    assert not f.any()


def layouts() -> dict[str, torch.Tensor]:
    x = torch.randn(6, 4, 5, 3)
    for sample, value in ((1, nan), (2, inf), (4, -inf)):
        x[sample, sample % 4, sample % 5, sample % 3] = value
    image = torch.randn(2, 3, 8, 8)
    image[1, 2, 7, 7] = nan
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 3),
        "inner transposed": x.transpose(1, 2),
        "all turned": x.permute(3, 2, 1, 0),
        "columns": x.reshape(6, 60).t(),
        "a slice": x[1:5, :, 1:4],
        "every second": x[:, :, ::2],
        "every third sample": x[::3],
        "one column": x[:, 0, 0, 0],
        "channels_last": image.to(memory_format=torch.channels_last),
        "channels_last_3d": torch.randn(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
        "expanded": torch.tensor([nan, 1.0]).reshape(2, 1).expand(2, 50),
        "expanded samples": torch.tensor([1.0, nan]).expand(50, 2),
        "diagonal": torch.full((5, 5), inf).diagonal(),
        "unfolded": torch.arange(10.0).unfold(0, 3, 1),
        "0-d": torch.tensor(nan),
        "no samples": torch.zeros(0, 3),
        "empty samples": torch.zeros(3, 0),
        "ten dimensions": torch.full((2,) * 10, nan),
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_layout(name, dtype):
    x = layouts()[name].to(dtype)
    if name in {"expanded", "expanded samples"}:
        x = layouts()[name].contiguous()[..., :1].to(dtype).expand_as(layouts()[name])
    if name in {"channels_last", "columns", "all turned"}:
        assert not x.is_contiguous()
    expected = naive(x)
    assert OPS.row_findings(x).tolist() == expected
    f = OPS.flags_check_new(x, 9, BOTH, PLAIN.key)
    assert OPS.flags_err(f).tolist() == [bits != 0 for bits in expected]


def test_0_d_is_one_sample():
    f = OPS.flags_check_new(torch.tensor(nan), 3, BOTH, PLAIN.key)
    assert model.to_rows(f) == [[slot_of(3, NAN, CRITICAL)] + [0] * 15]
    g, ids = OPS.flags_index_clamp(f, torch.tensor(7), 5, 4, PLAIN.key)
    assert ids.shape == ()
    assert ids.item() == 4
    assert OPS.flags_count(g).tolist() == [2]


def test_conjugated_and_negated_views():
    z = torch.zeros(4, 3, dtype=torch.complex64)
    z[1, 0] = complex(0, inf)
    z[2, 0] = complex(-inf, 0)
    z[3, 0] = complex(nan, 0)
    conjugate = z.conj()
    assert conjugate.is_conj()
    assert OPS.row_findings(conjugate).tolist() == [0, 4, 4, 1]
    negative = conjugate.imag
    assert negative.is_neg()
    assert OPS.row_findings(negative).tolist() == [0, 4, 0, 0]
    f = OPS.flags_check_new(negative, 1, NEG, PLAIN.key)
    assert OPS.flags_err(f).tolist() == [False, True, False, False]
    f = OPS.flags_check_new(negative, 1, POS, PLAIN.key)
    assert not OPS.flags_err(f).any()
    OPS.flags_check_(f, negative, 1, NEG, PLAIN.key)
    assert OPS.flags_err(f).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        (NAN_, [1, 0, 0]),
        (NAN_ | POS, [1, 1, 0]),
        (POS | NEG, [0, 1, 1]),
        (NEG, [0, 0, 1]),
        (0, [0, 0, 0]),
    ],
)
def test_what_is_not_asked_for_is_not_recorded(checks, expected):
    x = torch.tensor([[nan], [inf], [-inf]])
    f = OPS.flags_check_new(x, 1, checks, PLAIN.key)
    assert OPS.flags_count(f).tolist() == expected


def test_nan_comes_before_inf():
    f = OPS.flags_check_new(torch.tensor([[inf, nan]]), 5, BOTH, PLAIN.key)
    assert model.to_rows(f)[0][:3] == [slot_of(5, NAN, CRITICAL), slot_of(5, INF, CRITICAL), 0]


def test_flags_and_masks_of_any_layout():
    wide = torch.zeros(5, 8, dtype=torch.int64)
    slot = slot_of(1, NAN, CRITICAL)
    where = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0]], dtype=torch.bool)
    codes = torch.tensor([[1, 0, 2], [0, 9, 0], [3, 3, 3], [0, 0, 5], [1, 9, 9]]).t()[1]
    for f in (wide[:, :4], wide[:, ::2], torch.zeros(4, 5, dtype=torch.int64).t()):
        out = OPS.flags_push(f, where[:, 0], slot, PLAIN.key)
        assert out.is_contiguous()
        assert OPS.flags_err(out).tolist() == [True, False, True, False, True]
        assert not OPS.flags_err(f).any()
        OPS.flags_push_(f, where[:, 1], slot, PLAIN.key)
        assert OPS.flags_err(f).tolist() == [False, True, True, False, False]
        coded = OPS.flags_push_codes(f, codes, 1, -1, 2, PLAIN.key)
        assert OPS.flags_count(coded).tolist() == [0, 2, 2, 0, 1]
        f.zero_()
    assert not wide.any()
    one = torch.zeros(1, 4, dtype=torch.int64).expand(5, 4)
    assert OPS.flags_err(OPS.flags_push_all(one, slot, PLAIN.key)).all()
    assert not one.any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_samples_on_several_threads(threads):
    """Enough for every op to be shared among torch's threads; the answers do not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.zeros(50_000, 40)
        bad = torch.arange(0, 50_000, 777)
        x[bad, bad % 40] = nan
        f = OPS.flags_check_new(x, 1, BOTH, PLAIN.key)
        assert OPS.flags_err(f).nonzero().flatten().tolist() == bad.tolist()
        merged = OPS.flags_merge([f, f.flip(0)], PLAIN.key)
        assert OPS.flags_count(merged).sum() == len(
            set(bad.tolist()) | set((49_999 - bad).tolist())
        )
        assert OPS.flags_max_severity(merged).sum() == 3 * OPS.flags_err(merged).sum()
        assert not OPS.flags_err(OPS.flags_clear(merged, NAN)).any()
        few_rows = torch.zeros(3, 2_000_000)
        few_rows[1, 1_999_999] = inf
        assert OPS.row_findings(few_rows).tolist() == [0, 2, 0]
        ids = torch.randint(0, 9, (50_000, 3)).t().contiguous().t()
        ids[77, 2] = 9
        out, clamped = OPS.flags_index_clamp(f, ids, 9, 3, PLAIN.key)
        assert torch.equal(clamped, ids.clamp(max=8))
        assert OPS.flags_count(out).sum() == len(bad) + 1
    finally:
        torch.set_num_threads(before)


def test_more_than_2_to_the_31_elements():
    """Zeros that the kernel of the system makes when they are read: they take no memory."""
    big = torch.from_numpy(numpy.zeros((2, 2**30 + 9), dtype=numpy.uint8)).view(torch.float8_e5m2)
    big.view(torch.uint8)[1, -1] = 0x7F
    assert OPS.row_findings(big).tolist() == [0, 1]
    wide = torch.tensor([[0.0], [inf]]).expand(2, 2**31 + 5)
    assert OPS.row_findings(wide).tolist() == [0, 2]


# --- refusals -------------------------------------------------------------------------------------


def refused(function: Any, *args: Any) -> str:
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        function(*args)
    return str(caught.value).splitlines()[0]


def good() -> dict[str, Any]:
    return {"f": torch.zeros(3, 4, dtype=torch.int64), "x": torch.zeros(3, 5)}


@pytest.mark.parametrize(("op", "args", "words"), [
    ("flags_check", lambda f, x: (f, x, 1024, 7, PLAIN.key), ["0..1023", "1024"]),
    ("flags_check_", lambda f, x: (f, x, -1, 7, PLAIN.key), ["0..1023", "-1"]),
    ("flags_check_new", lambda f, x: (x, 1, 8, PLAIN.key), ["checks", "8"]),
    ("flags_check_new", lambda f, x: (x, 1, -1, PLAIN.key), ["checks", "-1"]),
    ("flags_check_new", lambda f, x: (x, 1, 7, 0), ["key", "0"]),
    ("flags_check_new", lambda f, x: (x, 1, 7, 1 << 23 | 16), ["key"]),
    ("flags_check_new", lambda f, x: (x, 1, 7, 16 | 3 << 16), ["key"]),
    ("flags_check_new", lambda f, x: (x, 1, 7, -1), ["key", "-1"]),
    ("flags_check", lambda f, x: (f, x[:2], 1, 7, PLAIN.key), ["x", "3 samples", "got 2"]),
    ("flags_check", lambda f, x: (f, x[0, 0], 1, 7, PLAIN.key), ["x", "3 samples", "got 1"]),
    ("flags_check_", lambda f, x: (f[0], x, 1, 7, PLAIN.key), ["(N, W)"]),
    ("flags_check", lambda f, x: (f[:, :0], x, 1, 7, PLAIN.key), ["W > 0"]),
    ("flags_check", lambda f, x: (f.half(), x, 1, 7, PLAIN.key), ["int64, int32", "float16"]),
    ("flags_check_", lambda f, x: (f[:1].expand(3, 4), x, 1, 7, PLAIN.key), ["clone()"]),
    ("flags_push", lambda f, x: (f, torch.ones(3), 7, PLAIN.key), ["where", "bool", "float32"]),
    ("flags_push", lambda f, x: (f, torch.ones(3, 1).bool(), 7, PLAIN.key), ["where", "(N,)"]),
    ("flags_push_", lambda f, x: (f, torch.ones(2).bool(), 7, PLAIN.key), ["where", "got 2"]),
    ("flags_push_all", lambda f, x: (f, 1 << 16, PLAIN.key), ["slot", "65536"]),
    ("flags_push_all_", lambda f, x: (f, -1, PLAIN.key), ["slot", "-1"]),
    ("flags_push_codes", lambda f, x: (f, x[:, 0], 1, -1, 2, PLAIN.key), ["codes", "float32"]),
    ("flags_push_codes", lambda f, x: (f, f[:, :1], 1, -1, 2, PLAIN.key), ["codes", "(N,)"]),
    ("flags_push_codes", lambda f, x: (f, f[:2, 0], 1, -1, 2, PLAIN.key), ["codes", "got 2"]),
    ("flags_push_codes", lambda f, x: (f, f[:, 0] + 16, 1, -1, 2, PLAIN.key), ["codes", "0..15"]),
    ("flags_push_codes", lambda f, x: (f, f[:, 0] - 1, 1, -1, 2, PLAIN.key), ["codes", "0..15"]),
    ("flags_push_codes", lambda f, x: (f, f[:, 0], 1, 4, 2, PLAIN.key), ["severity", "4"]),
    ("flags_push_codes", lambda f, x: (f, f[:, 0], 1, -1, -1, PLAIN.key), ["default_severity"]),
    ("flags_merge", lambda f, x: ([f, f[:2]], PLAIN.key), ["same batch", "3 and 2"]),
    ("flags_merge_", lambda f, x: (f, f[:, :2], PLAIN.key), ["slots", "16 and 8"]),
    ("flags_merge_", lambda f, x: (f, f.int(), PLAIN.key), ["slots", "16 and 8"]),
    ("flags_find", lambda f, x: (f, 1 << 16, 0), ["mask"]),
    ("flags_find", lambda f, x: (f, 0, -1), ["value"]),
    ("flags_clear", lambda f, x: (f, 16), ["0..15", "16"]),
    ("flags_index", lambda f, x: (f, x, 3, 1, PLAIN.key), ["ids", "int64", "float32"]),
    ("flags_index_new", lambda f, x: (f.bool(), 3, 1, PLAIN.key), ["ids", "bool"]),
    ("flags_index_new", lambda f, x: (f, -1, 1, PLAIN.key), ["size", "-1"]),
    ("flags_index_clamp", lambda f, x: (f, f[:2], 3, 1, PLAIN.key), ["ids", "got 2"]),
    ("flags_ok", lambda f, x: (f[None],), ["(N, W)"]),
])  # fmt: skip
def test_bad_arguments_are_one_clear_sentence(op, args, words):
    f, x = good().values()
    before = f.clone()
    said = refused(getattr(OPS, op), *args(f, x))
    for word in words:
        assert word in said, said
    assert len(said) < 260
    assert torch.equal(f, before)


def test_sparse_is_refused():
    sparse = torch.eye(3).to_sparse()
    assert refused(OPS.flags_check_new, sparse, 1, 7, PLAIN.key)
    assert refused(OPS.flags_check, good()["f"], sparse, 1, 7, PLAIN.key)


def uses(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def test_no_memory_for_the_result_keeps_nothing():
    """Flags whose copy no machine has room for: torch refuses, and every handle is given back."""
    f = torch.zeros(1, 4, dtype=torch.int64)
    apart = torch.zeros(8, 1, dtype=torch.int64)
    x, ids = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    many = 2**44
    held = [f, apart, x, ids]
    before = [uses(t) for t in held]
    for op, args in (
        ("flags_push_all", lambda: (f.expand(many, 4), 7, PLAIN.key)),
        ("flags_check_new", lambda: (x.expand(many, 1), 1, 7, PLAIN.key)),
        ("row_findings", lambda: (x.expand(many, 1),)),
        ("flags_check", lambda: (f.expand(many, 4), x.expand(many, 1), 1, 7, PLAIN.key)),
        ("flags_index_clamp", lambda: (f.expand(many, 4), ids.expand(many), 3, 1, PLAIN.key)),
        ("flags_merge", lambda: ([f.expand(many, 4)] * 2, PLAIN.key)),
        ("flags_merge", lambda: ([f.expand(many, 4)] * 12, PLAIN.key)),
        ("flags_count", lambda: (f.expand(many, 4),)),
        ("flags_clear", lambda: (apart[::2].expand(4, many).t(), 1)),
    ):
        said = refused(getattr(OPS, op), *args())
        assert "alloc" in said or "memory" in said
    gc.collect()  # the exceptions hold their frames
    assert [uses(t) for t in held] == before


def test_a_refusal_keeps_nothing():
    f, x = good().values()
    other = torch.zeros(2, 4, dtype=torch.int64)
    before = [uses(t) for t in (f, x, other)]
    for op, args in (
        ("flags_check", (f, x, 5000, 7, PLAIN.key)),
        ("flags_check_", (f, x[:2], 1, 7, PLAIN.key)),
        ("flags_index_clamp", (f, other, 1, 7, PLAIN.key)),
        ("flags_merge", ([f, other], PLAIN.key)),
        ("flags_merge", ([f] * 11 + [other], PLAIN.key)),
        ("flags_push", (f, other.bool()[:, 0], 7, PLAIN.key)),
    ):
        refused(getattr(OPS, op), *args)
    gc.collect()  # the exceptions hold their frames
    assert [uses(t) for t in (f, x, other)] == before


def test_inference_tensors_and_tensors_that_require_grad():
    with torch.inference_mode():
        x = torch.tensor([[nan], [0.0]])
        made = OPS.flags_check_new(x, 1, BOTH, PLAIN.key)
    assert OPS.flags_err(made).tolist() == [True, False]
    out = OPS.flags_check(made, x, 2, BOTH, PLAIN.key)
    assert OPS.flags_count(out).tolist() == [2, 0]
    leaf = x.clone().requires_grad_()
    for carrier in range(4):
        key = Policy(carrier=carrier).key
        for f in (
            OPS.flags_check_new(leaf, 1, BOTH, key),
            OPS.flags_check_new(leaf * 2, 1, 7, key),
        ):
            assert not f.requires_grad
            assert f.grad_fn is None
            assert not OPS.flags_check(f, leaf * 2, 1, BOTH, key).requires_grad
            OPS.flags_check_(f, leaf * 2, 1, BOTH, key)
            assert not f.requires_grad


def test_flush_to_zero_changes_nothing():
    """Float words are denormals and NaN patterns; nothing reads them as floats."""
    everything = [slot_of(511, NAN, CRITICAL)] * 2 + [slot_of(1022, INF, CRITICAL), 1 << 6 | 5]
    for carrier in (2, 3):
        policy = Policy(num_slots=4, carrier=carrier, dedupe=model.NONE)
        torch.set_flush_denormal(True)
        try:
            f = model.to_flags([everything, [0, 0, 0, 0], [5, 0, 0, 0]], policy)
            out = OPS.flags_merge([OPS.flags_push_all(f, 0, policy.key)], policy.key)
            assert model.to_rows(out) == [everything, [0, 0, 0, 0], [5, 0, 0, 0]]
            assert OPS.flags_err(f).tolist() == [True, False, True]
        finally:
            torch.set_flush_denormal(False)


def test_sixteen_threads_at_once():
    x = torch.zeros(64, 33)
    x[7, 5] = nan
    expected = OPS.flags_check_new(x, 1, BOTH, PLAIN.key)
    shared = torch.zeros(64, 4, dtype=torch.int64)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            mine = torch.zeros(64, 4, dtype=torch.int64)
            for i in range(60):
                assert torch.equal(OPS.flags_check_new(x, 1, BOTH, PLAIN.key), expected)
                OPS.flags_check_(mine, x, 1 + (seed + i) % 9, BOTH, PLAIN.key)
                assert OPS.flags_err(OPS.flags_merge([shared, expected], PLAIN.key))[7]
                with pytest.raises(RuntimeError, match="location"):
                    OPS.flags_check_(mine, x, 4000, BOTH, PLAIN.key)
            assert OPS.flags_count(mine).sum() == 9
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
