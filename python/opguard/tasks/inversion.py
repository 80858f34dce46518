"""Inversion: from a picture back to the latent, or to the noise, that a model makes it from.

Two ways. ``LatentInversion...`` goes through gradients: it starts from what the encoder says and
descends on the error of the decoded picture. ``DdimInversion...`` needs none: each DDIM step is an
equation for the noisier latent, solved by putting its own answer in again; the steps run forwards
from there in ``DdimReconstruction...``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from opguard.tasks._checks import count, number
from opguard.tasks.sd import Request, StableDiffusionBase
from opguard.tasks.vae import (
    AutoencoderBase,
    AutoencoderKLBase,
    AutoencoderTinyBase,
    VaeTinyForSd,
    is_batch,
)

__all__ = [
    "DdimBase",
    "DdimInversionBase",
    "DdimInversionSd",
    "DdimReconstructionSd",
    "Inverted",
    "LatentInversionBase",
    "LatentInversionKLBase",
    "LatentInversionSd",
    "LatentInversionTinyBase",
]

logger = logging.getLogger("opguard")

# By how much of its size the answer to a step of DDIM may still move.
SOLVED = 1e-6
UNSOLVED = 1e-2


class Inverted(NamedTuple):
    """What an inversion by gradients found; everything is detached and on the cpu."""

    latents: torch.Tensor  # (channels, height, width), for a list of pictures one more
    picture: Any  # what the latents decode to: a PIL picture, or a list of them
    losses: torch.Tensor  # mean squared error of pixels in [-1, 1]: (steps + 1,) or (n, steps + 1)


class LatentInversionBase(AutoencoderBase):
    """The latent whose decoded picture is nearest to a given one, by gradient descent.

    Combine it with an autoencoder's base, as ``LatentInversionTinyBase`` does. Call keywords:

    input_raw: a picture or several, as for ``AutoencoderBase`` with ``mode="encode"``.
    steps: how often to descend; 0 gives what the encoder says.
    learning_rate: Adam's, in units of the scaled latent.

    Returns an ``Inverted``. Each picture's latent is the best that was met, so it is never worse
    than the encoder's.
    """

    NEED_GRADS = True

    def _load_detector(self, **kwargs: Any) -> Any:
        # The gradient is the latent's alone.
        return super()._load_detector(**kwargs).requires_grad_(False)

    def _preprocess(self, *, input_raw: Any, mode: str | None = "encode") -> torch.Tensor:
        if mode != "encode":
            raise ValueError(
                f"{self.classname}: expected no mode=, an inversion has none, got {mode!r}"
            )
        return super()._preprocess(input_raw=input_raw, mode=mode)

    def _predict(  # type: ignore[override]
        self, *, input_proc: torch.Tensor, steps: int = 100, learning_rate: float = 0.05
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the latents and the losses, of as many pictures as came in."""
        steps = count(self.classname, "steps", steps, 0)
        learning_rate = number(self.classname, "learning_rate", learning_rate)
        one = input_proc.ndim == 3
        pixels = input_proc.unsqueeze(0) if one else input_proc
        with torch.no_grad():
            start = self._encode(pixels, None)
        latents, losses = self._descend(pixels.float(), start.float(), steps, learning_rate)
        return (latents[0], losses[0]) if one else (latents, losses)

    def _descend(
        self, pixels: torch.Tensor, start: torch.Tensor, steps: int, learning_rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        latents = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([latents], lr=learning_rate)
        best, least = start.clone(), torch.full((len(start),), torch.inf, device=start.device)
        losses = []
        for step in range(steps + 1):
            decoded = self._decode(latents.to(self.dtype)).float()
            errors = (decoded - pixels).square().flatten(1)
            loss = errors.detach().mean(1)
            losses.append(loss)
            better = loss < least
            least = torch.where(better, loss, least)
            best = torch.where(better[:, None, None, None], latents.detach(), best)
            if step < steps:
                # The sum, so that no gradient is too small for float16; Adam does not mind.
                (latents.grad,) = torch.autograd.grad(errors.sum(), [latents])
                optimizer.step()
        return best, torch.stack(losses, 1)

    def _postprocess(  # type: ignore[override]
        self, *, output_raw: tuple[torch.Tensor, torch.Tensor]
    ) -> Inverted:
        latents, losses = output_raw
        one = latents.ndim == 3
        with torch.no_grad():
            batch = (latents.unsqueeze(0) if one else latents).to(self.dtype)
            pixels = self._decode(batch)
        picture = super()._postprocess(output_raw=pixels[0] if one else pixels)
        return Inverted(latents.cpu(), picture, losses.cpu())

    def example_inputs(self) -> dict[str, Any]:
        """Call keywords to profile with: a grey picture, three steps."""
        return {"input_raw": super().example_inputs()["input_raw"], "steps": 3}


class LatentInversionTinyBase(LatentInversionBase, AutoencoderTinyBase):
    """Over an AutoencoderTiny."""


class LatentInversionKLBase(LatentInversionBase, AutoencoderKLBase):
    """Over an AutoencoderKL."""


class LatentInversionSd(LatentInversionTinyBase):
    NAME = "latent-inversion-sd"
    MODEL_ID = VaeTinyForSd.MODEL_ID
    REVISION = "main"


class DdimBase(StableDiffusionBase):
    """A pipeline with one text encoder that samples by DDIM, without guidance: it can be inverted.

    Called as ``StableDiffusionBase``, with ``latents=`` what an inversion gave and the same number
    of steps and prompt, it makes the picture again.
    """

    GUIDANCE_SCALE = 1.0
    NUM_INFERENCE_STEPS: ClassVar[int] = 50

    def _load_detector(self, **kwargs: Any) -> Any:
        from diffusers import DDIMScheduler

        pipeline = super()._load_detector(**kwargs)
        config = dict(pipeline.scheduler.config) | {"clip_sample": False}
        make: Any = DDIMScheduler.from_config
        pipeline.scheduler = make(config)
        return pipeline


class DdimInversionBase(DdimBase):
    """The noise that DDIM makes a picture from. Call keywords:

    input_raw: a PIL picture, or a list of them of one size.
    prompt: what the picture shows: one for all, or a list with one for each.
    num_inference_steps: of the sampling that is inverted.
    fixed_point_iterations: how often, at most, each step's equation is put into itself; 1 is the
        plain DDIM inversion. It ends earlier where the answer stands still.

    Returns the noise, of shape (channels, height, width), for a list one dimension more.
    """

    def _preprocess(self, *, input_raw: Any, prompt: str | Sequence[str] = "") -> Request:  # type: ignore[override]
        several = is_batch(self.classname, input_raw, self._detector.vae_scale_factor)
        pictures = list(input_raw) if several else [input_raw]
        prompts = self._one_each(prompt, "prompt", len(pictures))
        pixels = self._detector.image_processor.preprocess(pictures)
        arguments = {"prompt": prompts, "pixels": pixels.to(self.device, self.dtype)}
        return Request(arguments, len(pictures), not several)

    def _predict(  # type: ignore[override]
        self,
        *,
        input_proc: Request,
        num_inference_steps: int | None = None,
        fixed_point_iterations: int = 10,
    ) -> torch.Tensor:
        pipeline, steps = self._detector, self._steps(num_inference_steps)
        iterations = count(self.classname, "fixed_point_iterations", fixed_point_iterations, 1)
        text = pipeline.encode_prompt(input_proc.arguments["prompt"], self.device, 1, False)[0]
        latents = self._encoded(input_proc.arguments["pixels"]).float()
        # One of its own: the pipeline's is in use by whoever samples beside this call.
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        moved = 0.0
        for time in reversed(scheduler.timesteps.tolist()):
            step = _step(scheduler, time)
            latents, last = self._noisier(latents, time, step, text, iterations)
            moved = max(moved, last)
        if iterations > 1 and not moved <= UNSOLVED:
            logger.warning(
                "%s: a step was left unsolved, its answer still moved by %.0f %%; the noise will "
                "not give the picture back; raise num_inference_steps or fixed_point_iterations",
                self.classname,
                100 * moved,
            )
        return latents[0] if input_proc.one else latents

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self._detector.vae
        found = vae.encode(pixels)
        latents: torch.Tensor = (
            found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        )
        scale: float = vae.config.scaling_factor
        return latents * scale

    def _noisier(
        self,
        clean: torch.Tensor,
        time: int,
        step: tuple[float, float],
        text: torch.Tensor,
        iterations: int,
    ) -> tuple[torch.Tensor, float]:
        """Returns the latent at ``time`` from which one DDIM step leads to ``clean``.

        And by how much of its size the answer moved last.
        """
        kept, added = step
        noisy, moved = clean, 0.0
        for _ in range(iterations):
            told = self._detector.unet(noisy.to(self.dtype), time, encoder_hidden_states=text)
            solved = (clean - added * told.sample.float()) / kept
            moved = float((solved - noisy).norm() / solved.norm())
            noisy = solved
            if moved <= SOLVED:
                break
        return noisy, moved

    def example_inputs(self) -> dict[str, Any]:
        """Call keywords to profile with: a grey picture, two steps."""
        from PIL import Image

        picture = Image.new("RGB", (256, 256), "grey")
        return {"input_raw": picture, "num_inference_steps": 2, "fixed_point_iterations": 2}


class DdimInversionSd(DdimInversionBase):
    NAME = "ddim-inversion-sd"
    MODEL_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    REVISION = "main"


class DdimReconstructionSd(DdimBase):
    NAME = "ddim-reconstruction-sd"
    MODEL_ID = DdimInversionSd.MODEL_ID
    REVISION = "main"


def _step(scheduler: Any, time: int) -> tuple[float, float]:
    """Returns a and b of the DDIM step from ``time``: ``next = a * latent + b * told by the unet``.

    With signal s and noise n, s**2 + n**2 = 1, a latent is ``s * picture + n * noise``.
    """
    before = time - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    power = float(scheduler.alphas_cumprod[time])
    power_before = float(
        scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    )
    signal, noise = power**0.5, (1 - power) ** 0.5
    signal_before, noise_before = power_before**0.5, (1 - power_before) ** 0.5
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return signal_before / signal, noise_before - signal_before * noise / signal
    if kind == "v_prediction":  # of signal * noise - noise * picture
        return (
            signal_before * signal + noise_before * noise,
            noise_before * signal - signal_before * noise,
        )
    if kind == "sample":
        return noise_before / noise, signal_before - noise_before * signal / noise
    raise ValueError(
        "scheduler: expected a prediction_type of epsilon, v_prediction or sample, "
        f"got {kind!r}; DDIM knows no other"
    )
