"""Autoencoders: a picture to its latent, a latent to its picture, or there and back.

One in, one out: a picture gives a latent of shape (channels, height, width), a list of pictures
gives (pictures, channels, height, width), and decoding goes the same way back. Latents are scaled
as the diffusion model sees them, so that those of one class fit a pipeline with the same
autoencoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from opguard.base import OpGuardBase
from opguard.tasks._checks import broken, warn_broken
from opguard.tasks._late import Late

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "AutoencoderBase",
    "AutoencoderKLBase",
    "AutoencoderTinyBase",
    "VaeSdxlFp16Fix",
    "VaeTinyForSd",
    "VaeTinyForSdxl",
    "check_latent",
    "is_batch",
]

MODES = ("encode", "decode", "encode-decode")


class AutoencoderBase(OpGuardBase):
    """What the autoencoders share::

        with VaeTinyForSd() as vae:
            latent = vae(input_raw=picture, mode="encode")
            again = vae(input_raw=latent, mode="decode")

    Call keywords:
        input_raw: for the modes that encode a PIL picture, a list of PIL pictures of one size, or
            a float tensor in [0, 1] of shape (3, height, width) or (pictures, 3, height, width);
            to decode a latent tensor of 3 or 4 dimensions. Sides that ``SCALE_FACTOR`` does not
            divide are resized to the next smaller ones it does.
        mode: "encode", "decode" or "encode-decode"; required.
        seed: draws the latent from the distribution of a KL autoencoder, which gives its mode
            otherwise; an AutoencoderTiny has nothing to draw.

    Returns a latent tensor or PIL pictures. Raises ValueError for another mode or shape, and for
    pixels or latents that are not finite; of an answer that is not finite a WARNING says which.
    """

    SCALE_FACTOR: ClassVar[int] = 8  # pixels along each side of one element of a latent

    def _load_processor(self) -> Any:
        from diffusers.image_processor import VaeImageProcessor

        return VaeImageProcessor(vae_scale_factor=self.SCALE_FACTOR, do_convert_rgb=True)

    def _preprocess(self, *, input_raw: Any, mode: str | None = None) -> torch.Tensor:
        """Returns pixels in [-1, 1] or latents, of 3 dimensions for one and 4 for several."""
        if mode not in MODES:
            raise ValueError(
                f"{self.classname}: expected mode= one of {', '.join(MODES)}, "
                f"got {'none' if mode is None else repr(mode)}"
            )
        if mode == "decode":
            channels = getattr(self._detector.config, "latent_channels", None)
            check_latent(self.classname, "input_raw", input_raw, channels)
            values = input_raw
        else:
            many = is_batch(self.classname, input_raw, self.SCALE_FACTOR)
            values = self._processor.preprocess(input_raw)
            values = values if many else values[0]
        placed: torch.Tensor = values.to(self.device, self.dtype)
        return placed

    def _predict(
        self, *, input_proc: torch.Tensor, mode: str | None = None, seed: int | None = None
    ) -> torch.Tensor:
        """Returns latents or pixels, of as many dimensions as came in."""
        one = input_proc.ndim == 3
        values: torch.Tensor = input_proc.unsqueeze(0) if one else input_proc
        if mode != "decode":
            values = self._encode(values, seed)
        if mode != "encode":
            values = self._decode(values)
        return values[0] if one else values

    def _postprocess(self, *, output_raw: torch.Tensor, mode: str | None = None) -> Any:
        one = output_raw.ndim == 3
        several = output_raw.unsqueeze(0) if one else output_raw
        warn_broken(self.classname, several)
        if mode == "encode":
            return output_raw
        # Pixels go to numpy, which has no bfloat16; what is no number is black, without its noise.
        pixels = several.float().cpu().nan_to_num(nan=-1.0)
        pictures: list[Image] = self._processor.postprocess(pixels, output_type="pil")
        return pictures[0] if one else pictures

    def _encode(self, pixels: torch.Tensor, seed: int | None) -> torch.Tensor:
        raise NotImplementedError

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def example_inputs(self) -> dict[str, Any]:
        """Call keywords to profile with: a grey picture there and back."""
        from PIL import Image

        return {"input_raw": Image.new("RGB", (256, 256), "grey"), "mode": "encode-decode"}


class AutoencoderTinyBase(AutoencoderBase):
    """Over diffusers' AutoencoderTiny: fast, without a distribution."""

    DETECTOR_TYPE = Late("diffusers", "AutoencoderTiny", extra="diffusion")

    def _encode(self, pixels: torch.Tensor, seed: int | None) -> torch.Tensor:
        del seed
        latents: torch.Tensor = self._detector.encode(pixels).latents
        scale: float = self._detector.config.scaling_factor
        return latents * scale

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self._detector.decode(
            latents / self._detector.config.scaling_factor
        ).sample
        return pixels


class AutoencoderKLBase(AutoencoderBase):
    """Over diffusers' AutoencoderKL, which encodes to a distribution."""

    DETECTOR_TYPE = Late("diffusers", "AutoencoderKL", extra="diffusion")

    def _encode(self, pixels: torch.Tensor, seed: int | None) -> torch.Tensor:
        posterior = self._detector.encode(pixels).latent_dist
        if seed is None:
            latents = posterior.mode()
        else:  # a generator of the cpu draws the same numbers for every device
            latents = posterior.sample(generator=torch.Generator().manual_seed(seed))
        shift, scale = self._shift_and_scale()
        scaled: torch.Tensor = (latents - shift) * scale
        return scaled

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        shift, scale = self._shift_and_scale()
        pixels: torch.Tensor = self._detector.decode(latents / scale + shift).sample
        return pixels

    def _shift_and_scale(self) -> tuple[float, float]:
        config = self._detector.config
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor


class VaeTinyForSd(AutoencoderTinyBase):
    NAME = "vae-tiny-for-sd"
    MODEL_ID = "madebyollin/taesd"
    REVISION = "main"


class VaeTinyForSdxl(AutoencoderTinyBase):
    NAME = "vae-tiny-for-sdxl"
    MODEL_ID = "madebyollin/taesdxl"
    REVISION = "main"


class VaeSdxlFp16Fix(AutoencoderKLBase):
    """The SDXL autoencoder, finetuned so that its activations stay inside float16."""

    NAME = "vae-sdxl-fp16-fix"
    MODEL_ID = "madebyollin/sdxl-vae-fp16-fix"
    REVISION = "main"
    DTYPE_PREFERENCE = torch.float16


def check_latent(owner: str, name: str, given: Any, channels: int | None = None) -> None:
    """Raises ValueError for what is no latent of ``channels``, or several, or is not finite."""
    whole = isinstance(given, torch.Tensor) and given.ndim in (3, 4) and given.numel()
    if not whole or not given.is_floating_point() or channels not in (None, given.shape[-3]):
        got = type(given).__name__
        if isinstance(given, torch.Tensor):
            got = f"{tuple(given.shape)} of {given.dtype}"
        raise ValueError(
            f"{owner}: expected {name}= a latent tensor of floats, of shape "
            f"({channels or 'channels'}, height, width) or one dimension more for several, "
            f"got {got}; encoding a picture gives one"
        )
    if found := broken(given if given.ndim == 4 else given.unsqueeze(0)):
        raise ValueError(
            f"{owner}: expected {name}= finite numbers, got NaN or infinity in latent {found[0]}; "
            "look at what made it"
        )


def is_batch(name: str, given: Any, least: int = 1) -> bool:
    """Whether there may be several pictures.

    ValueError for what is none, cannot be stacked, or has a side of less than ``least`` pixels.
    """
    if isinstance(given, torch.Tensor):
        _check_pixels(name, given)
        _check_sides(name, given.shape[:-3:-1], least)
        return given.ndim == 4
    many = isinstance(given, list | tuple)
    from PIL.Image import Image

    for at, each in enumerate(given if many else [given]):
        if not isinstance(each, Image):
            number = f" as number {at}" if many else ""
            raise ValueError(
                f"{name}: expected input_raw= PIL pictures or one tensor of them, got "
                f"{type(each).__name__}{number}; stack tensors, and make an array a picture with "
                "PIL.Image.fromarray"
            )
        _check_sides(name, each.size, least)
    if many and len(sizes := sorted({each.size for each in given})) != 1:
        raise ValueError(
            f"{name}: expected pictures of one size, got {sizes or 'none'}; "
            "resize them, or call with one at a time"
        )
    return many


def _check_sides(name: str, size: Sequence[int], least: int) -> None:
    if min(size) < least:
        raise ValueError(
            f"{name}: expected pictures of {least} pixels a side at least, got "
            f"{size[0]} x {size[1]}; enlarge them"
        )


def _check_pixels(name: str, pixels: torch.Tensor) -> None:
    shaped = pixels.ndim in (3, 4) and pixels.shape[-3] == 3 and pixels.numel()
    if not shaped or not pixels.is_floating_point():
        raise ValueError(
            f"{name}: expected input_raw= pixels of shape (3, height, width) or (pictures, 3, "
            f"height, width) as floats in [0, 1], got {tuple(pixels.shape)} of {pixels.dtype}; "
            "make bytes floats and divide them by 255"
        )
    for at, each in enumerate(pixels if pixels.ndim == 4 else [pixels]):
        low, high = (float(bound) for bound in each.aminmax())
        if not (low >= 0 and high <= 1):
            number = f" in picture {at}" if pixels.ndim == 4 else ""
            raise ValueError(
                f"{name}: expected input_raw= pixels in [0, 1], got {low:g} to {high:g}{number}; "
                "divide bytes by 255, shift what is in [-1, 1], clamp what a resize overshot"
            )
