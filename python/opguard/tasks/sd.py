"""Stable diffusion: text to pictures, with parts of the pipeline swapped for other models.

A part is swapped in two ways: ``VAE_TYPE``, an ``OpGuardBase`` class of which the pipeline makes
an instance of its own, or ``swap_in(vae=instance)``, an instance that others use too. Either way
the pipeline is one more user of that instance while it is loaded: the part is loaded before it,
stays as long as it, and goes with its last user.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from collections.abc import Iterator, Sequence
from operator import index
from typing import Any, ClassVar, NamedTuple, Self

import torch

from opguard._exporting import made_from
from opguard._routing import near_miss
from opguard.base import OpGuardBase
from opguard.tasks._checks import count, number, warn_broken
from opguard.tasks._late import Late
from opguard.tasks.vae import VaeSdxlFp16Fix, check_latent

__all__ = ["SdTinyNanoTextToImage", "SdxlTextToImage", "StableDiffusionBase"]

# What an instance that the pipeline makes of VAE_TYPE is to be told as the pipeline was.
HANDED_ON = (
    "local_hfhub_variant_check_only",
    "local_files_only",
    "only_load_export",
    "force_export_refresh",
    "local_files_only_on_refresh",
    "sanitize_all_exceptions",
)


class Request(NamedTuple):
    """A call on its way to the pipeline."""

    arguments: dict[str, Any]  # by the pipeline's names
    pictures: int
    one: bool  # a prompt came, and no list


class StableDiffusionBase(OpGuardBase):
    """Text to pictures over a diffusers pipeline::

        with SdTinyNanoTextToImage() as sd:
            picture = sd(input_raw="a red house", seed=1)

    Call keywords:
        input_raw: a prompt, or a list of prompts.
        negative_prompt: what is not wanted: one for all, or a list with one for each prompt.
        seed: an integer, or a list with one for each prompt. Picture i of a list is made with
            ``seed + i``, and is the picture that its prompt gives alone with that seed.
        num_inference_steps, guidance_scale: instead of the class's ``NUM_INFERENCE_STEPS`` and
            ``GUIDANCE_SCALE``.
        height, width: in pixels; the model's own by default.
        latents: the noise to begin with, of shape (channels, height, width) or one more.

    Returns a PIL picture for a prompt, and a list of PIL pictures for a list. Calls of several
    threads wait for each other.
    """

    DETECTOR_TYPE = Late("diffusers", "StableDiffusionPipeline", extra="diffusion")
    VAE_TYPE: ClassVar[type[OpGuardBase] | None] = None
    NUM_INFERENCE_STEPS: ClassVar[int] = 30
    GUIDANCE_SCALE: ClassVar[float] = 7.5

    # On the class, so that __del__ of a half-made instance finds them.
    _swapped: dict[str, OpGuardBase] = {}  # noqa: RUF012 - replaced, never written to
    _held: tuple[OpGuardBase, ...] = ()

    def swap_in(self, **parts: OpGuardBase) -> Self:
        """Lets the pipeline take the detectors of these instances, by names of its parts.

        Returns the pipeline itself. Raises RuntimeError when it is loaded already, and TypeError
        for a part that it does not have (for a ``DETECTOR_TYPE`` that finds its class in the
        model's folder, only once that is loaded).
        """
        with self._lock:
            if self._is_loaded:
                raise RuntimeError(
                    f"{self.classname}.swap_in: expected a pipeline that is not loaded yet, it is; "
                    "call free() first"
                )
            self._check_parts(parts)
            self._swapped = self._swapped | parts
        return self

    def _check_parts(self, parts: dict[str, OpGuardBase]) -> None:
        known = self._part_names()
        if known and (wrong := parts.keys() - known):
            raise TypeError(
                f"{self.classname}.swap_in: expected parts of the pipeline "
                f"({', '.join(sorted(known))}), got {near_miss(sorted(wrong), known)}"
            )
        for name, part in parts.items():
            if not isinstance(part, OpGuardBase):
                raise TypeError(
                    f"{self.classname}.swap_in: expected {name}= an instance of an OpGuardBase, "
                    f"got {type(part).__name__}; wrap the model in one"
                )

    def _part_names(self) -> set[str]:
        """Returns the names that the pipeline's constructor has, none where it takes any."""
        names = inspect.signature(self.DETECTOR_TYPE.__init__).parameters
        if any(each.kind is each.VAR_KEYWORD for each in names.values()):
            return set()
        return set(names) - {"self"}

    def _prepare(self) -> None:
        super()._prepare()
        # A pipeline and its scheduler keep the state of one call: at once, two calls would mix.
        self._sampling = threading.Lock()

    # Loading

    def _part_types(self) -> dict[str, type[OpGuardBase] | None]:
        """The classes of the parts to swap in, by their names in the pipeline."""
        return {"vae": self.VAE_TYPE}

    def _load_detector(self, **kwargs: Any) -> Any:
        self._let_go()  # of what an attempt before this one held
        parts = {name: self._made(kind) for name, kind in self._part_types().items() if kind}
        for name, part in (parts | self._swapped).items():
            kwargs[name] = self._hold(name, part)
        pipeline = super()._load_detector(**kwargs)
        for name in parts | self._swapped:
            if getattr(pipeline, name, None) is not kwargs[name]:
                raise TypeError(
                    f"{self.classname}: expected a pipeline with a part {name!r} to swap, got a "
                    f"{type(pipeline).__name__}, which has none"
                )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _made(self, kind: type[OpGuardBase]) -> OpGuardBase:
        settings = {name: self._settings[name] for name in HANDED_ON if name in self._settings}
        return kind(device_override=self.device, dtype_override=self.dtype, **settings)

    def _hold(self, name: str, part: OpGuardBase) -> Any:
        """Becomes a user of the part until the pipeline is freed; returns its model."""
        if (part.device, part.dtype) != (self.device, self.dtype):
            raise ValueError(
                f"{self.classname}: expected its {name} on {self.device} as {self.dtype}, like the "
                f"pipeline, got {part.classname} on {part.device} as {part.dtype}; "
                "make it with device_override= and dtype_override="
            )
        part._join()
        self._held += (part,)
        return part.detector

    def _forget(self) -> None:
        super()._forget()
        self._let_go()

    def _let_go(self) -> None:
        held, self._held = self._held, ()
        for part in reversed(held):
            part._leave_quietly()

    def _export_identity(self) -> dict[str, Any]:
        # Parts named by the class are described with its attributes.
        return {name: made_from(part, network=False) for name, part in self._swapped.items()}

    # Calling

    def _preprocess(
        self, *, input_raw: Any, negative_prompt: str | Sequence[str] | None = None
    ) -> Request:
        """Returns what the pipeline is called with; a subclass adds to it."""
        one = isinstance(input_raw, str)
        prompts = [input_raw] if one else input_raw
        if not isinstance(prompts, list | tuple) or not prompts or not _are(prompts, str):
            raise TypeError(
                f"{self.classname}: expected input_raw= a prompt or a list of prompts, "
                f"got {input_raw!r:.150}"
            )
        unwanted = self._one_each(negative_prompt, "negative_prompt", len(prompts))
        return Request({"prompt": list(prompts), "negative_prompt": unwanted}, len(prompts), one)

    def _predict(
        self,
        *,
        input_proc: Request,
        seed: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
    ) -> Any:
        arguments = input_proc.arguments | {
            "generator": self._generators(seed, input_proc.pictures),
            "num_inference_steps": self._steps(num_inference_steps),
            "guidance_scale": self._guidance(guidance_scale),
            "height": self._side("height", height),
            "width": self._side("width", width),
            "latents": self._noise(latents, input_proc.pictures),
        }
        with self._sampling, self._watched():
            found = self._detector(**arguments).images
        return found[0] if input_proc.one else found

    def _steps(self, given: int | None) -> int:
        if given is None:
            return self.NUM_INFERENCE_STEPS
        return count(self.classname, "num_inference_steps", given, 1)

    def _guidance(self, given: float | None) -> float:
        return (
            self.GUIDANCE_SCALE
            if given is None
            else number(self.classname, "guidance_scale", given)
        )

    def _side(self, name: str, given: int | None) -> int | None:
        """Returns a side of the pictures in pixels; of 0, the pipeline would take its default."""
        if given is None:
            return None
        # Pipelines ask for multiples of 8, and an element of a latent is so many pixels a side.
        unit = math.lcm(8, getattr(self._detector, "vae_scale_factor", 8))
        side = count(self.classname, name, given, unit)
        if side % unit:
            raise ValueError(
                f"{self.classname}: expected {name}= a multiple of {unit}, got {side}; "
                f"give {side - side % unit} or {side - side % unit + unit}"
            )
        return side

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Says which pictures are not finite, for which the pipeline gives black ones.

        It looks between the last of the models and the pictures, where pixels are still numbers;
        the lock of the call around it keeps it this call's.
        """
        processor = getattr(self._detector, "image_processor", None)
        if processor is None:
            yield
            return
        finish, seen = processor.postprocess, []

        def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(image, torch.Tensor):
                seen.append(image.isfinite().flatten(1).all(1))
                image = image.nan_to_num(nan=-1.0)
            return finish(image, *args, **kwargs)

        processor.postprocess = postprocess
        try:
            yield
        finally:
            del processor.postprocess
        if seen:
            # A safety checker had them once more.
            warn_broken(self.classname, torch.where(seen[0], 0.0, torch.nan)[:, None])

    def _one_each(self, given: Any, name: str, prompts: int) -> list[Any] | None:
        """Returns one value for each prompt; a value that is no list stands for each of them."""
        if given is None:
            return None
        values = list(given) if isinstance(given, list | tuple) else [given] * prompts
        if len(values) != prompts:
            raise ValueError(
                f"{self.classname}: expected {name}= one for all or a list of {prompts}, one for "
                f"each prompt, got {len(values)}"
            )
        return values

    def _generators(self, seed: Any, prompts: int) -> list[torch.Generator] | None:
        if seed is None:
            return None
        if not isinstance(seed, list | tuple):
            seed = [index(seed) + at for at in range(prompts)]
        # Generators of the cpu draw the same numbers whatever device the model is on.
        return [
            torch.Generator().manual_seed(index(each))
            for each in self._one_each(seed, "seed", prompts) or ()
        ]

    def _noise(self, latents: torch.Tensor | None, prompts: int) -> torch.Tensor | None:
        if latents is None:
            return None
        vae = getattr(self._detector, "vae", None)
        channels = getattr(getattr(vae, "config", None), "latent_channels", None)
        check_latent(self.classname, "latents", latents, channels)
        noise = latents.unsqueeze(0) if latents.ndim == 3 else latents
        if len(noise) != prompts:
            raise ValueError(
                f"{self.classname}: expected latents= of shape (channels, height, width), for "
                f"several ({prompts}, channels, height, width), got {tuple(latents.shape)}"
            )
        return noise.to(self.device, self.dtype)

    def example_inputs(self) -> dict[str, Any]:
        """Call keywords to profile with: one prompt, four steps."""
        return {"input_raw": "a red house", "seed": 0, "num_inference_steps": 4}


class SdTinyNanoTextToImage(StableDiffusionBase):
    """A small model for pictures of 128 x 128 pixels."""

    NAME = "sd-nano-text-to-image"
    MODEL_ID = "bguisard/stable-diffusion-nano-2-1"
    REVISION = "main"


class SdxlTextToImage(StableDiffusionBase):
    """SDXL with the autoencoder that stays finite in float16."""

    NAME = "sdxl-text-to-image"
    MODEL_ID = "stabilityai/stable-diffusion-xl-base-1.0"
    REVISION = "main"
    DETECTOR_TYPE = Late("diffusers", "StableDiffusionXLPipeline", extra="diffusion")
    VAE_TYPE = VaeSdxlFp16Fix


def _are(values: Any, kind: type) -> bool:
    return all(isinstance(each, kind) for each in values)
