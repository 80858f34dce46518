"""Exports through OpGuardBase: made at the first load, matched afterwards, never stale."""

import functools
import json
import logging
import shutil
import threading
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from opguard import LocalFileMissing, OpGuardBase
from opguard.guards.locality import is_local

transformers = pytest.importorskip("transformers")
pytest.importorskip("huggingface_hub")

from tiny_diffusion import build_autoencoder_tiny  # noqa: E402
from tiny_models import build_bert  # noqa: E402

# What loaders of these tests saw: a global, since what a loader's closure holds is part of its key.
SEEN = []
CPU = {"device_override": "cpu", "local_files_only": True}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def source(built, tmp_path):
    """A folder with a tiny BERT and its tokenizer; a test may change it."""
    return Path(shutil.copytree(built, tmp_path / "source"))


@pytest.fixture
def exports(tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    return tmp_path / "exports"


@pytest.fixture(autouse=True)
def _said(caplog):
    SEEN.clear()
    caplog.set_level(logging.INFO, logger="opguard")


FILL = 1.0


def filled(model):
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(FILL)
    return model


def kind(source, **attributes):
    """A class as a user writes it; always of the same name."""

    class Bert(OpGuardBase):
        NAME = "tiny-bert"
        MODEL_ID = source
        DETECTOR_TYPE = transformers.BertModel

        def _load_processor(self):
            return transformers.AutoTokenizer.from_pretrained(self.model_id)

        def _preprocess(self, *, input_raw):
            return self.processor(input_raw, return_tensors="pt")

        def _predict(self, *, input_proc):
            return self.detector(**input_proc).last_hidden_state

    for name, value in attributes.items():
        setattr(Bert, name, value)
    return Bert


def run(instance):
    """(answer, folder the weights came from)."""
    with instance as model:
        return model(input_raw="a cat"), model.detector.config._name_or_path


def warnings_of(caplog):
    found = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    caplog.clear()
    return found


def change_weights(source, scale=2.0):
    file = source / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[name] *= scale
    save_file(tensors, file, metadata={"format": "pt"})


# --- made, then matched ---------------------------------------------------------------------------


def test_made_at_the_first_load_and_matched_afterwards(exports, source, caplog):
    first, came_from = run(kind(source)(**CPU))
    assert came_from == str(source)
    folder = exports / "models--tiny-bert-detector"
    assert [path.name for path in exports.iterdir() if path.is_dir() and path.name[0] != "."] == [
        folder.name
    ]
    second, came_from = run(kind(source)(**CPU))
    assert came_from == str(folder)
    assert torch.equal(first, second)
    assert warnings_of(caplog) == []
    made_from = json.loads((folder / "metadata.json").read_text())["made_from"]
    assert made_from["name"] == "tiny-bert"
    assert made_from["dtype"] == "torch.float32"
    assert made_from["source"]["model"] == str(source)
    assert "model.safetensors" in made_from["source"]["files"]
    assert not list(folder.rglob("*.bin"))


def test_one_instance_used_again_and_again_stays_as_it_was(exports, source, caplog):
    """D2: an export present, 4 calls on one lazily managed object, then entered twice."""
    run(kind(source)(**CPU))
    model = kind(source)(**CPU)
    answers = [model(input_raw="a cat") for _ in range(4)]
    for _ in range(2):
        answer, came_from = run(model)
        answers.append(answer)
        assert came_from == str(exports / "models--tiny-bert-detector")
    assert all(torch.equal(answers[0], answer) for answer in answers)
    assert model.model_id == str(source)
    assert model.variant is None
    assert (exports / "models--tiny-bert-detector" / "metadata.json").exists()
    assert warnings_of(caplog) == []


def test_the_export_is_read_by_the_loading_thread_alone(exports, source):
    def look(model):
        SEEN.append(model.model_id)
        thread = threading.Thread(target=lambda: SEEN.append(model.model_id))
        thread.start()
        thread.join(30)

    class Looks(kind(source)):
        def _load_detector(self):
            look(self)
            return super()._load_detector()

    run(Looks(**CPU))
    SEEN.clear()
    run(Looks(**CPU))
    assert [str(exports / "models--tiny-bert-detector"), str(source)] == SEEN


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("bf16", "-bf16"), ("fp16", "-fp16"), ("fp32", ""), ("fp64", "-fp64")],
)
def test_each_dtype_has_a_folder_of_its_own(exports, source, dtype, name):
    run(kind(source)(**CPU))
    before = (exports / "models--tiny-bert-detector" / "metadata.json").read_text()
    with kind(source)(dtype_override=dtype, **CPU) as model:
        expected = model.detector.state_dict()
    folder = exports / f"models--tiny-bert-detector{name}"
    with kind(source)(dtype_override=dtype, **CPU) as model:
        assert model.detector.config._name_or_path == str(folder)
        found = model.detector.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert {value.dtype for value in found.values() if value.is_floating_point()} == {model.dtype}
    assert (exports / "models--tiny-bert-detector" / "metadata.json").read_text() == before


def test_a_quantized_model_comes_back_as_it_was(exports, source):
    pytest.importorskip("bitsandbytes")
    nf4 = {"quant_type_override": "nf4", **CPU}
    states = []
    for came_from in (source, exports / "models--tiny-bert-detector-nf4"):
        with kind(source)(**nf4) as model:
            assert model.detector.config._name_or_path == str(came_from)
            states.append(model.detector.state_dict())
    first, second = states
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(value.dtype == torch.uint8 for value in second.values())


def test_slashes_in_the_name(exports, source):
    run(kind(source, NAME="org/tiny")(**CPU))
    assert (exports / "models--org--tiny-detector" / "metadata.json").exists()


# --- the processor --------------------------------------------------------------------------------


def test_the_processor_is_exported_beside_the_model(exports, source):
    first, _ = run(kind(source)(**CPU))
    shutil.rmtree(source)
    model = kind(source)(only_load_export=True, device_override="cpu")
    second, came_from = run(model)
    assert came_from == str(exports / "models--tiny-bert-detector")
    assert torch.equal(first, second)


def test_a_processor_that_would_overwrite_the_models_config_is_not_exported(exports, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.image_processor import VaeImageProcessor

    folder = build_autoencoder_tiny(tmp_path / "vae")

    class Vae(OpGuardBase):
        NAME = "vae"
        MODEL_ID = folder
        DETECTOR_TYPE = diffusers.AutoencoderTiny

        def _load_processor(self):
            return VaeImageProcessor(vae_scale_factor=2)

    for _ in range(2):
        with Vae(**CPU) as vae:
            assert vae.processor.config.vae_scale_factor == 2
            came_from = vae.detector.config._name_or_path
    assert came_from == str(exports / "models--vae-detector")


def test_a_processor_that_reads_other_files_of_the_source(exports, source, caplog):
    """What its save_pretrained did not write is read from the source."""
    (source / "names.txt").write_text("cat")

    class Named(kind(source)):
        def _load_processor(self):
            processor = super()._load_processor()
            processor.labels = (Path(self.model_id) / "names.txt").read_text()
            return processor

    for came_from in (source, exports / "models--tiny-bert-detector"):
        with Named(**CPU) as model:
            assert model.processor.labels == "cat"
            assert model.detector.config._name_or_path == str(came_from)
    assert warnings_of(caplog) == []


# --- made anew when anything differs --------------------------------------------------------------


def test_changed_weights_are_noticed_and_said(exports, source, caplog):
    """D3: the files change under an unchanged name."""
    first, _ = run(kind(source)(**CPU))
    change_weights(source)
    second, came_from = run(kind(source)(**CPU))
    assert came_from == str(source)
    assert not torch.equal(first, second)
    assert any("model.safetensors changed" in text for text in warnings_of(caplog))
    third, came_from = run(kind(source)(**CPU))
    assert came_from != str(source)
    assert torch.equal(second, third)


@pytest.fixture
def hub(built, tmp_path, monkeypatch):
    """A hub cache with a model at two commits; ``main`` is the first. No network is asked."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repo = cache / "models--org--bert"
    for commit, scale in (("a" * 40, 1.0), ("b" * 40, 2.0)):
        shutil.copytree(built, repo / "snapshots" / commit)
        change_weights(repo / "snapshots" / commit, scale)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "refs" / "next").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))

    def of(**attributes):
        found = kind("org/bert", **attributes)
        found._load_processor = lambda self: transformers.AutoTokenizer.from_pretrained(built)
        return found

    of.repo = repo
    return of


def weights_of(instance):
    with instance as model:
        name = "embeddings.word_embeddings.weight"
        return model.detector.state_dict()[name].clone(), model.detector.config._name_or_path


def test_another_revision_is_another_model(exports, hub, caplog):
    """D3: REVISION is part of the key."""
    first, came_from = weights_of(hub(REVISION="main")(**CPU))
    assert came_from == "org/bert"
    again, came_from = weights_of(hub(REVISION="main")(**CPU))
    assert came_from == str(exports / "models--tiny-bert-detector")
    assert torch.equal(first, again)
    other, came_from = weights_of(hub(REVISION="next")(**CPU))
    assert came_from == "org/bert"
    assert torch.equal(other, 2 * first)
    assert any("revision" in text for text in warnings_of(caplog))


def test_a_branch_that_moved_is_noticed_and_said(exports, hub, caplog):
    """D3: the same REVISION names another commit now."""
    first, _ = weights_of(hub(REVISION="main")(**CPU))
    (hub.repo / "refs" / "main").write_text("b" * 40)
    second, _ = weights_of(hub(REVISION="main")(**CPU))
    assert torch.equal(second, 2 * first)
    (said,) = warnings_of(caplog)
    assert "a" * 40 in said
    assert "b" * 40 in said
    assert "REVISION" in said


def test_two_classes_of_one_name_do_not_share(exports, source, caplog):
    """D4: the same NAME and MODEL_ID, other keywords for the loader."""
    plain = kind(source)
    changed = kind(source, FROM_PRETRAINED_ADDITIONAL_KWARGS={"num_hidden_layers": 1})
    run(plain(**CPU))
    with changed(**CPU) as model:
        assert len(model.detector.encoder.layer) == 1
    assert any("num_hidden_layers" in text for text in warnings_of(caplog))
    with plain(**CPU) as model:
        assert len(model.detector.encoder.layer) == 2


def test_two_classes_that_share_a_name_are_told(exports, source, caplog):
    """D4."""
    run(kind(source)(**CPU))
    other = type("Other", (kind(source),), {})
    run(other(**CPU))
    assert any("two classes share this NAME" in text for text in warnings_of(caplog))


@pytest.mark.parametrize("lines", ["return model", "model.scale = 2\n    return model"])
def test_loaders_without_source_do_not_share(exports, source, lines):
    """D5: two loaders made by exec, which have no source text, are two loaders."""
    head = "def load(self):\n    model = base(self)\n    "
    for body in ("return model", lines):
        space = {"base": OpGuardBase._load_detector}
        exec(head + body, space)
        _, came_from = run(kind(source, _load_detector=space["load"])(**CPU))
    assert (came_from == str(source)) is (lines != "return model")


def test_what_the_loader_calls_counts(exports, source, caplog):
    """A method that the loading step names is part of how the model is made."""

    def scaled(by):
        def _scale(self, model):
            with torch.no_grad():
                model.embeddings.word_embeddings.weight.fill_(by)

        def _load_detector(self):
            model = OpGuardBase._load_detector(self)
            self._scale(model)
            return model

        return kind(source, _scale=_scale, _load_detector=_load_detector)

    one, _ = weights_of(scaled(1.0)(**CPU))
    two, came_from = weights_of(scaled(2.0)(**CPU))
    assert came_from == str(source)
    assert (one == 1).all()
    assert (two == 2).all()
    again, came_from = weights_of(scaled(2.0)(**CPU))
    assert came_from != str(source)
    assert (again == 2).all()


def test_the_functions_and_numbers_that_a_loader_names_count(exports, source, monkeypatch):
    """Of its module: another value of a constant, or another helper, and it is another model."""

    class Filled(kind(source)):
        def _load_detector(self):
            return filled(super()._load_detector())

    one, _ = weights_of(Filled(**CPU))
    assert (one == 1).all()
    monkeypatch.setitem(globals(), "FILL", 2.0)
    two, _ = weights_of(Filled(**CPU))
    assert (two == 2).all()

    def other(model):
        return model

    assert weights_of(Filled(**CPU))[1] != str(source)
    monkeypatch.setitem(globals(), "filled", other)
    three, _ = weights_of(Filled(**CPU))
    assert not (three == 2).all()


def test_what_an_instance_was_told_counts_if_its_loader_names_it(exports, source):
    class Told(kind(source)):
        def __init__(self, *, fill, note="", **keywords):
            super().__init__(**keywords)
            self.fill, self.note = fill, note

        def _load_detector(self):
            model = super()._load_detector()
            with torch.no_grad():
                model.embeddings.word_embeddings.weight.fill_(self.fill)
            return model

    one, _ = weights_of(Told(fill=1.0, **CPU))
    two, came_from = weights_of(Told(fill=2.0, **CPU))
    assert came_from == str(source)
    assert (two == 2 * one).all()
    assert weights_of(Told(fill=2.0, note="another", **CPU))[1] != str(source)


def test_what_a_load_sets_does_not_count(exports, source, caplog):
    class Counts(kind(source)):
        _loads = ()

        def _load_detector(self):
            model = super()._load_detector()
            self._loads += (1,)
            return model

    model = Counts(**CPU)
    folder = str(exports / "models--tiny-bert-detector")
    assert [run(model)[1] for _ in range(3)] == [str(source), folder, folder]
    assert run(Counts(**CPU))[1] == folder
    assert warnings_of(caplog) == []


def test_what_only_the_subclass_knows_counts(exports, source):
    class Tuned(kind(source)):
        adapter = "one"

        def _export_identity(self):
            return {"adapter": self.adapter}

    run(Tuned(**CPU))
    assert run(Tuned(**CPU))[1] != str(source)
    Tuned.adapter = "two"
    assert run(Tuned(**CPU))[1] == str(source)


def test_a_model_named_in_an_attribute_counts_with_its_source(exports, source, built, tmp_path):
    other = Path(shutil.copytree(built, tmp_path / "other"))
    part = kind(other, NAME="part")
    whole = kind(source, PARTS={"encoder": part})
    run(whole(**CPU))
    assert run(whole(**CPU))[1] != str(source)
    change_weights(other)
    assert run(whole(**CPU))[1] == str(source)


# --- loaders of the user's own --------------------------------------------------------------------


def test_a_loader_that_is_not_idempotent_never_gives_other_weights(exports, source, caplog):
    """It fuses something into the weights: of an export it would fuse it twice."""

    class Fused(kind(source)):
        def _load_detector(self):
            model = super()._load_detector()
            with torch.no_grad():
                model.embeddings.word_embeddings.weight += 1
            return model

    first, _ = weights_of(Fused(**CPU))
    for _ in range(3):
        again, came_from = weights_of(Fused(**CPU))
        assert torch.equal(first, again)
        assert came_from == str(source)
    (said,) = warnings_of(caplog)  # once, not at each load
    assert "not used from now on" in said
    with pytest.raises(LocalFileMissing, match="does not give the same model"):
        weights_of(Fused(only_load_export=True, **CPU))


def test_a_loader_that_cannot_read_an_export_reads_its_source(exports, source, caplog):
    """It insists on a file that only the source has."""
    (source / "extra.txt").write_text("2")

    class Picky(kind(source)):
        def _load_detector(self):
            int((Path(self.model_id) / "extra.txt").read_text())
            return super()._load_detector()

    first, _ = run(Picky(**CPU))
    for _ in range(2):
        again, came_from = run(Picky(**CPU))
        assert torch.equal(first, again)
        assert came_from == str(source)
    assert len(warnings_of(caplog)) == 1


def test_a_subfolder_is_the_sources(exports, built, tmp_path):
    shutil.copytree(built, tmp_path / "whole" / "text")
    sub = kind(tmp_path / "whole", FROM_PRETRAINED_ADDITIONAL_KWARGS={"subfolder": "text"})
    sub._load_processor = lambda self: transformers.AutoTokenizer.from_pretrained(built)
    first, _ = run(sub(**CPU))
    second, came_from = run(sub(**CPU))
    assert came_from == str(exports / "models--tiny-bert-detector")
    assert torch.equal(first, second)


def test_a_function_as_detector_type_is_exported_too(exports, source):
    load = functools.partial(transformers.BertModel.from_pretrained, local_files_only=True)
    made = kind(source, DETECTOR_TYPE=staticmethod(load))
    first, _ = run(made(**CPU))
    second, came_from = run(made(**CPU))
    assert came_from == str(exports / "models--tiny-bert-detector")
    assert torch.equal(first, second)


# --- damage and failures --------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["weights", "metadata", "no metadata", "truncated", "added"])
def test_a_damaged_export_costs_a_load_and_is_said(exports, source, caplog, damage):
    """D5."""
    first, _ = run(kind(source)(**CPU))
    folder = exports / "models--tiny-bert-detector"
    weights, metadata = folder / "model.safetensors", folder / "metadata.json"
    if damage == "weights":
        data = bytearray(weights.read_bytes())
        data[-9] ^= 1
        weights.write_bytes(data)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "metadata":
        metadata.write_text("{broken")
    elif damage == "added":
        (folder / "pytorch_model.bin").write_bytes(b"x")
    else:
        metadata.unlink()
    with pytest.raises(LocalFileMissing, match="only_load_export: expected an export"):
        run(kind(source)(only_load_export=True, **CPU))
    warnings_of(caplog)
    second, came_from = run(kind(source)(**CPU))
    assert came_from == str(source)
    assert torch.equal(first, second)
    assert len(warnings_of(caplog)) == 1
    third, came_from = run(kind(source)(**CPU))
    assert came_from == str(folder)
    assert torch.equal(first, third)


def test_a_failing_save_leaves_the_model_and_the_old_export(exports, source, caplog, monkeypatch):
    """D5: the disk is full."""
    run(kind(source)(**CPU))
    folder = exports / "models--tiny-bert-detector"
    before = (folder / "metadata.json").read_text()

    def full(self, folder, **kwargs):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.BertModel, "save_pretrained", full)
    change_weights(source)
    _, came_from = run(kind(source)(**CPU))
    assert came_from == str(source)
    assert any("No space left" in text for text in warnings_of(caplog))
    assert (folder / "metadata.json").read_text() == before
    assert [path.name for path in exports.iterdir() if path.name != ".locks"] == [folder.name]


def test_the_model_is_saved_before_it_ever_runs(exports, source):
    """4-bit weights are repacked by the first call: what is saved after it is another model."""
    order = []

    class Ordered(kind(source, DETECTOR_TYPE=transformers.BertModel)):
        def _load_detector(self):
            model = super()._load_detector()
            save = model.save_pretrained
            model.save_pretrained = lambda folder: (order.append("saved"), save(folder))
            model.register_forward_pre_hook(lambda *_: order.append("ran"))
            return model

    run(Ordered(**CPU))
    assert order == ["saved", "ran"]


# --- the keywords ---------------------------------------------------------------------------------


def test_only_load_export(exports, source):
    with pytest.raises(LocalFileMissing, match=r"only_load_export: expected .*there is none"):
        run(kind(source)(only_load_export=True, device_override="cpu"))
    assert not any(exports.glob("models--*"))
    first, _ = run(kind(source)(**CPU))
    second, came_from = run(kind(source)(only_load_export=True, device_override="cpu"))
    assert came_from != str(source)
    assert torch.equal(first, second)
    change_weights(source)
    with pytest.raises(LocalFileMissing, match=r"model\.safetensors changed"):
        run(kind(source)(only_load_export=True, device_override="cpu"))


def test_only_load_export_is_off_the_network_altogether(exports, source):
    class Seen(kind(source)):
        def _load_processor(self):
            SEEN.append(is_local())
            return super()._load_processor()

    run(Seen(device_override="cpu"))
    run(Seen(device_override="cpu", only_load_export=True))
    assert SEEN == [False, True]


def test_only_load_export_without_the_source_takes_the_variant_it_was_made_from(
    exports, source, built
):
    half = transformers.BertModel.from_pretrained(built).to(torch.bfloat16)
    half.save_pretrained(source, variant="fp16")
    made = kind(source)(dtype_override="bf16", **CPU)
    assert made.variant == "fp16"
    first, _ = run(made)
    shutil.rmtree(source)
    found = kind(source)(dtype_override="bf16", device_override="cpu", only_load_export=True)
    second, came_from = run(found)
    assert came_from == str(exports / "models--tiny-bert-detector-bf16")
    assert torch.equal(first, second)


def test_force_export_refresh(exports, source):
    run(kind(source)(**CPU))
    folder = exports / "models--tiny-bert-detector"
    before = folder.stat().st_ino
    _, came_from = run(kind(source)(force_export_refresh=True, **CPU))
    assert came_from == str(source)
    assert folder.stat().st_ino != before
    assert run(kind(source)(**CPU))[1] == str(folder)
    with pytest.raises(ValueError, match="only_load_export: expected without force_export_refresh"):
        run(kind(source)(force_export_refresh=True, only_load_export=True, **CPU))


def test_local_files_only_on_refresh(exports, source):
    class Seen(kind(source)):
        def _load_processor(self):
            SEEN.append(is_local())
            return super()._load_processor()

    run(Seen(device_override="cpu", local_files_only_on_refresh=True))
    run(Seen(device_override="cpu", force_export_refresh=True))
    assert SEEN == [True, False]


# --- what is not exported -------------------------------------------------------------------------


def test_exports_are_turned_off(source, tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_EXPORTS", "0")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(kind(source)(**CPU))[1] == str(source)
    with pytest.raises(LocalFileMissing, match="OPGUARD_EXPORTS=0"):
        run(kind(source)(only_load_export=True, **CPU))
    assert not list(tmp_path.rglob("metadata.json"))


def test_pickles_are_not_exported(exports, source):
    _, came_from = run(kind(source, USE_SAFETENSORS=False)(**CPU))
    assert came_from == str(source)
    assert not exports.exists()
    with pytest.raises(ValueError, match="USE_SAFETENSORS to be True, exports are safetensors"):
        run(kind(source, USE_SAFETENSORS=False)(only_load_export=True, **CPU))


def test_a_model_without_save_pretrained_is_not_exported(exports, caplog):
    class Plain(OpGuardBase):
        NAME = "plain"
        MODEL_ID = "."
        DETECTOR_TYPE = staticmethod(lambda model_id: torch.nn.Linear(2, 2))

    Plain(**CPU)(input_raw=torch.ones(1, 2))
    assert not exports.exists()
    assert any("no save_pretrained" in each.getMessage() for each in caplog.records)
    with pytest.raises(LocalFileMissing, match="makes it or says why it cannot"):
        Plain(only_load_export=True, **CPU)(input_raw=torch.ones(1, 2))


def test_a_type_that_cannot_be_exported_is_no_case_for_only_load_export(exports, tmp_path, caplog):
    class Linear(torch.nn.Linear):
        def __init__(self, where):
            super().__init__(2, 2)

    class Plain(OpGuardBase):
        NAME = "plain"
        MODEL_ID = tmp_path
        DETECTOR_TYPE = Linear

    Plain(**CPU)(input_raw=torch.ones(1, 2))
    (said,) = [each.getMessage() for each in caplog.records if "export" in each.getMessage()]
    assert said == "exports: no export of Plain, Linear has no save_pretrained"
    with pytest.raises(ValueError, match=r"Linear has no save_pretrained; leave only_load_export"):
        Plain(only_load_export=True, **CPU)(input_raw=torch.ones(1, 2))


def test_a_model_that_is_not_in_memory_is_not_exported(exports, source, caplog):
    class Offloaded(kind(source)):
        def _load_detector(self):
            return super()._load_detector().to("meta")

    Offloaded(keep_warm=True, device_override="meta", local_files_only=True)
    assert not any(exports.glob("models--*"))
    (said,) = [each.getMessage() for each in caplog.records if "export" in each.getMessage()]
    assert "not in memory" in said


# --- nothing stays alive --------------------------------------------------------------------------


def test_a_load_that_fails_under_exports_leaves_nothing_alive(exports, source, collected):
    class Fails(kind(source)):
        def _load_detector(self):
            model = super()._load_detector()
            SEEN.append(weakref.ref(model))
            raise RuntimeError("no")

    def load():
        Fails(keep_warm=True, **CPU)

    with pytest.raises(RuntimeError, match="no") as held:
        load()
    assert held.value is not None
    assert [reference() for reference in SEEN] == [None]


def test_a_model_that_is_refused_is_gone_before_the_source_is_loaded(exports, source, collected):
    """Two copies of a large model at once do not fit."""

    class Fused(kind(source)):
        def _load_detector(self):
            alive.append([reference() is not None for reference in SEEN])
            model = super()._load_detector()
            SEEN.append(weakref.ref(model))
            with torch.no_grad():
                model.embeddings.word_embeddings.weight += 1
            return model

    alive = Alive()
    Fused(**CPU)(input_raw="a cat")
    Fused(**CPU)(input_raw="a cat")
    assert alive.found == [[], [False], [False, False]]


class Alive:
    """A list that a loader's key does not follow: it has one value for all of its states."""

    found: ClassVar[list] = []

    def __init__(self):
        self.found.clear()

    def append(self, value):
        self.found.append(value)


def test_a_model_is_one_copy_in_memory_while_it_is_exported_and_read(exports, source, collected):
    class Seen(kind(source)):
        def _load_detector(self):
            model = super()._load_detector()
            SEEN.append(weakref.ref(model))
            return model

    for _ in range(2):
        with Seen(**CPU) as model:
            assert model.detector is SEEN[-1]()
    assert len(SEEN) == 2
    assert [reference() for reference in SEEN] == [None, None]


def test_a_damaged_weight_file_is_named_by_its_folder(exports, source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SafetensorError) as caught:
        run(kind(source)(**CPU))
    assert f"a weight file of Bert is damaged, in {source}" in caught.value.__notes__[0]
