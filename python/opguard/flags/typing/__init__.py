"""Annotations for tensors that :func:`opguard.flags.tensorcheck` checks at run time.

@tensorcheck
def forward(self, x: Tensor[float32_t, ("batch", Dim.in_features)]) -> Tensor[float32_t, [...]]:
    ...
"""

from __future__ import annotations

from opguard.flags.typing.dims import Broadcast, Dim
from opguard.flags.typing.dtypes import (
    PYTHON_TYPE_TO_TORCH_DTYPE,
    bfloat16_t,
    bool_t,
    complex32_t,
    complex64_t,
    complex128_t,
    error_t,
    float8_e4m3fn_t,
    float8_e4m3fnuz_t,
    float8_e5m2_t,
    float8_e5m2fnuz_t,
    float16_t,
    float32_t,
    float64_t,
    int8_t,
    int16_t,
    int32_t,
    int64_t,
    qint8_t,
    qint32_t,
    quint2x4_t,
    quint4x2_t,
    quint8_t,
    uint8_t,
    uint16_t,
    uint32_t,
    uint64_t,
)
from opguard.flags.typing.errors import (
    DeviceMismatchError,
    DimensionMismatchError,
    DTypeMismatchError,
    InvalidParameterError,
    InvalidReturnTypeError,
    TypeMismatchError,
    ValidationError,
)
from opguard.flags.typing.tensors import Tensor, TensorAnnotation, type_cast

__all__ = [
    "PYTHON_TYPE_TO_TORCH_DTYPE",
    "Broadcast",
    "DTypeMismatchError",
    "DeviceMismatchError",
    "Dim",
    "DimensionMismatchError",
    "InvalidParameterError",
    "InvalidReturnTypeError",
    "Tensor",
    "TensorAnnotation",
    "TypeMismatchError",
    "ValidationError",
    "bfloat16_t",
    "bool_t",
    "complex32_t",
    "complex64_t",
    "complex128_t",
    "error_t",
    "float8_e4m3fn_t",
    "float8_e4m3fnuz_t",
    "float8_e5m2_t",
    "float8_e5m2fnuz_t",
    "float16_t",
    "float32_t",
    "float64_t",
    "int8_t",
    "int16_t",
    "int32_t",
    "int64_t",
    "qint8_t",
    "qint32_t",
    "quint2x4_t",
    "quint4x2_t",
    "quint8_t",
    "type_cast",
    "uint8_t",
    "uint16_t",
    "uint32_t",
    "uint64_t",
]
