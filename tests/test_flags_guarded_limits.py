"""GuardedTensor where torch allows more than one expects: numbers as lists, long histories."""

from __future__ import annotations

import copy
import gc
import time
import weakref

import pytest
import torch
from torch.autograd import forward_ad

from opguard import flags as F
from opguard.flags import GuardedTensor, guard
from opguard.flags._rows import rules

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own


def made(bad, *shape, dtype=torch.float32):
    """Ones of ``shape``, the samples ``bad`` of which have an error."""
    where = torch.zeros(shape[0], dtype=torch.bool)
    where[bad] = True
    g = guard(torch.ones(shape, dtype=dtype))
    return g.with_flags(F.push(g.flags, F.ErrorCode.NAN, "here", where=where))


def bad(g):
    """The rows that have errors."""
    return g.is_err().nonzero().flatten().tolist()


NOTHING = torch.empty(0, dtype=torch.int64)


# --- writes by an index without dimensions, and by one without elements -------------------------


@pytest.mark.parametrize("src", [torch.tensor(5.0), 5.0])
def test_scatter_of_a_number_into_a_batch_touches_one_sample(src):
    assert bad(made([0, 2], 3).scatter(0, torch.tensor(2), src)) == [0]


def test_scatter_add_of_a_number_goes_to_its_sample():
    value = made([0], 1)[0]
    assert bad(made([], 3).scatter_add(0, torch.tensor(1), value)) == [1]
    assert bad(made([2], 3).scatter_reduce(0, torch.tensor(1), value, "sum")) == [1, 2]


@pytest.mark.parametrize(
    "write",
    [
        lambda x, y: x.index_copy(0, NOTHING, y),
        lambda x, y: x.index_add(0, NOTHING, y) if x.dim() else x,
        lambda x, y: x.index_fill(0, NOTHING, 1.0),
        lambda x, y: x.scatter(0, NOTHING, y),
        lambda x, y: x.scatter_add(0, NOTHING, y),
        lambda x, y: x.put(NOTHING, y),
    ],
)
@pytest.mark.parametrize("dims", [0, 1])
def test_nothing_written_leaves_the_flags(write, dims):
    x = made([0], 1) if dims else made([0], 1)[0]
    assert bad(write(x, torch.empty(0))) == [0]


def test_a_number_written_over_a_number_takes_its_flags():
    x = made([0], 1)[0]
    at = torch.tensor(0)
    assert bad(x.scatter(0, at, torch.tensor(2.0))) == []
    assert bad(x.index_copy(0, at, torch.tensor(2.0))) == []
    assert bad(x.index_fill(0, at, 2.0)) == []
    assert bad(x.index_add(0, at, torch.tensor(2.0))) == [0]


def test_batches_without_elements_may_be_written_into():
    g = made([1], 3, 0)
    g[torch.zeros(3, 0, dtype=torch.bool)] = 1.0
    g.masked_scatter_(torch.zeros(3, 0, dtype=torch.bool), made([0], 1, 0))
    g.index_add_(0, torch.tensor([0]), made([0], 1, 0))
    assert (g.batch_dims, bad(g)) == ((0,), [1])


def test_what_is_given_for_results_has_no_flags_of_before():
    out = made([1], 3, 2)
    torch.add(torch.ones(3, 2), 1, out=out)
    assert (out.batch_dims, bad(out)) == ((0,), [])
    view = made([1, 2], 3, 2)
    torch.add(torch.ones(2), 1, out=view[1])
    assert bad(view) == [2]


def test_what_is_given_for_results_takes_their_size():
    out = guard(torch.empty(0))
    torch.add(torch.ones(3, 2), 1, out=out)
    assert (out.shape, out.batch_dims, out.flags.shape[0]) == ((3, 2), (0,), 3)
    assert torch.equal(out.unwrap() + 0, torch.full((3, 2), 2.0))
    assert out.sum(1).shape == (3,)


def test_what_was_written_before_a_rule_failed_is_known_to_all(monkeypatch):
    def fails(call):
        raise ZeroDivisionError

    g = made([], 3, 2)
    monkeypatch.setattr(rules._of(torch.ops.aten.mul_.Tensor), "rule", fails)
    with pytest.raises(NotImplementedError, match="its rule failed"):
        g.mul_(made([1], 3, 2))
    assert bad(g) == [0]
    assert bad(g[2:]) == [0]


def test_signals_come_back_from_their_frames():
    window = torch.ones(8)
    frames = torch.stft(made([1], 3, 32), 8, window=window, return_complex=True)
    got = torch.istft(frames, 8, window=window)
    assert (got.batch_dims, bad(got)) == ((0,), [1])
    assert torch.allclose(got.unwrap(), torch.ones(3, 32), atol=1e-5)


@pytest.mark.parametrize("reduce", [torch.any, torch.all])
def test_reductions_over_no_dims_keep_the_samples(reduce):
    got = reduce(made([1], 4, 4), dim=())
    assert (got.batch_dims, bad(got)) == ((0,), [1])
    assert bad(torch.sum(made([1], 4, 4), dim=())) == [0]  # no dims are all of them to a sum


@pytest.mark.parametrize("part", [lambda g: g[:, 0], lambda g: g.sum(1), lambda g: g.mean(2)])
def test_parts_of_a_batch_broadcast_over_it_as_torch_does(part):
    g = made([1], 3, 3, 3)
    assert bad(g - part(g)) == [0, 1, 2]  # sample 1 of the part stands beside index 1 of dim 1
    assert bad(g * 2 * part(g)) == [0, 1, 2]
    g.mul_(part(g))
    assert bad(g) == [0, 1, 2]
    assert bad(made([1], 3, 3, 3).sum(1, keepdim=True) + made([], 3, 3, 3)) == [1]


def test_padding_masks_do_not_stand_for_positions():
    mask = made([0], 2, 2, dtype=torch.bool)  # (samples, keys)
    got = torch.ops.aten._masked_softmax(torch.ones(2, 1, 2, 2), mask, 3, 1)
    assert bad(got[0]) == [0]


# --- what is remembered of an op ----------------------------------------------------------------


def test_views_by_element_size_are_remembered_by_it():
    wide = made([1], 4, 8).view(torch.int16)
    same = made([1], 4, 8, dtype=torch.float16).view(torch.int16)
    assert (wide.shape, same.shape) == ((4, 16), (4, 8))
    assert bad(same.reshape(2, 16)[0]) == list(range(8, 16))
    assert bad(same.reshape(32)[8:16]) == list(range(8))
    assert bad(same[:, 4:].reshape(16)[4:8]) == list(range(4))


# --- long histories of one memory ---------------------------------------------------------------


def test_flags_may_be_given_any_number_of_times():
    first = g = made([1], 4, 2)
    for _ in range(1500):
        g = g.with_flags(g.flags)
    alive = weakref.ref(first._data)
    g[0] = made([0], 1, 2)[0]
    assert bad(g) == [0, 1] == bad(first)
    gc.disable()
    try:
        del first
        assert alive() is None
    finally:
        gc.enable()


def test_flags_given_to_views_of_flags_given_know_of_writes():
    base = made([], 4, 3)
    part = base.with_flags(base.flags)[1:]
    other = part.with_flags(part.flags)
    last = other.t().with_flags(other.flags)
    last[:, 1] = made([0], 1, 3)[0]
    assert [bad(g) for g in (last, other, part, base)] == [[1], [1], [1], [2]]
    base[3] = made([0], 1, 3)[0]
    assert [bad(g) for g in (last, other, part, base)] == [[1, 2], [1, 2], [1, 2], [2, 3]]


def test_views_of_views_may_be_any_number():
    g = h = made([1], 4, 4)
    for _ in range(1500):
        h = h.transpose(0, 1)
    h[3] = made([0], 1, 4)[0]
    assert bad(g) == [1, 3]


def test_a_write_into_one_sample_takes_no_step_of_python_for_each_other():
    g, one = made([1], 200_000, 2), made([0], 1, 2)[0]
    took = []
    for place in (5, 7, 9):
        start = time.perf_counter()
        g[place] = one
        took.append(time.perf_counter() - start)
    assert bad(g) == [1, 5, 7, 9]
    assert min(took) < 0.2  # 0.01 s, and 0.9 s with such steps


# --- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_shallow_copy_shares_what_is_written(requires_grad):
    g = made([1], 4, 2).requires_grad_(requires_grad)
    other = copy.copy(g)
    assert type(other) is GuardedTensor
    assert (other.requires_grad, other.is_leaf) == (requires_grad, True)
    with torch.no_grad():
        other[0] = made([0], 1, 2)[0]
    assert bad(g) == [0, 1] == bad(other)


def test_a_deep_copy_has_the_gradient():
    g = made([1], 4, 2).requires_grad_()
    (g * 2).sum().backward()
    other = copy.deepcopy(g)
    assert torch.equal(other.grad, g.grad)
    assert other.grad is not g.grad


# --- autograd's corners -------------------------------------------------------------------------


def test_gradients_of_gradients_are_plain_while_tensors_are_kept_elsewhere():
    w = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        (grad,) = torch.autograd.grad((made([1], 3, 2) * w).exp().sum(), w, create_graph=True)
    assert type(grad) is torch.Tensor
    (again,) = torch.autograd.grad(grad.sum(), w)
    assert type(again) is torch.Tensor


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.vmap,
        torch.func.grad,
        torch.func.functionalize,
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    ],
)
def test_no_tensor_of_a_transform_is_guarded(transform):
    with pytest.raises(NotImplementedError, match="before the transform"):
        transform(lambda x: guard(x).mul(2).sum().unwrap())(torch.ones(3, 2))


def test_a_transform_of_a_guarded_batch_keeps_its_flags():
    got = torch.func.vmap(lambda row: row.cumsum(0))(made([1], 3, 2))
    assert (got.batch_dims, bad(got)) == ((0,), [1])


def test_no_tangent_is_left_out():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3, 2), torch.ones(3, 2))
        with pytest.raises(NotImplementedError, match="tangent"):
            guard(dual)
        assert bad(made([1], 3, 2) * 2) == [1]
