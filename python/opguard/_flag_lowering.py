"""What Inductor makes of the flag ops: a call of the C function, into memory that Inductor planned.

Without this a custom op is called through the dispatcher from the generated code, gets inputs that
were copied to the strides they had when traced, and makes its result itself. Our ops take any
strides, so no copy is needed, and the call costs a fifth. It rests on Inductor's own interfaces
for lowerings; where they are not as expected the ops are lowered as any custom op, only slower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from opguard import _flag_chain

__all__ = ["register"]

# op -> how many tensors it takes before its ints; None: a list of them. Their C functions are
# opguard._C.flags_out_*, which generated code finds in torch.ops.opguard.core.
OPS: dict[str, int | None] = {
    "check": 2,
    "check_new": 1,
    "index": 2,
    "index_new": 1,
    "push": 2,
    "push_all": 1,
    "merge": None,
}


def _lowering(name: str, tensors: int | None, op: Any) -> Callable[..., Any]:
    from torch._inductor import ir
    from torch._inductor.lowering import fallback_handler
    from torch._inductor.virtualized import V

    otherwise = fallback_handler(op, add_to_fallback_set=False)  # type: ignore[no-untyped-call]

    def lower(*args: Any) -> Any:
        graph: Any = V.graph
        node = graph.current_node
        value = node.meta["val"]
        if (
            graph.cpp_wrapper  # AOTInductor and C++ code call the op by its schema
            or getattr(graph, "fx_wrapper", False)
            or value.device.type not in {"cpu", "cuda"}
        ):
            return otherwise(*args)
        inputs = list(args[0]) if tensors is None else list(args[:tensors])
        if len(inputs) > _flag_chain.MOST_FLAGS:
            return otherwise(*args)
        inputs = [_realized(x) for x in inputs]
        if _flag_chain.waits(node):
            return _flag_chain.Waiting(node, inputs)
        constants, kernel = list(args[1 if tensors is None else tensors :]), name
        if any(isinstance(x, _flag_chain.Waiting) for x in inputs):
            inputs, constants = _flag_chain.joined(_flag_chain.Waiting(node, inputs))
            kernel = "chain"
        return ir.TensorBox.create(
            ir.ExternKernelOut(
                layout=ir.FixedLayout(
                    value.device,
                    value.dtype,
                    ir.convert_shape_to_inductor(value.size()),  # type: ignore[attr-defined]
                    ir.convert_shape_to_inductor(value.stride()),  # type: ignore[attr-defined]
                ),
                inputs=inputs,
                constant_args=constants,
                python_kernel_name=f"torch.ops.opguard.core.flags_out_{kernel}",
                op_overload=op,
            )
        )

    return lower


def _realized(x: Any) -> Any:
    from torch._inductor import ir

    return x if isinstance(x, _flag_chain.Waiting) else ir.ExternKernel.realize_input(x)


def register() -> None:
    """Registers the lowerings; needs torch._inductor.lowering to be imported or importable.

    Raises:
        ImportError, AttributeError, TypeError: this Inductor is another one; nothing is registered.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering

    # Looked for here, where it is not too late for the ops to be lowered as any others.
    inductor: Any = ir
    parts = (
        inductor.FixedLayout,
        inductor.TensorBox.create,
        inductor.ExternKernel.realize_input,
        inductor.convert_shape_to_inductor,
    )
    needed = {"layout", "inputs", "constant_args", "python_kernel_name", "op_overload"}
    missing = needed - set(inspect.signature(ir.ExternKernelOut).parameters)
    if missing or not all(map(callable, parts)):
        raise TypeError(f"expected Inductor's ExternKernelOut to take {sorted(missing)}")
    for name, tensors in OPS.items():
        op = getattr(torch.ops.opguard, f"flags_{name}").default
        register_lowering(op, type_promotion_kind=None)(_lowering(name, tensors, op))
