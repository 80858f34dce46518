"""Models of which little is read come in without their pages; those that are read come in whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opguard import pools
from opguard.pools._reading import Reading
from opguard.pools.errors import PoolFileChanged
from pools_kit import MIB, fresh_pools, tiny


@pytest.fixture
def cpu(tmp_path):
    with fresh_pools(tmp_path, "64MiB") as management:
        yield management


def times(handle, model, call, count):
    """Bytes in memory right after each of so many leases began; each begins with none."""
    found = []
    for _ in range(count):
        with pools.auto_manage(handle), torch.no_grad():
            found.append(handle.entry.user.home.resident())
            call(model)
        pools.free("cpu")
        assert handle.entry.user.home.resident() == 0
    return found


def one_row(table):
    return table(torch.tensor([1]))


def every_row(table):
    return table.weight.sum()


def test_who_reads_a_row_is_brought_in_without_the_others(cpu):
    table = nn.Embedding(16384, 256)
    before = table.weight.detach().clone()
    handle = pools.manage(table)
    first, *later = times(handle, table, one_row, 20)
    assert first >= 16 * MIB
    assert sum(later) <= 2 * first, "brought in again and again"
    assert cpu.pool("cpu").used == 0
    with pools.auto_manage(handle):
        assert cpu.pool("cpu").used >= 16 * MIB, "what may be read counts"
        assert torch.equal(table.weight, before)


def test_who_reads_all_is_brought_in_whole(cpu):
    model = nn.Embedding(16384, 256)
    handle = pools.manage(model)
    whole = [found for found in times(handle, model, every_row, 24) if found >= 16 * MIB]
    assert len(whole) >= 18


def test_who_begins_to_read_all_is_found_out(cpu):
    table = nn.Embedding(16384, 256)
    handle = pools.manage(table)
    times(handle, table, one_row, 10)
    found = times(handle, table, every_row, 20)
    assert sum(each >= 16 * MIB for each in found) >= 10
    found = times(handle, table, one_row, 80)
    assert found[-1] < 16 * MIB, "and who stops"


def test_a_change_is_kept_where_little_was_brought_in(cpu):
    table = nn.Embedding(16384, 256)
    handle = pools.manage(table)
    times(handle, table, one_row, 3)
    for step in range(3):
        with pools.auto_manage(handle):
            table.weight.data[4096 * step + 7] = step
        assert pools.free("cpu") >= 16 * MIB
    assert [table.weight[4096 * step + 7, 0].item() for step in range(3)] == [0, 1, 2]


def test_a_file_that_was_cut_is_an_exception_all_the_same(cpu):
    table = nn.Embedding(16384, 256)
    handle = pools.manage(table)
    times(handle, table, one_row, 3)
    (path,) = cpu.folder.path.glob("*.safetensors")
    with open(path, "r+b") as file:
        file.truncate(4096)
    with pytest.raises(PoolFileChanged, match="load the model again"), pools.auto_manage(handle):
        pass


def test_small_models_are_brought_in_whole(cpu):
    model = tiny(1)
    handle = pools.manage(model)
    found = times(handle, model, lambda model: None, 9)
    assert min(found) >= MIB


def test_a_lease_without_use_tells_nothing():
    reading = Reading(64 * MIB)
    for _ in range(40):
        reading.lazily()
        if reading.looking:
            reading.saw(0)
    assert not reading.lazily()
