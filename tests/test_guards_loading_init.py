"""device_guard, dtype_guard, variant_guard, quant_guard and init_guard, on a machine with a cpu."""

import socket

import pytest
import torch

from opguard.guards import initial, locality
from opguard.guards.initial import (
    InitValues,
    device_guard,
    dtype_guard,
    init_guard,
    quant_guard,
    variant_guard,
)
from opguard.guards.locality import local_guard

CPU = torch.device("cpu")


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(initial.devices, "device_supports_bfloat16", lambda _: False)


def test_every_guard_needs_no_argument(no_accelerator):
    with device_guard() as device, dtype_guard() as dtype:
        assert (device, dtype) == (CPU, torch.float32)
    with variant_guard() as variant, quant_guard() as quant:
        assert variant is quant is None
    with init_guard() as values:
        assert values == InitValues([CPU], CPU, torch.float32, None, None, None)
    assert InitValues._fields == (
        "device_list",
        "device",
        "dtype",
        "variant",
        "device_map",
        "quant_config",
    )


@pytest.mark.parametrize("guard", [device_guard, dtype_guard, variant_guard, quant_guard])
def test_parameters_are_keyword_only(guard):
    with pytest.raises(TypeError):
        guard("cpu")


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "fp64"])
def test_cpu_dtypes_are_a_choice(name):
    """Fault C9: bf16, fp16 and float64 can be had on the cpu."""
    expected = initial.devices.normalize_dtype(name)
    with dtype_guard(device_list=["cpu"], dtype_desired=name) as dtype:
        assert dtype is expected
    with init_guard(device="cpu", dtype=expected) as values:
        assert values.dtype is expected


def test_precision_falls_back_and_says_so(two_gpus, caplog):
    with dtype_guard(device_list=["xpu"], dtype_desired="bf16") as dtype:
        assert dtype is torch.float16
    assert "torch.float16 is used" in caplog.text
    with dtype_guard(device_list=["mps"], dtype_desired="fp64") as dtype:
        assert dtype is torch.float32
    with dtype_guard(device_list=["xpu"], dtype_override="bf16") as dtype:
        assert dtype is torch.bfloat16
    with dtype_guard() as dtype:
        assert dtype is torch.float16


def test_dtype_must_be_floating():
    with pytest.raises(TypeError, match=r"dtype_desired: expected a floating .* quant_guard"):
        dtype_guard(dtype_desired="i8").__enter__()


def test_absent_accelerator_becomes_the_best_device(no_accelerator, caplog):
    with device_guard(device="cuda") as device:
        assert device == CPU
    assert "no cuda on this machine, cpu is used" in caplog.text
    with init_guard(device="cuda", device_map="auto") as values:
        assert values.device_list == [CPU]
        assert values.device_map is None


def test_device_map_names(two_gpus):
    pair = [torch.device("xpu", 0), torch.device("xpu", 1)]
    for name in ("auto", "balanced", "xpu"):
        with init_guard(device_map=name) as values:
            assert values.device_list == pair
            assert values.device_map == name
    with init_guard(device="cpu", device_map="auto") as values:
        assert (values.device_list, values.device_map) == ([CPU], None)
    with init_guard(device="xpu:1") as values:
        assert values.device_list == [pair[1]]


def test_device_map_dict_is_taken(two_gpus):
    """Fault C9: a dict is neither refused on an accelerator's host nor ignored on the cpu."""
    given = {"a": "xpu:1", "b": "cpu", "c": "disk"}
    with init_guard(device_map=given) as values:
        assert values.device_map == given
        assert values.device_map is not given
        assert values.device_list == [torch.device("xpu", 1), CPU]
        assert values.device == torch.device("xpu", 1)


def test_device_map_dict_on_the_cpu(no_accelerator):
    with init_guard(device_map={"": "cpu"}) as values:
        assert (values.device_list, values.device_map) == ([CPU], {"": "cpu"})
    with pytest.raises(ValueError, match=r"device_map\['a'\]: expected one of cpu, got 'cuda:0'"):
        init_guard(device_map={"a": "cuda:0"}).__enter__()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"device_map": "everywhere"}, ValueError, "device_map: expected one of auto"),
        ({"device_map": 3}, TypeError, "device_map: expected None"),
        ({"device": "xpu:7"}, ValueError, "device: expected one of xpu:0, xpu:1, cpu"),
        ({"device": "gpu"}, ValueError, "device: expected a device torch knows"),
    ],
)
def test_bad_devices_are_one_sentence(two_gpus, arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        device_guard(**arguments).__enter__()
    assert "\n" not in str(caught.value)


def test_overrides_win(two_gpus):
    with init_guard(
        device="xpu",
        device_normalized_override=CPU,
        device_list_override=["cpu"],
        dtype_override=torch.bfloat16,
        variant_override="bf16",
        quant_config="mine",
    ) as values:
        assert values == InitValues([CPU], CPU, torch.bfloat16, "bf16", None, "mine")


@pytest.fixture
def half_folder(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    return tmp_path


def test_variant_of_a_local_folder(half_folder, tmp_path_factory):
    """Fault C5: a folder at half precision is looked into, not taken for a hub id."""
    for dtype, expected in (("fp16", "fp16"), ("bf16", "fp16"), ("fp32", None)):
        with variant_guard(dtype=dtype, model_id=half_folder) as variant:
            assert variant == expected
    plain = tmp_path_factory.mktemp("plain")
    (plain / "model.safetensors").touch()
    with variant_guard(dtype="fp16", model_id=str(plain)) as variant:
        assert variant is None


def test_variant_from_the_hub_cache(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--model"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "model.fp16-00001-of-00002.safetensors").touch()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    for revision in (None, "main", "abc"):
        with variant_guard(dtype="fp16", model_id="some/model", revision=revision) as variant:
            assert variant == "fp16"
    with variant_guard(dtype="fp16", model_id="some/model", revision="v2") as variant:
        assert variant is None


def test_variant_probe_asks_the_hub_only_where_it_may(tmp_path, monkeypatch):
    """Fault C5: no listing under local_files_only, local_guard or the user's offline setting."""
    hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def listing(self, name, revision=None):
        asked.append((name, revision))
        return ["unet/model.fp16.safetensors"]

    monkeypatch.setattr(hub.HfApi, "list_repo_files", listing)
    ask = {"dtype": "fp16", "model_id": "some/model", "local_hfhub_variant_check_only": False}
    with variant_guard(**ask, local_files_only=True) as variant:
        assert variant is None
    with local_guard(), variant_guard(**ask) as variant:
        assert variant is None
    with variant_guard(**ask | {"local_hfhub_variant_check_only": True}) as variant:
        assert variant is None
    with init_guard(dtype="fp16", device="cpu", model_id="some/model") as values:
        assert values.variant is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with variant_guard(**ask) as variant:
        assert variant is None
    assert asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with variant_guard(**ask, revision="v2") as variant:
        assert variant == "fp16"
    assert asked == [("some/model", "v2")]


def test_variant_probe_survives_a_hub_that_cannot_be_reached(tmp_path, monkeypatch, caplog):
    hub = pytest.importorskip("huggingface_hub")

    def listing(self, name, revision=None):
        raise ConnectionError("down")

    monkeypatch.setattr(hub.HfApi, "list_repo_files", listing)
    monkeypatch.setattr(locality, "is_offline", lambda: False)
    ask = {"dtype": "fp16", "model_id": "some/model", "local_hfhub_variant_check_only": False}
    with variant_guard(**ask) as variant:
        assert variant is None
    assert "could not be listed" in caplog.text


def test_init_guard_opens_no_socket_under_local_files_only(monkeypatch):
    """Fault C5: with local_files_only, choosing at half precision touches no network."""
    tried = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: tried.append(a))
    with init_guard(
        dtype="bf16",
        device="cpu",
        model_id="nobody/nothing",
        local_files_only=True,
        local_hfhub_variant_check_only=False,
    ) as values:
        assert values.variant is None
    assert tried == []
