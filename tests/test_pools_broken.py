"""A file cut while its weights are in use: the answer is refused, the process goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from opguard import pools
from pools_kit import fresh_pools, tiny

X = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def management(tmp_path):
    with fresh_pools(tmp_path, "8MiB") as found:
        yield found


def cut(folder: Path, handle: pools.AutoManageWrapper) -> None:
    """Cuts the file of a model's weights to nothing, as nobody should."""
    (path,) = (p for p in folder.rglob("*.safetensors") if handle.name in p.name)
    os.truncate(path, 0)


def run_cut(folder: Path, handle: pools.AutoManageWrapper, *, raising: bool = False) -> None:
    """Uses a model whose file is cut meanwhile, in a block that may raise by itself."""
    with pools.auto_manage(handle):
        cut(folder, handle)
        handle.obj(X)
        if raising:
            raise ZeroDivisionError


def test_the_end_of_a_lease_says_that_the_answer_is_worth_nothing(management, tmp_path):
    handle = pools.manage(tiny(1), name="cut")
    with pytest.raises(pools.PoolFileChanged, match="cut"):
        run_cut(tmp_path, handle)
    assert management.snapshot().users[0].leases == 0
    with pytest.raises(pools.PoolFileChanged), pools.auto_manage(handle):
        pass


def test_a_hooked_call_raises_in_place_of_an_answer(management, tmp_path):
    model = tiny(1)
    handle = pools.manage(model, name="cut")
    with pools.AutoManageHook(handle):
        model(X)
        cut(tmp_path, handle)
        with pytest.raises(pools.PoolFileChanged, match="cut"):
            model(X)
    assert management.snapshot().users[0].leases == 0


# That the weights are gone too is told as what cannot be raised beside it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_of_the_block_is_the_one_that_leaves_it(management, tmp_path):
    handle = pools.manage(tiny(1), name="cut")
    with pytest.raises(ZeroDivisionError):
        run_cut(tmp_path, handle, raising=True)
    assert management.snapshot().users[0].leases == 0


def test_other_models_go_on(management, tmp_path):
    gone, other = pools.manage(tiny(1), name="cut"), pools.manage(tiny(1, seed=3), name="other")
    expected = tiny(1, seed=3)(X)
    with pytest.raises(pools.PoolFileChanged):
        run_cut(tmp_path, gone)
    with pools.auto_manage(other):
        assert torch.equal(other.obj(X), expected)
