"""Which parameters a pair of matrices changes in a module of a known kind, and their shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from opguard._loaded import loaded
from opguard.pools._lora_files import Pair, Replacement
from opguard.pools._lora_math import LowRank, Whole
from opguard.pools._lora_places import Place

__all__ = ["CONVS", "Target", "checked_pair", "targets_of"]

_ADDABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KNOWN = (nn.Linear, nn.Embedding, *CONVS)


@dataclass(frozen=True)
class Target:
    """One parameter and what is done to it."""

    path: str
    module: nn.Module
    parameter: nn.Parameter
    change: LowRank | Whole


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer that keeps its weight transposed."""
    return isinstance(module, loaded("transformers.pytorch_utils", "Conv1D"))


def _refused_kind(place: Place, what: str, where: str) -> TypeError:
    kind = f"{type(place.module).__module__}.{type(place.module).__qualname__}"
    return TypeError(
        f"expected a linear layer, a convolution or an embedding at {place.path} for "
        f"{place.what.key!r} of {where}, came {kind}{what}"
    )


def _parameter(place: Place, name: str, where: str) -> nn.Parameter:
    """A parameter that can be added to, or an exception with the way out."""
    module, whole = place.module, isinstance(place.what, Replacement)
    if "parametrizations" in module._modules:
        raise _refused_kind(
            place, " with parametrizations; remove them (remove_parametrizations) first", where
        )
    parameter = module._parameters.get(name)
    way_out = "give mode='hook' to LoraCommit, which leaves the weights alone"
    if whole:
        way_out = "merge it with peft and manage the merged model"
    if parameter is None:
        raise _refused_kind(place, f" without a {name} of its own; {way_out}", where)
    if type(parameter) is not nn.Parameter or parameter.dtype not in _ADDABLE:
        kind = type(parameter).__name__
        raise TypeError(
            f"expected a plain float {name} at {place.path} for {place.what.key!r} of {where}, "
            f"came {kind} of {parameter.dtype} (adding would quantize it again); {way_out}"
        )
    if parameter.is_meta:
        raise TypeError(
            f"expected a {name} with values at {place.path} for {place.what.key!r} of {where}, "
            "came a meta tensor; load the model first"
        )
    return parameter


def _expected(pair: Pair, place: Place, shape: str, where: str) -> ValueError:
    came = f"[r, {pair.down.shape[1]}] and [{pair.up.shape[0]}, r]"
    kernel = f" with kernel {list(pair.kernel)}" if pair.kernel else ""
    return ValueError(
        f"expected matrices {shape} for {type(place.module).__name__} at {place.path}, came "
        f"{came}{kernel} at {pair.key!r} of {where}; this LoRA was made for another model"
    )


def _weight_of(place: Place, where: str) -> tuple[str, int, int, bool]:
    """(name of the parameter, outputs, inputs with the kernel, whether kept transposed)."""
    module, pair = place.module, place.what
    if type(module).__module__.partition(".")[0] == "peft":
        raise _refused_kind(
            place, ", which peft has wrapped; merge or unload its adapters first", where
        )
    if isinstance(module, nn.Embedding):
        return "weight", module.embedding_dim, module.num_embeddings, True
    if isinstance(module, CONVS):
        if module.groups != 1:
            raise _refused_kind(
                place, f" with {module.groups} groups, where the product is no weight of it; "
                "leave this module out of the LoRA", where,
            )  # fmt: skip
        kernel = tuple(module.kernel_size)
        assert isinstance(pair, Pair)
        if (pair.kernel or (1,) * len(kernel)) != kernel:
            size = module.in_channels * math.prod(kernel)
            raise _expected(
                pair, place, f"[r, {size}] with kernel {list(kernel)} and "
                f"[{module.out_channels}, r]", where,
            )  # fmt: skip
        return "weight", module.out_channels, module.in_channels * math.prod(kernel), False
    if isinstance(module, nn.MultiheadAttention):
        raise _refused_kind(
            place, ", whose out_proj some versions of peft change twice; merge it with the version "
            "that trained it", where,
        )  # fmt: skip
    if _is_conv1d(module):
        weight = module._parameters["weight"]
        assert weight is not None
        return "weight", weight.shape[1], weight.shape[0], True
    # A quantized layer of a library keeps these two beside weights of its own shape.
    outputs, inputs = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(module, nn.Linear) or (isinstance(outputs, int) and isinstance(inputs, int)):
        assert isinstance(outputs, int)
        assert isinstance(inputs, int)
        return "weight", outputs, inputs, False
    raise _refused_kind(place, "; leave it out of the LoRA, or merge it with peft", where)


def checked_pair(place: Place, where: str) -> tuple[str, bool]:
    """(name of the parameter, whether kept transposed) of a pair whose shapes fit."""
    pair = place.what
    assert isinstance(pair, Pair)
    name, outputs, inputs, transposed = _weight_of(place, where)
    linear = not isinstance(place.module, CONVS)
    fits = pair.up.shape[0] == outputs and pair.down.shape[1] == inputs
    if linear and math.prod(pair.kernel) != 1:
        fits = False
    if pair.embedding and not isinstance(place.module, nn.Embedding):
        fits = False
    if not fits:
        raise _expected(pair, place, f"[r, {inputs}] and [{outputs}, r]", where)
    return name, transposed


def _of_pair(place: Place, pair: Pair, where: str) -> Iterator[Target]:
    name, transposed = checked_pair(place, where)
    parameter = _parameter(place, name, where)
    left, right = (pair.down.t(), pair.up.t()) if transposed else (pair.up, pair.down)
    # Scaled on one side whichever way round, so that what is tied can be told to be equal.
    change = LowRank(left * pair.scale, right)
    if not isinstance(place.module, _KNOWN) and not _is_conv1d(place.module):
        raise _refused_kind(
            place, ", whose weight may lie any way round; give mode='hook' to LoraCommit", where
        )
    rows, columns = change.left.shape[0], change.right.shape[1]
    if parameter.shape[0] != rows or parameter.numel() != rows * columns:
        raise ValueError(
            f"expected {name} of {rows} x {columns} at {place.path} by the module's own numbers, "
            f"came {list(parameter.shape)}; set them to what the weight is"
        )
    yield Target(place.path, place.module, parameter, change)
    if pair.bias is None:
        return
    if place.module._parameters.get("bias") is None:
        raise _refused_kind(place, " without a bias for lora_B.bias; merge it with peft", where)
    bias = _parameter(place, "bias", where)
    if pair.bias.shape != bias.shape:
        raise ValueError(
            f"expected a bias of {list(bias.shape)} at {place.path}, came "
            f"{list(pair.bias.shape)} beside {pair.key!r} of {where}; this LoRA was made for "
            "another model"
        )
    column = (pair.bias * pair.scale).unsqueeze(1)
    yield Target(place.path, place.module, bias, LowRank(column, column.new_ones(1, 1)))


def targets_of(place: Place, where: str) -> Iterator[Target]:
    """The parameters that one place changes, once all that could be wrong with it was looked at."""
    what = place.what
    if isinstance(what, Pair):
        yield from _of_pair(place, what, where)
        return
    assert isinstance(what, Replacement)
    parameter = _parameter(place, what.name, where)
    if what.tensor.shape != parameter.shape:
        raise ValueError(
            f"expected {what.name} of {list(parameter.shape)} at {place.path}, came "
            f"{list(what.tensor.shape)} at {what.key!r} of {where}; resize the model first, as it "
            "was when the adapter was trained"
        )
    yield Target(place.path, place.module, parameter, Whole(what.tensor))
