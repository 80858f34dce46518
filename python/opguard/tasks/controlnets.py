"""ControlNets, which are no use alone: a pipeline takes their detector.

An edge detector makes the picture that a Canny ControlNet wants::

    with CannyDetector() as edges, CannyTextToImage() as sd:
        outline = edges(input_raw=picture)
        picture = sd(input_raw="a red house", control=outline, seed=1)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from opguard.base import OpGuardBase
from opguard.tasks._canny import Canny
from opguard.tasks._checks import number, pictures
from opguard.tasks._late import Late
from opguard.tasks.sd import Request, StableDiffusionBase

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "CannyControlnet",
    "CannyDetector",
    "CannyTextToImage",
    "ControlledStableDiffusionBase",
    "ControlnetBase",
    "TileControlnet",
    "UnionControlnet",
    "UnionPromaxControlnet",
]


class ControlnetBase(OpGuardBase):
    """A ControlNet for a pipeline to take, by ``CONTROLNET_TYPE`` or ``swap_in(controlnet=...)``.

    Calling it raises TypeError.
    """

    DETECTOR_TYPE = Late("diffusers", "ControlNetModel", extra="diffusion")
    IS_CALLABLE = False


class CannyControlnet(ControlnetBase):
    NAME = "canny-controlnet"
    MODEL_ID = "lllyasviel/control_v11p_sd15_canny"
    REVISION = "main"


class TileControlnet(ControlnetBase):
    NAME = "tile-controlnet"
    MODEL_ID = "lllyasviel/control_v11f1e_sd15_tile"
    REVISION = "main"
    USE_SAFETENSORS = False  # it has none; diffusers opens other files without running their code


class UnionControlnet(ControlnetBase):
    NAME = "union-controlnet"
    MODEL_ID = "xinsir/controlnet-union-sdxl-1.0"
    REVISION = "main"
    DETECTOR_TYPE = Late("diffusers", "ControlNetUnionModel", extra="diffusion")


class UnionPromaxControlnet(UnionControlnet):
    """The second set of weights of that repository, from a copy with the names diffusers reads."""

    NAME = "union-promax-controlnet"
    MODEL_ID = "OzzyGT/controlnet-union-promax-sdxl-1.0"
    FROM_PRETRAINED_ADDITIONAL_KWARGS: ClassVar[dict[str, Any]] = {
        "variant": "fp16"
    }  # has no other


class ControlledStableDiffusionBase(StableDiffusionBase):
    """Text to pictures that follow a control picture; call keywords beside the base's:

    control: a PIL picture for all prompts, or a list with one for each; required.
    control_scale: how much it counts, 1.0 as trained.
    """

    DETECTOR_TYPE = Late("diffusers", "StableDiffusionControlNetPipeline", extra="diffusion")
    CONTROLNET_TYPE: ClassVar[type[OpGuardBase] | None] = None

    def _part_types(self) -> dict[str, type[OpGuardBase] | None]:
        return super()._part_types() | {"controlnet": self.CONTROLNET_TYPE}

    def _preprocess(
        self,
        *,
        input_raw: Any,
        negative_prompt: str | Sequence[str] | None = None,
        control: Image | Sequence[Image] | None = None,
        control_scale: float = 1.0,
    ) -> Request:
        request = super()._preprocess(input_raw=input_raw, negative_prompt=negative_prompt)
        images = self._one_each(control, "control", request.pictures)
        if images is None:
            raise ValueError(
                f"{self.classname}: expected control= a picture for the ControlNet, got none; "
                "a detector such as CannyDetector makes one"
            )
        pictures(self.classname, "control", images)
        request.arguments["image"] = images
        scale = number(self.classname, "control_scale", control_scale)
        request.arguments["controlnet_conditioning_scale"] = scale
        return request

    def example_inputs(self) -> dict[str, Any]:
        """Call keywords to profile with: one prompt, a white control picture, four steps."""
        from PIL import Image

        return super().example_inputs() | {"control": Image.new("RGB", (512, 512), "white")}


class CannyTextToImage(ControlledStableDiffusionBase):
    """Stable diffusion 1.5 that follows edges."""

    NAME = "canny-text-to-image"
    MODEL_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    REVISION = "main"
    CONTROLNET_TYPE = CannyControlnet


class CannyDetector(OpGuardBase):
    """The edges of pictures, white on black; computed in torch, without weights.

    Call keywords:
        input_raw: a PIL picture, or a list of them.
        low, high: how much the brightness, in [0, 1], must change from pixel to pixel for an edge
            that joins another, and for one that begins; 0 <= low <= high.

    Returns a PIL picture of the same size, or a list of them. Raises ValueError for other bounds.
    """

    NAME = "canny-detector"
    MODEL_ID = "canny"  # nothing to load
    DETECTOR_TYPE = Canny
    DTYPE_PREFERENCE = torch.float32

    def _preprocess(self, *, input_raw: Any) -> list[torch.Tensor] | torch.Tensor:
        several = isinstance(input_raw, list | tuple)
        pictures(self.classname, "input_raw", list(input_raw) if several else [input_raw])
        if several:
            return [self._grey(each) for each in input_raw]
        return self._grey(input_raw)

    def _grey(self, picture: Image) -> torch.Tensor:
        """Returns the brightness in [0, 1], of shape (1, 1, height, width)."""
        grey = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8)
        values = grey.to(self.device, torch.float32) / 255
        return values.reshape(1, 1, picture.height, picture.width)

    def _predict(self, *, input_proc: Any, low: float = 0.1, high: float = 0.2) -> Any:
        if not 0 <= low <= high:
            raise ValueError(
                f"{self.classname}: expected 0 <= low <= high, got low={low}, high={high}"
            )
        if isinstance(input_proc, list):
            return [self._detector(each, low, high) for each in input_proc]
        return self._detector(input_proc, low, high)

    def _postprocess(self, *, output_raw: Any) -> Any:
        if isinstance(output_raw, list):
            return [_picture_of(each) for each in output_raw]
        return _picture_of(output_raw)

    def example_inputs(self) -> dict[str, Any]:
        """Call keywords to profile with: half black, half white."""
        from PIL import Image

        picture = Image.new("RGB", (256, 256), "white")
        picture.paste("black", (0, 0, 128, 256))
        return {"input_raw": picture}


def _picture_of(edges: torch.Tensor) -> Image:
    """Makes an RGB picture of booleans of shape (1, 1, height, width)."""
    from PIL import Image

    height, width = edges.shape[-2:]
    values = edges.to("cpu", torch.uint8).mul(255).contiguous()
    return Image.frombytes("L", (width, height), bytes(values.flatten().tolist())).convert("RGB")
