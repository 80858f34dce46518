"""IF/ELIF/ELSE: the same in eager and compiled code, and gradients of the branch taken alone."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from opguard.flags import AND, CONFIG, HAS, IF, IS, NOT, OR, err, fix, flag_nan, tracked

# torch's own inductor uses what torch.jit has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")

NAN = float("nan")
TRUE, FALSE = torch.tensor(True), torch.tensor(False)
DTYPES = [torch.int64, torch.int32, torch.float64, torch.float32]


def compiled(fn: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend=backend)


@pytest.fixture(params=DTYPES, ids=str)
def carrier(request):
    before = CONFIG.flag_dtype
    CONFIG.flag_dtype = request.param
    yield request.param
    CONFIG.flag_dtype = before


def test_predicates_are_scalars_over_the_batch(carrier):
    f = err.push(err.new_t(3), err.NAN, 1, where=torch.tensor([False, True, False]))
    clean = err.new_t(3)
    for got, expected in (
        (HAS(f), True),
        (HAS(clean), False),
        (IS(err.NAN, f), True),
        (IS(err.INF, f), False),
        (OR(IS(err.INF, f), IS(err.NAN, f)), True),
        (OR(FALSE), False),
        (AND(IS(err.NAN, f), IS(err.INF, f)), False),
        (AND(TRUE, TRUE, TRUE), True),
        (NOT(HAS(f)), False),
        (NOT(FALSE), True),
        (HAS(err.new_t(0)), False),
    ):
        assert got.dtype is torch.bool
        assert got.shape == ()
        assert bool(got) is expected


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (OR, ValueError),
        (AND, ValueError),
        (lambda: NOT(True), TypeError),
        (lambda: OR(FALSE, torch.tensor(1)), TypeError),
        (lambda: AND(torch.tensor([True, False])), ValueError),
        (lambda: IF(True, lambda: 1), TypeError),
        (lambda: IF(torch.tensor(1.0), lambda: 1), TypeError),
        (lambda: IF(torch.tensor([True]), lambda: 1), ValueError),
        (lambda: IF(FALSE, lambda: 1).ELIF(0, lambda: 2), TypeError),
        (lambda: IS(16, err.new_t(1)), ValueError),
    ],
)
def test_a_condition_is_a_scalar_bool_tensor(call, error):
    with pytest.raises(error, match="expected"):
        call()


def test_eager_runs_the_first_branch_that_holds_and_nothing_before_else():
    ran = []

    def branch(name):
        return lambda: ran.append(name) or name

    chain = IF(FALSE, branch("a")).ELIF(TRUE, branch("b")).ELIF(TRUE, branch("c"))
    assert ran == []
    assert chain.ELSE(branch("d")) == "b"
    assert ran == ["b"]
    assert IF(FALSE, branch("a")).ELSE(branch("d")) == "d"
    assert IF(TRUE, branch("a")).ELIF(TRUE, branch("b")).ELSE(branch("d")) == "a"


def two_constants(x):
    return IF(x.sum() > 0, lambda: (x, 1)).ELSE(lambda: (x, 2))


def unequal_tuples(x):
    return IF(x.sum() > 0, lambda: (x, x)).ELSE(lambda: (x,))


def other_keys(x):
    return IF(x.sum() > 0, lambda: {"a": x}).ELSE(lambda: {"b": x})


def list_or_tuple(x):
    return IF(x.sum() > 0, lambda: [x]).ELSE(lambda: (x,))


def other_shapes(x):
    return IF(x.sum() > 0, lambda: x).ELSE(lambda: x[:1])


def other_dtypes(x):
    return IF(x.sum() > 0, lambda: x).ELSE(lambda: x.to(torch.float64))


def tensor_or_none(x):
    return IF(x.sum() > 0, lambda: (x, None)).ELSE(lambda: (x, x))


@pytest.mark.parametrize(
    "fn",
    [
        two_constants,
        unequal_tuples,
        other_keys,
        list_or_tuple,
        other_shapes,
        other_dtypes,
        tensor_or_none,
    ],
)
def test_branches_that_differ_in_more_than_values_are_an_error_not_another_result(fn):
    """One graph cannot return both: 1.0.4 returned the IF side's whatever the condition was."""
    with pytest.raises(Exception, match="expected every branch of IF to return"):
        compiled(fn)(-torch.ones(2))


def test_where_a_graph_may_break_such_branches_run_as_in_eager():
    torch._dynamo.reset()
    run = torch.compile(two_constants, backend="eager")
    for x in (-torch.ones(2), torch.ones(2)):
        assert str(run(x)) == str(two_constants(x))


Pair = namedtuple("Pair", ["z", "extra"])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_structures_come_back_as_they_are(requires_grad):
    def fn(x):
        return (
            IF(x.sum() > 0, lambda: {"p": Pair(x * 2, None), "l": [x > 0, "same", 3], "e": ()})
            .ELIF(x.sum() < -9, lambda: {"l": [x > 1, "same", 3], "p": Pair(x * 3, None), "e": ()})
            .ELSE(lambda: {"p": Pair(x.clone(), None), "l": [x > 2, "same", 3], "e": ()})
        )

    run = compiled(fn)
    for value in (1.0, -10.0, -1.0):
        x = torch.full((2,), value, requires_grad=requires_grad)
        expected, got = fn(x), run(x)
        assert got.keys() == expected.keys()
        assert type(got["p"]) is Pair
        assert got["p"].extra is None
        assert torch.equal(got["p"].z, expected["p"].z)
        assert torch.equal(got["l"][0], expected["l"][0])
        assert got["l"][0].dtype is torch.bool
        assert got["l"][1:] == ["same", 3]
        assert got["e"] == ()


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.int64],
    ids=str,
)
def test_integers_beside_gradients_keep_dtype_and_values(dtype):
    values = torch.tensor([0, 1, 1, 0]).to(dtype)
    if dtype is torch.int64:
        values = torch.tensor([2**62 + 1, -1, -(2**63), 0x7FF8000000000001])
    if dtype is torch.int32:
        values = torch.tensor([2**31 - 1, -1, -(2**31), 0x7F800001], dtype=dtype)

    def fn(x, values):
        return IF(x.sum() > 0, lambda: (x * 2, values)).ELSE(lambda: (x * 3, values.flip(0)))

    run = compiled(fn)
    for sign in (1.0, -1.0):
        x = torch.full((2,), sign, requires_grad=True)
        z, got = run(x, values)
        assert got.dtype is dtype
        assert not got.requires_grad
        assert torch.equal(got, values if sign > 0 else values.flip(0))
        z.sum().backward()
        assert x.grad.tolist() == [2.0, 2.0] if sign > 0 else [3.0, 3.0]


def test_the_branch_not_taken_does_not_poison_gradients():
    def fn(x):
        return IF(x.min() < 0, lambda: x * 2).ELSE(lambda: torch.sqrt(x))

    run = compiled(fn)
    for values in ([-1.0, 4.0], [1.0, 4.0]):
        grads = []
        for call in (fn, run):
            x = torch.tensor(values, requires_grad=True)
            y = call(x)
            y.sum().backward()
            grads.append((y.detach(), x.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])
        assert grads[1][1].isfinite().all()


def test_a_chain_differentiates_the_branch_it_takes():
    def fn(x):
        return (
            IF(x.sum() > 10, lambda: (torch.log(-x), x.argmax()))
            .ELIF(x.sum() < 0, lambda: (torch.sqrt(-x), x.argmin()))
            .ELSE(lambda: (torch.sqrt(x), x.argmax()))
        )

    run = compiled(fn)
    for values in ([1.0, 4.0], [-1.0, -4.0]):
        results = []
        for call in (fn, run):
            x = torch.tensor(values, requires_grad=True)
            y, i = call(x)
            y.sum().backward()
            results.append((y.detach(), i, x.grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_of_the_random_numbers_drawn(training):
    """Recomputed, dropout would draw another mask than the one that was applied."""
    dropout = nn.Dropout(0.5).train(training)

    def fn(x):
        return IF(x.sum() < 0, lambda: torch.sqrt(x)).ELSE(lambda: dropout(x) * 2)

    x = torch.ones(200, requires_grad=True)
    y = compiled(fn)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert bool((y == 0).any()) is training


def test_shapes_that_vary():
    def fn(x):
        f = flag_nan(x, 3)
        z = err.take_ok_p(f, x)
        return IF(HAS(f), lambda: (z * 2, f.clone())).ELSE(lambda: (z.clone(), f))

    torch._dynamo.reset()
    run = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5, 8):
        x = torch.randn(n, 4)
        x[n // 2, 0] = NAN if n > 3 else 1.0
        grads = []
        for call in (fn, run):
            leaf = x.clone().requires_grad_()
            z, f = call(leaf)
            z.sum().backward()
            grads.append((z.detach(), f, leaf.grad))
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


@tracked
class Repairing(nn.Module):
    """The README's recovery inside a compiled graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        z = self.layer(x)
        f = flag_nan(z, self.layer)
        z, f = IF(IS(err.NAN, f), lambda: fix(z, f, self.layer)).ELSE(
            lambda: (z.clone(), f.clone())
        )
        return z, f


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_readme_repair_trains_compiled_as_eager(backend):
    torch.manual_seed(1)
    model = Repairing()
    run = compiled(model, backend)
    bad = torch.randn(3, 4)
    bad[1, 2] = NAN
    for x in (torch.randn(3, 4), bad):
        results = []
        for call in (model, run):
            model.zero_grad()
            z, f = call(x)
            z.sum().backward()
            results.append((z.detach(), f, model.layer.bias.grad.clone()))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(err.has_fallback(results[1][1]), x.isnan().any(1))
        assert results[1][0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_branches_move_every_bit_of_flags(dtype):
    """Float words whose bits are NaN patterns and denormals, with and without gradients."""
    before = CONFIG.flag_dtype
    CONFIG.flag_dtype = dtype
    try:
        f = err.new_t(2)
        for location in (1, 510, 1023, 511, 1022, 2):
            f = err.push(f, err.NAN, location)

        def fn(x, f, g):
            return IF(x.sum() > 0, lambda: (x * 2, f.clone())).ELSE(lambda: (x * 3, g.clone()))

        run = compiled(fn)
        words = torch.int64 if dtype.itemsize == 8 else torch.int32
        for requires_grad in (False, True):
            for sign in (1.0, -1.0):
                x = torch.full((2,), sign, requires_grad=requires_grad)
                _, got = run(x, f, err.new_t(2))
                assert got.dtype is dtype
                assert not got.requires_grad
                expected = f if sign > 0 else err.new_t(2)
                assert torch.equal(got.view(words), expected.view(words))
    finally:
        CONFIG.flag_dtype = before


def test_export_holds_the_branches():
    class Model(nn.Module):
        def forward(self, x):
            f = flag_nan(x, 3)
            return IF(HAS(f), lambda: (torch.zeros_like(x), f.clone())).ELSE(
                lambda: (x.clone(), f.clone())
            )

    x = torch.randn(2, 3)
    program = torch.export.export(Model(), (x,)).module()
    assert torch.equal(program(x)[0], x)
    bad = x.clone()
    bad[0, 0] = NAN
    z, f = program(bad)
    assert torch.equal(z, torch.zeros(2, 3))
    assert err.has_nan(f).tolist() == [True, False]
