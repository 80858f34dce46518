"""OpGuardBase over real libraries: tiny transformers and diffusers models made from configs."""

import weakref
from types import MappingProxyType

import pytest
import torch

from opguard import OpGuardBase

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-vae"
    widths = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    diffusers.AutoencoderTiny(**widths, **blocks).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=32, intermediate_size=16, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


# diffusers deprecates the seed's own input: a tensor whose values begin at -1
@pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning")
def test_the_seeds_quick_start(tiny_vae):
    """The seed's TinyVAE, changed only in its missing imports and MODEL_ID."""
    from diffusers import AutoencoderTiny
    from diffusers.image_processor import VaeImageProcessor
    from PIL.Image import Image as PILImage

    class TinyVAE(OpGuardBase):
        NAME = "tiny-vae"
        MODEL_ID = tiny_vae
        REVISION = "main"
        DETECTOR_TYPE = AutoencoderTiny

        def _load_processor(self) -> VaeImageProcessor:
            """Load the pre/post processor (detector for inference loaded automatically)"""
            return VaeImageProcessor(vae_scale_factor=8)

        def _preprocess(self, *, input_raw: PILImage) -> torch.FloatTensor:
            """Apply pre-processing (called automatically before _predict)"""
            return self._processor.preprocess(input_raw).to(self.device, self.dtype)  # (B,C,H,W)

        def _predict(self, *, input_proc):
            """Build a bespoke predictor that does encode-decode sequence (two calls)."""
            return self._detector.decode(
                self._detector.encode(input_proc.to(self.device, self.dtype)).latents
            ).sample

        def _postprocess(self, *, output_raw: torch.FloatTensor) -> PILImage:
            """Apply post-processing (called automatically after _predict."""
            return self._processor.postprocess(output_raw, output_type="pil")[0]

    # Run the VAE safely
    with TinyVAE() as vae:
        x = torch.rand(1, 3, 64, 64, device=vae.device, dtype=vae.dtype) * 2 - 1
        y = vae(input_raw=x)
        model = weakref.ref(vae.detector)
    assert y.size == (64, 64)
    assert model() is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_transformers_model_from_a_folder(tiny_bert, dtype):
    class Tiny(OpGuardBase):
        NAME = "tiny-bert"
        MODEL_ID = tiny_bert
        DETECTOR_TYPE = transformers.BertModel

    with Tiny(device_override="cpu", dtype_override=dtype, local_files_only=True) as model:
        assert model.detector.dtype == model.dtype
        assert not model.detector.training
        out = model(input_raw={"input_ids": torch.ones(2, 5, dtype=torch.long)})
    assert type(out).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    assert out.last_hidden_state.shape == (2, 5, 8)
    assert not out.last_hidden_state.requires_grad


def test_additional_and_skipped_keywords_reach_from_pretrained(tiny_bert):
    class Tiny(OpGuardBase):
        NAME = "tiny-bert"
        MODEL_ID = tiny_bert
        DETECTOR_TYPE = transformers.BertModel
        FROM_PRETRAINED_ADDITIONAL_KWARGS = MappingProxyType({"attn_implementation": "eager"})
        FROM_PRETRAINED_SKIP_KWARGS = ("use_safetensors",)

    with Tiny(device_override="cpu") as model:
        assert model.detector.config._attn_implementation == "eager"
        assert "use_safetensors" not in model._from_pretrained_kwargs()


def test_the_export_keywords_are_respected(tiny_bert, tmp_path, monkeypatch):
    class Tiny(OpGuardBase):
        NAME = "tiny-bert"
        MODEL_ID = tiny_bert
        DETECTOR_TYPE = transformers.BertModel

    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path))
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(OSError, match="export"):
        Tiny(device_override="cpu", only_load_export=True)(input_raw=inputs)
    made = Tiny(device_override="cpu", force_export_refresh=True)(input_raw=inputs)
    assert list(tmp_path.glob("*tiny-bert-detector*/*.safetensors"))
    read = Tiny(device_override="cpu", only_load_export=True)(input_raw=inputs)
    assert torch.equal(made.last_hidden_state, read.last_hidden_state)


def test_a_failure_inside_a_real_model_frees_it(tiny_bert, collected):
    class Tiny(OpGuardBase):
        NAME = "tiny-bert"
        MODEL_ID = tiny_bert
        DETECTOR_TYPE = transformers.BertModel

    seen = []

    def fail():
        with Tiny(device_override="cpu") as model:
            seen.append(weakref.ref(model.detector))
            model(input_raw={"input_ids": torch.full((1, 3), 999)})  # outside the vocabulary

    error = None
    try:
        fail()
    except IndexError as caught:
        error = caught
    assert error is not None
    assert seen[0]() is None


def test_a_missing_file_is_said_without_the_network(tmp_path):
    class Missing(OpGuardBase):
        NAME = "missing"
        MODEL_ID = "nobody/nothing-of-this-name"
        REVISION = "main"
        DETECTOR_TYPE = transformers.BertModel

    with pytest.raises(OSError, match=r"expected .*nobody/nothing-of-this-name"):
        Missing(device_override="cpu", local_files_only=True)(input_raw=1)


def test_parts_that_a_model_keeps_in_float32_stay_so(tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path)

    class T5(OpGuardBase):
        NAME = "tiny-t5"
        MODEL_ID = tmp_path
        DETECTOR_TYPE = transformers.T5EncoderModel

    with T5(device_override="cpu", dtype_override="fp16") as model:
        block = model.detector.encoder.block[0]
        assert block.layer[0].SelfAttention.q.weight.dtype == torch.float16
        assert block.layer[1].DenseReluDense.wo.weight.dtype == torch.float32
        assert model(input_raw={"input_ids": torch.ones(1, 3, dtype=torch.long)})


def test_a_model_without_files_has_no_variants_to_look_for(monkeypatch):
    """Its id is no hub id: nobody is to ask the hub about it."""

    calls = []

    def asked(*args, **kwargs):
        calls.append(args)
        raise OSError("no network here")

    class Plain(OpGuardBase):
        NAME = "plain"
        MODEL_ID = "none"
        DETECTOR_TYPE = staticmethod(lambda model_id: torch.nn.Linear(2, 2))

    monkeypatch.setattr("socket.getaddrinfo", asked)
    monkeypatch.setattr("socket.socket.connect", asked)
    with Plain(device_override="cpu", dtype_override="bf16") as model:
        assert model.variant is None
        assert model(input_raw=torch.ones(1, 2)).shape == (1, 2)
    assert calls == []
