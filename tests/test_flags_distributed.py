"""Flags of several processes: four gloo ranks, each of which compares with a merge of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import opguard
from checkout import TESTS
from opguard.flags import GuardedTensor, dist_merge, err, guard, push

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")

RANKS = 4


def test_four_ranks_get_one_result_or_one_error(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(opguard.__file__).parent.parent)}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = TESTS / "isolated" / "flags_ranks.py"
    made = subprocess.run(
        [sys.executable, str(script), str(RANKS), str(tmp_path / "meeting")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr[-4000:]


def test_without_a_group_is_one_sentence():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="init_process_group"):
        dist_merge(err.new_t(4))


def test_one_rank_is_itself(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        f = err.push(err.new_t(4), err.NAN, 1, where=torch.tensor([True, False, True, False]))
        merged = dist_merge(f)
        assert torch.equal(merged, f)
        assert merged is not f
    finally:
        dist.destroy_process_group()


def test_a_guarded_tensor_comes_back_with_the_flags_of_all(tmp_path):
    g = push(guard(torch.randn(4, 3)), err.NAN, 1, where=torch.tensor([True, False, True, False]))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        merged = dist_merge(g.t())
    finally:
        dist.destroy_process_group()
    assert isinstance(merged, GuardedTensor)
    assert merged.batch_dims == (1,)
    assert torch.equal(merged.flags, g.flags)
    assert torch.equal(merged.unwrap(), g.unwrap().t())
