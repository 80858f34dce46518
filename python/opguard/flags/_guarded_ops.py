"""The three ops between tensors and GuardedTensors: they carry gradients past the wrapper.

``attach`` gives a tensor the flags of another, ``unwrap`` gives the tensor without them,
``with_flags`` gives other flags to the same data. All return an alias of the data, and the gradient
of each is the identity. GuardedTensor's dispatch does their work; they have no kernels of their
own, so that a call without any GuardedTensor is an error of torch's.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["ATTACH", "UNWRAP", "WITH_FLAGS"]

_SCHEMAS = {
    "guarded_attach": ("(Tensor x, Tensor carrier) -> Tensor", 2),
    "guarded_unwrap": ("(Tensor g) -> Tensor", 1),
    "guarded_with_flags": ("(Tensor g, Tensor flags) -> Tensor", 2),
}


def _identity(inputs: int) -> Any:
    rest = (None,) * (inputs - 1)

    def backward(ctx: Any, grad: Any) -> Any:
        return grad if inputs == 1 else (grad, *rest)

    return backward


def _define() -> Any:
    library: Any = torch.library.Library  # untyped before torch 2.14
    library = library("opguard", "FRAGMENT")
    for name, (schema, inputs) in _SCHEMAS.items():
        library.define(name + schema)
        torch.library.register_autograd(f"opguard::{name}", _identity(inputs), lib=library)
    return library


# Kept: when it goes, the ops go.
LIBRARY = _define()

ATTACH = torch.ops.opguard.guarded_attach.default
UNWRAP = torch.ops.opguard.guarded_unwrap.default
WITH_FLAGS = torch.ops.opguard.guarded_with_flags.default
