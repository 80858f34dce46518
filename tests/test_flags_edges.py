"""Flags on mixed devices, of nested tensors, under an empty vmap, at the end of a process."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from opguard.flags import (
    ErrorLocation,
    FlagsError,
    _found,
    check_model,
    err,
    flag_nan,
    flag_nan_,
    flag_oob_indices,
    guarded_embedding,
    guarded_gather,
    guarded_index_select,
    push,
)
from opguard.flags.locations import _registry

nan = float("nan")


def meta(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device="meta")


MIXED = {
    "check": lambda f: flag_nan(meta(4, 2), 1, f),
    "check_": lambda f: flag_nan_(meta(4, 2), 1, f),
    "push": lambda f: push(f, err.NAN, 1, where=meta(4, dtype=torch.bool)),
    "codes": lambda f: err.push(f, meta(4, dtype=torch.int64), 1),
    "index": lambda f: flag_oob_indices(meta(4, dtype=torch.int64), 3, 1, f),
    "merge": lambda f: err.merge(f, f.to("meta")),
    "merge into meta": lambda f: err.merge(f.to("meta"), f),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_meta_tensor_beside_real_flags_is_refused(name):
    f = err.from_code(err.INF, 3, 4)
    with pytest.raises(ValueError, match="on one device, got meta and cpu"):
        MIXED[name](f)
    assert torch.equal(f, err.from_code(err.INF, 3, 4))


def test_meta_tensors_alone_have_meta_flags():
    f = push(flag_nan(meta(4, 2), 1), err.NAN, 1)
    assert f.device.type == "meta"
    assert f.shape == (4, 4)


FILLS = {
    "embedding": lambda x, fill: guarded_embedding(torch.tensor([0, 9]), x, fill=fill),
    "gather": lambda x, fill: guarded_gather(x, 0, torch.tensor([[0], [9]]), fill=fill),
    "index_select": lambda x, fill: guarded_index_select(x, 0, torch.tensor([0, 9]), fill=fill),
}


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize(
    ("dtype", "fill"), [(torch.int64, 1.5), (torch.int64, nan), (torch.float16, 1e6)]
)
def test_a_fill_that_the_dtype_does_not_hold_is_refused(name, dtype, fill):
    with pytest.raises(FlagsError, match=f"fill to be a number that {dtype} holds"):
        FILLS[name](torch.ones(3, 1, dtype=dtype), fill)
    out, f = FILLS[name](torch.ones(3, 1, dtype=dtype), 7)
    assert out.flatten().tolist() == [1, 7]
    assert err.is_err(f).tolist() == [False, True]


@pytest.mark.parametrize("dim", [2, -3, 5])
def test_a_dimension_that_x_does_not_have_is_refused(dim):
    with pytest.raises(FlagsError, match=f"one of the 2 of x, .*got {dim}"):
        guarded_gather(torch.eye(3), dim, torch.tensor([[0]]))
    with pytest.raises(FlagsError, match=f"one of the 2 of x, .*got {dim}"):
        guarded_index_select(torch.eye(3), dim, torch.tensor([0]))


def test_vmap_over_nothing_keeps_the_shapes():
    none = torch.empty(0, 5, 4)
    assert torch.vmap(lambda x: flag_nan(x, 1))(none).shape == (0, 5, 4)
    assert torch.vmap(lambda x: err.has_nan(flag_nan(x, 1)))(none).shape == (0, 5)
    words = none.long()
    assert torch.vmap(err.merge)(words, words).shape == (0, 5, 4)
    ids = torch.empty(0, 5, dtype=torch.int64)
    out, f = torch.vmap(lambda one: guarded_embedding(one, torch.eye(3)))(ids)
    assert out.shape == (0, 5, 3)
    assert f.shape == (0, 5, 4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_model_of_nested_tensors_answers_as_without_checks():
    model = nn.Linear(4, 4)
    x = torch.nested.nested_tensor([torch.ones(2, 4), torch.full((1, 4), nan)])
    with check_model(model) as c:
        y = model(x)
        assert c.flags.shape[0] == 2
        assert err.has_nan(c.flags).all()  # whose rows are whose cannot be told
    for ours, theirs in zip(y.unbind(), model(x).unbind(), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


def test_checked_models_that_are_gone_leave_no_names():
    ErrorLocation.reset()
    for _ in range(20):
        check_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    gc.collect()
    owners, ids = len(_registry.owners), ErrorLocation.count()
    for _ in range(50):
        check_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        gc.collect()
    assert len(_registry.owners) <= owners
    assert ErrorLocation.count() == ids


def test_a_check_may_outlive_the_globals_of_its_module(monkeypatch):
    check = check_model(nn.Linear(2, 2))
    number, threads = check._number, _found.THREADS
    assert number in threads
    monkeypatch.setattr(_found, "THREADS", None)  # as the interpreter leaves it at exit
    del check
    gc.collect()
    assert number not in threads


NUMBERS = {
    "code": lambda f, number: push(f, number, 1),
    "severity": lambda f, number: push(f, err.NAN, 1, severity=number),
    "location": lambda f, number: push(f, err.NAN, number),
    "location of a check": lambda f, number: flag_nan(torch.full((1, 1), nan), number, f),
    "code to clear": err.clear,
    "code to find": err.has_code,
    "all of err.push": lambda f, number: err.push(f, number, number, number),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_a_compiled_function_is_given_may_change(name):
    torch._dynamo.reset()
    f = err.from_code(err.INF, 3, 1)
    run = torch.compile(NUMBERS[name], backend="eager", fullgraph=True)
    for number in (1, 2, 3, 1):
        assert torch.equal(run(f, number), NUMBERS[name](f, number))
    torch._dynamo.reset()
