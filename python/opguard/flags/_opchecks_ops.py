"""What kind of op it is: what it can make, what it cannot, which of its arguments are ids.

Everything here is asked once an op and kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "Kind",
    "brings_inf",
    "ids_of",
    "is_quiet",
    "kind_of",
    "overflows",
    "puts_inf",
    "with_ids",
]

# What these return is in their inputs, or finite whatever the inputs are: they make no NaN and no
# Inf, from an Inf neither.
_MOVES = """
    _conj _efficientzerotensor _fw_primal _neg_view _reshape_alias _to_copy _unsafe_view _values
    alias as_strided as_strided_scatter broadcast_to cat channel_shuffle chunk clone concat
    contiguous copy copy_ data detach detach_ diagonal diagonal_copy diagonal_scatter dropout
    expand expand_as flatten flip fliplr flipud gather index index_copy index_put index_select
    lift lift_fresh lift_fresh_copy masked_select movedim narrow new_empty new_empty_strided
    new_ones new_zeros permute pixel_shuffle pixel_unshuffle positive ravel repeat
    repeat_interleave reshape resize_ roll rot90 scatter select select_backward select_scatter
    set_ slice slice_backward slice_scatter sort split split_with_sizes squeeze stack swapaxes t
    take take_along_dim tile to topk transpose tril triu unbind unflatten unfold unsafe_chunk
    unsafe_split unsqueeze view view_as view_as_complex view_as_real where zero_ zeros_like
    ones_like empty_like empty zeros ones eye arange linspace rand rand_like randn randn_like
    randint randint_like randperm full full_like new_full fill fill_ masked_fill constant_pad_nd
    pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d bernoulli bernoulli_ uniform_ normal_ random_ empty_strided empty_permuted
    resize_as_
    scalar_tensor _local_scalar_dense max_pool1d max_pool2d max_pool3d
    max_pool2d_with_indices max_pool3d_with_indices kthvalue median mode cummax cummin
    unfold_backward lift_fresh_ view_copy nonzero
"""
_BOUNDS = """
    relu relu_ relu6 hardtanh hardsigmoid clamp clamp_min clamp_max clip max min amax amin
    aminmax maximum minimum fmax fmin sigmoid tanh sign sgn floor ceil round trunc erf neg
    nan_to_num threshold threshold_backward argmax argmin heaviside atan leaky_relu dropout
    native_dropout feature_dropout
"""
# They make an Inf where the dtype they write has a smaller range than the one they read.
_CASTS = frozenset(("_to_copy", "copy", "copy_"))
_SAME = {"dropout", "feature_dropout", "native_dropout"}  # they scale what is left: scanned
_QUIET = frozenset((_MOVES + _BOUNDS).split()) - _SAME
# An Inf that goes in does not come out as one.
_BOUNDED = """
    softmax _softmax sigmoid tanh erf atan sign clamp relu6 hardtanh hardsigmoid nan_to_num
    scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
    _scaled_dot_product_attention_math _safe_softmax _scaled_dot_product_cudnn_attention
"""
_ENDS_INF = frozenset(_BOUNDED.split())
# name: (the table or its number of rows, its dimension or the argument that says it, the ids)
_IDS: dict[str, tuple[str, int | str, str]] = {
    "embedding": ("weight", 0, "indices"),
    # Autograd kept the ids as they were given.
    "embedding_dense_backward": ("num_weights", 0, "indices"),
    "_embedding_bag": ("weight", 0, "indices"),
    "_embedding_bag_forward_only": ("weight", 0, "indices"),
    **dict.fromkeys(
        (
            *("index_select", "gather", "scatter", "scatter_add", "scatter_reduce"),
            *("index_add", "index_copy", "index_fill"),
        ),
        ("self", "dim", "index"),
    ),
}
_LISTS_OF_IDS = frozenset({"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"})
_DIVIDES = frozenset({
    "div", "div_", "true_divide", "divide", "floor_divide", "floor_divide_", "remainder",
    "remainder_", "fmod", "fmod_", "reciprocal", "reciprocal_", "addcdiv", "addcdiv_",
})  # fmt: skip
# What else these return is for their backward passes; some of it is padding that holds anything.
_FOR_BACKWARD = {"_scaled_dot_product_": 1, "_efficient_attention": 1, "_flash_attention": 1,
                 "_cudnn_rnn": 3, "miopen_rnn": 3}  # fmt: skip
_DIVISORS = {
    "reciprocal": "self",
    "reciprocal_": "self",
    "addcdiv": "tensor2",
    "addcdiv_": "tensor2",
}


@dataclass(slots=True)
class Kind:
    """What is asked about an op before and after it runs."""

    name: str  # "aten::log"
    plain: bool  # nothing to do but to run it: not of the user's, or without tensors
    quiet: bool  # cannot make what is looked for
    casts: bool  # quiet but where the dtype changes
    pointwise: bool
    ends_inf: bool
    splits: bool  # made of other ops, which are looked at instead
    writes: tuple[int, ...]  # arguments that the op writes into
    ids: tuple[str, int | str, str] | None
    id_lists: bool
    divisor: str | None
    results: int | None  # how many of the outputs are looked at, None: all
    names: tuple[str, ...]  # of the arguments, by position

    def argument(self, name: str, args: Any, kwargs: Any) -> Any:
        """The argument of this name, None where it was left out."""
        if name in kwargs:
            return kwargs[name]
        at = self.names.index(name) if name in self.names else len(args)
        return args[at] if at < len(args) else None


def kind_of(op: Any) -> Kind:
    """The kind of an ``OpOverload``; other callables (higher-order ops) are plain."""
    schema = getattr(op, "_schema", None)
    if schema is None or op.namespace == "opguard":
        name = str(op) if schema is None else schema.name
        return Kind(name, True, True, False, False, False, False, (), None, False, None, None, ())
    base = schema.name.rpartition("::")[2]
    bare = base[:-1] if base.endswith("_") and not base.endswith("__") else base
    arguments = schema.arguments
    return Kind(
        name=schema.name,
        plain=op.namespace in {"prim", "profiler", "c10d", "_c10d_functional", "debugprims"},
        quiet=op.namespace == "aten"
        and (base in _QUIET or bare in _QUIET)
        and op._overloadname != "dtype",  # bits taken for another dtype's may be a NaN
        casts=op.namespace == "aten" and base in _CASTS,
        pointwise=torch.Tag.pointwise in op.tags,
        ends_inf=bare in _ENDS_INF,
        splits=_splits(op),
        writes=tuple(
            i
            for i, each in enumerate(arguments)
            if each.alias_info is not None and each.alias_info.is_write
        ),
        ids=_IDS.get(bare) if op.namespace == "aten" else None,
        id_lists=op.namespace == "aten" and base in _LISTS_OF_IDS,
        divisor=_DIVISORS.get(base, "other") if base in _DIVIDES else None,
        results=next((n for x, n in _FOR_BACKWARD.items() if base.startswith(x)), None),
        names=tuple(each.name for each in arguments),
    )


def _splits(op: Any) -> bool:
    """Whether it is only made of others: such an op arrives in inference mode."""
    try:
        return bool(
            torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        ) and not any(each.alias_info is not None for each in op._schema.arguments)
    except RuntimeError:
        return False


def brings_inf(args: Any) -> bool:
    """Whether a number among the arguments is itself an Inf: then it is meant."""
    return any(isinstance(each, float) and math.isinf(each) for each in args)


def _read(kind: Kind, args: Any) -> Any:
    """What a cast reads."""
    value = args[1] if kind.writes or kind.name == "aten::copy" else args[0]
    return value if isinstance(value, torch.Tensor) else None


def overflows(kind: Kind, args: Any, out: torch.Tensor) -> torch.Tensor:
    """The Infs that a cast made, 0 elsewhere.

    The greatest number of the dtype it read is none: masks have it where they mean an Inf.
    """
    read = _read(kind, args)
    bad = torch.isinf(out)
    if read.is_floating_point():
        bad = bad & (read.abs() < torch.finfo(read.dtype).max)
    elif read.is_complex():
        bad = bad & torch.isfinite(read)
    return torch.where(bad, out, torch.zeros_like(out))


def puts_inf(kind: Kind, args: Any) -> bool:
    """Whether an Inf in the output is a number among the arguments."""
    return (kind.pointwise or kind.ids is not None) and brings_inf(args)


def is_quiet(kind: Kind, args: Any, out: Any) -> bool:
    """Whether ``out`` holds nothing that the op made."""
    if not kind.quiet:
        return False
    if not kind.casts:
        return True
    read = _read(kind, args)
    if read is None or read.dtype == out.dtype or read.device != out.device:
        return True
    if not out.is_floating_point() and not out.is_complex():
        return True
    reach: float = torch.finfo(out.dtype).max
    if read.is_floating_point() or read.is_complex():
        return torch.finfo(read.dtype).max <= reach
    return read.dtype == torch.bool or torch.iinfo(read.dtype).max <= reach


def ids_of(kind: Kind, args: Any, kwargs: Any) -> list[tuple[Any, Any, Any]]:
    """The ids among the arguments, each with the lowest and the highest that are right."""
    if kind.ids is not None:
        table, dim, name = kind.ids
        ids, of = (kind.argument(each, args, kwargs) for each in (name, table))
        if isinstance(dim, str):
            dim = kind.argument(dim, args, kwargs)
        if not isinstance(of, torch.Tensor):
            return [(ids, 0, of - 1)]
        return [(ids, 0, of.shape[dim] - 1)] if of.dim() else []
    of = kind.argument("self", args, kwargs)
    found = []
    dim = 0
    for ids in kind.argument("indices", args, kwargs):
        if ids is None:
            dim += 1
        elif ids.dtype in {torch.bool, torch.uint8}:
            dim += ids.dim()
        else:
            found.append((ids, -of.shape[dim], of.shape[dim] - 1))
            dim += 1
    return found


def with_ids(kind: Kind, args: Any, kwargs: Any, old: list[Any], new: list[Any]) -> Any:
    """The arguments with other ids in the places of the old ones."""
    name = "indices" if kind.ids is None else kind.ids[2]
    value = kind.argument(name, args, kwargs)
    changed = {id(before): after for before, after in zip(old, new, strict=True)}
    if kind.ids is None:
        value = [changed.get(id(each), each) for each in value]
    else:
        value = changed[id(value)]
    if name in kwargs:
        return args, {**kwargs, name: value}
    at = kind.names.index(name)
    return (*args[:at], value, *args[at + 1 :]), kwargs
