"""Variants: which weight files are asked for, by what lies there and what a load would read."""

import pytest
import torch

from opguard import OpGuardBase
from opguard.guards.initial import init_guard, variant_guard

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
Llama = transformers.LlamaForCausalLM
UNet = diffusers.UNet2DConditionModel
Pipeline = diffusers.StableDiffusionPipeline


def folder_of(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def variant_of(folder, dtype, **keywords):
    with variant_guard(dtype=dtype, model_id=folder, **keywords) as variant:
        return variant


def test_the_files_of_the_dtype_come_first(tmp_path):
    both = folder_of(tmp_path / "both", "model.fp16.safetensors", "model.bf16.safetensors")
    assert [variant_of(both, dtype) for dtype in ("fp16", "bf16")] == ["fp16", "bf16"]
    half = folder_of(tmp_path / "half", "model.fp16.safetensors", "model.safetensors")
    assert [variant_of(half, dtype) for dtype in ("fp16", "bf16")] == ["fp16", "fp16"]
    brain = folder_of(tmp_path / "brain", "model.bf16.safetensors")
    assert [variant_of(brain, dtype) for dtype in ("fp16", "bf16")] == ["bf16", "bf16"]
    for dtype in ("fp32", "fp64"):
        assert variant_of(both, dtype) is None


@pytest.mark.parametrize(
    "name",
    [
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ],
)
def test_weight_files_of_a_variant(tmp_path, name):
    assert variant_of(folder_of(tmp_path, name), "fp16") == "fp16"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.fp16.bin",  # needs use_safetensors=False
        "config.fp16.json",
        "fp16/model.safetensors",
        "model.fp16.safetensors/readme.md",
        "modelfp16.safetensors",
        "model.fp16e.safetensors",
    ],
)
def test_files_that_are_no_weights_of_a_variant(tmp_path, name):
    assert variant_of(folder_of(tmp_path, name), "fp16") is None


def test_other_formats_count_where_they_may_be_read(tmp_path):
    folder = folder_of(tmp_path, "pytorch_model.fp16.bin", "model.safetensors")
    assert variant_of(folder, "fp16", use_safetensors=False) == "fp16"
    with init_guard(dtype="fp16", device="cpu", model_id=folder) as values:
        assert values.variant is None


def test_a_broken_link_is_no_file(tmp_path):
    (tmp_path / "model.fp16.safetensors").symlink_to(tmp_path / "gone")
    assert variant_of(tmp_path, "fp16") is None


def test_only_what_the_load_reads_counts(tmp_path):
    """A repo of parts: a variant of one of them must not be asked of another, which has none."""
    folder = folder_of(
        tmp_path,
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "model.safetensors",
    )
    assert variant_of(folder, "fp16", model_type=UNet, subfolder="unet") == "fp16"
    assert variant_of(folder, "fp16", model_type=diffusers.AutoencoderKL, subfolder="vae") is None
    assert variant_of(folder, "fp16", model_type=Llama) is None
    assert variant_of(folder, "fp16", subfolder="vae") is None
    assert variant_of(folder, "fp16", subfolder="unet/") == "fp16"
    assert variant_of(folder, "fp16", model_type=Pipeline) == "fp16"
    assert variant_of(folder, "fp16", model_type=torch.nn.Linear) == "fp16"
    with init_guard(
        dtype="fp16", device="cpu", model_id=folder, model_type=UNet, subfolder="vae"
    ) as values:
        assert values.variant is None


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        (Pipeline, "sd_turbo.fp16.safetensors"),
        (Pipeline, "diffusion_pytorch_model.fp16.safetensors"),
        (Pipeline, "split/clip_l.fp16.safetensors"),
        (diffusers.AutoencoderKL, "sdxl_vae.fp16.safetensors"),
        (Llama, "adapter_model.fp16.safetensors"),
    ],
)
def test_files_for_other_programs_are_no_variant(tmp_path, model_type, name):
    """Asked for a variant that only they have, the library would find no weights at all."""
    folder = folder_of(tmp_path, name, "model.safetensors", "unet/diffusion_pytorch_model.bin")
    assert variant_of(folder, "fp16", model_type=model_type) is None
    assert variant_of(folder, "fp16") == "fp16"


def build_llama(folder, **saving):
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = Llama(config)
    model.save_pretrained(folder, **saving)
    return model


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_transformers_reads_the_variant_that_was_chosen(tmp_path, variant, dtype):
    """Shards as the library itself names them; there is no plain file it could fall back to."""
    build_llama(tmp_path, variant=variant, max_shard_size="4KB")
    assert len(list(tmp_path.glob(f"*.{variant}*-of-*.safetensors"))) > 1
    assert not (tmp_path / "model.safetensors").exists()

    class Tiny(OpGuardBase):
        NAME = "tiny"
        MODEL_ID = tmp_path
        DETECTOR_TYPE = Llama

    with Tiny(device_override="cpu", dtype_override=dtype, local_files_only=True) as tiny:
        assert tiny.variant == variant
        assert tiny.detector.dtype is dtype


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_diffusers_reads_the_variant_that_was_chosen(tmp_path, size):
    blocks = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "layers_per_block": 1,
    }
    model = UNet(sample_size=8, **blocks)
    model.save_pretrained(tmp_path / "unet", variant="bf16", max_shard_size=size)
    files = list((tmp_path / "unet").glob("*.safetensors"))
    assert (len(files) > 1) == (size == "20KB")
    assert all(".bf16" in file.name for file in files)

    class Tiny(OpGuardBase):
        NAME = "tiny"
        MODEL_ID = tmp_path / "unet"
        DETECTOR_TYPE = UNet

    with Tiny(device_override="cpu", dtype_override="bf16", local_files_only=True) as tiny:
        assert tiny.variant == "bf16"
        assert tiny.detector.dtype is torch.bfloat16


@pytest.mark.parametrize("how", ["local_files_only", "only_load_export"])
def test_choosing_at_half_precision_asks_nobody(monkeypatch, how):
    """Fault C5: strict locality is strict in the constructor too."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *a, **k: asked.append(a) or [])

    class Tiny(OpGuardBase):
        NAME = "tiny"
        MODEL_ID = "nobody/nothing"
        REVISION = "main"
        DETECTOR_TYPE = Llama

    for dtype in ("fp16", "bf16"):
        assert Tiny(dtype_override=dtype, **{how: True}).variant is None
    assert asked == []
    Tiny(dtype_override="fp16")
    assert len(asked) == 1
