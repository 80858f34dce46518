"""Row rules of neural networks' layers: convolutions, norms, attention, pools, losses.

Each names the dimensions that its inputs and outputs share. Positions of one sample (space, time,
channels) that see each other merge; samples do so only where they lie along such a dimension.
"""

from __future__ import annotations

from typing import Any

from opguard.flags._rows.placing import (
    After,
    Shape,
    broadcast,
    each,
    entire,
    inputs,
    merged,
    place,
    reduced,
    spell,
    union,
)
from opguard.flags._rows.rows import Rows
from opguard.flags._rows.rules import Call, names_of, rule

__all__: list[str] = []


# --- layers whose dimensions have fixed places ----------------------------------------------------

spell(
    "avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices "
    "quantized_max_pool1d",
    "*y",
    self="*x",
)
spell(
    "avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_avg_pool2d "
    "adaptive_max_pool2d max_unpool2d mkldnn_max_pool2d quantized_max_pool2d max_pool2d",
    "*yz",
    self="*hw",
    indices="*ab",
)
spell(
    "avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d adaptive_avg_pool3d "
    "adaptive_max_pool3d max_unpool3d mkldnn_max_pool3d quantized_max_pool3d max_pool3d",
    "*xyz",
    self="*dhw",
    indices="*abc",
)
spell("fractional_max_pool2d", "*yz", self="*hw", random_samples="*r")
spell("fractional_max_pool3d", "*xyz", self="*dhw", random_samples="*r")
spell("max_pool2d_with_indices_backward", "*yz", grad_output="*ab", self="*hw", indices="*ab")
spell("upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d", "*y", self="*x", input="*x")
spell(
    "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa",
    "*yz",
    self="*hw",
    input="*hw",
)
spell(
    "upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d",
    "*xyz",
    self="*dhw",
    input="*dhw",
)
spell("grid_sampler_2d _grid_sampler_2d_cpu_fallback", "ncyz", input="nchw", grid="nyzk")
spell("grid_sampler_3d", "ncxyz", input="ncdhw", grid="nxyzk")
spell("cudnn_grid_sampler", "ncyz", self="nchw", grid="nyzk")
spell("affine_grid_generator", "n*", theta="nij")

# queries, keys, values; what each kind of attention gives beside its output has a row for a query.
spell(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable",
    "*lv",
    "*l",
    "-",
    query="*le",
    key="*se",
    value="*sv",
    attn_mask="*ls",
    attn_bias="*ls",
)
spell(
    "_scaled_dot_product_attention_math _scaled_dot_product_attention_math_for_mps",
    "*lv",
    "*ls",
    query="*le",
    key="*se",
    value="*tv",
    attn_mask="*ls",
)
spell("_triton_scaled_dot_attention", "*lv", q="*le", k="*se", v="*sv")
spell(
    "_native_multi_head_attention _triton_multi_head_attention",
    "ntd",
    "n*",
    query="nte",
    key="nse",
    value="nse",
)
spell("_transformer_encoder_layer_fwd", "nyd", src="nte")
spell("_transform_bias_rescale_qkv", "nhtk", qkv="nte")


# --- convolutions ---------------------------------------------------------------------------------


def _or(call: Call, name: str, default: Any) -> Any:
    return call[name] if name in call else default  # noqa: SIM401 - no mapping


def _at(values: Any, at: int) -> Any:
    if isinstance(values, (list, tuple)):
        return values[at % len(values)] if values else 0
    return values


def _untouched(call: Call, dim: int, kernel: Any) -> bool:
    """Whether along a dimension of space each position sees itself alone (kernel of 1)."""
    stride, padding = _or(call, "stride", 1), _or(call, "padding", 0)
    return (
        type(kernel) is int
        and kernel == 1
        and _at(stride, dim - 2) == 1
        and _at(padding, dim - 2) == 0
        and not any(_or(call, "output_padding", None) or ())
    )


@rule(
    *names_of(
        "convolution _convolution convolution_overrideable cudnn_convolution "
        "cudnn_convolution_relu cudnn_convolution_transpose mkldnn_convolution "
        "miopen_convolution miopen_convolution_relu miopen_convolution_transpose "
        "miopen_depthwise_convolution _slow_conv2d_forward slow_conv3d_forward "
        "slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d "
        "_conv_depthwise2d conv_depthwise3d _nnpack_spatial_convolution"
    )
)
def _convolution(call: Call) -> After:
    """(N, C, ...) with (O, C / groups, ...): samples follow, channels and space merge."""
    first = "input" if "input" in call else "self"
    turned = bool(_or(call, "transposed", "transpose" in call.name))
    weight = call.shape("weight")
    rank, groups = len(weight), _or(call, "groups", 1)

    def placed(name: str, rows: Rows, shape: Shape) -> Rows | None:
        if len(shape) != rank or (name == first and len(rows.shape) != rank):
            return rows.whole(shape)
        if name == first:
            kept = [d if _untouched(call, d, weight[d]) else None for d in range(2, rank)]
            return place(rows, [0, None, *kept], shape)
        if name not in {"weight", "bias"}:
            return rows.whole(shape)
        out = 1 if turned and name == "weight" else 0
        dims: list[int | None] = [None] * len(rows.shape)
        dims[out] = 1 if out == 0 or groups == 1 else None
        return place(rows, dims, shape)

    return union(call, placed)


spell("conv_tbc", "ybo", self="tbc", weight="kco", bias="o")


# --- norms ----------------------------------------------------------------------------------------


def _channelwise(rows: Rows, shape: Shape) -> Rows | None:
    """(C,) along dimension 1 of an output."""
    if len(rows.shape) != 1 or len(shape) < 2:
        return rows.whole(shape)
    return place(rows, [1], shape)


@rule(
    *names_of(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
        "_native_batch_norm_legit_no_training _batch_norm_with_update "
        "_batch_norm_with_update_functional _batch_norm_no_update cudnn_batch_norm "
        "miopen_batch_norm quantized_batch_norm batch_norm_elemt"
    )
)
def _batch_norm(call: Call) -> After:
    """In eval each element is scaled by itself; in training every sample is in the statistics.

    Running statistics are the layer's and carry no rows.
    """
    training = _or(call, "training", "with_update" in call.name)
    first = "input" if "input" in call else "self"
    rank = len(call.shape(first))
    others = [dim for dim in range(rank) if dim != 1]
    rows = call.rows(first)

    def placed(at: int, shape: Shape) -> Rows | None:
        if at:  # mean and inverse deviation; then a reserve, or the running statistics
            counts = at < 3 and training and rows is not None and len(shape) == 1
            return reduced(rows, others, shape) if counts else None
        found: list[Rows | None] = []
        for name, one in inputs(call):
            if name == first:
                found.append(one.mixed(others) if training else one)
            else:
                found.append(_channelwise(one, shape))
        return merged(found, shape)

    return each(placed)


@rule("aten::batch_norm_stats", "aten::batch_norm_update_stats")
def _statistics(call: Call) -> After:
    others = [dim for dim in range(len(call.shape("input"))) if dim != 1]
    return union(
        call,
        lambda name, rows, shape: (
            reduced(rows, others, shape) if name == "input" else broadcast(rows, shape)
        ),
    )


@rule("aten::batch_norm_gather_stats", "aten::batch_norm_gather_stats_with_counts")
def _all_statistics(call: Call) -> After:
    return entire(call)


@rule("aten::native_layer_norm", "aten::_fused_rms_norm")
def _layer_norm(call: Call) -> After:
    """Over the last dimensions of each sample; the statistics are of the input alone."""
    rank, last = len(call.shape("input")), len(call["normalized_shape"])
    gone = list(range(rank - last, rank))

    def placed(at: int, shape: Shape) -> Rows | None:
        found = [
            broadcast(rows.mixed(gone) if name == "input" else rows, shape)
            for name, rows in inputs(call)
            if at == 0 or name == "input"
        ]
        return merged(found, shape)

    return each(placed)


@rule("aten::native_group_norm")
def _group_norm(call: Call) -> After:
    """(N, C, ...) by groups of channels: samples follow, all else merges."""

    def placed(at: int, shape: Shape) -> Rows | None:
        found: list[Rows | None] = []
        for name, rows in inputs(call):
            if name == "input":
                found.append(place(rows, [0, *[None] * (len(rows.shape) - 1)], shape))
            elif at == 0:
                found.append(_channelwise(rows, shape))
        return merged(found, shape)

    return each(placed)


# --- patches --------------------------------------------------------------------------------------


@rule("aten::im2col", "aten::col2im")
def _patches(call: Call) -> After:
    """Patches of an image as columns, and back: (N, C, H, W) and (N, C * k, L), or without N."""
    batched = len(call.shape("self")) == (4 if "im2col" in call.name else 3)

    def placed(name: str, rows: Rows, shape: Shape) -> Rows | None:
        gone: list[int | None] = [None] * (len(rows.shape) - batched)
        return place(rows, [*([0] if batched else []), *gone], shape)

    return union(call, placed)
