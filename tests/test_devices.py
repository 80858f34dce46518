"""Devices and dtypes: spellings, choices, memory; no accelerator is needed."""

import pytest
import torch

from opguard import devices


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cpu", torch.device("cpu")),
        ("cpu:0", torch.device("cpu")),
        (torch.device("cpu"), torch.device("cpu")),
        ("cuda:3", torch.device("cuda", 3)),
        ("meta", torch.device("meta")),
        ("xpu", torch.device("xpu", 0)),
    ],
)
def test_normalize_device(given, expected):
    assert devices.normalize_device(given) == expected


def test_normalize_device_default_is_best():
    assert devices.normalize_device() == devices.best_device()
    assert devices.best_device() == devices.list_devices()[0]


@pytest.mark.parametrize(
    ("given", "error"), [("gpu", ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_normalize_device_bad_input_is_one_sentence(given, error):
    with pytest.raises(error, match=r"^device: expected .*, got ") as caught:
        devices.normalize_device(given)
    assert "\n" not in str(caught.value)


def test_normalize_devices_each_once_in_order():
    found = devices.normalize_devices(["cpu", "cuda:1", torch.device("cpu"), "cuda:1"])
    assert found == [torch.device("cpu"), torch.device("cuda", 1)]
    assert devices.normalize_devices("cpu") == [torch.device("cpu")]
    assert devices.normalize_devices() == devices.list_devices()
    with pytest.raises(TypeError, match="devices: expected"):
        devices.normalize_devices(1.5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("fp32", torch.float32),
        ("torch.float16", torch.float16),
        ("half", torch.float16),
        ("BF16", torch.bfloat16),
        ("float64", torch.float64),
        ("fp64", torch.float64),
        ("i8", torch.int8),
        ("int8", torch.int8),
        ("u8", torch.uint8),
        (torch.complex64, torch.complex64),
    ],
)
def test_normalize_dtype(given, expected):
    assert devices.normalize_dtype(given) is expected


@pytest.mark.parametrize(
    ("given", "error"), [("fp17", ValueError), ("nn", ValueError), (16, TypeError)]
)
def test_normalize_dtype_bad_input_is_one_sentence(given, error):
    with pytest.raises(error, match=r"^dtype: expected .*, got "):
        devices.normalize_dtype(given)


def test_cpu_computes_in_every_float():
    for name in ("fp64", "fp32", "fp16", "bf16"):
        assert devices.device_supports_dtype("cpu", name)
    assert devices.device_supports_bfloat16("cpu")
    assert not devices.device_supports_dtype("mps", torch.float64)


def test_absent_accelerators_are_left_alone():
    absent = [torch.device("cuda", 63), torch.device("xpu", 63)]
    devices.synchronize(absent)
    devices.empty_cache(absent)
    devices.reset_memory_peak(absent)
    for device in absent:
        assert devices.memory_now(device) == 0
        assert devices.memory_peak(device) == 0
        assert devices.memory_cached(device) == 0
        assert not devices.device_supports_bfloat16(device)


def test_cpu_memory_is_the_resident_size():
    before = devices.memory_now("cpu")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    during = devices.memory_now("cpu")
    assert during - before > 48 << 20
    assert devices.memory_peak("cpu") >= during
    del block
    assert devices.memory_now("cpu") < during


def test_all_devices_by_default():
    devices.synchronize()
    devices.empty_cache()


def test_an_accelerator_is_driven_through_torch_accelerator(monkeypatch):
    """A machine with two accelerators of another kind is waited for and emptied, each by name."""
    calls = []
    fake = {
        "is_available": lambda: True,
        "current_accelerator": lambda: torch.device("xpu"),
        "device_count": lambda: 2,
        "current_device_index": lambda: 1,
        "set_device_index": lambda index: calls.append(("current", index)),
        "synchronize": lambda device: calls.append(("wait", device)),
        "empty_cache": lambda: calls.append(("empty",)),
        "memory_allocated": lambda device: 7,
        "memory_reserved": lambda device: 10,
        "max_memory_allocated": lambda device: 9,
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.accelerator, name, function)
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: True)
    first, second = torch.device("xpu", 0), torch.device("xpu", 1)
    assert devices.best_device() == second
    assert devices.normalize_device("xpu") == second
    assert devices.normalize_device(0) == first
    assert devices.list_devices() == [first, second, torch.device("cpu")]
    devices.synchronize()
    assert calls == [("wait", first), ("wait", second)]
    calls.clear()
    devices.empty_cache("xpu:0")
    assert calls == [("current", 0), ("empty",), ("current", 1)]
    assert devices.memory_now(first) == 7
    assert devices.memory_peak(first) == 9
    assert devices.memory_cached(first) == 3
