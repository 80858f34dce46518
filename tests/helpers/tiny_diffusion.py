"""Tiny diffusers models made from configs, equal in every run; each is saved into a folder.

The pictures mean nothing. The shapes do: one element of a latent is 2 x 2 pixels, a picture is
32 x 32 unless asked otherwise.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "PROMPT",
    "SIZE",
    "build_autoencoder_kl",
    "build_autoencoder_tiny",
    "build_controlnet",
    "build_stable_diffusion",
    "build_stable_diffusion_xl",
    "picture",
]

SIZE = 32  # pixels along each side of what the pipeline makes
PROMPT = "a red house"
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def picture(size: int = SIZE, seed: int = 0) -> Any:
    """A smooth PIL picture of size x size pixels; another one for each seed."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0]
    return Image.fromarray((fine * 255).round().byte().permute(1, 2, 0).numpy())


def build_autoencoder_tiny(folder: str | Path, *, seed: int = 0) -> Path:
    """AutoencoderTiny: 4 latent channels, 2 pixels a side for an element."""
    from diffusers import AutoencoderTiny

    with _seeded(seed):
        model = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    model.save_pretrained(folder)
    return Path(folder)


def _autoencoder_kl(seed: int) -> Any:
    from diffusers import AutoencoderKL

    with _seeded(seed):
        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=SIZE,
            scaling_factor=2.0,  # latents vary by about 1, as a unet expects
        )


def build_autoencoder_kl(folder: str | Path, *, seed: int = 0) -> Path:
    """AutoencoderKL: 4 latent channels, 2 pixels a side for an element."""
    _autoencoder_kl(seed).save_pretrained(folder)
    return Path(folder)


def _unet(seed: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    with _seeded(seed):
        return UNet2DConditionModel(
            **{"cross_attention_dim": 16, **more},
            sample_size=SIZE // 2,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
        )


def _text_parts(seed: int, kind: str = "CLIPTextModel") -> tuple[Any, Any]:
    """A CLIP text encoder and a tokenizer that knows single letters."""
    import transformers
    from transformers import CLIPTextConfig, CLIPTokenizer

    letters = string.ascii_lowercase
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: at for at, token in enumerate([*tokens, "<|startoftext|>"])}
    end = vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        projection_dim=16,
    )
    with _seeded(seed):
        return getattr(transformers, kind)(config), tokenizer


def build_stable_diffusion(folder: str | Path, *, seed: int = 0) -> Path:
    """A whole StableDiffusionPipeline with a KL autoencoder, DDIM and no safety checker."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    text_encoder, tokenizer = _text_parts(seed)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SCHEDULE)
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder_kl(seed),
        unet=_unet(seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def build_stable_diffusion_xl(folder: str | Path, *, seed: int = 0) -> Path:
    """A whole StableDiffusionXLPipeline with two text encoders, a KL autoencoder and DDIM."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    first, tokenizer = _text_parts(seed)
    second, other = _text_parts(seed + 1, "CLIPTextModelWithProjection")
    # Six numbers of sizes and crops, each as 8, beside the second encoder's projection.
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16}
    pipeline = StableDiffusionXLPipeline(
        vae=_autoencoder_kl(seed),
        unet=_unet(seed, cross_attention_dim=32, addition_embed_type="text_time", **sizes),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=other,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SCHEDULE),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def build_controlnet(folder: str | Path, *, seed: int = 0) -> Path:
    """A ControlNetModel for the pipeline of build_stable_diffusion; its outputs are not zero."""
    from diffusers import ControlNetModel

    with _seeded(seed + 1):
        model = ControlNetModel.from_unet(
            _unet(seed), conditioning_embedding_out_channels=(8, 8), conditioning_channels=3
        )
        # A fresh ControlNet adds zeros everywhere, which would hide that it is not used at all.
        for block in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=2.0)
        torch.nn.init.normal_(model.controlnet_cond_embedding.conv_out.weight, std=2.0)
    model.save_pretrained(folder)
    return Path(folder)
