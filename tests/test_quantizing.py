"""Quantization: which type each library, device and installation gets, and what that really does.

The models are tiny and made from configs; nothing is downloaded. What an accelerator would get is
asked of the choice alone.
"""

import importlib.util
import logging
from types import MappingProxyType

import pytest
import torch

from opguard import OpGuardBase
from opguard.guards import quantizing
from opguard.guards.initial import init_guard, quant_guard
from opguard.guards.loading import load_guard

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytest.importorskip("accelerate")

import tiny_diffusion  # noqa: E402

Llama = transformers.LlamaForCausalLM
UNet = diffusers.UNet2DConditionModel
Pipeline = diffusers.StableDiffusionPipeline
IDS = torch.arange(4, 12)[None]
# (type, double) that bitsandbytes holds for transformers on a cpu
BNB = [("i8", False), ("fp4", False), ("fp4", True), ("nf4", False), ("nf4", True)]


def build_llama(folder, width):
    """A Llama as transformers initializes it: 4 bit are near enough for its small weights."""
    config = transformers.LlamaConfig(
        vocab_size=45,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("models") / "llama", 64)


@pytest.fixture(scope="module")
def narrow_llama(tmp_path_factory):
    """Its layers have 32 inputs: less than a block of 4 bit weights."""
    return build_llama(tmp_path_factory.mktemp("models") / "narrow", 32)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_diffusion.build_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


def cosine(first, second):
    pair = first.flatten().double(), second.flatten().double()
    return torch.nn.functional.cosine_similarity(*pair, dim=0).item()


def weight_bytes(model):
    """Bytes that the parameters hold, those inside a tensor of tensors too."""

    def held(tensor):
        inner = getattr(tensor, "tensor_data_names", None)
        return sum(held(getattr(tensor, name)) for name in inner) if inner else tensor.nbytes

    return sum(held(parameter.data) for parameter in model.parameters())


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


# What is chosen


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["i8", "fp4", "nf4"])
def test_what_transformers_gets(kind, double, device):
    with quant_guard(
        quant_type=kind, quant_use_double=double, model_type=Llama, device=device
    ) as config:
        assert type(config) is transformers.BitsAndBytesConfig
        held = quantizing.describe_quant(config)
    assert held == (kind, double and kind != "i8", "bnb")


@pytest.mark.parametrize("kind", ["i8", "fp4", "nf4"])
def test_what_diffusers_gets(kind, caplog):
    with quant_guard(quant_type=kind, model_type=UNet, device="cuda") as config:
        assert type(config) is diffusers.BitsAndBytesConfig
        assert quantizing.describe_quant(config) == (kind, False, "bnb")
    caplog.set_level(logging.INFO, "opguard")
    caplog.clear()
    with quant_guard(quant_type=kind, model_type=UNet, device="cpu") as config:
        assert type(config) is diffusers.TorchAoConfig
        assert quantizing.describe_quant(config) == ("i8", False, "torchao")
    (said,) = caplog.records
    assert said.levelno == (logging.INFO if kind == "i8" else logging.WARNING)
    assert "diffusers quantizes with bitsandbytes on an accelerator only" in said.getMessage()
    if kind != "i8":
        assert f"{kind} cannot be had here, i8 by torchao is used" in said.getMessage()


def test_torchao_on_request():
    for library, model_type in ((transformers, Llama), (diffusers, UNet)):
        with quant_guard(
            quant_type="i8", backend="torchao", model_type=model_type, device="cpu"
        ) as config:
            assert type(config) is library.TorchAoConfig


def test_a_subclass_gets_what_its_base_gets():
    class Mine(UNet):
        """Of a module of the user's own."""

    with quant_guard(quant_type="i8", model_type=Mine, device="cpu") as config:
        assert type(config) is diffusers.TorchAoConfig


@pytest.mark.parametrize(
    ("model_type", "library"),
    [
        (transformers.AutoModelForCausalLM, "transformers"),
        (UNet, "diffusers"),
        (Pipeline, "a pipeline"),
        (diffusers.DiffusionPipeline, "a pipeline"),
        (diffusers.AutoPipelineForText2Image, "a pipeline"),
        (torch.nn.Linear, None),
        (len, None),
    ],
)
def test_whose_class_it_is(model_type, library):
    assert quantizing.library_of(model_type) == library


def test_a_model_of_transformers_that_diffusers_defines():
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    assert quantizing.library_of(StableDiffusionSafetyChecker) == "transformers"


def test_compute_dtype_reaches_the_configuration():
    with quant_guard(quant_type="nf4", compute_dtype="bf16", device="cpu") as config:
        assert config.bnb_4bit_compute_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"quant_type": "int3"}, ValueError, "quant_type: expected None or one of i8, fp4, nf4"),
        (
            {"quant_type": "i8", "model_type": torch.nn.Linear},
            ValueError,
            "model_type: expected a class of transformers or diffusers",
        ),
        ({"backend": "x"}, ValueError, "backend: expected None, 'bnb' .* or 'torchao', got 'x'"),
        (
            {"quant_type": "nf4", "backend": "torchao"},
            ValueError,
            "torchao holds i8 only, not nf4; leave backend out",
        ),
        (
            {"quant_type": "i8", "backend": "bnb", "model_type": UNet},
            ValueError,
            "on an accelerator only, not on the cpu; leave backend out",
        ),
        (
            {"quant_type": "i8", "backend": "torchao", "device": "mps"},
            ValueError,
            "torchao quantizes on cpu, cuda or xpu, not on mps:0; leave backend out",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        quant_guard(**{"device": "cpu"} | arguments).__enter__()
    assert "\n" not in str(caught.value)


def missing(monkeypatch, *packages):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in packages else real(name)
    )


def test_an_absent_package_is_an_error_only_where_it_was_named(monkeypatch, caplog):
    missing(monkeypatch, "bitsandbytes")
    with pytest.raises(ImportError, match=r"pip install bitsandbytes\); leave backend out"):
        quant_guard(quant_type="nf4", backend="bnb", device="cpu").__enter__()
    with quant_guard(quant_type="nf4", device="cpu") as config:
        assert type(config) is transformers.TorchAoConfig
    assert "nf4 cannot be had here, i8 by torchao is used" in caplog.text


@pytest.mark.parametrize("absent", [("bitsandbytes", "torchao"), ("accelerate",)])
def test_nothing_possible_is_said_and_the_model_is_whole(monkeypatch, caplog, absent):
    missing(monkeypatch, *absent)
    for kind in ("i8", "nf4"):
        with quant_guard(quant_type=kind, model_type=Llama, device="cpu") as config:
            assert config is None
        assert f"{kind} cannot be had here, the model is loaded unquantized" in caplog.text
    assert f"the package {absent[0]} is not installed" in caplog.text


def test_an_old_package_is_as_good_as_none(monkeypatch, caplog):
    real = quantizing.metadata.version
    monkeypatch.setattr(
        quantizing.metadata,
        "version",
        lambda name: "0.40.1" if name == "bitsandbytes" else real(name),
    )
    with quant_guard(quant_type="fp4", device="cpu") as config:
        assert type(config) is transformers.TorchAoConfig
    assert "bitsandbytes 0.40.1 is older than 0.48" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "version", "held"),
    [
        (Llama, "4.52.4", "torchao"),
        (Llama, "4.53.0", "bnb"),
        (UNet, "0.35.2", None),
        (UNet, "0.36.0", "torchao"),
    ],
)
def test_a_library_too_old_for_a_backend(monkeypatch, caplog, model_type, version, held):
    """transformers: bitsandbytes on any cpu; diffusers: configurations of torchao's own."""
    library, real = quantizing.library_of(model_type), quantizing.metadata.version
    monkeypatch.setattr(
        quantizing.metadata, "version", lambda name: version if name == library else real(name)
    )
    with quant_guard(quant_type="nf4", model_type=model_type, device="cpu") as config:
        assert quantizing.describe_quant(config).backend == held
    assert (f"{library} {version} is older than" in caplog.text) == version.endswith(("4", "2"))
    if held is None:
        with pytest.raises(ImportError, match=r"older than 0\.36, which torchao on cpu needs"):
            quant_guard(
                quant_type="i8", backend="torchao", model_type=model_type, device="cpu"
            ).__enter__()


def test_a_package_that_does_not_import_is_as_good_as_none(monkeypatch, caplog):
    def broken(package):
        raise OSError("wrong library") if package == "bitsandbytes" else AssertionError

    monkeypatch.setattr(quantizing, "import_backend", broken)
    assert "OSError: wrong library" in quantizing.reason_against(
        "bnb", "i8", torch.device("cpu"), frozenset({"transformers"})
    )


@pytest.mark.parametrize(
    ("kind", "capability", "chosen"),
    [
        ("i8", (7, 5), "bnb"),
        ("i8", (7, 0), "torchao"),
        ("nf4", (6, 0), "bnb"),
        ("nf4", (5, 2), "torchao"),
    ],
)
def test_an_old_gpu_is_asked_before_the_load(monkeypatch, kind, capability, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    with quant_guard(quant_type=kind, model_type=Llama, device=torch.device("cuda", 0)) as config:
        assert quantizing.describe_quant(config).backend == chosen


# What is in effect


def test_init_values_tell_what_is_in_effect():
    ask = {"device": "cpu", "dtype": "fp32", "quant_use_double": True}
    with init_guard(**ask, quant_type="nf4", model_type=Llama) as values:
        assert (values.quant_type, values.quant_use_double, values.quant_backend) == (
            "nf4",
            True,
            "bnb",
        )
    with init_guard(**ask, quant_type="nf4", model_type=UNet) as values:
        assert (values.quant_type, values.quant_use_double) == ("i8", False)
    with init_guard(**ask, quant_type="i8", quant_backend="torchao", model_type=Llama) as values:
        assert values.quant_backend == "torchao"
    with init_guard(**ask) as values:
        assert (values.quant_type, values.quant_use_double, values.quant_backend) == (
            None,
            False,
            None,
        )


def test_a_configuration_of_the_users_own_has_a_name():
    from torchao.quantization import Int4WeightOnlyConfig

    describe = quantizing.describe_quant
    mine = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert describe(mine) == ("nf4", False, "bnb")
    assert describe(mine.to_dict()) == ("nf4", False, "bnb")
    assert describe(transformers.TorchAoConfig(Int4WeightOnlyConfig())) == (
        "int4weightonly",
        False,
        "torchao",
    )
    packed = transformers.TorchAoConfig(Int4WeightOnlyConfig()).to_dict()  # as in config.json
    assert describe(packed).quant_type == "int4weightonly"
    for name, kind in [("int8_weight_only", "i8"), ("int8wo", "i8"), ("int4wo", "int4wo")]:
        old = {"quant_method": "torchao", "quant_type": name}  # older libraries take names
        assert describe(old) == (kind, False, "torchao")
    assert describe(transformers.EetqConfig()).quant_type == "eetq"
    whole = diffusers.PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs={"load_in_4bit": True}
    )
    assert describe(whole) == ("fp4", False, "bnb")
    with quant_guard(quant_config_override=mine) as config:
        assert config is mine


# Where it is loaded to


def test_a_quantized_model_is_loaded_where_it_is_to_be():
    """Without a map a quantized model goes to the first accelerator, whichever was asked for."""
    place = quantizing.load_map
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    config = object()
    assert place(config, None, gpu, Llama) == {"": "cuda:1"}
    assert place(config, None, cpu, Llama) == {"": "cpu"}
    assert place(config, "auto", gpu, Llama) == "auto"
    assert place(config, None, gpu, UNet) == {"": "cuda:1"}
    assert place(config, None, gpu, Pipeline) is None
    assert place(None, None, gpu, Llama) is None
    # diffusers quantizes nothing that a map sends to the cpu
    assert place(config, None, cpu, UNet) is None
    assert place(config, {"": "cpu"}, cpu, UNet) is None
    assert place(None, {"": "cpu"}, cpu, UNet) == {"": "cpu"}


def test_a_cpu_map_does_not_undo_the_quantization_of_diffusers(pipeline):
    class Unet(OpGuardBase):
        NAME = "unet"
        MODEL_ID = pipeline
        DETECTOR_TYPE = UNet
        FROM_PRETRAINED_ADDITIONAL_KWARGS = MappingProxyType({"subfolder": "unet"})

    with Unet(quant_type_override="i8", device_map_override={"": "cpu"}) as unet:
        assert quantized_parameters(unet.detector)


def quantized_parameters(model):
    return [
        name
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "quant_state")
        or hasattr(parameter, "SCB")
        or hasattr(parameter, "tensor_data_names")
    ]


# What it does


class Tiny(OpGuardBase):
    NAME = "tiny-llama"
    MODEL_ID = "."
    DETECTOR_TYPE = Llama

    def _predict(self, *, input_proc):
        return self._detector(input_proc).logits


@pytest.fixture
def guarded(llama):
    def make(folder=llama, **keywords):
        tiny = type("Tiny", (Tiny,), {"MODEL_ID": folder})
        return tiny(device_override="cpu", **keywords)

    return make


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("kind", "double"), BNB)
def test_transformers_on_the_cpu(guarded, llama, kind, double, dtype):
    plain = Llama.from_pretrained(llama).eval()
    with guarded(
        quant_type_override=kind, quant_use_double_override=double, dtype_override=dtype
    ) as tiny:
        assert len(quantized_parameters(tiny.detector)) == 14
        assert weight_bytes(tiny.detector) < (0.45 if kind == "i8" else 0.35) * weight_bytes(plain)
        first = tiny(input_raw=IDS)
        assert torch.equal(first, tiny(input_raw=IDS))
        assert first.dtype is tiny.dtype
    near = 0.999 if kind == "i8" else 0.98
    assert 1 - 1e-7 > cosine(first, logits(plain)) > near


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_diffusers_on_the_cpu(pipeline, dtype, caplog):
    class Unet(OpGuardBase):
        NAME = "unet"
        MODEL_ID = pipeline
        DETECTOR_TYPE = UNet
        FROM_PRETRAINED_ADDITIONAL_KWARGS = MappingProxyType({"subfolder": "unet"})

        def _predict(self, *, input_proc):
            text = torch.ones(1, 3, 16, dtype=self.dtype)
            return self._detector(input_proc.to(self.dtype), 1, text).sample

    x = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16)
    with Unet(dtype_override="fp32") as unet:
        plain, size = unet(input_raw=x), weight_bytes(unet.detector)
    with Unet(dtype_override=dtype, quant_type_override="nf4") as unet:
        assert "i8 by torchao is used" in caplog.text
        assert quantized_parameters(unet.detector)
        assert weight_bytes(unet.detector) < size
        assert 1 - 1e-9 > cosine(unet(input_raw=x), plain) > 0.999


@pytest.mark.parametrize(("kind", "double"), [("fp4", False), ("nf4", True)])
def test_layers_that_do_not_fit_the_packed_format(guarded, narrow_llama, kind, double):
    """bitsandbytes packs 4 bit weights at the first call on some processors and fails at these."""
    plain = Llama.from_pretrained(narrow_llama).eval()
    with guarded(narrow_llama, quant_type_override=kind, quant_use_double_override=double) as tiny:
        found = tiny(input_raw=IDS)
    assert cosine(found, logits(plain)) > 0.95


def test_a_loader_of_the_users_own_is_settled_too(narrow_llama):
    with (
        quant_guard(quant_type="nf4", model_type=Llama, device="cpu") as config,
        load_guard(local_files_only=True) as load,
    ):
        model = load(lambda: Llama.from_pretrained(narrow_llama, quantization_config=config))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.in_features == 32
    assert not layer.support_avx512bf16_for_cpu
    assert torch.isfinite(logits(model)).all()


def test_settling_touches_only_layers_that_do_not_fit():
    from bitsandbytes.nn import Linear4bit

    layers = torch.nn.Sequential(
        Linear4bit(64, 32), Linear4bit(96, 32), Linear4bit(64, 48), Linear4bit(128, 64)
    )
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    assert quantizing.settle(layers) is layers
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [True, False, False, True]
    assert quantizing.settle("no module") == "no module"


# Matching another instance


def test_a_match_of_the_other_library_is_made_by_type(llama, pipeline):
    """A configuration is one library's own: the other would refuse it."""

    class Unet(OpGuardBase):
        NAME = "unet"
        MODEL_ID = pipeline
        DETECTOR_TYPE = UNet
        FROM_PRETRAINED_ADDITIONAL_KWARGS = MappingProxyType({"subfolder": "unet"})

    class Local(Tiny):
        MODEL_ID = llama

    small = Local(quant_type_override="i8", device_override="cpu")
    with Unet(instance_to_match=small) as unet:
        assert type(unet.quant_config) is diffusers.TorchAoConfig
        assert quantized_parameters(unet.detector)
    assert Local(instance_to_match=small).quant_config is small.quant_config
    with Local(instance_to_match=unet) as back:
        assert type(back.quant_config) is transformers.BitsAndBytesConfig
        assert quantized_parameters(back.detector)


def test_a_model_with_nothing_to_quantize_is_said(tmp_path, caplog, pipeline):
    tiny_diffusion.build_autoencoder_tiny(tmp_path / "vae")

    class Vae(OpGuardBase):
        NAME = "vae-i8"
        MODEL_ID = tmp_path / "vae"
        DETECTOR_TYPE = diffusers.AutoencoderTiny

    said = "i8 was asked for, but nothing of Vae is quantized, which has no linear layers"
    for _ in range(2):  # from the source, from the export
        with Vae(quant_type_override="i8", device_override="cpu"):
            assert sum(said in each.getMessage() for each in caplog.records) == 1
        caplog.clear()

    class Unet(OpGuardBase):
        NAME = "unet-i8"
        MODEL_ID = pipeline
        DETECTOR_TYPE = diffusers.UNet2DConditionModel
        FROM_PRETRAINED_ADDITIONAL_KWARGS = MappingProxyType({"subfolder": "unet"})

    with Unet(quant_type_override="i8", device_override="cpu"):
        assert "nothing of" not in caplog.text
