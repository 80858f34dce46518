"""OpGuardBase's contract, item by item: class attributes, constructor keywords, properties."""

import socket
import sys
import threading
import weakref

import pytest
import torch

from opguard import LocalFileMissing, OpGuardBase, devices

CPU = {"device_override": "cpu"}
X = torch.ones(1, 4)


class Net(torch.nn.Module):
    """Remembers how it was loaded and where it was moved."""

    def __init__(self, model_id=None, **given):
        super().__init__()
        self.model_id = model_id
        self.given = given
        self.moved = []
        self.linear = torch.nn.Linear(4, 4)

    @classmethod
    def from_pretrained(cls, model_id, **given):
        return cls(model_id, **given)

    def to(self, *args, **kwargs):
        self.moved.append((args, kwargs))
        return super().to(*args, **kwargs)

    def forward(self, x):
        return self.linear(x)


class Local(OpGuardBase):
    NAME = "local"
    MODEL_ID = "."
    DETECTOR_TYPE = Net


def with_attributes(**attributes):
    return type("Changed", (Local,), attributes)


def loaded(kind, **keywords):
    """The detector as loaded; by its record it tells what reached it."""
    return kind(keep_warm=True, **keywords).detector


# --- class attributes -----------------------------------------------------------------------------


def test_default_device_is_used_and_overridden():
    meta = with_attributes(DEFAULT_DEVICE="meta")
    assert meta().device == torch.device("meta")
    assert meta(**CPU).device == torch.device("cpu")
    assert Local().device == devices.best_device()


def test_default_device_map_reaches_the_loader_which_then_places():
    mapped = with_attributes(DEFAULT_DEVICE_MAP={"": "cpu"})
    model = mapped(keep_warm=True)
    assert model.device_map == {"": "cpu"}
    assert model.detector.given["device_map"] == {"": "cpu"}
    assert "device" not in model.detector.moved[0][1]
    other = loaded(mapped, device_map_override={"": "meta"})
    assert other.given["device_map"] == {"": "meta"}
    assert "device_map" not in loaded(Local, **CPU).given


@pytest.mark.parametrize(
    ("preferred", "able", "chosen"),
    [
        ("bf16", {torch.bfloat16, torch.float16}, torch.bfloat16),
        ("bf16", {torch.float16}, torch.float16),
        (torch.bfloat16, set(), torch.float32),
        ("fp16", set(), torch.float32),
        ("fp64", set(), torch.float32),
    ],
)
def test_dtype_preference_falls_back_to_what_the_device_can(monkeypatch, preferred, able, chosen):
    monkeypatch.setattr(devices, "device_supports_dtype", lambda device, dtype: dtype in able)
    kind = with_attributes(DTYPE_PREFERENCE=preferred, DEFAULT_DEVICE="meta")
    assert kind().dtype == chosen


def test_half_precision_is_no_preference_on_the_cpu_but_a_choice():
    half = with_attributes(DTYPE_PREFERENCE="fp16")
    assert half(**CPU).dtype == torch.float32
    assert half(dtype_override="bf16", **CPU).dtype == torch.bfloat16
    assert with_attributes(DTYPE_PREFERENCE="fp64")(**CPU).dtype == torch.float64


def test_use_safetensors_reaches_the_loader():
    assert loaded(Local, **CPU).given["use_safetensors"] is True
    any_file = with_attributes(USE_SAFETENSORS=False)
    assert "use_safetensors" not in loaded(any_file, **CPU).given
    strict = any_file(**CPU)
    assert strict.use_safetensors is False
    strict.use_safetensors = True
    assert strict.use_safetensors is True
    assert strict.detector.given["use_safetensors"] is True
    assert any_file(**CPU).use_safetensors is False
    with pytest.raises(ValueError, match="use_safetensors: expected True"):
        strict.use_safetensors = False


@pytest.mark.parametrize("outer", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("outside", ["the load", "the call"])
def test_need_grads_is_no_inference_mode_and_no_detaching_anywhere(outer, outside):
    class Grads(Local):
        NEED_GRADS = True

        def _predict(self, *, input_proc):
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            loss = self.detector(input_proc).pow(2).sum()
            (grad,) = torch.autograd.grad(loss, self.detector.linear.weight, create_graph=True)
            return loss, grad

    seen = []
    model = Grads(detach_outputs=True, **CPU)
    if outside == "the load":
        with outer():
            model.detector
        loss, grad = model(input_raw=X)
    else:
        with model, outer():
            loss, grad = model(input_raw=X)
    assert seen == [(True, False)]
    assert loss.requires_grad
    assert grad.abs().sum() > 0
    assert not loss.is_inference()


def test_a_model_kept_warm_since_an_inference_mode_is_ordinary():
    with torch.inference_mode():
        model = Local(keep_warm=True, **CPU)
    assert not model.detector.linear.weight.is_inference()


def test_is_callable_is_enforced_before_anything_loads():
    part = with_attributes(IS_CALLABLE=False)
    model = part(**CPU)
    with pytest.raises(TypeError, match=r"IS_CALLABLE is False; hand its \.detector"):
        model(input_raw=X)
    assert not model.is_loaded
    with model:  # everything but the call works
        assert model.detector(X).shape == (1, 4)
    assert type("Whole", (part,), {"IS_CALLABLE": True})(**CPU)(input_raw=X).shape == (1, 4)


@pytest.mark.parametrize(
    ("attributes", "moves"),
    [
        ({}, {"device": torch.device("cpu"), "dtype": torch.float64}),
        ({"SKIP_TO_DEVICE": True}, {"dtype": torch.float64}),
        ({"SKIP_TO_DTYPE": True}, {"device": torch.device("cpu")}),
        ({"SKIP_TO_DEVICE": True, "SKIP_TO_DTYPE": True}, None),
    ],
)
def test_skip_to_device_and_dtype(attributes, moves):
    detector = loaded(with_attributes(**attributes), dtype_override="fp64", **CPU)
    assert detector.moved == ([((), moves)] if moves else [])


def test_a_quantized_model_is_moved_by_nobody():
    detector = loaded(Local, quant_config_override={"bits": 8}, **CPU)
    assert detector.given["quantization_config"] == {"bits": 8}
    assert detector.moved == []


@pytest.mark.parametrize("name", ["use_safetensors", "dtype", "torch_dtype"])
def test_skipped_keywords_do_not_reach_the_loader(name):
    skipping = with_attributes(FROM_PRETRAINED_SKIP_KWARGS=(name,))
    assert loaded(Local, **CPU).given.keys() - loaded(skipping, **CPU).given.keys() == {
        "torch_dtype" if "dtype" in name else name
    }


def test_additional_keywords_reach_the_loader_and_have_the_last_word():
    adding = with_attributes(
        FROM_PRETRAINED_ADDITIONAL_KWARGS={"subfolder": "unet", "dtype": torch.float16}
    )
    given = loaded(adding, **CPU).given
    assert (given["subfolder"], given["dtype"]) == ("unet", torch.float16)
    assert "torch_dtype" not in given  # not both names of one thing


def test_keywords_of_an_overridden_loader_have_the_very_last_word():
    class Own(with_attributes(FROM_PRETRAINED_ADDITIONAL_KWARGS={"subfolder": "unet"})):
        def _load_detector(self):
            return super()._load_detector(subfolder="vae")

    assert loaded(Own, **CPU).given["subfolder"] == "vae"


def test_default_quantization_is_used_and_overridden():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")

    class Quantized(Local):
        DETECTOR_TYPE = transformers.BertModel
        DEFAULT_QUANT_TYPE = "nf4"
        DEFAULT_QUANT_USE_DOUBLE = True

    config = Quantized(**CPU).quant_config
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    other = Quantized(quant_type_override="fp4", quant_use_double_override=False, **CPU)
    config = other.quant_config
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", False)


def test_the_revision_reaches_the_loader_of_a_hub_id_only():
    hub = with_attributes(MODEL_ID="org/name", REVISION="v1")
    assert loaded(hub, local_files_only=True, **CPU).given["revision"] == "v1"
    assert "revision" not in loaded(with_attributes(REVISION="v1"), **CPU).given


# --- constructor keywords -------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers with fp16 files, and counts how often it is asked."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = []

    def list_repo_files(self, name, **kwargs):
        asked.append(name)
        return ["model.safetensors", "model.fp16.safetensors"]

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    return asked


@pytest.mark.parametrize(
    "keyword",
    [
        None,
        "local_hfhub_variant_check_only",
        "local_files_only",
        "only_load_export",
        "local_files_only_on_refresh",
    ],
)
def test_who_may_ask_the_hub_for_variants(hub, keyword):
    kind = with_attributes(MODEL_ID="org/name", REVISION="main")
    keywords = {keyword: True} if keyword else {}
    model = kind(dtype_override="fp16", device_override="meta", **keywords)
    assert model.variant == (None if keyword else "fp16")
    assert hub == ([] if keyword else ["org/name"])


def test_a_refresh_without_the_network_opens_no_socket(tmp_path, monkeypatch):
    """H1: not for the variants of an absent model either, whether or not it is half precision."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    kind = with_attributes(
        MODEL_ID="opguard/absent", REVISION="main", DETECTOR_TYPE=transformers.BertModel
    )
    seen, watching = [], [True]
    sys.addaudithook(lambda event, _: watching and event.startswith("socket.") and seen.append(1))
    try:
        for dtype in ("bf16", "fp32"):
            model = kind(local_files_only_on_refresh=True, dtype_override=dtype, **CPU)
            with pytest.raises(LocalFileMissing, match="expected config"):
                model.detector
        assert seen == []
        socket.socket().close()
        assert seen  # the hook sees them
    finally:
        watching.clear()


def test_a_device_that_is_not_there_is_said_once(caplog):
    Local(device_override="xpu" if devices.best_device().type != "xpu" else "mps")
    assert [each.getMessage().startswith("device_guard: no ") for each in caplog.records] == [True]


def test_local_files_only_reaches_loader_and_processor(hub):
    from opguard.guards.locality import is_local

    class Seen(with_attributes(MODEL_ID="org/name", REVISION="main")):
        def _load_processor(self):
            return is_local()

    assert Seen(keep_warm=True, local_files_only=True, **CPU).processor is True
    assert loaded(Seen, local_files_only=True, **CPU).given["local_files_only"] is True
    assert Seen(keep_warm=True, **CPU).processor is False


def test_instance_to_match_matches_also_what_was_not_chosen():
    one = Local(dtype_override="fp64", **CPU)
    kind = with_attributes(
        DEFAULT_DEVICE="meta", DEFAULT_DEVICE_MAP={"": "cpu"}, DEFAULT_QUANT_TYPE="nf4"
    )
    two = kind(instance_to_match=one)
    assert (two.device, two.device_map, two.dtype) == (one.device, None, torch.float64)
    assert two.quant_config is None
    three = kind(instance_to_match=one, dtype_override="fp32", device_map_override={"": "meta"})
    assert (three.dtype, three.device_map) == (torch.float32, {"": "meta"})


def test_instance_to_match_is_not_kept_alive():
    one = Local(**CPU)
    two = Local(instance_to_match=one)
    reference = weakref.ref(one)
    del one
    assert reference() is None
    assert two.device == torch.device("cpu")


def test_settings_are_the_keywords_given():
    assert Local()._settings == {}
    given = {"dtype_override": "fp64", "local_files_only": True, **CPU}
    assert Local(keep_warm=False, **given)._settings == given
    again = Local(**Local(instance_to_match=Local(**given))._settings)
    assert (again.dtype, again.device) == (torch.float64, torch.device("cpu"))


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("keep_warn", "keep_warm"),
        ("only_load_exports", "only_load_export"),
        ("local_file_only", "local_files_only"),
        ("dtype", "dtype_override"),
        ("quant_type", "quant_type_override"),
    ],
)
def test_an_unknown_keyword_names_the_near_miss(wrong, near):
    with pytest.raises(TypeError, match=rf"got '{wrong}' \(did you mean '{near}'\?\)"):
        Local(**{wrong: True})


# --- the call -------------------------------------------------------------------------------------


def test_a_missing_keyword_is_said_before_anything_loads():
    class Needs(Local):
        def _predict(self, *, input_proc, steps):
            return steps

    model = Needs(**CPU)
    with pytest.raises(TypeError, match=r"Needs\(\): expected input_raw=..., steps=..., got none"):
        model()
    with pytest.raises(TypeError, match=r"expected steps=..., got none"):
        model(input_raw=X)
    with pytest.raises(TypeError, match=r"got 'step' \(did you mean 'steps'\?\)"):
        model(input_raw=X, step=1)
    assert not model.is_loaded
    assert model(input_raw=X, steps=3) == 3


def test_a_caller_that_needs_no_input_raw():
    class Prompted(Local):
        def _caller(self, *, prompt="a cat"):
            return prompt

    assert Prompted(**CPU)() == "a cat"


# --- properties and methods -----------------------------------------------------------------------


def test_model_id_is_set_on_the_instance_before_it_loads(tmp_path):
    model = Local(**CPU)
    model.model_id = tmp_path
    assert model.model_id == str(tmp_path)
    assert Local.MODEL_ID == "."
    assert Local(**CPU).model_id == "."
    with model:
        assert model.detector.model_id == str(tmp_path)
        with pytest.raises(RuntimeError, match=r"model_id: expected .* before .*; call free\(\)"):
            model.model_id = "."
    model.model_id = "."
    assert model.detector.model_id == "."


def test_another_model_id_has_variants_of_its_own(tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "model.fp16.safetensors").touch()
    model = with_attributes(MODEL_ID=".")(dtype_override="fp16", device_override="meta")
    model.model_id = half
    assert model.variant == "fp16"


def test_what_was_chosen_is_read_only():
    model = Local(**CPU)
    for name in ("device", "dtype", "variant", "device_list", "device_map", "quant_config"):
        with pytest.raises(AttributeError):
            setattr(model, name, None)
    model.device_list.clear()
    assert model.device_list == [torch.device("cpu")]
    assert model.classname == "Local"


def test_extra_info_is_emptied_with_the_model():
    class Tells(Local):
        def _predict(self, *, input_proc):
            self.extra_info["scale"] = self._extra_info["again"] = 2
            return input_proc

    with Tells(**CPU) as model:
        model(input_raw=X)
        assert model.extra_info == {"scale": 2, "again": 2}
    assert model.extra_info == {}


def test_the_processor_is_loaded_by_asking():
    class Two(Local):
        def _load_processor(self):
            return {"size": 8}

    model = Two(**CPU)
    assert model.processor == {"size": 8}
    assert model.is_loaded


def test_lazy_loader_context_holds_and_leaves_as_a_call_does(collected):
    model = Local(**CPU)
    with model.lazy_loader_context() as held, model.lazy_loader_context():
        assert held is model
        detector = weakref.ref(model.detector)
        model(input_raw=X)
        assert model.detector is detector()
    assert detector() is None
    warm = Local(keep_warm=True, **CPU)
    with warm.lazy_loader_context():
        pass
    assert warm.is_loaded
    with warm:
        pass
    assert not warm.is_loaded


def test_lazy_loader_context_leaves_nothing_of_a_failure(collected):
    seen = []

    def helper(model):
        activation = model.detector(X)
        seen.extend([weakref.ref(activation), weakref.ref(model.detector)])
        raise ValueError("mine")

    def block():
        with Local(**CPU).lazy_loader_context() as model:
            helper(model)

    with pytest.raises(ValueError, match="mine") as held:
        block()
    assert held.value is not None
    assert [reference() for reference in seen] == [None, None]


def test_lazy_loader_context_of_two_threads_frees_once_both_left():
    model, inside, go_on = Local(**CPU), threading.Event(), threading.Event()

    def other():
        with model.lazy_loader_context():
            inside.set()
            assert go_on.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    with model.lazy_loader_context():
        pass
    assert model.is_loaded
    go_on.set()
    thread.join(30)
    assert not model.is_loaded


def test_example_inputs_are_the_subclasss():
    with pytest.raises(NotImplementedError, match=r"Local\.example_inputs: expected a method"):
        Local(**CPU).example_inputs()
