"""What an OpGuardBase's export is made from: nothing that decides the weights is left out."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file

from opguard import OpGuardBase
from opguard._exporting import made_from
from opguard.exports import proving
from opguard.guards.loading import cache_guard, load_guard
from opguard.guards.locality import local_guard

SCALE = 1.0
SECRET = "hf_" + "abcdefgh" * 4


class Weights(torch.nn.Module):
    """A model of one tensor with a library's two methods, of no library."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        model = cls()
        model.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
        return model

    def save_pretrained(self, folder):
        save_file(self.state_dict(), os.path.join(folder, "model.safetensors"))


class Scaled(Weights):
    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        model = super().from_pretrained(folder)
        if os.path.exists(os.path.join(folder, "raw")):  # a source, no export of it
            model.w.data *= SCALE
        return model


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "raw").write_text("")
    return folder


@pytest.fixture(autouse=True)
def exports(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="opguard")
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    return tmp_path / "exports" / "models--weights-detector"


def kind(source, detector=Weights, base=OpGuardBase, **attributes):
    names = {"NAME": "weights", "MODEL_ID": str(source), "DETECTOR_TYPE": detector}
    return type("Model", (base,), names | attributes)


def loaded(cls, *args, **kwargs):
    with cls(*args, device_override="cpu", **kwargs) as model:
        return model.detector.w[0].item()


def warned(caplog):
    found = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    caplog.clear()
    return found


class Filled(OpGuardBase):
    """Its weights are a file's that an attribute names, where there are none of an export."""

    FILE = ""

    def _load_detector(self, **kwargs):
        model = super()._load_detector(**kwargs)
        if os.path.exists(os.path.join(self.model_id, "raw")):
            model.w.data.fill_(load_file(self.FILE)["x"].item())
        return model


def test_a_file_that_an_attribute_names_is_in_the_key(source, tmp_path, caplog):
    file = tmp_path / "adapter.safetensors"
    cls = kind(source, base=Filled, FILE=str(file))
    save_file({"x": torch.tensor(3.0)}, file)
    assert [loaded(cls), loaded(cls)] == [3.0, 3.0]
    assert warned(caplog) == []
    save_file({"x": torch.tensor(5.0)}, file)
    assert loaded(cls) == 5.0
    assert "adapter.safetensors changed" in warned(caplog)[0]
    file.unlink()
    assert loaded(cls, only_load_export=True) == 5.0


class Listed(OpGuardBase):
    def __init__(self, values, **kwargs):
        self._values = values
        self._seen = []
        super().__init__(**kwargs)

    def _load_detector(self, **kwargs):
        self._seen.append(torch.ones(1))
        model = super()._load_detector(**kwargs)
        if os.path.exists(os.path.join(self.model_id, "raw")):
            model.w.data.fill_(sum(self._values))
        return model


def test_a_file_named_without_its_folder_is_in_the_key(source, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    cls = kind(source, base=Filled, FILE="adapter.safetensors")
    for value in (3.0, 4.0):
        save_file({"x": torch.tensor([value])}, "adapter.safetensors")
        assert loaded(cls) == value
    assert "adapter.safetensors changed" in warned(caplog)[-1]


def test_a_list_of_the_instance_is_in_the_key(source, caplog):
    cls = kind(source, base=Listed)
    assert loaded(cls, [1.0]) == loaded(cls, [1.0]) == 1.0
    assert warned(caplog) == []
    assert loaded(cls, [1.0, 2.0]) == 3.0
    assert "instance._values" in warned(caplog)[0]


def test_a_list_that_the_load_fills_is_no_cause_of_it(source, caplog):
    model = kind(source, base=Listed)([1.0], device_override="cpu")
    for _ in range(3):
        with model:
            assert model.detector.w[0].item() == 1.0
    assert len(model._seen) == 3
    assert warned(caplog) == []


class OtherFile(OpGuardBase):
    def _load_detector(self, **kwargs):
        model = super()._load_detector(**kwargs)
        file = os.path.join(self.model_id, "more.weights")
        if os.path.exists(file):
            model.w.data.fill_(float(Path(file).read_text()))
        return model


def test_a_file_that_no_library_reads_is_in_the_key_of_ones_own_loader(source, caplog):
    cls = kind(source, base=OtherFile)
    (source / "more.weights").write_text("3")
    assert [loaded(cls), loaded(cls)] == [3.0, 3.0]
    (source / "more.weights").write_text("5")
    assert loaded(cls) == 5.0
    assert "more.weights changed" in warned(caplog)[0]


def read_other_file(folder):
    model = Weights.from_pretrained(folder)
    file = os.path.join(folder, "more.weights")
    if os.path.exists(file):
        model.w.data.fill_(float(Path(file).read_text()))
    return model


def test_the_same_for_a_loader_that_is_a_function(source):
    def load():
        with cache_guard(base_export_name="x") as guarded:
            return guarded(read_other_file, str(source)).w[0].item()

    (source / "more.weights").write_text("3")
    assert [load(), load()] == [3.0, 3.0]
    (source / "more.weights").write_text("5")
    assert load() == 5.0


def test_the_cache_that_the_loader_is_told_is_the_one_described(tmp_path, exports):
    """Another cache has another commit of the same branch."""
    refs = tmp_path / "cache" / "models--org--m" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("b" * 40)
    cache = {"cache_dir": str(tmp_path / "cache")}

    def loader(model_id, cache_dir=None):
        return Weights()

    with local_guard(), cache_guard(base_export_name="x") as guarded:
        guarded(loader, "org/m", **cache)
    found = json.loads((exports.parent / "models--x" / "metadata.json").read_text())
    assert found["made_from"]["source"]["commit"] == "b" * 40

    cls = kind("org/m", REVISION="main", FROM_PRETRAINED_ADDITIONAL_KWARGS=cache)
    model = cls(device_override="cpu", local_files_only=True)
    assert made_from(model, False)["source"]["commit"] == "b" * 40


def test_what_was_proven_is_what_stood_there(tmp_path):
    """A folder's number may come again for the next export in its place."""
    model = Weights()
    proving.note(tmp_path, [model])
    (tmp_path / "metadata.json").write_text("1")
    saved = proving.notes_of(tmp_path)["weights"]
    assert proving.prove(tmp_path, saved, [model]) is None
    other = Weights()
    other.w.data.fill_(7)
    (tmp_path / "metadata.json").write_text("2")
    assert proving.prove(tmp_path, saved, [other]) == "1 of its weights differ, such as w"


def test_what_the_detectors_own_loader_reads_is_in_the_key(source, monkeypatch, caplog):
    cls = kind(source, detector=Scaled)
    assert [loaded(cls), loaded(cls)] == [1.0, 1.0]
    monkeypatch.setitem(globals(), "SCALE", 4.0)
    assert loaded(cls) == 4.0
    assert "SCALE was 1.0 and is 4.0" in warned(caplog)[0]


class Pinned(OpGuardBase):
    def _load_detector(self, **kwargs):
        assert callable(hf_hub_download)
        return super()._load_detector(**kwargs)


def test_an_installed_package_is_its_version(source, exports):
    """What is behind its functions may change while it runs, and may be a secret."""
    loaded(kind(source, base=Pinned))
    found = json.loads((exports / "metadata.json").read_text())["made_from"]["globals"]
    hub = {name for name in found if name.startswith(("huggingface_hub", "hf_"))}
    assert hub == {"huggingface_hub (version)", "hf_hub_download"}
    assert isinstance(found["huggingface_hub (version)"], str)
    assert found["hf_hub_download"]["name"].startswith("huggingface_hub.")


class Secretive(OpGuardBase):
    HF_TOKEN = SECRET
    API_KEY = "s3cr3t of mine"

    def __init__(self, **kwargs):
        self.password = "hunter2"
        super().__init__(**kwargs)

    def _load_detector(self, **kwargs):
        assert self.password
        return super()._load_detector(**kwargs)


def test_no_secret_is_written(source, exports, caplog):
    cls = kind(source, base=Secretive, FROM_PRETRAINED_ADDITIONAL_KWARGS={"token": SECRET[::-1]})
    loaded(cls)
    text = (exports / "metadata.json").read_text()
    for secret in (SECRET, SECRET[::-1], "s3cr3t of mine", "hunter2"):
        assert secret not in text
    cls.HF_TOKEN = "another"
    loaded(cls)
    assert warned(caplog) == []
    assert "another" not in caplog.text


def scaled(folder):
    model = Weights.from_pretrained(folder)
    if os.path.exists(os.path.join(folder, "raw")):
        model.w.data *= SCALE
    return model


def test_what_the_loader_of_a_guard_names_is_in_the_key(source, monkeypatch, caplog):
    def get():
        with load_guard(base_export_name="scaled") as load:
            return load(scaled, str(source)).w[0].item()

    assert [get(), get()] == [1.0, 1.0]
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 7.0)
    assert get() == 7.0
    assert "globals.SCALE was 1.0 and is 7.0" in warned(caplog)[-1]
