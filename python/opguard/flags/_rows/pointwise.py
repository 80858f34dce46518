"""Row rules of ops that work element by element, with torch's tag or without it.

An output element is made of the elements at its place in the inputs, as they broadcast. What is
drawn at random from the numbers of a tensor follows it too.
"""

from __future__ import annotations

from opguard.flags._rows.axes import same_shape
from opguard.flags._rows.placing import After, Shape, broadcast, each, entire, merged, union
from opguard.flags._rows.rows import Rows
from opguard.flags._rows.rules import Call, names_of, rule

__all__ = ["pointwise"]


def pointwise(call: Call) -> After:
    """Every output takes the union of the inputs' rows, as they broadcast."""
    found = call.any()

    def place_one(at: int, shape: Shape) -> Rows | None:
        if len(found) == 1 and same_shape(found[0].shape, shape):
            return found[0]
        return merged([broadcast(rows, shape) for rows in found], shape)

    return each(place_one)


# Without torch's tag.
UNTAGGED = """
    complex polar floor_divide hardswish log_sigmoid_forward
    native_dropout _fused_dropout rrelu_with_noise rrelu_with_noise_functional
    _add_relu _masked_scale _prelu_kernel _prelu_kernel_backward dequantize quantize_per_tensor
    fake_quantize_per_tensor_affine_cachemask _fake_quantize_learnable_per_tensor_affine
    _fake_quantize_per_tensor_affine_cachemask_tensor_qparams int_repr
    elu_backward hardshrink_backward hardsigmoid_backward hardswish_backward hardtanh_backward
    leaky_relu_backward log_sigmoid_backward softplus_backward softshrink_backward
    rrelu_with_noise_backward native_dropout_backward mse_loss_backward smooth_l1_loss_backward
    huber_loss_backward binary_cross_entropy_backward soft_margin_loss_backward
    sigmoid_backward tanh_backward silu_backward gelu_backward threshold_backward
    bernoulli normal poisson binomial _standard_gamma _standard_gamma_grad
"""
rule(*names_of(UNTAGGED))(pointwise)


@rule("aten::_sample_dirichlet")
def _dirichlet(call: Call) -> After:
    """One draw over the last dimension."""
    return union(call, lambda name, rows, shape: rows.mixed([-1]))


@rule("aten::fake_quantize_per_channel_affine_cachemask", "aten::quantize_per_channel")
def _channels(call: Call) -> After:
    """The tensor follows; scales and zero points of its channels merge."""
    return union(
        call,
        lambda name, rows, shape: (
            broadcast(rows, shape) if name in {"self", "input"} else rows.whole(shape)
        ),
    )


@rule(
    "aten::mse_loss",
    "aten::smooth_l1_loss",
    "aten::huber_loss",
    "aten::soft_margin_loss",
    "aten::binary_cross_entropy",
    "aten::binary_cross_entropy_with_logits",
)
def _loss(call: Call) -> After:
    """Elementwise until its reduction."""
    return pointwise(call) if call["reduction"] == 0 else entire(call)


@rule("aten::linspace", "aten::logspace")
def _ends(call: Call) -> After:
    """Every element is made from both ends."""
    return entire(call)
