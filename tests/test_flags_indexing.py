"""Look-ups with bad indices: flagged per sample, clamped, and without a gradient of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opguard.flags import (
    ErrorCode,
    ErrorConfig,
    ErrorLocation,
    FlagsError,
    Severity,
    err,
    flags,
    guarded_embedding,
    guarded_gather,
    guarded_index_select,
)
from opguard.flags.errors import BatchMismatchError

BAD = torch.tensor([[0, 4], [5, 1], [2, 3], [-1, 9]])
ROWS = torch.tensor([False, True, False, True])  # samples of BAD outside 0..4
CLAMPED = torch.tensor([[0, 4], [4, 1], [2, 3], [0, 4]])
CARRIERS = [torch.int64, torch.int32, torch.float64, torch.float32]


def table(rows: int = 5, width: int = 3) -> torch.Tensor:
    return torch.arange(rows * width, dtype=torch.float32).reshape(rows, width)


def only_error(f: torch.Tensor, row: int) -> tuple[int, int, int]:
    (found,) = flags.unpack(f, row)
    return found.code, found.severity, found.location


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_embedding_flags_and_clamps(dtype):
    out, f = guarded_embedding(BAD.to(dtype), table(), module=7)
    assert torch.equal(out, F.embedding(CLAMPED, table()))
    assert torch.equal(err.is_err(f), ROWS)
    assert only_error(f, 1) == (ErrorCode.OUT_OF_BOUNDS, Severity.ERROR, 7)
    assert only_error(f, 3) == (ErrorCode.OUT_OF_BOUNDS, Severity.ERROR, 7)


def test_given_flags_are_kept_and_not_changed():
    before = err.push(err.new_t(4), err.NAN, 3, where=torch.tensor([False, True, True, False]))
    kept = before.clone()
    _, f = guarded_embedding(BAD, table(), before, module=7)
    assert torch.equal(before, kept)
    assert [e.code for e in flags.unpack(f, 1)] == [ErrorCode.NAN, ErrorCode.OUT_OF_BOUNDS]
    assert [e.code for e in flags.unpack(f, 2)] == [ErrorCode.NAN]
    with pytest.raises(BatchMismatchError, match="4"):
        guarded_embedding(BAD, table(), err.new_t(3))


@pytest.mark.parametrize("carrier", CARRIERS, ids=str)
def test_every_carrier(carrier):
    config = ErrorConfig(num_slots=4, flag_dtype=carrier)
    _, f = guarded_embedding(BAD, table(), config=config)
    assert f.dtype == carrier
    assert f.shape == (4, config.num_words)
    assert torch.equal(err.is_err(f), ROWS)


def test_fill_and_without():
    out, _ = guarded_embedding(BAD, table(), fill=-1.0)
    good = ((BAD >= 0) & (BAD < 5)).unsqueeze(-1)
    wanted = torch.where(good, F.embedding(CLAMPED, table()), torch.tensor(-1.0))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("fill", [None, 0.0])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2, -3])
def test_embedding_gradient_is_of_the_good_ids_alone(fill, sparse, padding_idx):
    weight = table().requires_grad_()
    out, _ = guarded_embedding(BAD, weight, fill=fill, sparse=sparse, padding_idx=padding_idx)
    (out * torch.arange(1.0, 25.0).reshape(4, 2, 3)).sum().backward()
    got = weight.grad.to_dense()
    good = (BAD >= 0) & (BAD < 5)
    plain = table().requires_grad_()
    factors = torch.arange(1.0, 25.0).reshape(4, 2, 3)[good]
    (F.embedding(BAD[good], plain, padding_idx) * factors).sum().backward()
    assert torch.equal(got, plain.grad)


def test_a_module_is_called_as_it_is():
    module = nn.Embedding(5, 3, padding_idx=2, max_norm=1.0, scale_grad_by_freq=True)
    twin = nn.Embedding(5, 3, padding_idx=2, max_norm=1.0, scale_grad_by_freq=True)
    twin.load_state_dict(module.state_dict())
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[0, 2], [1, 1]])
    out, f = guarded_embedding(ids, module, module=1)
    wanted = twin(ids)
    assert calls == [1]
    assert torch.equal(out, wanted)
    assert err.all_ok(f)
    out.sum().backward()
    wanted.sum().backward()
    assert torch.equal(module.weight.grad, twin.weight.grad)
    assert torch.equal(module.weight, twin.weight)


def test_the_place_is_the_module_unless_another_is_said():
    module = nn.Embedding(5, 3)
    module._fx_path = "text.tokens"
    _, f = guarded_embedding(BAD, module)
    assert ErrorLocation.name(only_error(f, 1)[2]) == "text.tokens"
    _, f = guarded_embedding(BAD, module, module="elsewhere")
    assert ErrorLocation.name(only_error(f, 1)[2]) == "elsewhere"


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2


def test_a_subclass_does_what_it_does():
    module = Scaled(5, 3)
    assert torch.equal(guarded_embedding(BAD, module, module=1)[0], module(CLAMPED))


def test_small_and_empty_ids():
    out, f = guarded_embedding(torch.tensor(9), table())
    assert out.shape == (3,)
    assert err.is_err(f).tolist() == [True]
    out, f = guarded_embedding(torch.tensor([1, 9]), table())
    assert err.is_err(f).tolist() == [False, True]
    out, f = guarded_embedding(torch.zeros(0, 4, dtype=torch.int64), table())
    assert out.shape == (0, 4, 3)
    assert f.shape[0] == 0
    out, f = guarded_embedding(torch.zeros(2, 0, dtype=torch.int64), table())
    assert out.shape == (2, 0, 3)
    assert err.all_ok(f)


def test_strides_do_not_matter():
    ids = BAD.t().contiguous().t()
    assert not ids.is_contiguous()
    out, f = guarded_embedding(ids, table())
    assert torch.equal(out, F.embedding(CLAMPED, table()))
    assert torch.equal(err.is_err(f), ROWS)
    _, f = guarded_embedding(torch.tensor([[7]]).expand(3, 4), table())
    assert err.is_err(f).all()


@pytest.mark.parametrize(
    ("ids", "weight", "options", "said"),
    [
        (BAD, torch.zeros(0, 3), {}, r"at least one row.*\(0, 3\)"),
        (BAD, torch.zeros(3), {}, r"shape \(V, D\)"),
        (BAD, nn.ReLU(), {}, "ReLU"),
        (BAD, nn.EmbeddingBag(5, 3), {"module": 1}, "EmbeddingBag"),
        (BAD, nn.Embedding(5, 3), {"module": 1, "padding_idx": 1}, "which has its own"),
        (BAD.float(), table(), {}, "integer"),
    ],
)
def test_bad_arguments_are_one_sentence(ids, weight, options, said):
    with pytest.raises(FlagsError, match=said):
        guarded_embedding(ids, weight, **options)


# --- gather and index_select ----------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gather(dim):
    x = torch.randn(5, 5, requires_grad=True)
    out, f = guarded_gather(x, dim, BAD, module=1)
    assert torch.equal(out, x.gather(dim, CLAMPED))
    assert torch.equal(err.is_err(f), ROWS)  # rows of index, for dim 0 too
    out.sum().backward()
    good = (BAD >= 0) & (BAD < 5)
    plain = x.detach().clone().requires_grad_()
    plain.gather(dim, CLAMPED)[good].sum().backward()
    assert torch.equal(x.grad, plain.grad)
    out, _ = guarded_gather(x, dim, BAD.int(), fill=3.0)
    assert out[3].tolist() == [3.0, 3.0]


def test_gather_of_scalars_and_nothing():
    out, f = guarded_gather(torch.tensor(5.0), 0, torch.tensor(2))
    assert out.item() == 5.0
    assert err.is_err(f).tolist() == [True]
    empty = torch.zeros(0, 0, dtype=torch.int64)
    out, f = guarded_gather(torch.zeros(0, 3), 0, empty)
    assert out.shape == (0, 0)
    with pytest.raises(FlagsError, match="something to look up"):
        guarded_gather(torch.zeros(4, 0), 1, BAD)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_index_select(dim):
    x = torch.randn(4, 4, requires_grad=True)
    index = torch.tensor([0, 3, 4, -2, 3])
    out, f = guarded_index_select(x, dim, index)
    clamped = index.clamp(0, 3)
    assert torch.equal(out, x.index_select(dim, clamped))
    assert err.is_err(f).tolist() == [False, False, True, True, False]
    out.sum().backward()
    plain = x.detach().clone().requires_grad_()
    plain.index_select(dim, torch.tensor([0, 3, 3])).sum().backward()
    assert torch.equal(x.grad, plain.grad)
    out, _ = guarded_index_select(x, dim, index, fill=0.0)
    assert out.select(dim, 2).eq(0).all()
    assert out.select(dim, 1).ne(0).any()


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", CARRIERS, ids=str)
def test_compiled_is_eager(carrier):
    config = ErrorConfig(num_slots=4, flag_dtype=carrier)
    module = nn.Embedding(5, 3)

    def look_up(ids, x):
        a, f = guarded_embedding(ids, module, module=3, config=config)
        b, f = guarded_gather(x, 1, ids, f, module=4, config=config)
        c, f = guarded_index_select(x, 1, ids[:, 0], f, module=5, fill=0.0, config=config)
        return a, b, c, f

    compiled = torch.compile(look_up, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5)
    for ours, wanted in zip(compiled(BAD, x), look_up(BAD, x), strict=True):
        assert torch.equal(ours.view(torch.uint8), wanted.view(torch.uint8))


def test_compiled_gradient():
    module = nn.Embedding(5, 3)
    compiled = torch.compile(
        lambda ids: guarded_embedding(ids, module, module=1)[0], fullgraph=True, backend="aot_eager"
    )
    compiled(BAD).sum().backward()
    counts = torch.bincount(BAD[(BAD >= 0) & (BAD < 5)], minlength=5)
    assert torch.equal(module.weight.grad, counts.float().unsqueeze(1).expand(5, 3))


def test_functional_gradient():
    grad = torch.func.grad(lambda w: guarded_embedding(BAD, w)[0].sum())(table())
    counts = torch.bincount(BAD[(BAD >= 0) & (BAD < 5)], minlength=5)
    assert torch.equal(grad, counts.float().unsqueeze(1).expand(5, 3))
