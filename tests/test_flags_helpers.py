"""The helpers by their own names: what is recorded, in place or not, eager or compiled."""

from __future__ import annotations

import pytest
import torch

from opguard.flags import (
    BatchMismatchError,
    ErrorConfig,
    FlagsError,
    get_config,
    set_config,
)
from opguard.flags._engine import read_all
from opguard.flags.helpers import (
    find,
    fix,
    flag_inf,
    flag_inf_,
    flag_nan,
    flag_nan_,
    flag_nan_and_inf,
    flag_nan_and_inf_,
    flag_oob_indices,
    has_err,
    push,
    push_,
)

NAN, INF = (3, 1, 6), (3, 2, 6)
ROWS = torch.tensor(
    [
        [0.0, 1.0],
        [float("nan"), 1.0],
        [2.0, float("inf")],
        [float("-inf"), 3.0],
        [float("nan"), float("-inf")],
    ]
)
WANTED = {
    "nan": [[], [NAN], [], [], [NAN]],
    "inf": [[], [], [INF], [INF], [INF]],
    "inf pos": [[], [], [INF], [], []],
    "inf none": [[], [], [], [], []],
    "both": [[], [NAN], [INF], [INF], [NAN, INF]],
    "both pos": [[], [NAN], [INF], [], [NAN]],
    "both none": [[], [NAN], [], [], [NAN]],
}
FUNCTIONS = {"nan": flag_nan, "inf": flag_inf, "both": flag_nan_and_inf}
IN_PLACE = {"nan": flag_nan_, "inf": flag_inf_, "both": flag_nan_and_inf_}


@pytest.mark.parametrize("case", WANTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_detection(case, dtype):
    name, *inf = case.split()
    options = {"inf": inf[0]} if inf else {}
    x = ROWS.to(dtype)
    f = FUNCTIONS[name](x, 6, **options)
    assert read_all(f) == WANTED[case]
    given = torch.zeros_like(f)
    assert torch.equal(FUNCTIONS[name](x, 6, given, **options), f)
    assert not given.any()
    assert IN_PLACE[name](x, 6, given, **options) is given
    assert torch.equal(given, f)


@pytest.mark.parametrize("inf", ["all", "", None, 3, ["both"]])
def test_an_unknown_inf_is_refused(inf):
    for call in (flag_inf, flag_nan_and_inf):
        with pytest.raises(FlagsError, match="expected inf to be"):
            call(ROWS, 6, inf=inf)


def test_configurations_are_of_the_call_or_the_current_one():
    own = ErrorConfig(num_slots=4, flag_dtype=torch.float32)
    assert flag_nan(ROWS, 6, config=own).shape == (5, 2)
    assert flag_nan(ROWS, 6, None, own).dtype == torch.float32
    before = get_config()
    try:
        set_config(own)
        assert flag_nan_and_inf(ROWS, 6).dtype == torch.float32
        assert flag_oob_indices(torch.tensor([[1], [9]]), 5, 6).shape == (2, 2)
    finally:
        set_config(before)
    assert flag_nan_and_inf(ROWS, 6).dtype == before.flag_dtype


def test_push_and_find():
    f = flag_nan(ROWS, 6)
    where = torch.tensor([True, True, False, False, False])
    g = push(f, 9, 7, where=where)
    assert read_all(g) == [[(1, 9, 7)], [NAN, (1, 9, 7)], [], [], [NAN]]
    assert find(9, g).tolist() == where.tolist()
    assert push_(f, 9, 7, where=where) is f
    assert torch.equal(f, g)
    assert read_all(push(f, 15, 8, config=ErrorConfig(default_severity=1)))[2] == [(1, 15, 8)]
    assert read_all(push(f, 15, 8, severity=3))[2] == [(3, 15, 8)]
    assert read_all(push_(f, 12, location=8, config=ErrorConfig(default_severity=3)))[2] == [
        (3, 12, 8)
    ]
    assert has_err(f)
    assert not has_err(torch.zeros_like(f))
    assert not has_err(f[:0])


def test_indices():
    ids = torch.tensor([[0, 4], [-1, 0], [5, 0]])
    f = flag_oob_indices(ids, 5, 6)
    assert read_all(f) == [[], [(2, 5, 6)], [(2, 5, 6)]]
    assert torch.equal(flag_oob_indices(ids, 5, 6, f), f)
    with pytest.raises(FlagsError):
        flag_oob_indices(ids.float(), 5, 6)


def test_fix_replaces_whole_samples_and_says_so():
    f = flag_nan(ROWS, 6)
    fixed, g = fix(ROWS, f, 7, fallback=-1.0)
    assert fixed[[1, 4]].eq(-1).all()
    assert torch.equal(fixed[[0, 2, 3]], ROWS[[0, 2, 3]])
    assert read_all(g)[1] == [NAN, (1, 13, 7)]
    assert read_all(g)[0] == []
    with pytest.raises(BatchMismatchError):
        fix(ROWS[:2], f, 7)


def model(x: torch.Tensor, where: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    f = flag_nan(x, 6)
    f = flag_inf(x * 2, "by name", f, inf="pos")
    f = flag_nan_and_inf(x.t().contiguous().t(), 8, f)
    f = push(f, 15, 9, where=where)
    f = push(f, 9, 9, severity=2)
    return flag_oob_indices(ids, 3, None, f)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_eager(backend):
    ids = torch.arange(5).unsqueeze(1)
    where = torch.arange(5) > 2
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.equal(compiled(ROWS, where, ids), model(ROWS, where, ids))
    before = get_config()
    try:  # the configuration is part of what the graph was made for
        set_config(ErrorConfig(num_slots=2, default_severity=1))
        assert compiled(ROWS, where, ids).shape == (5, 1)
        assert torch.equal(compiled(ROWS, where, ids), model(ROWS, where, ids))
    finally:
        set_config(before)


def test_in_place_compiled():
    def step(x, f):
        push_(f, 9, 7, where=x[:, 0] > 0)
        return flag_nan_and_inf_(x, 6, f).clone()

    f, g = torch.zeros(5, 4, dtype=torch.int64), torch.zeros(5, 4, dtype=torch.int64)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ROWS, f), step(ROWS, g))
    assert torch.equal(f, g)


def test_bad_input_under_the_compiler_is_refused_while_tracing():
    def bad(x):
        return flag_nan(x, 2000)

    with pytest.raises(Exception, match="expected a location id from 0 to 1023"):
        torch.compile(bad, fullgraph=True, backend="eager")(ROWS)
