"""LoRA files as commits: parameters are pointed at patched tensors and back, bit-exactly."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opguard.pools._lora_files import Pair, Replacement, read
from opguard.pools._lora_math import Added, LowRank, Whole
from opguard.pools._lora_places import Place, places
from opguard.pools._lora_side import add_sides, drop_sides
from opguard.pools._lora_targets import Target, targets_of
from opguard.pools._parameters import roots_of
from opguard.pools._patched import Delta, DeltaCommit

__all__ = ["LoraCommit"]


class LoraCommit(DeltaCommit):
    """A LoRA on a model, from a file or a dict of tensors.

    The weights are computed from the base in fp32 with everything that lies on the stack, and
    rounded to the parameter's dtype once; reverting points back at the base. The file is read here
    and its tensors are kept, so it may change later. Layouts: peft's, diffusers', kohya's (LoCon
    too). What is not understood is refused by the name of its key, nothing is passed over.

    Args:
        source: a .safetensors file, a peft adapter folder, or a state dict.
        scale: what the change is multiplied by, beside the file's own alpha.
        config: adapter settings (``r``, ``lora_alpha``, ``use_rslora``, ``rank_pattern``,
            ``alpha_pattern``, ...) as a dict, a path to a JSON file or peft's LoraConfig; None
            takes what lies beside the file or in it. Without any, alpha = r, said by a warning.
        name: for messages.
        component: take only what the file has for this part of a pipeline (``"unet"``).
        mode: ``"weights"`` patches weights; ``"hook"`` leaves them and adds the product to the
            module's output, which quantized weights need. Slower a call, but no extra weights.
        tied: a weight that several modules share is refused unless the LoRA has the same change
            for all of them: patched, it changes for all. ``"add"`` applies whatever it has for any
            of them to the one weight; ``mode="hook"`` to each module its own.

    Raises:
        ValueError, TypeError, FileNotFoundError: the file is not a LoRA that is understood.

    Attributes:
        uuid: made from the contents, the scale and the options: equal for equal changes, also in
            another process, so it may be part of a cache's key.
    """

    def __init__(
        self,
        source: str | PathLike[str] | Mapping[str, Tensor],
        *,
        scale: float = 1.0,
        config: Mapping[str, Any] | str | PathLike[str] | None = None,
        name: str | None = None,
        component: str | None = None,
        mode: Literal["weights", "hook"] = "weights",
        tied: Literal["refuse", "add"] = "refuse",
    ) -> None:
        if (
            isinstance(scale, bool)
            or not isinstance(scale, int | float)
            or not math.isfinite(scale)
        ):
            raise ValueError(f"expected scale as a finite number, came {scale!r}; give a float")
        if mode not in ("weights", "hook"):
            raise ValueError(f"expected mode 'weights' or 'hook', came {mode!r}; choose one")
        if tied not in ("refuse", "add"):
            raise ValueError(f"expected tied 'refuse' or 'add', came {tied!r}; choose one")
        adapter = read(source, config, float(scale))
        self.scale, self.component, self.mode, self.tied = float(scale), component, mode, tied
        self.where = adapter.where
        self.name = name or adapter.where
        self._pairs = tuple(adapter.pairs)
        self._replacements = tuple(adapter.replacements)
        options = f"{adapter.digest} {self.scale!r} {component!r} {mode} {tied}"
        self._digest = hashlib.blake2b(options.encode(), digest_size=16).hexdigest()
        if mode == "hook":
            self.squash_key = None
            self.undoes_itself = False  # hooks of many modules: an interrupt may come between two
        if adapter.assumed:
            warnings.warn(
                f"expected alpha for every matrix of {self.where}, came none for "
                f"{adapter.assumed} of {len(adapter.pairs)}: alpha = r is taken; give "
                "config={'r': ..., 'lora_alpha': ...} to say otherwise",
                stacklevel=2,
            )

    @property
    def uuid(self) -> str:
        """Made from the contents: equal for equal changes."""
        return self._digest

    def __repr__(self) -> str:
        return f"<LoraCommit {self.name} scale={self.scale:g} {self._digest[:8]}>"

    def _places(self, obj: Any) -> list[Place]:
        whats: list[Pair | Replacement] = [*self._pairs, *self._replacements]
        return places(obj, whats, self.where, self.component)

    def deltas(self, obj: Any) -> Mapping[Tensor, Delta]:
        """What is added to each parameter of ``obj``, a module or a pipeline of modules.

        Raises:
            LookupError: a module that the file names is not there.
            ValueError, TypeError: a shape or a kind of weight does not fit.
        """
        if self.mode == "hook":
            return {}
        found: dict[object, list[Target]] = {}
        for place in self._places(obj):
            for target in targets_of(place, self.where):
                found.setdefault(_memory(target.parameter), []).append(target)
        if self.tied == "refuse":
            self._refuse_other_ends(obj, found)
        return {group[0].parameter: self._one(group) for group in found.values()}

    def _refuse_other_ends(self, obj: Any, found: Mapping[object, list[Target]]) -> None:
        """Raises where a weight that is to change belongs to modules that the file does not name.

        The adapter was trained beside one end of it, the other was as it is.
        """
        for prefix, root in roots_of(obj):
            for path, module in root.named_modules(prefix=prefix):
                for parameter in module._parameters.values():
                    group = () if parameter is None else found.get(_memory(parameter), ())
                    if group and all(target.module is not module for target in group):
                        raise ValueError(
                            f"expected a change of {group[0].path} alone, which shares its weight "
                            f"with {path}, for which {self.where} has none; untie the weights, "
                            "give mode='hook', or give tied='add' to change both"
                        )

    def _one(self, group: list[Target]) -> Added | LowRank | Whole:
        """All that the file has for one weight: replacements first, what two names say once."""
        wholes = [t for t in group if isinstance(t.change, Whole)]
        ranks = [t for t in group if isinstance(t.change, LowRank)]
        for same in (wholes, ranks):
            different = [t for t in same[1:] if not _equal(t.change, same[0].change)]
            if different and (self.tied == "refuse" or same is wholes):
                raise ValueError(
                    f"expected one change of the weight that {same[0].path} and "
                    f"{different[0].path} share, came two different ones in {self.where}; "
                    "untie the weights, or give tied='add' to apply both"
                )
            if not different:
                del same[1:]
        return Added.of([t.change for t in [*wholes, *ranks]])

    def apply(self, obj: Any) -> None:
        """Points the parameters at patched tensors, or adds the hooks."""
        if self.mode == "weights":
            super().apply(obj)
            return
        handles = add_sides(self._places(obj), self.where)
        try:
            self._keep(obj, handles)
        except BaseException:
            drop_sides(handles)
            raise

    def settle(self, obj: Any) -> None:
        """Hooks need nothing in memory; patched weights go with their module."""
        if self.mode == "weights":
            super().settle(obj)

    def revert(self, obj: Any) -> None:
        """Points the parameters back at the base, bit by bit what they were."""
        if self.mode == "weights":
            super().revert(obj)
            return
        drop_sides(self._kept_for(obj))
        self._forget(obj)


def _memory(parameter: Tensor) -> object:
    """Equal for parameters that are one piece of memory in one shape."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
        return id(parameter)
    place = parameter.device, parameter.data_ptr()
    return place, parameter.shape, parameter.stride(), parameter.dtype


def _equal(one: LowRank | Whole, other: LowRank | Whole) -> bool:
    """Whether two changes of one kind do the same."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
    if isinstance(one, Whole) and isinstance(other, Whole):
        return torch.equal(one.tensor, other.tensor)
    return False
