"""load_guard, cache_guard, free_guard and model_guard: what is loaded, and what is left."""

import gc
import json
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from opguard import devices
from opguard.guards import freeing
from opguard.guards.freeing import free_guard
from opguard.guards.loading import cache_guard, load_guard
from opguard.guards.locality import LocalFileMissing, is_local

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.linear = torch.nn.Linear(size, size)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(x))


# --- load_guard -----------------------------------------------------------------------------------


def test_loads_in_eval_and_stays_so():
    with load_guard() as load:
        model = load(Net, size=3)
        assert load(lambda: model) is model
    assert isinstance(model, Net)
    assert not any(module.training for module in model.modules())
    with load_guard(train_mode=True) as load:
        assert all(module.training for module in load(lambda: model).modules())


def test_modules_in_what_a_loader_returns():
    class Tokenizer:
        """Fault C2: a callable train that is not a module's is left alone."""

        def train(self, files):
            raise AssertionError

    class Pipeline:
        def __init__(self):
            self.net = Net()

        @property
        def components(self):
            return {"net": self.net, "other": None}

    with load_guard() as load:
        pair = load(lambda: (Tokenizer(), {"net": [Net()]}))
        pipeline = load(Pipeline)
    assert not pair[1]["net"][0].training
    assert not pipeline.net.training


def test_loader_may_stand_on_the_guard():
    with load_guard(loader_fn=Net, loader_kwargs={"size": 2}) as load:
        assert load().linear.in_features == 2
        assert load(size=5).linear.in_features == 5


def test_tensors_a_loader_returns_are_detached():
    pytest.importorskip("opguard.detaching")
    made = {"w": torch.ones(2, requires_grad=True) * 2}
    with load_guard() as load:
        assert not load(lambda: made)["w"].requires_grad
    with load_guard(detach_outputs=False) as load:
        assert load(lambda: made) is made


@pytest.mark.parametrize(
    ("loader", "words"),
    [((), "expected a loader, got none"), ((3,), "got int"), ((Net(),), "got Net")],
)
def test_bad_loader_is_one_sentence(loader, words):
    with pytest.raises(TypeError, match=words), load_guard() as load:
        load(*loader)


def test_load_is_of_its_block_only():
    with load_guard() as load:
        pass
    with pytest.raises(RuntimeError, match="expected a call inside the guard's block"):
        load(Net)


def test_locality_only_where_asked(bert_folder):
    transformers = pytest.importorskip("transformers")
    with load_guard() as load:
        assert load(is_local) is False
    with load_guard(local_files_only=True) as load:
        assert is_local()
        model = load(transformers.BertModel.from_pretrained, str(bert_folder))
        assert load(lambda **k: k) == {}
    assert not is_local()
    assert not model.training
    with (
        pytest.raises(LocalFileMissing, match="hf download nobody/nothing"),
        load_guard(local_files_only=True) as load,
    ):
        load(transformers.BertModel.from_pretrained, "nobody/nothing")
    assert not is_local()


def alive_after_failure(guard, error, *, outside=False):
    """Returns which of model and activation live on, while the exception is held."""
    refs = {}

    def loader():
        model, activation = Net(), torch.ones(1000)
        refs["model"], refs["activation"] = weakref.ref(model), weakref.ref(activation)
        raise error

    def helper(load):
        loader() if outside else load(loader)

    held = None
    try:
        with guard as load:
            helper(load)
    except BaseException as caught:
        held = caught
    assert held is error
    assert held.__traceback__ is not None
    return {name for name, ref in refs.items() if ref() is not None}


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("outside", [False, True])
def test_a_failed_load_leaves_nothing_alive(error, outside):
    """Fault A4: processor loads go the same way, and so does all else in the block."""
    gc.disable()
    try:
        assert alive_after_failure(load_guard(), error, outside=outside) == set()
    finally:
        gc.enable()


def test_a_missing_file_leaves_nothing_alive():
    transformers = pytest.importorskip("transformers")
    refs = []

    def loader(name):
        model = Net()
        refs.append(weakref.ref(model))
        return transformers.BertModel.from_pretrained(name)

    with pytest.raises(LocalFileMissing) as caught, load_guard(local_files_only=True) as load:
        load(loader, "nobody/nothing")
    assert caught.value.__cause__ is not None
    assert refs[0]() is None


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_a_load_that_breaks_off_in_a_library_leaves_no_module(library, bert_folder, tmp_path):
    """Weights that end too early: without a collection no module is left, and the error is told."""
    if library == "transformers":
        loader = pytest.importorskip("transformers").BertModel.from_pretrained
        folder = bert_folder
    else:
        vae = pytest.importorskip("diffusers").AutoencoderTiny
        loader, folder = vae.from_pretrained, tmp_path / "whole"
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        sizes = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
        vae(**blocks, **sizes).save_pretrained(folder)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        cut = 100 if path.suffix == ".safetensors" else 0
        (broken / path.name).write_bytes(path.read_bytes()[: path.stat().st_size - cut])

    def modules():
        return sum(issubclass(type(found), torch.nn.Module) for found in gc.get_objects())

    gc.collect()
    before = modules()
    gc.disable()
    try:
        with pytest.raises(Exception) as caught, load_guard(local_files_only=True) as load:  # noqa: PT011
            load(loader, str(broken))
        assert caught.value.__traceback__ is not None
        assert modules() == before
    finally:
        gc.enable()


def test_unsanitized_keeps_everything():
    guard = load_guard(sanitize_all_exceptions=False)
    assert alive_after_failure(guard, ValueError("x")) == {"model", "activation"}


def test_load_guard_decorates():
    @load_guard(local_files_only=True)
    def build():
        return is_local()

    assert build() is True
    assert not is_local()


# --- free_guard -----------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """One accelerator whose memory the test sets; what is done to it is listed."""
    state = {"held": 100, "calls": []}
    device = torch.device("xpu", 0)
    calls = state["calls"]
    monkeypatch.setattr(devices, "list_devices", lambda: [device, CPU])
    monkeypatch.setattr(devices, "memory_now", lambda _: state["held"])
    monkeypatch.setattr(devices, "synchronize", lambda where: calls.append(("wait", *where)))
    monkeypatch.setattr(devices, "empty_cache", lambda where: calls.append(("empty", where)))
    monkeypatch.setattr(freeing.gc, "collect", lambda: calls.append(("collect",)))
    state["device"] = device
    return state


@pytest.mark.parametrize("fails", [False, True])
def test_free_guard_runs_also_when_the_body_raises(machine, fails):
    """Fault C6: the same cleanup either way, and the body's error goes on."""

    def body():
        machine["held"] = 40
        if fails:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") if fails else nullcontext(), free_guard():
        body()
    device = machine["device"]
    assert machine["calls"] == [("wait", device, CPU), ("collect",), ("empty", device)]


def test_cache_is_emptied_only_where_memory_was_released(machine):
    """Fault C10: a block that released nothing empties nothing."""
    with free_guard():
        pass
    assert machine["calls"] == [("wait", machine["device"], CPU), ("collect",)]


def test_free_guard_may_only_wait(machine):
    with free_guard(device_list=["cpu"], run_gc_and_clear_cache=False):
        machine["held"] = 0
    assert machine["calls"] == [("wait", CPU)]


def test_load_guard_collects_and_empties_nothing_on_success(machine):
    """Fault C10: a load that went well pays for no collection and no emptied cache."""
    with load_guard() as load:
        load(Net)
    assert machine["calls"] == [("wait", machine["device"], CPU)]


def test_load_guard_collects_after_a_failure_only_when_asked(machine):
    for asked in (False, True):
        machine["calls"].clear()
        with pytest.raises(KeyError), load_guard(garbage_collect_on_exception=asked) as load:
            load({}.pop, "x")
        assert (("collect",) in machine["calls"]) is asked


def test_a_device_error_while_leaving_does_not_hide_the_users(machine, monkeypatch):
    def broken(_):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(devices, "synchronize", broken)
    with pytest.raises(KeyError, match="mine"), free_guard():
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match="device-side assert"), free_guard():
        pass


# --- cache_guard ----------------------------------------------------------------------------------


def test_cache_guard_without_a_name_calls_the_loader():
    with cache_guard() as load:
        assert load(Net, size=3).linear.in_features == 3
    with cache_guard(loader_fn=Net, loader_kwargs={"size": 2}) as load:
        assert load().linear.in_features == 2
    with (
        pytest.raises(ValueError, match="only_load_export: expected a base_export_name"),
        cache_guard(only_load_export=True) as load,
    ):
        load(Net)


@pytest.fixture
def exports(tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    return tmp_path / "exports"


@pytest.fixture
def source(bert_folder, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in bert_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


SEEN = []


def load_bert(model_id, **kwargs):
    """A loader that notes which folder it was given."""
    from transformers import BertModel

    SEEN.append(str(model_id))
    return BertModel.from_pretrained(model_id, **kwargs)


def loaded_from(monkeypatch):
    pytest.importorskip("transformers")
    SEEN.clear()
    return load_bert, SEEN


def test_export_is_made_then_read(exports, source, monkeypatch):
    loader, seen = loaded_from(monkeypatch)
    for _ in range(2):
        with cache_guard(base_export_name="a/b") as load:
            model = load(loader, str(source))
    folder = exports / "models--a--b"
    assert seen == [str(source), str(folder)]
    assert sorted(path.name for path in exports.iterdir()) == [".locks", folder.name]
    meta = json.loads((folder / "metadata.json").read_text())
    made_from = meta["made_from"]
    assert made_from["source"]["model"] == str(source)
    assert made_from["source"]["revision"] is None
    assert made_from["versions"]["torch"] == torch.__version__
    assert list(folder.glob("*.safetensors"))
    assert not list(folder.glob("*.bin"))
    with load_guard(base_export_name="a/b", only_load_export=True) as load:
        again = load(loader, str(source))
    assert torch.equal(
        again.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight
    )


@pytest.mark.parametrize(
    "change", ["revision", "argument", "weights", "loader", "corrupt", "force"]
)
def test_export_is_made_anew_when_anything_differs(exports, source, monkeypatch, change):
    """Faults D3 and D5: revision and weights are in the key; a broken export costs a load."""
    loader, seen = loaded_from(monkeypatch)
    settings, extra = {"base_export_name": "x"}, {}
    with cache_guard(**settings) as load:
        load(loader, str(source))
    if change == "revision":
        extra = {"revision": "v2"}
    elif change == "argument":
        extra = {"attn_implementation": "eager"}
    elif change == "weights":
        path = source / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0@")
    elif change == "loader":
        old = loader
        loader = lambda model_id: [old(model_id)][0]
    elif change == "corrupt":
        (exports / "models--x" / "model.safetensors").write_bytes(b"x")
    elif change == "force":
        settings["force_export_refresh"] = True
    seen.clear()
    with cache_guard(**settings) as load:
        load(loader, str(source), **extra)
    assert seen[-1] == str(source)
    if change not in ("force", "corrupt"):
        (exports / "models--x" / "metadata.json").write_text("{broken")
        with (
            pytest.raises(LocalFileMissing, match="only_load_export: expected an export in"),
            cache_guard(base_export_name="x", only_load_export=True) as load,
        ):
            load(loader, str(source), **extra)


def test_a_loader_that_changes_the_weights_does_not_do_it_twice(exports, source, caplog):
    """The export has the changed weights; read by the same loader they would change again."""
    transformers = pytest.importorskip("transformers")

    def doubling(model_id):
        model = transformers.BertModel.from_pretrained(model_id)
        with torch.no_grad():
            model.embeddings.word_embeddings.weight.mul_(2)
        return model

    with cache_guard(base_export_name="x") as load:
        wanted = load(doubling, str(source)).embeddings.word_embeddings.weight
    for _ in range(2):
        with cache_guard(base_export_name="x") as load:
            got = load(doubling, str(source)).embeddings.word_embeddings.weight
        assert torch.equal(got, wanted)
    said = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(said) == 1
    assert "embeddings.word_embeddings.weight" in said[0]
    with (
        pytest.raises(LocalFileMissing, match="does not give the same model"),
        cache_guard(base_export_name="x", only_load_export=True) as load,
    ):
        load(doubling, str(source))


def test_a_failing_save_leaves_the_load_and_the_old_export(exports, source, monkeypatch, caplog):
    """Fault D5: the source is fine, so the load is."""
    loader, _ = loaded_from(monkeypatch)
    with cache_guard(base_export_name="x") as load:
        model = load(loader, str(source))
    before = (exports / "models--x" / "metadata.json").read_text()

    def full(self, folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with cache_guard(base_export_name="x", force_export_refresh=True) as load:
        assert load(loader, str(source)) is not None
    assert "no space left on device" in caplog.text
    assert (exports / "models--x" / "metadata.json").read_text() == before
    assert sorted(path.name for path in exports.iterdir()) == [".locks", "models--x"]


def test_what_cannot_be_exported_is_said(exports, caplog):
    with cache_guard(base_export_name="x") as load:
        assert isinstance(load(lambda name: Net(), "some/model"), Net)
    assert "has no save_pretrained" in caplog.text
    with (
        pytest.raises(ValueError, match="base_export_name: expected a loader that is given"),
        cache_guard(base_export_name="x") as load,
    ):
        load(Net)
    with (
        pytest.raises(ValueError, match="use_safetensors: expected True"),
        cache_guard(base_export_name="x", use_safetensors=False) as load,
    ):
        load(Net)


# --- leaks ----------------------------------------------------------------------------------------


def test_no_leak_by_slope():
    script = Path(__file__).parent / "isolated" / "leak_loading.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
