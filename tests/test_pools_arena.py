"""Weights that move between home and an accelerator: nothing lost, nothing unmapped too early."""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from checkout import CSRC
from emulated_pool import OUT_OF_MEMORY, UNIT, Emulated, emulated_accelerator
from opguard.pools import PoolFileChanged, PoolRefused, _accelerators, _devices, _transfers
from opguard.pools._accelerators import TorchAccelerator, accelerator_for, streams_of
from opguard.pools._devices import DeviceHome
from opguard.pools._homes import Home
from opguard.pools._spill import SpillFolder
from opguard.pools._transfers import checksum
from pools_kit import MIB

KINDS = ["arena", "ring", "torch"]


class Net(nn.Module):
    """Tied weights, a transposed view, a non-persistent buffer, statistics, an odd dtype."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(100, 300)
        self.norm = nn.BatchNorm1d(300)
        self.second = nn.Linear(300, 100)
        self.tied = nn.Linear(100, 300)
        self.tied.weight = self.first.weight
        self.register_buffer("view", self.second.weight.detach().t(), persistent=False)
        self.register_buffer("extra", torch.randn(33, dtype=torch.bfloat16))
        self.register_buffer("none", torch.empty(0))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)).relu()) @ self.view.t() + self.extra.sum()


class Case:
    """A module at home and an accelerator for it, of one of the kinds."""

    def __init__(
        self, kind: str, folder: SpillFolder, net: nn.Module | None = None, **more
    ) -> None:
        self.kind = kind
        self.emulated = Emulated()
        self.net = Net() if net is None else net
        self.before = {n: t.detach().clone() for n, t in everything(self.net).items()}
        self.x = torch.randn(4, 100)
        with torch.no_grad():
            self.expected = self.net(self.x) if net is None else None
        self.inner = Home.adopt(self.net, folder, "net", segments=more.pop("segments", None))
        accelerator = (
            TorchAccelerator("cpu") if kind == "torch" else emulated_accelerator(self.emulated)
        )
        if kind == "ring":
            more["lend"] = no_master
        self.home = DeviceHome(self.inner, accelerator, **more)

    def at_home(self) -> bool:
        return not self.inner.astray() and not self.home._there

    def same(self) -> None:
        found = everything(self.net)
        assert found.keys() == self.before.keys()
        for name, tensor in self.before.items():
            assert torch.equal(found[name], tensor), name


def everything(net: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*net.named_parameters(), *net.named_buffers()])


class no_master:
    """Host memory has no room for a pinned copy."""

    def __init__(self, _master) -> None:
        pass

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_error) -> None:
        return None


@pytest.fixture
def folder(tmp_path):
    return SpillFolder(tmp_path)


@pytest.fixture(params=KINDS)
def case(request, folder):
    gc.collect()
    made = Case(request.param, folder)
    yield made
    assert made.emulated.count("misuse") == 0
    made.home.close()


def test_there_and_back_keeps_everything(case):
    ids = {name: id(tensor) for name, tensor in everything(case.net).items()}
    addresses = set()
    for _ in range(3):
        case.home.bring_in()
        if case.kind != "torch":
            addresses.add(case.net.first.weight.data_ptr())
            assert len(addresses) == 1
            assert case.emulated.count("used") == case.home.nbytes
        assert set(case.inner.astray()) >= {"first.weight", "view", "extra", "norm.running_mean"}
        assert not case.home.astray()
        assert case.net.tied.weight is case.net.first.weight
        assert case.net.view.data_ptr() == case.net.second.weight.data_ptr()
        assert torch.equal(case.net(case.x), case.expected)
        case.same()
        assert case.home.give_back() == 0
        assert case.at_home()
        assert case.emulated.count("used") == 0
        case.same()
        assert torch.equal(case.net(case.x), case.expected)
    assert {name: id(tensor) for name, tensor in everything(case.net).items()} == ids


def test_a_clean_model_is_not_copied_back(case):
    case.home.bring_in()
    case.net(case.x)
    case.home.give_back()
    assert case.emulated.count("bytes_out") == 0


def test_one_copy_and_the_second_time_no_file(folder):
    case = Case("arena", folder)
    for turn in range(3):
        case.home.bring_in()
        assert case.emulated.calls("cuMemcpyHtoDAsync_v2") == turn + 1
        assert case.inner.resident() == 0
        case.home.give_back()
    assert case.emulated.calls("cuMemAddressReserve") == 1
    assert case.emulated.calls("cuMemHostRegister_v2") == 1
    master = case.home.master
    assert case.inner.nbytes - 4096 <= master.nbytes <= case.inner.nbytes
    # A cache that can go by itself, and comes again.
    master.close()
    assert case.emulated.count("pinned") == 0
    case.home.bring_in()
    case.same()
    case.home.close()


WRITES = {
    "in place": lambda net: net.first.weight.add_(1),
    "copy_": lambda net: net.extra.copy_(torch.ones(33)),
    "through a view": lambda net: net.second.weight[3].zero_(),
    "through the other end": lambda net: net.tied.weight.mul_(2),
    "load_state_dict": lambda net: net.norm.load_state_dict(
        {**net.norm.state_dict(), "weight": torch.full((300,), 7.0)}
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_changes_come_home(case, write):
    case.home.bring_in()
    with torch.no_grad():
        WRITES[write](case.net)
    changed = {name: tensor.clone() for name, tensor in everything(case.net).items()}
    assert case.home.changed() > 0
    assert case.home.give_back() > 0
    assert case.at_home()
    for _ in range(2):
        for name, tensor in everything(case.net).items():
            assert torch.equal(tensor, changed[name]), name
        case.home.bring_in()
        for name, tensor in everything(case.net).items():
            assert torch.equal(tensor, changed[name]), name
        case.home.give_back()


def test_changes_at_home_are_in_the_next_copy(case):
    """The pinned copy is of before: it is filled again."""
    case.home.bring_in()
    case.home.give_back()
    case.net.first.weight.data.add_(1)
    case.home.bring_in()
    assert torch.equal(case.net.first.weight, case.before["first.weight"] + 1)
    case.home.give_back()
    case.net.first.weight.data.add_(1)
    assert case.home.give_back() > 0  # a sweep, after which the pages look clean
    case.home.bring_in()
    assert torch.equal(case.net.first.weight, case.before["first.weight"] + 1 + 1)


def test_training_writes_without_versions(case):
    """Batch norm's statistics and fused optimizers move no version."""
    case.net.train()
    optimizer = torch.optim.SGD(case.net.parameters(), lr=0.1, fused=True)
    case.home.bring_in()
    case.net(case.x).square().sum().backward()
    versions = [p._version for p in case.net.parameters()]
    optimizer.step()
    assert [p._version for p in case.net.parameters()] == versions
    optimizer.zero_grad()
    changed = {name: tensor.clone() for name, tensor in everything(case.net).items()}
    assert case.home.give_back() > 0
    for name, tensor in everything(case.net).items():
        assert torch.equal(tensor, changed[name]), name
    assert not torch.equal(changed["norm.running_mean"], case.before["norm.running_mean"])
    assert not torch.equal(changed["first.weight"], case.before["first.weight"])


def test_statistics_of_a_module_that_is_in_eval_again(case):
    case.home.bring_in()
    case.net.norm.train()
    with torch.no_grad():
        case.net(case.x)
    case.net.eval()
    mean = case.net.norm.running_mean.clone()
    case.home.give_back()
    assert torch.equal(case.net.norm.running_mean, mean)
    assert not torch.equal(mean, case.before["norm.running_mean"])


@pytest.mark.parametrize("kind", KINDS)
def test_verify_bytes_sees_what_versions_do_not(folder, kind):
    case = Case(kind, folder, verify="bytes")
    case.home.bring_in()
    case.net.first.bias.data.add_(1)
    case.net.second.weight.detach().numpy()[7, 7] = -5
    assert case.home.changed() == sum(
        tensor.numel() * 4 for tensor in (case.net.first.bias, case.net.second.weight)
    )
    assert case.home.give_back() > 0
    assert torch.equal(case.net.first.bias, case.before["first.bias"] + 1)
    assert case.net.second.weight[7, 7] == -5
    # Training mode alone is no reason to copy where the bytes are looked at.
    case.net.train()
    case.home.bring_in()
    assert case.home.changed() == 0
    case.home.give_back()
    with pytest.raises(ValueError, match="verify"):
        DeviceHome(case.inner, case.home.accelerator, verify="all")
    case.home.close()


def test_checksums_tell_every_small_change():
    flat = torch.arange(1000, dtype=torch.int64).view(torch.uint8)[:7997]
    sums = {checksum(flat)}
    for at in (0, 7, 8, 4000, 7990, 7996):
        flat[at] ^= 128
        sums.add(checksum(flat))
    assert len(sums) == 7
    # What a plain sum takes for the same: signs turned in pairs, words exchanged.
    words = torch.randn(64, dtype=torch.float64)
    some = {checksum(words.view(torch.uint8))}
    words[:2] *= -1
    some.add(checksum(words.view(torch.uint8)))
    words[[5, 9]] = words[[9, 5]]
    some.add(checksum(words.view(torch.uint8)))
    assert len(some) == 3
    assert checksum(torch.empty(0, dtype=torch.uint8)) == 0


def test_inference_tensors_are_assumed_to_have_changed(folder):
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(10, 10)).eval()
    case = Case("arena", folder, net)
    case.home.bring_in()
    with torch.inference_mode():
        net[0].weight.add_(1)
    assert case.home.give_back() > 0
    assert torch.equal(net[0].weight, case.before["0.weight"] + 1)
    case.home.close()


def test_a_replaced_parameter_is_its_owners(case):
    case.home.bring_in()
    fresh = nn.Parameter(torch.randn(300))
    case.net.first.bias = fresh
    elsewhere = torch.randn(100)
    case.net.second.bias.data = elsewhere
    assert case.home.astray() == ["second.bias"]
    case.home.give_back()
    assert case.net.first.bias is fresh
    assert case.net.second.bias.data_ptr() == elsewhere.data_ptr()
    case.home.bring_in()
    assert case.net.second.bias.data_ptr() == elsewhere.data_ptr()
    weight = case.net.first.weight
    assert case.home.base(weight).data_ptr() == weight.data_ptr()
    case.home.give_back()
    assert case.home.base(weight).data_ptr() == weight.data_ptr()


def test_a_segment_without_bytes(folder):
    for kind in KINDS:
        net = Net()
        case = Case(kind, folder, net, segments=[[net.none], [net.first.weight]])
        for segment in (0, 1, None):
            case.home.bring_in(segment)
            assert case.home.is_in(segment or 0)
            case.same()
            net.train()  # so that all of it is fetched
            case.home.give_back(segment)
            net.eval()
        assert case.at_home()
        case.home.close()
    bare = nn.Module()
    bare.register_buffer("none", torch.empty(0))
    home = DeviceHome(Home.adopt(bare, folder, "bare"), case.home.accelerator)
    home.bring_in()
    home.give_back()
    home.close()


def test_segments_come_and_go_alone(folder):
    for kind in KINDS:
        net = Net()
        segments = [list(net.first.parameters()), [net.second.weight]]
        case = Case(kind, folder, net, segments=segments)
        case.home.bring_in(1)
        assert set(case.inner.astray()) == {"second.weight", "view"}
        case.home.prefetch(0)
        assert not case.home.is_in(0)
        case.same()
        case.home.bring_in(0)
        case.home.give_back(1)
        assert set(case.inner.astray()) == {"first.weight", "first.bias"}
        case.home.prefetch(2)  # given back before anybody waited for it
        case.home.give_back()
        assert case.at_home()
        case.same()
        case.home.close()


# --- order on the device --------------------------------------------------------------------------


def test_memory_goes_only_after_the_last_kernel(folder):
    """On streams that nobody told of; the emulation would die of it (see the torch-free tests)."""
    case = Case("arena", folder)
    case.home.bring_in()
    address, nbytes = case.net.first.weight.data_ptr(), case.net.first.weight.nbytes
    for _ in range(2):
        case.emulated.read(case.emulated.stream(), address, nbytes, seconds=0.1)
    begin = time.perf_counter()
    case.home.give_back()
    assert time.perf_counter() - begin > 0.05
    assert case.emulated.count("sum") > 0
    # A kernel's writes are in what comes home.
    case.home.bring_in()
    before = case.net.extra.clone().view(torch.uint8)
    case.net.extra.add_(0)
    case.emulated.add(case.emulated.stream(), case.net.extra.data_ptr(), 66, seconds=0.1)
    case.home.give_back()
    assert torch.equal(case.net.extra.view(torch.uint8), before + 1)
    case.home.close()


def test_a_slow_copy_is_waited_for_before_use(folder):
    case = Case("arena", folder)
    case.emulated.pause(0.1)
    case.home.prefetch()
    case.same()  # at home meanwhile
    assert case.at_home() is False
    case.home.bring_in()
    case.same()
    assert case.emulated.calls("cuCtxSynchronize") == 0
    case.home.close()


def test_prefetch_while_another_model_runs(folder):
    """The copy is on a stream of its own: it neither waits for kernels nor do they wait for it."""
    case = Case("arena", folder)
    compute = case.emulated.stream()
    other = torch.zeros(1000, dtype=torch.uint8)
    case.emulated.read(compute, other.data_ptr(), 1000, seconds=0.5)
    begin = time.perf_counter()
    case.home.bring_in()
    assert time.perf_counter() - begin < 0.4
    case.same()
    case.emulated.finish()
    case.home.close()


def test_a_stream_can_wait_instead_of_the_thread(folder):
    case = Case("arena", folder)
    case.home.accelerator.host_computes = False
    case.emulated.pause(0.1)
    compute = case.emulated.stream()
    begin = time.perf_counter()
    case.home.bring_in(stream=compute)
    assert time.perf_counter() - begin < 0.09
    weight = case.net.first.weight
    case.emulated.read(compute, weight.data_ptr(), weight.nbytes)
    case.emulated.finish()
    expected = int(case.before["first.weight"].view(torch.uint8).long().sum())
    assert case.emulated.count("sum") == expected
    case.home.close()


def test_what_was_queued_after_the_last_use_is_not_waited_for(folder):
    case = Case("arena", folder)
    accelerator, compute = case.home.accelerator, case.emulated.stream()
    other = torch.ones(1000, dtype=torch.uint8)
    weight = case.net.first.weight
    first = int(weight.detach().view(torch.uint8).long().sum())
    for told in (True, False):
        before = case.emulated.count("sum")
        case.home.bring_in()
        case.emulated.read(case.emulated.stream(), weight.data_ptr(), weight.nbytes, seconds=0.05)
        mark = accelerator.mark()
        case.emulated.read(compute, other.data_ptr(), 1000, seconds=10 if told else 0.1)
        case.home.unused_since(mark)
        if not told:
            case.home.unused_since(None)
        case.home.give_back()
        assert case.emulated.count("sum") - before == first + (0 if told else 1000)
        case.emulated.hurry()
    # A copy that nobody waited for comes after the mark.
    case.emulated.pause(0.05)
    case.home.prefetch()
    case.home.unused_since(mark)
    case.home.give_back()
    assert case.emulated.count("misuse") == 0
    # A mark is of one stay.
    case.home.bring_in()
    assert all(there.last_use is None for there in case.home._there.values())
    case.home.close()


# --- captures -------------------------------------------------------------------------------------


def test_weights_come_during_a_capture_and_go_after_it(folder, monkeypatch):
    """Another thread captures a CUDA graph: it is not spoilt, and its end is waited for."""
    emulated = Emulated()
    graph = emulated.stream()
    net = Net()
    home = DeviceHome(Home.adopt(net, folder, "net"), emulated_accelerator(emulated, graph))
    told = threading.Event()

    def capture() -> None:
        with emulated.capture(graph):
            told.set()
            time.sleep(0.2)

    beside = []

    def looked_at(flat: torch.Tensor) -> int:
        beside.append(home.accelerator.driver.capturing())
        return checksum(flat)

    monkeypatch.setattr(_devices, "checksum", looked_at)
    for verify in (None, "bytes"):
        home.verify = verify
        with thread_that(capture):
            told.wait(5)
            told.clear()
            home.bring_in()
            net.first.bias.data.add_(1)
            home.give_back()
            assert not emulated.library.emu_end(ctypes.c_void_p(graph))
        assert not home._there
    assert beside
    assert not any(beside)  # torch's own work would spoil the capture
    assert emulated.count("misuse") == 0
    home.close()


def test_a_stream_that_is_captured_is_not_made_to_wait(folder):
    """The copy is no part of its graph: the thread waits instead."""
    emulated = Emulated()
    graph = emulated.stream()
    accelerator = emulated_accelerator(emulated, graph)
    accelerator.host_computes = False
    net = Net()
    home = DeviceHome(Home.adopt(net, folder, "net"), accelerator)
    weight = net.first.weight.clone()
    with emulated.capture(graph):
        home.bring_in(stream=graph)
        assert torch.equal(net.first.weight, weight)
    assert emulated.count("misuse") == 0
    home.close()


def test_a_capture_without_an_end_keeps_the_weights(folder, monkeypatch):
    monkeypatch.setattr(_transfers, "PATIENCE", 0.05)
    emulated = Emulated()
    graph = emulated.stream()
    net = Net()
    home = DeviceHome(Home.adopt(net, folder, "net"), emulated_accelerator(emulated, graph))
    home.bring_in()
    mark = home.accelerator.mark()
    with emulated.capture(graph):
        with pytest.raises(PoolRefused, match=r"one has been for 0\.05 s"):
            home.give_back()
        assert home.is_in(0)
        assert home.accelerator.mark() is None
        # With a mark from before there is nothing to ask of all streams.
        home.unused_since(mark)
        home.give_back()
        home.bring_in()
        assert home.is_in(0)
    # To look at the bytes is work of torch's, which has to wait as well.
    home.give_back()
    home.verify = "bytes"
    home.bring_in()
    mark = home.accelerator.mark()
    home.unused_since(mark)
    with emulated.capture(graph), pytest.raises(PoolRefused, match="one has been"):
        home.give_back()
    assert emulated.count("misuse") == 0
    home.close()


def test_torchs_cache_is_not_emptied_during_a_capture(monkeypatch):
    """It waits for the whole device."""
    emulated = Emulated()
    graph = emulated.stream()
    place = emulated_accelerator(emulated, graph).place([UNIT])
    place.device = torch.device("cuda", 0)
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    with emulated.capture(graph):
        emulated.fail("cuMemCreate", 1, OUT_OF_MEMORY)
        place.take(0)
        assert not emptied
    place.drop(0)
    emulated.fail("cuMemCreate", 1, OUT_OF_MEMORY)
    place.take(0)
    assert emptied
    place.drop(0)


def test_the_thread_that_captures_is_told_at_once(folder, monkeypatch):
    emulated = Emulated()
    graph = emulated.stream()
    net = Net()
    home = DeviceHome(Home.adopt(net, folder, "net"), emulated_accelerator(emulated, graph))
    home.bring_in()
    monkeypatch.setattr(_transfers, "_this_thread_captures", lambda _device: True)
    with emulated.capture(graph), pytest.raises(PoolRefused, match="around the capture"):
        home.give_back()
    plain = DeviceHome(Home.adopt(Net(), folder, "net"), TorchAccelerator("cpu"))
    with pytest.raises(PoolRefused, match="around the capture"):
        plain.bring_in()
    monkeypatch.undo()
    home.close()
    plain.close()


class thread_that:
    """Runs a function in a thread beside a block; what it raises is raised at the end."""

    def __init__(self, function) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,))

    def _run(self, function) -> None:
        try:
            function()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def test_all_streams_of_torch_are_watched(monkeypatch):
    """It has 32 of each priority, hands them out in turn and takes higher ones for the highest."""
    turns: dict[int, int] = {-1: 7}

    class Stream:
        def __init__(self, _device: torch.device, priority: int = 0) -> None:
            kind = max(priority, -3)
            turns[kind] = turns.get(kind, 0) + 1
            self.cuda_stream = 1000 * (1 - kind) + turns[kind] % 32

        def priority_range(self) -> tuple[int, int]:
            return (0, -5)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    found = streams_of(torch.device("cuda", 0))
    assert sorted(found) == [1000 * kind + i for kind in (1, 2, 3, 4) for i in range(32)]


# --- failures -------------------------------------------------------------------------------------


def test_a_full_device_leaves_the_model_at_home(folder):
    case = Case("arena", folder)
    other = case.home.accelerator.place([0, (64 << 20) - case.home.nbytes + UNIT])
    other.take(1)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        case.home.bring_in()
    assert case.at_home()
    case.same()
    other.drop(1)
    case.home.bring_in()
    case.same()
    case.home.close()


@pytest.mark.parametrize("kind", ["arena", "ring"])
def test_every_driver_call_may_fail(folder, kind):
    """The n-th call fails, for each n: the model is whole, at home or there, and works on."""
    case = Case(kind, folder)
    case.home.bring_in()
    case.home.give_back()
    failed = 0
    for nth in range(1, 200):
        case.emulated.fail("*", nth)
        value = float(nth)
        try:
            case.home.bring_in()
            with torch.no_grad():
                case.net.second.bias.fill_(value)
            case.home.give_back()
        except (RuntimeError, torch.OutOfMemoryError):
            failed += 1
        case.emulated.fail("", 0, 0)
        if not torch.equal(case.net.second.bias, case.before["second.bias"]):
            case.before["second.bias"].fill_(value)
        case.same()
        case.home.give_back()
        case.same()
        assert case.at_home()
        assert case.net.second.bias.data_ptr() == case.inner.base(case.net.second.bias).data_ptr()
    assert failed > 15
    case.home.close()


def test_a_tensor_that_was_taken_keeps_the_model_there(folder):
    case = Case("arena", folder)
    case.home.bring_in()
    taken = case.net.first.weight.detach()[0]  # a view, and what it is a view of
    with pytest.raises(PoolRefused, match=r"2 tensors outside of it share .* of first\.weight"):
        case.home.give_back()
    assert torch.equal(taken, case.before["first.weight"][0])
    case.same()
    assert case.home.is_in(0)
    del taken
    case.home.give_back()
    assert case.at_home()
    case.home.close()


def test_the_file_is_looked_at_before_the_pinned_copy_is_used(folder):
    case = Case("arena", folder)
    case.home.bring_in()
    case.home.give_back()
    (path,) = [p for p in folder.path.rglob("*") if p.is_file() and p.stat().st_size > UNIT]
    with open(path, "r+b") as file:
        file.truncate(4096)
    with pytest.raises(PoolFileChanged):
        case.home.bring_in()
    assert not case.home._there
    assert case.emulated.count("used") == 0


def test_a_full_disk_keeps_the_change_on_the_device(case, monkeypatch):
    case.home.bring_in()
    case.net.first.bias.data.zero_()
    case.net.first.weight.detach().add_(1)
    changed = case.net.first.weight.clone()
    real = case.inner.give_back
    monkeypatch.setattr(case.inner, "give_back", full)
    with pytest.raises(OSError, match="no space"):
        case.home.give_back()
    assert torch.equal(case.net.first.weight, changed)
    assert case.home.is_in(0)
    monkeypatch.setattr(case.inner, "give_back", real)
    assert case.home.give_back() > 0
    assert torch.equal(case.net.first.weight, changed)


def full(*_args) -> int:
    raise OSError(28, "no space left on device")


def test_a_gpu_that_broke_down_is_told_and_the_rest_is_given_back(folder):
    """An error of a kernel sticks. What was changed there is gone with it; nothing else is."""
    case = Case("arena", folder)
    case.home.bring_in()
    case.emulated.break_down()
    with pytest.raises(RuntimeError, match="700"):
        case.home.give_back()
    with pytest.raises(RuntimeError, match="700"):
        case.home.release()
    assert case.home.is_in(0)
    case.home.close()
    assert not [path for path in folder.path.rglob("*") if path.stat().st_size > UNIT]
    assert case.emulated.count("misuse") == 0


def test_memory_that_a_copy_may_still_fill_is_not_given_back(folder):
    """The event behind the copy cannot be made, so nobody knows when it ends."""
    case = Case("arena", folder)
    for function in ("cuEventCreate", "cuEventSynchronize", "cuEventRecord"):
        case.emulated.fail(function, 1)
        real = case.home._place.settle
        case.home._place.settle = broken
        with pytest.raises(RuntimeError):
            case.home.bring_in()
        case.home._place.settle = real
        assert case.at_home()
        case.same()
        case.home.bring_in()
        case.same()
        case.home.give_back()
    assert case.emulated.count("used") == case.emulated.count("misuse") == 0
    case.home.close()


def broken() -> None:
    raise RuntimeError("cannot wait")


def test_closing_keeps_the_weights(case):
    case.home.bring_in()
    with torch.no_grad():
        case.net.first.bias.add_(1)
    case.home.release()
    case.before["first.bias"] += 1
    case.same()
    gc.collect()
    assert case.emulated.count("mapped") == 0


def test_two_threads_and_one_model(folder):
    case = Case("arena", folder)
    case.emulated.pause(0.001)
    wrong: list[BaseException] = []

    def work(verb) -> None:
        try:
            for _ in range(20):
                verb()
        except BaseException as error:
            wrong.append(error)

    verbs = (case.home.bring_in, case.home.give_back, case.home.prefetch, case.home.changed)
    threads = [threading.Thread(target=work, args=(verb,)) for verb in verbs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    case.home.give_back()
    assert case.at_home()
    case.same()
    case.home.close()


def test_a_subclass_moves_by_its_inner_tensors(folder):
    torchao = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Linear(64, 64)).eval()
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig(version=2))
    x = torch.randn(2, 64)
    expected = net(x)
    case = Case("arena", folder, net=None)
    case.home.close()
    inner = Home.adopt(net, folder, "quantized")
    home = DeviceHome(inner, emulated_accelerator(case.emulated))
    home.bring_in()
    assert all("::" in name for name in inner.astray() if "weight" in name)
    assert torch.equal(net(x), expected)
    home.give_back()
    assert torch.equal(net(x), expected)
    home.close()


def test_a_gpu_has_one_accelerator(monkeypatch):
    opened = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(_accelerators, "_known", {})
    monkeypatch.setattr(_accelerators, "_open", lambda device: opened.append(device) or object())
    assert accelerator_for(torch.device("cuda")) is accelerator_for(torch.device("cuda", 1))
    assert accelerator_for(torch.device("cuda", 0)) is not accelerator_for(torch.device("cuda", 1))
    assert opened == [torch.device("cuda", 1), torch.device("cuda", 0)]


def test_devices_without_a_driver_are_torchs():
    assert isinstance(accelerator_for(torch.device("cpu")), TorchAccelerator)
    assert accelerator_for(torch.device("cpu")) is accelerator_for(torch.device("cpu"))


def test_a_copy_of_the_module_is_its_own(case):
    case.home.bring_in()
    twin = copy.deepcopy(case.net)
    case.home.give_back()
    with torch.no_grad():
        twin.first.weight.zero_()
    case.same()


def test_the_rows_of_the_benchmark_move_a_model(monkeypatch, tmp_path):
    """On the emulated GPU the figures mean nothing; what they are of does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    bench = importlib.import_module("bench_cuda")
    emulated = Emulated()
    accelerator = emulated_accelerator(emulated)
    monkeypatch.setenv("OPGUARD_SPILL", str(tmp_path))
    monkeypatch.setattr(_accelerators, "accelerator_for", lambda _device: accelerator)
    monkeypatch.setattr(bench, "POOL_BYTES", MIB)
    monkeypatch.setattr(bench, "SIDE", 256)
    monkeypatch.setattr(bench, "buffers", lambda: (torch.ones(MIB), torch.zeros(MIB)))
    monkeypatch.setattr(bench, "KEPT", [])
    monkeypatch.setattr(torch.cuda, "synchronize", emulated.finish)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (64 * MIB, 64 * MIB))
    coming, going = bench.pool_rows()
    assert (coming.limit, going.limit) == (1 / 0.9, 1.0)
    (model,) = bench.KEPT
    at_home = [weight.data_ptr() for weight in model.parameters()]
    moved = emulated.count("bytes_in")
    assert coming.ours() > 0
    assert emulated.count("bytes_in") - moved == MIB
    assert coming.theirs() > 0
    home = going.ours.__closure__[0].cell_contents
    home.bring_in()
    assert not {weight.data_ptr() for weight in model.parameters()} & {*at_home}
    assert 0 < going.ours() < 1
    assert [weight.data_ptr() for weight in model.parameters()] == at_home
    assert going.theirs() == 0.005
    assert emulated.count("bytes_out") == emulated.count("used") == 0
    home.close()


# --- our declarations against the toolkit's -------------------------------------------------------

CHECK = """
#include <cuda.h>
#define OG_CHECK_ABI
#include "core/pool_arena_driver.h"
#define SAME(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #ours)
SAME(OG_CU_OUT_OF_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME(OG_CU_DEINITIALIZED, CUDA_ERROR_DEINITIALIZED);
SAME(OG_CU_NOT_READY, CUDA_ERROR_NOT_READY);
SAME(OG_CU_PINNED, CU_MEM_ALLOCATION_TYPE_PINNED);
SAME(OG_CU_ON_DEVICE, CU_MEM_LOCATION_TYPE_DEVICE);
SAME(OG_CU_READ_WRITE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
SAME(OG_CU_HAS_MEMORY_MAPS, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
SAME(OG_CU_NON_BLOCKING, CU_STREAM_NON_BLOCKING);
SAME(OG_CU_SLEEP_NO_TIMING, CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING);
SAME(OG_CU_PORTABLE, CU_MEMHOSTREGISTER_PORTABLE);
SAME(OG_CU_RELAXED, CU_STREAM_CAPTURE_MODE_RELAXED);
_Static_assert(sizeof(og_cu_address) == sizeof(CUdeviceptr), "address");
_Static_assert(sizeof(og_cu_handle) == sizeof(CUmemGenericAllocationHandle), "handle");
#define LIKE(ours, field, theirs, other) \\
    _Static_assert(offsetof(ours, field) == offsetof(theirs, other), #field)
_Static_assert(sizeof(og_cu_property) == sizeof(CUmemAllocationProp), "property");
LIKE(og_cu_property, handle_types, CUmemAllocationProp, requestedHandleTypes);
LIKE(og_cu_property, location.id, CUmemAllocationProp, location.id);
LIKE(og_cu_property, metadata, CUmemAllocationProp, win32HandleMetaData);
LIKE(og_cu_property, flags.usage, CUmemAllocationProp, allocFlags.usage);
_Static_assert(sizeof(og_cu_access) == sizeof(CUmemAccessDesc), "access");
LIKE(og_cu_access, flags, CUmemAccessDesc, flags);
/* As many parameters of the same sizes: opaque pointers and enums aside, a call must compile. */
#define CALL(field, name, parameters) \\
    int (*check_##field) parameters = (int (*) parameters)(void *)name;
OG_CU_FUNCTIONS(CALL)
OG_CU_NEWER(CALL)
"""


def test_declarations_agree_with_the_toolkit(tmp_path):
    headers = [*Path("/usr/local").glob("cuda*/include/cuda.h")]
    gcc = shutil.which("gcc")
    if not headers or gcc is None:
        pytest.skip("there is no gcc, or no CUDA toolkit with its header")
    source = tmp_path / "check.c"
    source.write_text(CHECK)
    command = [gcc, "-std=c11", "-fsyntax-only", f"-I{headers[0].parent}", f"-I{CSRC}", str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
