"""Rows of a tensor: where its samples lie after any op, and the table of rules.

The oracle is torch itself: a tensor that holds in each element the number of its sample goes
through the same ops, and each element of the result must lie in a row that carries that sample.
"""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import opguard.flags as tg
from opguard.flags._rows import (
    Axis,
    FlagPayload,
    Rows,
    SamplePayload,
    cat_rows,
    merge_rows,
    plan,
    rules,
    stack_rows,
)
from opguard.flags._rows.payloads import MIXED, NO_SAMPLE

NOTHING = -1  # in the oracle: an element of no sample
aten = torch.ops.aten
KEY = tg.ErrorConfig(num_slots=16).key

few = hypothesis.settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


# --- the oracle -----------------------------------------------------------------------------------


def flags_of(samples: int) -> torch.Tensor:
    """Sample i has one error, at location i + 1."""
    config = tg.ErrorConfig(num_slots=16)
    f = tg.err.new_t(samples, config=config)
    for i in range(samples):
        where = torch.arange(samples) == i
        f = tg.err.push(f, tg.err.NAN, i + 1, where=where, config=config)
    return f


def fresh(shape: tuple[int, ...], dim: int) -> tuple[Rows, Rows, torch.Tensor]:
    """(rows with flags, rows with sample numbers, the number of each element)."""
    samples = shape[dim]
    axes = (Axis(dim, 1, samples),)
    around = [1] * len(shape)
    around[dim] = samples
    index = torch.arange(samples).view(around).expand(shape).clone()
    flags = Rows(shape, axes, FlagPayload(flags_of(samples), KEY))
    return flags, Rows(shape, axes, SamplePayload(samples)), index


def row_numbers(rows: Rows) -> torch.Tensor:
    """The row of each element, by the definition of an axis."""
    result = torch.zeros(rows.shape, dtype=torch.long)
    step = 1
    for axis in reversed(rows.axes):
        assert rows.shape[axis.dim] % (axis.inner * axis.size or 1) == 0
        at = torch.arange(rows.shape[axis.dim]) // axis.inner % max(axis.size, 1)
        around = [1] * len(rows.shape)
        around[axis.dim] = len(at)
        result = result + at.view(around) * step
        step *= axis.size
    assert step == rows.payload.rows
    return result


def samples_in(rows: Rows) -> list[set[int]]:
    """The samples each row carries; of sample numbers MIXED is {MIXED}."""
    payload = rows.payload
    if isinstance(payload, FlagPayload):
        return [{error.location - 1 for error in tg.flags.unpack(payload.flags, i)}
                for i in range(payload.rows)]  # fmt: skip
    ids = payload.ids()
    found = [MIXED] * payload.rows if ids is None else ids.tolist()
    return [set() if one == NO_SAMPLE else {one} for one in found]


def check(rows: Rows, index: torch.Tensor, *, exact: bool = True) -> None:
    """Each element's row carries its sample: that alone if ``exact``."""
    assert rows.shape == tuple(index.shape)
    carried = samples_in(rows)
    flags = isinstance(rows.payload, FlagPayload)
    if not index.numel():
        return
    for row, sample in zip(row_numbers(rows).flatten().tolist(), index.flatten().tolist()):  # noqa: B905
        if sample == NOTHING:
            continue
        if exact:
            assert carried[row] == {sample}
        elif flags:
            assert sample in carried[row]
        else:
            assert carried[row] in ({sample}, {MIXED})


def check_all(parts: tuple[Rows, Rows], index: torch.Tensor, *, exact: bool = True) -> None:
    for rows in parts:
        check(rows, index, exact=exact)
        whole = rows.aligned()
        check(whole, index, exact=exact)
        assert all(a.inner == 1 and a.size == rows.shape[a.dim] for a in whole.axes)
        assert whole.dims == rows.dims
        assert whole.payload.rows == math.prod(rows.shape[dim] for dim in rows.dims)


# --- programs -------------------------------------------------------------------------------------


def factorings(draw: Any, shape: tuple[int, ...]) -> list[int]:
    """Another shape of as many elements: dimensions joined, and split along their divisors."""
    sizes = list(shape)
    for _ in range(draw(st.integers(1, 3))):
        if len(sizes) > 1 and draw(st.booleans()):
            k = draw(st.integers(0, len(sizes) - 2))
            sizes[k : k + 2] = [sizes[k] * sizes[k + 1]]
        elif sizes:
            k = draw(st.integers(0, len(sizes) - 1))
            divisors = [d for d in range(1, sizes[k] + 1) if sizes[k] % d == 0] or [1]
            d = draw(st.sampled_from(divisors))
            sizes[k : k + 1] = [d, sizes[k] // d]
    return sizes


def a_dim(draw: Any, index: torch.Tensor) -> int:
    return draw(st.integers(-index.dim(), index.dim() - 1))


def reshape(draw: Any, index: torch.Tensor) -> Any:
    sizes = factorings(draw, tuple(index.shape))
    return lambda r: r.reshaped(sizes), index.reshape(sizes)


def permute(draw: Any, index: torch.Tensor) -> Any:
    order = draw(st.permutations(range(index.dim())))
    order = [k - index.dim() if draw(st.booleans()) else k for k in order]
    return lambda r: r.permuted(order), index.permute(order)


def select(draw: Any, index: torch.Tensor) -> Any:
    dim = a_dim(draw, index)
    size = index.shape[dim]
    if size == 0:
        return lambda r: r, index
    i = draw(st.integers(-size, size - 1))
    return lambda r: r.selected(dim, i), index.select(dim, i)


def cut(draw: Any, index: torch.Tensor) -> Any:
    dim = a_dim(draw, index)
    ends = st.one_of(st.none(), st.integers(-9, 9), st.just(2**63 - 1))
    start, end, step = draw(ends), draw(ends), draw(st.integers(1, 3))
    new = aten.slice.Tensor(index, dim, start, end, step)
    return lambda r: r.sliced(dim, start, end, step), new


def take(draw: Any, index: torch.Tensor) -> Any:
    dim = a_dim(draw, index)
    size = index.shape[dim]
    at = draw(st.lists(st.integers(0, size - 1), max_size=5)) if size else []
    taken = torch.tensor(at, dtype=torch.long)
    return lambda r: r.taken(dim, taken), index.index_select(dim, taken)


def flip(draw: Any, index: torch.Tensor) -> Any:
    dims = draw(st.lists(st.integers(0, index.dim() - 1), unique=True))
    return lambda r: r.flipped(dims), index.flip(dims)


def roll(draw: Any, index: torch.Tensor) -> Any:
    dim, shift = a_dim(draw, index), draw(st.integers(-9, 9))
    return lambda r: r.rolled(dim, shift), index.roll(shift, dim)


def repeat(draw: Any, index: torch.Tensor) -> Any:
    more = draw(st.integers(0, 1))
    counts = [draw(st.integers(1, 2)) for _ in range(index.dim() + more)]
    return lambda r: r.repeated(counts), index.repeat(counts)


def expand(draw: Any, index: torch.Tensor) -> Any:
    new = draw(st.lists(st.integers(1, 2), max_size=1))
    sizes = [draw(st.integers(1, 3)) if s == 1 else draw(st.sampled_from([-1, s]))
             for s in index.shape]  # fmt: skip
    return lambda r: r.expanded([*new, *sizes]), index.expand([*new, *sizes])


def unsqueeze(draw: Any, index: torch.Tensor) -> Any:
    dim = draw(st.integers(-index.dim() - 1, index.dim()))
    return lambda r: r.unsqueezed(dim), index.unsqueeze(dim)


def squeeze(draw: Any, index: torch.Tensor) -> Any:
    if draw(st.booleans()):
        return lambda r: r.squeezed(), index.squeeze()
    dim = a_dim(draw, index)
    return lambda r: r.squeezed([dim]), index.squeeze(dim)


def pad(draw: Any, index: torch.Tensor) -> Any:
    dim = draw(st.integers(0, index.dim() - 1))
    size = index.shape[dim]
    before, after = draw(st.integers(-(size // 2), 2)), draw(st.integers(-(size // 2), 2))
    around = [0, 0] * (index.dim() - dim - 1) + [before, after]
    new = torch.nn.functional.pad(index, around, value=NOTHING)
    return lambda r: r.padded(dim, before, after), new


def cat(draw: Any, index: torch.Tensor) -> Any:
    """Beside a turned copy of itself, and perhaps a tensor without rows."""
    dim = a_dim(draw, index)
    turned = index.flip(dim)
    shapes = [tuple(index.shape)] * 2
    parts = [index, turned]
    plain = draw(st.booleans())
    if plain:
        parts.append(torch.full_like(index, NOTHING))
    parts.append(index.new_empty(0))

    def rows(r: Rows) -> Rows | None:
        both = [(r, shapes[0]), (r.flipped([dim]), shapes[1])]
        return cat_rows(both + [(None, shapes[0])] * plain + [(None, (0,))], dim)

    return rows, torch.cat(parts, dim)


def stack(draw: Any, index: torch.Tensor) -> Any:
    dim = draw(st.integers(-index.dim() - 1, index.dim()))
    turned = [0] if index.dim() else []
    shape = tuple(index.shape)
    if draw(st.booleans()):
        turned = []

    def rows(r: Rows) -> Rows | None:
        return stack_rows([(r, shape), (None, shape), (r.flipped(turned), shape)], dim)

    nothing = torch.full_like(index, NOTHING)
    return rows, torch.stack([index, nothing, index.flip(turned)], dim)


STEPS = [reshape, permute, select, cut, take, flip, roll, repeat, expand, unsqueeze, squeeze,
         pad, cat, stack]  # fmt: skip
ANY_DIM = {reshape, unsqueeze, stack}  # the others need a dimension
shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


def program(data: st.DataObject, steps: list[Any]) -> tuple[tuple[Rows, Rows], torch.Tensor]:
    draw = data.draw
    flags, samples, index = fresh(draw(shapes), draw(st.integers(0, 2)))
    parts = (flags, samples)
    for step in steps:
        if index.dim() == 0 and step not in ANY_DIM:
            continue
        change, new = step(draw, index)
        if new.numel() > 600 or new.dim() > 5:
            continue
        parts, index = tuple(change(rows) for rows in parts), new
        check_all(parts, index)
    return parts, index


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@hypothesis.settings(few, max_examples=15)
@hypothesis.given(data=st.data())
def test_a_step_and_what_splits_the_batch_before_it(data: st.DataObject, step: Any):
    program(data, [reshape, permute, step])


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("new", [(2, 9), (9, 2), (6, 3), (3, 2, 3), (2, 3, 3), (1, 18), (3, 6)])
def test_a_reshape_that_cuts_the_batch_keeps_its_samples_apart(new: tuple[int, ...], dim: int):
    flags, samples, index = fresh((3, 3, 2), dim)
    check_all((flags.reshaped(new), samples.reshaped(new)), index.reshape(new))


def test_two_axes_that_a_reshape_cuts_are_kept_apart():
    flags, samples, index = fresh((6, 2), 0)
    order, sizes = (2, 1, 0), (3, 4)
    turned = index.reshape(3, 2, 2).permute(order)
    parts = [rows.reshaped((3, 2, 2)).permuted(order) for rows in (flags, samples)]
    assert len(parts[0].axes) == 2
    check_all(tuple(rows.reshaped(sizes) for rows in parts), turned.reshape(sizes))


def test_a_reshape_that_would_make_very_many_rows_merges_them():
    flags, _, index = fresh((3, 5, 1009), 0)
    cut = flags.reshaped((5, 3 * 1009))
    assert cut.payload.rows == 1
    check(cut, index.reshape(5, 3 * 1009), exact=False)


@few
@hypothesis.given(data=st.data())
def test_programs_of_moves_are_followed_exactly(data: st.DataObject):
    program(data, [data.draw(st.sampled_from(STEPS)) for _ in range(5)])


# --- where rows meet ------------------------------------------------------------------------------


def hot(index: torch.Tensor, samples: int) -> torch.Tensor:
    """(..., samples) bool: what each element came from."""
    return index.unsqueeze(-1) == torch.arange(samples)


def check_sets(rows: Rows, hots: torch.Tensor) -> None:
    """A row carries what its elements came from, all of it and nothing else."""
    assert rows.shape == tuple(hots.shape[:-1])
    if not hots.numel():  # rows of no element may carry anything, and there may be none
        return
    carried = samples_in(rows)
    expected: list[set[int]] = [set() for _ in carried]
    flat = hots.reshape(-1, hots.shape[-1])
    for row, sources in zip(row_numbers(rows).flatten().tolist(), flat, strict=True):
        expected[row] |= set(sources.nonzero().flatten().tolist())
    if isinstance(rows.payload, SamplePayload):
        expected = [one if len(one) < 2 else {MIXED} for one in expected]
        # A row of MIXED and others stays MIXED; nothing is proven of a payload without numbers.
        carried = [{MIXED} if MIXED in one else one for one in carried]
    assert carried == expected


def both(first: Any, second: Any) -> tuple[Rows, Rows]:
    pairs = list(zip(first, second, strict=True))
    return tuple(merge_rows([a, b], torch.broadcast_shapes(a.shape, b.shape)) for a, b in pairs)


@few
@hypothesis.given(data=st.data())
def test_a_sum_of_two_programs_holds_what_both_bring(data: st.DataObject):
    moves = [permute, cut, flip, roll, take]
    shape, dim = data.draw(shapes), data.draw(st.integers(0, 2))
    sides = []
    for _ in range(2):
        flags, samples, index = fresh(shape, dim)
        parts = (flags, samples)
        for step in data.draw(st.lists(st.sampled_from(moves), max_size=2)):
            change, index = step(data.draw, index)
            parts = tuple(change(rows) for rows in parts)
        sides.append((parts, index))
    (first, one), (second, two) = sides
    try:
        torch.broadcast_shapes(one.shape, two.shape)
    except RuntimeError:
        return
    hots = torch.logical_or(hot(one, 4), hot(two, 4))
    for rows in both(first, second):
        carried = samples_in(rows)
        for row, sources in zip(  # at least what the elements came from
            row_numbers(rows).flatten().tolist(), hots.reshape(-1, 4), strict=True
        ):
            found = set(sources.nonzero().flatten().tolist())
            assert found <= carried[row] or carried[row] == {MIXED}
    if one.shape == two.shape and [a.dim for a in first[0].axes] == [a.dim for a in second[0].axes]:
        for rows in both(first, second):
            check_sets(rows, hots)


@few
@hypothesis.given(data=st.data())
def test_reductions_and_mixes_hold_all_along_their_dimensions(data: st.DataObject):
    parts, index = program(data, [reshape, permute])
    if index.dim() == 0:
        return
    samples = int(index.max()) + 1
    dims = data.draw(st.lists(st.integers(0, index.dim() - 1), min_size=1, unique=True))
    named = [dim - index.dim() if data.draw(st.booleans()) else dim for dim in dims]
    hots = hot(index, samples)
    kept = hots.amax(dims, keepdim=True)
    for rows in parts:
        check_sets(rows.reduced(named), hots.amax(dims))
        check_sets(rows.reduced(named, keepdim=True), kept)
        mixed = rows.mixed(named)
        assert mixed.dims == rows.dims
        check_sets(mixed.aligned(), kept.expand_as(hots))
        check_sets(rows.whole((2, 2)), hots.flatten(0, -2).amax(0).expand(2, 2, samples))
    dim = named[0]
    bigger = kept.expand_as(hots)
    bigger = torch.cat([bigger, bigger], dim if dim >= 0 else dim - 1)
    for rows in parts:
        if len(dims) == 1:
            check_sets(rows.resized(dim, index.shape[dim] * 2).aligned(), bigger)


@few
@hypothesis.given(data=st.data())
def test_gather_takes_each_element_from_its_row(data: st.DataObject):
    parts, index = program(data, [data.draw(st.sampled_from([permute, reshape, flip, repeat]))])
    samples = int(index.max()) + 1
    dim = data.draw(st.integers(0, index.dim() - 1))
    sizes = [data.draw(st.integers(1, size)) for size in index.shape]
    sizes[dim] = data.draw(st.integers(0, 4))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    at = torch.randint(0, index.shape[dim], sizes)
    for rows in parts:
        check_sets(rows.reordered_by(at, dim), hot(index.gather(dim, at), samples))


# --- sizes that are symbols -----------------------------------------------------------------------

SYMBOLIC = {
    "joined": lambda r, n: r.reshaped((n * 3, 4)),
    "joined and split": lambda r, n: r.reshaped((n * 3, 4)).reshaped((n, 3, 4)),
    "joined, moved, split": lambda r, n: (
        r.permuted((1, 0, 2)).reshaped((3 * n, 4)).reshaped((3, n, 4)).permuted((1, 0, 2))
    ),
    "flat": lambda r, n: r.reshaped((n * 12,)),
    "repeated": lambda r, n: r.repeated((2, 1, 1)),
    "new first dimension": lambda r, n: r.expanded((2, n, 3, 4)).reshaped((2 * n, 3, 4)),
    "sliced": lambda r, n: r.sliced(0, 1, None),
    "sliced from the end": lambda r, n: r.sliced(0, -2, 2**63 - 1),
    "every second": lambda r, n: r.sliced(0, 0, n, 2),
    "joined and sliced": lambda r, n: r.reshaped((n * 3, 4)).sliced(0, 3, n * 3),
    "selected": lambda r, n: r.selected(0, -1),
    "rolled": lambda r, n: r.rolled(0, 1),
    "flipped": lambda r, n: r.flipped((0, 1)),
    "padded": lambda r, n: r.padded(0, 1, 0),
    "mixed": lambda r, n: r.mixed((0,)),
    "reduced": lambda r, n: r.reduced((0, 1), keepdim=True),
    "beside itself": lambda r, n: cat_rows([(r, r.shape), (r.flipped((0,)), r.shape)], 0),
    "stacked": lambda r, n: stack_rows([(r, r.shape), (r.flipped((0,)), r.shape)], 1),
    "added to its mirror": lambda r, n: merge_rows([r, r.flipped((0,))], r.shape),
    "added to one row": lambda r, n: merge_rows([r.reduced((0,), True), r], r.shape),
    "taken": lambda r, n: r.taken(0, torch.tensor([2, 0, 0])),
    "gathered": lambda r, n: r.reordered_by(torch.arange(n).flip(0).view(n, 1, 1), 0),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_a_traced_program_follows_batches_of_other_sizes(name: str):
    def public(flags: torch.Tensor) -> torch.Tensor:
        n = flags.shape[0]
        rows = Rows((n, 3, 4), (Axis(0, 1, n),), FlagPayload(flags, KEY))
        return SYMBOLIC[name](rows, n).aligned().payload.flags

    traced = make_fx(public, tracing_mode="symbolic")(flags_of(5))
    for samples in (4, 7):
        assert torch.equal(traced(flags_of(samples)), public(flags_of(samples)))


# --- the table of rules ---------------------------------------------------------------------------


def rows_by(found: dict[int, Rows]) -> Any:
    return lambda tensor: found.get(id(tensor))


def planned(op: Any, args: tuple[Any, ...], found: dict[int, Rows], **kwargs: Any) -> Any:
    finish = plan(op, args, kwargs, rows_by(found))
    return finish(op(*args, **kwargs))


def test_pointwise_ops_in_place_and_into_out_share_one_rule():
    x, y = torch.ones(3, 2), torch.ones(3, 2)
    rows, _, _ = fresh((3, 2), 0)
    for op, kwargs in ((aten.add.Tensor, {}), (aten.add_.Tensor, {}),
                       (aten.add.out, {"out": torch.empty(3, 2)})):  # fmt: skip
        assert planned(op, (x, y), {id(x): rows}, **kwargs) == [rows]
        assert planned(op, (y, x), {id(x): rows}, **kwargs) == [rows]
        assert planned(op, (x, y), {}, **kwargs) == [None]


def test_what_out_held_before_is_not_in_the_result():
    x, out = torch.ones(3, 2), torch.empty(3, 2)
    rows, _, _ = fresh((3, 2), 0)
    assert planned(aten.add.out, (x, x), {id(out): rows}, out=out) == [None]


def test_a_rule_sees_arguments_by_name_and_refuses_before_the_op_runs(monkeypatch):
    seen = {}
    rows, _, _ = fresh((3, 2), 0)
    x = torch.zeros(3, 2)

    def index_fill(call: Any) -> Any:
        seen.update(dim=call["dim"], value=call["value"], name=call.name, shape=call.shape("self"))
        seen.update(rows=call.rows("self"), none=call.rows("index"), all=call.any())
        seen.update(has="value" in call, not_has="nothing" in call, op=call.op)
        rules.lost(call, "of a test")

    rules.load()
    monkeypatch.setattr(rules, "_rules", {"aten::index_fill": index_fill})
    monkeypatch.setattr(rules, "_known", {})
    op = aten.index_fill_.int_Scalar
    with pytest.raises(NotImplementedError, match="of a test") as caught:
        planned(op, (x, 0, torch.tensor([1])), {id(x): rows}, value=5.0)
    assert isinstance(caught.value, tg.RowsLost)
    assert isinstance(caught.value, tg.FlagsError)
    assert "aten::index_fill_" in str(caught.value)
    assert "unwrap()" in str(caught.value)
    assert seen == {
        "dim": 0, "value": 5.0, "name": "aten::index_fill_.int_Scalar", "shape": (3, 2),
        "rows": rows, "none": None, "all": [rows], "has": True, "not_has": False, "op": op,
    }  # fmt: skip
    assert x.eq(0).all()


def test_rules_are_found_by_the_most_exact_name(monkeypatch):
    rules.load()
    monkeypatch.setattr(rules, "_known", {})
    monkeypatch.setattr(rules, "_rules", {})
    rules.rule("aten::sum")(lambda call: "name")
    rules.rule("aten::sum.dim_IntList")(lambda call: "overload")
    rules.rule("aten::relu")(lambda call: "functional")
    assert rules.lookup(aten.sum.dim_IntList)(None) == "overload"
    assert rules.lookup(aten.sum.IntList_out)(None) == "name"
    assert rules.lookup(aten.relu_.default)(None) == "functional"
    assert rules.lookup(aten.exp.default) is not None  # pointwise by its tag
    assert rules.lookup(aten.median.default) is None
    assert not rules.known(aten.median.default)
    with pytest.raises(ValueError, match="one rule for aten::sum"):
        rules.rule("aten::sum")(lambda call: None)
    x = torch.ones(3)
    with pytest.raises(tg.RowsLost, match="no rule"):
        plan(aten.median.default, (x,), {}, lambda tensor: None)


def test_a_rule_that_is_wrong_about_its_result_is_an_error_and_no_wrong_row(monkeypatch):
    rows, _, _ = fresh((3, 2), 0)
    x = torch.ones(3, 2)
    monkeypatch.setattr(rules, "_known", {})
    for answer in (rows, [rows, None], lambda outputs: [rows]):
        monkeypatch.setitem(rules._rules, "aten::t_copy", lambda call, answer=answer: answer)
        rules._known.clear()
        with pytest.raises(tg.RowsLost):
            planned(aten.t_copy.default, (x,), {id(x): rows})


def test_arguments_that_make_no_sense_are_refused_by_the_op_itself():
    x = tg.guard(torch.ones(3, 2))
    for wrong in (
        lambda x: x.repeat(2),
        lambda x: x.gather(0, torch.full((1, 2), 7)),
        lambda x: aten.slice.Tensor(x, 0, 0, 3, 0),
        lambda x: x.select(0, 5),
        lambda x: x[:0][0],
        lambda x: x.sum(7),
    ):
        with pytest.raises((RuntimeError, IndexError)) as plain:
            wrong(torch.ones(3, 2))
        with pytest.raises(plain.type) as guarded:
            wrong(x)
        assert not isinstance(guarded.value, tg.FlagsError)
        assert str(guarded.value) == str(plain.value)


@pytest.mark.parametrize(
    "op",
    [
        lambda g: g[g > 0],
        lambda g: g.masked_select(g > 0),
        torch.unique,
        lambda g: g.squeeze(0).repeat_interleave((g.squeeze(0) > 0).long()),
        lambda g: g.t()[(g > 0).squeeze(0)],
        lambda g: g.nonzero(),
    ],
)
def test_what_numbers_decide_is_not_taken_from_an_earlier_call(op: Any):
    for numbers in ([1.0, 2.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]):
        result = op(tg.guard(torch.tensor([numbers])))
        expected = math.prod(result.shape[dim] for dim in result.batch_dims)
        assert result.flags.shape[0] == expected


def test_an_earlier_call_with_one_flags_tensor_says_nothing_of_two():
    """The second and third input had the same flags once, and have others the next time."""
    x = torch.ones(3)
    bad = tg.flag_nan(tg.guard(torch.tensor([1.0, math.nan, 1.0])), 1)
    fine = tg.guard(x)
    for flagged in (False, True):
        other = bad if flagged else fine
        result = torch.addcmul(tg.guard(x), fine, other)
        assert result.is_err().tolist() == [False, flagged, False]
        result = torch.addcmul(x, fine, other)
        assert result.is_err().tolist() == [False, flagged, False]


def test_a_rule_that_fails_where_its_op_does_not_loses_the_rows(monkeypatch):
    rules.load()
    monkeypatch.setattr(rules, "_known", {})
    monkeypatch.setattr(rules, "_rules", {"aten::t_copy": lambda call: 1 // 0})
    rows, _, _ = fresh((3, 2), 0)
    x = torch.ones(3, 2)
    with pytest.raises(tg.RowsLost, match="ZeroDivisionError") as caught:
        planned(aten.t_copy.default, (x,), {id(x): rows})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    merging = tg.guard(x, lost="merge")
    assert torch.ops.aten.t_copy(merging).batch_dims == ()


def test_flags_of_other_configurations_merge_without_loss():
    """Fewer slots now, words of another width: all that was recorded is in the sum."""
    few_slots, many = tg.ErrorConfig(num_slots=4), tg.ErrorConfig(num_slots=16)
    small = tg.ErrorConfig(num_slots=6, flag_dtype=torch.int32)
    parts = []
    for config, first in ((few_slots, 1), (many, 10), (small, 40)):
        f = tg.err.new_t(2, config=config)
        for i in range(config.num_slots):
            f = tg.err.push(f, tg.err.NAN, first + i, config=config)
        parts.append(FlagPayload(f, config.key))
    for order in ([0, 1], [1, 0], [0, 2], [2, 0]):
        first, second = (parts[i] for i in order)
        sides = samples_in(Rows((2,), (Axis(0, 1, 2),), first))[0]
        sides |= samples_in(Rows((2,), (Axis(0, 1, 2),), second))[0]
        together = samples_in(Rows((2,), (Axis(0, 1, 2),), first.merge(second)))
        capacity = max(4 * -(-len(part) // 4) for part in samples_of(first, second))
        for row in together:
            assert row <= sides
            assert len(row) == min(len(sides), capacity)
        beside = first.cat(0, [(first, (2,)), (None, (1,)), (second, (2,))])
        found = samples_in(Rows((5,), (Axis(0, 1, 5),), beside))
        assert found == [*[samples_of(first)[0]] * 2, set(), *[samples_of(second)[0]] * 2]


def samples_of(*payloads: FlagPayload) -> list[set[int]]:
    return [samples_in(Rows((2,), (Axis(0, 1, 2),), payload))[0] for payload in payloads]


def test_flags_merged_with_themselves_are_the_same_tensor():
    payload = FlagPayload(flags_of(3), KEY)
    assert payload.merge(payload, FlagPayload(payload.flags, KEY)) is payload
    assert payload.fold((3, 1), (1,)) is payload
    assert payload.permute((3, 1), (0, 1)) is payload


def test_sample_numbers_need_no_look_at_a_device():
    samples = SamplePayload(3)
    assert samples.identity
    assert samples.merge(SamplePayload(3)) is samples
    fake = torch.empty(2, dtype=torch.long, device="meta")
    assert samples.take((3,), 0, fake).mixed
    assert samples.gather(fake.view(1, 2)).mixed
    assert not samples.gather(torch.tensor([[0, 0], [1, -1]])).mixed
    assert samples.gather(torch.tensor([[0, 0], [1, -1]])).ids().tolist() == [0, 1]
    assert samples.gather(torch.tensor([[0, 1]])).ids().tolist() == [MIXED]


def test_rows_that_became_many_are_written_one_by_one():
    """Flags are written in place: an expanded batch of one sample has memory for each row."""
    rows = Rows((1, 2), (Axis(0, 1, 1),), FlagPayload(flags_of(1), KEY)).expanded((3, 2)).aligned()
    tg.push_(rows.payload.flags, tg.err.INF, 9, where=torch.tensor([False, True, False]))
    assert samples_in(rows) == [{0}, {0, 8}, {0}]
