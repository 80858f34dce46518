"""Quantization of pipelines, what survives saving, and what importing a backend may reach."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

import opguard
from opguard import OpGuardBase
from opguard.guards import locality, quantizing
from opguard.guards.initial import quant_guard
from opguard.guards.loading import cache_guard

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytest.importorskip("accelerate")

import tiny_diffusion  # noqa: E402
import tiny_models  # noqa: E402

Pipeline = diffusers.StableDiffusionPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_diffusion.build_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


def is_small(weight):
    return hasattr(weight, "tensor_data_names")


def linear_of(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight


def parts(**keywords):
    with quant_guard(quant_type="nf4", quant_use_double=True, device="cuda", **keywords) as config:
        assert type(config) is diffusers.PipelineQuantizationConfig
        return config.quant_mapping


def test_the_parts_are_those_of_the_folder(folder):
    mapping = parts(model_type=diffusers.DiffusionPipeline, model_id=folder)
    assert {name: type(config) for name, config in mapping.items()} == {
        "unet": diffusers.BitsAndBytesConfig,
        "text_encoder": transformers.BitsAndBytesConfig,
    }
    assert quantizing.describe_quant(mapping["unet"]) == ("nf4", True, "bnb")
    assert quantizing.describe_quant({"quant_mapping": mapping}) == ("nf4", True, "bnb")


def test_the_parts_are_those_of_the_class_where_the_folder_is_not_here():
    found = parts(model_type=Pipeline, model_id="nobody/nothing")
    assert set(found) == {"unet", "text_encoder", "image_encoder"}
    xl = parts(model_type=diffusers.StableDiffusionXLPipeline)
    assert {"unet", "text_encoder", "text_encoder_2"} <= set(xl)
    assert "vae" not in xl
    assert type(xl["text_encoder_2"]) is transformers.BitsAndBytesConfig


def test_the_usual_parts_where_nothing_else_is_known():
    assert {"unet", "transformer", "text_encoder"} <= set(
        parts(model_type=diffusers.AutoPipelineForText2Image)
    )


@pytest.mark.parametrize("text", ["no json", json.dumps({"unet": 3, "vae": ["diffusers", 1]})])
def test_a_broken_index_is_not_what_fails(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    assert "unet" in parts(model_type=Pipeline, model_id=tmp_path)


def test_a_pipeline_without_parts_to_quantize_is_said(tmp_path, caplog):
    index = {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with quant_guard(
        quant_type="i8", device="cpu", model_type=diffusers.DiffusionPipeline, model_id=tmp_path
    ) as config:
        assert config is None
    assert "no part to quantize" in caplog.text


def test_a_pipeline_on_the_cpu(folder, caplog):
    """4 bit cannot be had there for the denoiser: every part is i8, the autoencoder is whole."""

    class TextToImage(OpGuardBase):
        NAME = "tiny-sd"
        MODEL_ID = folder
        DETECTOR_TYPE = Pipeline

        def _predict(self, *, input_proc):
            return self._detector(
                input_proc,
                num_inference_steps=2,
                height=tiny_diffusion.SIZE,
                width=tiny_diffusion.SIZE,
                output_type="pt",
                generator=torch.Generator().manual_seed(0),
            ).images

    with TextToImage(device_override="cpu") as plain:
        expected = plain(input_raw=tiny_diffusion.PROMPT)
    with TextToImage(device_override="cpu", quant_type_override="nf4") as small:
        assert "nf4 cannot be had here, i8 by torchao is used" in caplog.text
        pipeline = small.detector
        assert is_small(linear_of(pipeline.unet))
        assert any(is_small(weight) for weight in pipeline.text_encoder.parameters())
        assert not any(is_small(weight) for weight in pipeline.vae.parameters())
        found = small(input_raw=tiny_diffusion.PROMPT)
        assert torch.equal(found, small(input_raw=tiny_diffusion.PROMPT))
    pair = found.flatten().double(), expected.flatten().double()
    assert 1 - 1e-9 > torch.nn.functional.cosine_similarity(*pair, dim=0) > 0.99


def test_a_pipeline_takes_no_map_to_one_device(folder):
    class TextToImage(OpGuardBase):
        NAME = "tiny-sd"
        MODEL_ID = folder
        DETECTOR_TYPE = Pipeline

    with TextToImage(device_map_override={"": "cpu"}) as plain:
        assert plain.detector.unet.device.type == "cpu"


# Saving


def save_and_load(model, kind, where):
    """The plain from_pretrained of an export: no configuration, which the folder has."""
    model.save_pretrained(where)
    assert not list(where.rglob("*.bin"))
    assert list(where.rglob("*.safetensors"))
    return kind.from_pretrained(where, dtype=model.dtype)


def inputs_of(model):
    if isinstance(model, transformers.BlipForConditionalGeneration):
        pixels = torch.linspace(-1, 1, 3 * 24 * 24).reshape(1, 3, 24, 24).to(model.dtype)
        return {"pixel_values": pixels, "input_ids": torch.tensor([[2, 7, 8]])}
    return {"input_ids": torch.tensor([[4, 5, 6, 7]])}


def forward(model):
    with torch.inference_mode():
        found = quantizing.settle(model).eval()(**inputs_of(model))
    return found.logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "quant",
    [
        {"quant_type": "i8", "backend": "bnb"},
        {"quant_type": "i8", "backend": "torchao"},
        {"quant_type": "fp4"},
        {"quant_type": "nf4"},
        {"quant_type": "nf4", "quant_use_double": True},
    ],
    ids=lambda quant: "-".join(map(str, quant.values())),
)
@pytest.mark.parametrize("name", ["llama", "blip"])
def test_what_is_saved_before_the_first_call_is_the_same_model(tmp_path, name, quant, dtype):
    source = getattr(tiny_models, f"build_{name}")(tmp_path / "source")
    types = {
        "llama": transformers.LlamaForCausalLM,
        "blip": transformers.BlipForConditionalGeneration,
    }
    with quant_guard(**quant, compute_dtype=dtype, model_type=types[name], device="cpu") as config:
        model = types[name].from_pretrained(
            source, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
        )
    again = save_and_load(model, types[name], tmp_path / "saved")
    assert torch.equal(forward(again), forward(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_pipeline_is_the_same(folder, tmp_path, dtype):
    with quant_guard(quant_type="i8", model_type=Pipeline, device="cpu", model_id=folder) as config:
        pipeline = Pipeline.from_pretrained(folder, dtype=dtype, quantization_config=config)
    again = save_and_load(pipeline, Pipeline, tmp_path / "saved")
    assert is_small(linear_of(again.unet))
    sample = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16).to(dtype)
    text = torch.ones(1, 3, 16, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(
            again.unet(sample, 1, text).sample, pipeline.unet(sample, 1, text).sample
        )


# Exports


class TinyLlama(OpGuardBase):
    NAME = "tiny-llama"
    MODEL_ID = "."
    DETECTOR_TYPE = transformers.LlamaForCausalLM

    def _predict(self, *, input_proc):
        return self._detector(input_proc).logits


class TinyUnet(OpGuardBase):
    NAME = "tiny-unet"
    MODEL_ID = "."
    DETECTOR_TYPE = diffusers.UNet2DConditionModel
    FROM_PRETRAINED_ADDITIONAL_KWARGS = MappingProxyType({"subfolder": "unet"})

    def _predict(self, *, input_proc):
        sample = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16).to(self.dtype)
        return self._detector(sample, 1, torch.ones(1, 3, 16, dtype=self.dtype)).sample


class TinyPipeline(TinyUnet):
    NAME = "tiny-pipeline"
    DETECTOR_TYPE = Pipeline
    FROM_PRETRAINED_ADDITIONAL_KWARGS = MappingProxyType({})

    def _predict(self, *, input_proc):
        whole, self._detector = self._detector, self._detector.unet
        try:
            return super()._predict(input_proc=input_proc)
        finally:
            self._detector = whole


@pytest.fixture
def exports(tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    return tmp_path / "exports"


@pytest.mark.parametrize(
    ("quant", "end"),
    [("i8", "i8"), ("fp4", "fp4-dq"), ("nf4", "nf4-dq"), (None, "detector")],
)
@pytest.mark.parametrize("kind", [TinyLlama, TinyUnet, TinyPipeline])
def test_a_quantized_export_is_matched_and_is_the_same(exports, tmp_path, kind, quant, end):
    """Named by what is in effect; the second load has nothing but the export."""
    if kind is TinyLlama:
        source = tiny_models.build_llama(tmp_path / "source")
    else:
        source = tiny_diffusion.build_stable_diffusion(tmp_path / "source")
        end = "i8" if quant else end
    tiny = type(kind.__name__, (kind,), {"MODEL_ID": source})
    settings = {
        "device_override": "cpu",
        "quant_type_override": quant,
        "quant_use_double_override": True,
    }
    ids = torch.arange(4, 12)[None]
    with tiny(**settings) as model:
        first = model(input_raw=ids)
    (folder,) = (path for path in exports.iterdir() if not path.name.startswith("."))
    assert folder.name.endswith(end)
    made = {file: file.stat().st_ino for file in folder.rglob("*.safetensors")}
    with tiny(**settings) as model:
        assert torch.equal(model(input_raw=ids), first)
    assert {file: file.stat().st_ino for file in folder.rglob("*.safetensors")} == made
    shutil.rmtree(source)
    with tiny(**settings, only_load_export=True) as model:
        assert torch.equal(model(input_raw=ids), first)


def test_a_quantized_model_through_cache_guard(exports, tmp_path, caplog):
    source = tiny_models.build_llama(tmp_path / "source")
    kind = transformers.LlamaForCausalLM
    found = []
    for _ in range(2):
        with (
            quant_guard(quant_type="nf4", model_type=kind, device="cpu") as config,
            cache_guard(base_export_name="cached") as load,
        ):
            model = load(kind.from_pretrained, source, quantization_config=config)
            found.append(forward(model))
    assert torch.equal(*found)
    assert [record for record in caplog.records if record.name == "opguard"] == []


def test_the_values_of_a_configuration_stay_as_they_are(folder):
    with quant_guard(quant_type="i8", model_type=Pipeline, device="cpu", model_id=folder) as config:
        before = quantizing.values_of(config)
        Pipeline.from_pretrained(folder, quantization_config=config)
    assert quantizing.values_of(config) == before
    assert json.loads(json.dumps(before)) == before
    mapping = diffusers.PipelineQuantizationConfig(quant_mapping=config.quant_mapping)
    before = quantizing.values_of(mapping)
    Pipeline.from_pretrained(folder, quantization_config=mapping)
    assert quantizing.values_of(mapping) == before
    assert set(before["parts"]) == {"unet", "text_encoder"}
    whole = diffusers.PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs={"load_in_4bit": True}
    )
    assert quantizing.values_of(whole)["quant_kwargs"] == {"load_in_4bit": True}
    mine = transformers.BitsAndBytesConfig(load_in_8bit=True)
    other = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0)
    assert quantizing.values_of(mine) != quantizing.values_of(other)
    assert quantizing.values_of(None) is None


# Importing


KERNELS = """
    import socket
    from huggingface_hub import constants

    def get_kernel(name, **_):
        print("asked", bool(constants.HF_HUB_OFFLINE))
        try:
            socket.create_connection(("192.0.2.1", 443), timeout=0.1)
        except Exception as error:
            print(type(error).__name__)
            raise
"""


WAYS = {
    "the hardware check": """
        import torch
        from opguard.guards.quantizing import reason_against
        cpu, libraries = torch.device("cpu"), frozenset({"transformers"})
        assert reason_against("bnb", "nf4", cpu, libraries) is None
    """,
    # importing any model of diffusers imports bitsandbytes
    "a task": """
        from opguard.tasks.vae import AutoencoderTinyBase
        assert AutoencoderTinyBase.DETECTOR_TYPE.from_pretrained
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_importing_bitsandbytes_fetches_no_code(tmp_path, way):
    """Its import asks the hub for a compiled kernel where the package kernels is installed."""
    (tmp_path / "kernels.py").write_text(textwrap.dedent(KERNELS))
    program = "\n".join(
        [
            "import sys",
            textwrap.dedent(WAYS[way]),
            "assert 'bitsandbytes' in sys.modules",
        ]
    )
    path = os.pathsep.join([str(tmp_path), str(Path(opguard.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if not done.stdout:
        pytest.skip("bitsandbytes asks for no kernel on this processor")
    assert done.stdout.split() == ["asked", "True", "LocalityError"]


def test_the_backend_of_a_configuration_of_the_users_own_is_imported_so_too(monkeypatch):
    mine = transformers.BitsAndBytesConfig(load_in_4bit=True)
    imported = []

    def importing(package):
        imported.append((package, locality.is_local()))

    monkeypatch.setattr(quantizing.importlib, "import_module", importing)
    for config in (mine, {"quant_method": "gptq"}, object()):
        with quant_guard(quant_config_override=config) as given:
            assert given is config
    assert imported == [("bitsandbytes", True)]
    assert not locality.is_local()
