"""What goes keeps its bits, or its changes; what is said to be held is what is held."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import safetensors.torch
import torch

from opguard import pools
from pools_kit import MIB, Thing, fresh_pools, tiny, until

PAGE = 4096


@pytest.fixture
def cpu(tmp_path):
    with fresh_pools(tmp_path, "4MiB") as management:
        yield management


def resident(*models):
    """Bytes of these models' weights in this process's page tables, as smaps says."""
    places = [
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size())
        for model in models
        for p in model.parameters()
    ]
    total, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
                inside = any(start < e and s < end for s, e in places)
            elif inside and first == "Rss:":
                total += int(line.split()[1]) * 1024
    return total


def test_nothing_is_resident_after_managing_and_the_budget_is_kept_by_smaps(cpu):
    models = [tiny(2, seed=n) for n in range(5)]
    handles = [pools.manage(model) for model in models]
    assert resident(*models) == 0
    x = torch.randn(1, 512)
    for turn in range(12):
        with handles[turn % 5].lease():
            models[turn % 5](x)
            assert resident(*models) <= cpu.pool("cpu").used + PAGE
            assert cpu.pool("cpu").used <= 4 * MIB
    cpu.free()
    assert resident(*models) == 0


def test_every_bit_comes_back(cpu):
    models = [tiny(2, seed=n) for n in range(4)]
    bits = [[p.detach().clone() for p in model.parameters()] for model in models]
    handles = [pools.manage(model) for model in models]
    for _ in range(3):
        for model, handle, expected in zip(models, handles, bits, strict=True):
            with handle.lease():
                for p, e in zip(model.parameters(), expected, strict=True):
                    assert torch.equal(p, e)


@pytest.mark.parametrize("inference", [2 * MIB, "2MiB", lambda module: 2 * MIB])
def test_room_for_calls_is_made_when_a_model_comes_in(cpu, inference):
    """As much as is said, of idle models; those in use stay, and nothing is refused for it."""
    idle, used, model = (pools.manage(tiny(1, seed=n)) for n in range(3))
    pools.manage(model, inference=inference)
    with idle.lease():
        pass
    with used.lease():
        with model.lease():
            assert not idle.loaded
            assert used.loaded
            assert cpu.pool("cpu").budget - cpu.pool("cpu").used >= 2 * MIB
        other = pools.manage(tiny(1, seed=3), inference="1GiB")
        with other.lease():
            assert used.loaded
            assert not model.loaded


def test_an_estimate_that_fails_lets_nothing_in(cpu):
    handle = pools.manage(tiny(1), inference=lambda module: {}["batch"])
    with pytest.raises(KeyError, match="batch"), handle.lease():
        pass
    assert not handle.loaded
    assert cpu.pool("cpu").used == 0


def change_in_place(model):
    with torch.no_grad():
        model[0].weight.add_(1)


def change_data(model):
    model[0].weight.data.mul_(2)


def change_numpy(model):
    model[0].weight.detach().numpy()[3, :] = 7


def change_by_optimizer(model):
    weight = model[0].weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    model(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    weight.grad = None
    weight.requires_grad_(False)


def change_by_loading(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_data, change_numpy, change_by_optimizer, change_by_loading],
    ids=lambda change: change.__name__,
)
def test_what_was_changed_under_a_lease_is_kept(cpu, change):
    model = tiny(2)
    handle = pools.manage(model)
    with handle.lease():
        change(model)
        after = [p.detach().clone() for p in model.parameters()]
    assert cpu.free() == 2 * MIB
    assert resident(model) == 0
    with handle.lease():
        assert all(torch.equal(p, a) for p, a in zip(model.parameters(), after, strict=True))
    figures = cpu.snapshot().users[0]
    assert figures.bytes_written_back >= PAGE


def test_statistics_of_batch_norm_are_kept(cpu):
    model = torch.nn.BatchNorm1d(512)
    handle = pools.manage(model)
    with handle.lease():
        model(torch.randn(8, 512) + 5)
        mean, count = model.running_mean.clone(), model.num_batches_tracked.clone()
    cpu.free()
    with handle.lease():
        assert torch.equal(model.running_mean, mean)
        assert torch.equal(model.num_batches_tracked, count)


def test_identity_and_aliases_stay(cpu):
    model = tiny(3)
    model[2].weight = model[0].weight
    held, view = model[0].weight, model[1].weight[:2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = pools.manage(model)
    for _ in range(2):
        with handle.lease():
            pass
        cpu.free()
    assert model[0].weight is held
    assert model[2].weight is held
    assert optimizer.param_groups[0]["params"][0] is held
    assert torch.equal(view, model[1].weight[:2])


def test_a_reader_without_a_lease_reads_the_right_bits_and_is_swept_up_after(cpu):
    stray, other = tiny(1, seed=1), [tiny(2, seed=n) for n in (2, 3)]
    expected = stray[0].weight.clone()
    pools.manage(stray)
    handles = [pools.manage(model) for model in other]
    assert torch.equal(stray[0].weight, expected)
    assert resident(stray) > 0
    for turn in range(8):
        with handles[turn % 2].lease():
            pass
        cpu.free()
    assert resident(stray) == 0
    assert torch.equal(stray[0].weight, expected)


def test_one_that_reads_while_another_is_brought_in_reads_right(cpu):
    """Forwards of two models that do not fit together, from two threads, all bit-equal."""
    models = [tiny(3, seed=n) for n in range(2)]
    x = torch.randn(4, 512)
    expected = [model(x) for model in models]
    handles = [pools.manage(model) for model in models]
    wrong = []

    def work(n):
        for _ in range(20):
            with handles[n].lease(10):
                if not torch.equal(models[n](x), expected[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_memory_of_a_dead_model_is_free(cpu):
    """A loop that makes, uses and drops models holds no more than the last one."""
    for n in range(6):
        model = tiny(3, seed=n)
        with pools.auto_manage(model, timeout=5):
            model(torch.randn(1, 512))
        del model
        gc.collect()
    until(lambda: cpu.pool("cpu").used == 0)


def test_free_gives_the_least_valuable_back_and_says_how_much(cpu):
    things = [pools.manage(Thing(MIB)) for _ in range(4)]
    for thing in things:
        thing.load()
    for thing in things[1:]:
        thing._loads.pop().__exit__(None, None, None)
    things[2].priority = 1
    assert pools.free(nbytes=1) == MIB
    assert [thing.loaded for thing in things] == [True, False, True, True]
    assert pools.free("cpu", MIB + 1) == 2 * MIB
    assert [thing.loaded for thing in things] == [True, False, False, False]
    assert pools.free() == 0
    things[0].offload()


def test_a_request_is_checked_to_be_met(cpu):
    """Evicting all who can go is not enough: refused with figures, and nobody was sent away."""
    held, idle, wanted = (pools.manage(Thing(n * MIB)) for n in (2, 1, 3))
    with held.lease():
        idle.load()._loads.pop().__exit__(None, None, None)
        with pytest.raises(pools.Deadlock):
            wanted.load(5)
        assert idle.loaded
        assert idle.obj.log == ["in"]


def test_a_users_file_is_read_again_and_looked_at(cpu, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(tiny(2).state_dict(), path)
    model = tiny(2, seed=9)
    model.load_state_dict(safetensors.torch.load_file(path), assign=True)
    handle = pools.manage(model, trust_files=True)
    assert cpu.folder.used == 0, "nothing was written"
    with handle.lease():
        expected = model[0].weight.clone()
    assert 2 * MIB <= cpu.free() <= 2 * MIB + 2 * PAGE
    with handle.lease():
        assert torch.equal(model[0].weight, expected)
        model[0].weight.data[0, 0] = 5
    cpu.free()
    assert model[0].weight[0, 0] == 5
    assert cpu.pool("cpu").used >= 2 * MIB, "what cannot be written back stays, and counts"


def test_a_users_file_that_changed_is_an_exception_on_entry(cpu, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(tiny(2).state_dict(), path)
    model = tiny(2, seed=9)
    model.load_state_dict(safetensors.torch.load_file(path), assign=True)
    handle = pools.manage(model, trust_files=True)
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(pools.PoolFileChanged) as caught, handle.lease():
        pass
    assert any("while bringing in" in note for note in caught.value.__notes__)
    assert cpu.pool("cpu").used == 0


def test_a_full_disk_while_managing_leaves_the_model_as_it_was(cpu, monkeypatch):
    import os

    model = tiny(1)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="space"):
        pools.manage(model)
    monkeypatch.undo()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert cpu.entries == {}
    assert pools.manage(model).load().loaded


def test_compiled_code_is_not_compiled_again(cpu):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = tiny(2)
    compiled = torch.compile(model, backend=counter)
    handle = pools.manage(model)
    x = torch.randn(1, 512)
    with handle.lease():
        expected = compiled(x)
    for _ in range(2):
        cpu.free()
        with handle.lease():
            assert torch.equal(compiled(x), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_arrays_of_before_managing_are_of_before(cpu):
    """Documented: memory taken from a parameter before is not the model's any more."""
    model = tiny(1)
    array = model[0].weight.detach().numpy()
    pools.manage(model)
    assert np.array_equal(array, model[0].weight.numpy())
    assert array.ctypes.data != model[0].weight.data_ptr()
