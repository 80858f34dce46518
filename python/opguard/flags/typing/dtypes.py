"""Names of dtypes for annotations: classes, so that type checkers take them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

__all__ = [
    "DTYPE_ALIASES",
    "PYTHON_TYPE_TO_TORCH_DTYPE",
    "DTypeAlias",
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
    "uint8_t",
    "uint16_t",
    "uint32_t",
    "uint64_t",
]

PYTHON_TYPE_TO_TORCH_DTYPE: dict[type, torch.dtype] = {
    float: torch.float32,
    int: torch.int64,
    bool: torch.bool,
    complex: torch.complex128,
}
# What may carry error flags; error_t stands for all of them.
FLAG_DTYPES = (torch.int64, torch.int32, torch.float64, torch.float32)


class _AliasType(type):
    _dtype: torch.dtype

    def __eq__(cls, other: object) -> bool:
        return cls is other or (isinstance(other, torch.dtype) and cls._dtype == other)

    def __hash__(cls) -> int:
        return hash(cls._dtype)

    def __getitem__(cls, item: Any) -> Any:
        raise TypeError(
            f"expected {cls.__name__} inside Tensor[{cls.__name__}, shape], got"
            f" {cls.__name__}[{item!r}]"
        )

    def __repr__(cls) -> str:
        return cls.__name__


class DTypeAlias(metaclass=_AliasType):
    """What the aliases derive from; ``_dtype`` is the dtype that an alias equals."""

    _dtype: ClassVar[torch.dtype]


class float8_e5m2_t(DTypeAlias):
    _dtype = torch.float8_e5m2


class float8_e4m3fn_t(DTypeAlias):
    _dtype = torch.float8_e4m3fn


class float8_e5m2fnuz_t(DTypeAlias):
    _dtype = torch.float8_e5m2fnuz


class float8_e4m3fnuz_t(DTypeAlias):
    _dtype = torch.float8_e4m3fnuz


class float16_t(DTypeAlias):
    _dtype = torch.float16


class bfloat16_t(DTypeAlias):
    _dtype = torch.bfloat16


class float32_t(DTypeAlias):
    _dtype = torch.float32


class float64_t(DTypeAlias):
    _dtype = torch.float64


class int8_t(DTypeAlias):
    _dtype = torch.int8


class int16_t(DTypeAlias):
    _dtype = torch.int16


class int32_t(DTypeAlias):
    _dtype = torch.int32


class int64_t(DTypeAlias):
    _dtype = torch.int64


class uint8_t(DTypeAlias):
    _dtype = torch.uint8


class uint16_t(DTypeAlias):
    _dtype = torch.uint16


class uint32_t(DTypeAlias):
    _dtype = torch.uint32


class uint64_t(DTypeAlias):
    _dtype = torch.uint64


class complex32_t(DTypeAlias):
    _dtype = torch.complex32


class complex64_t(DTypeAlias):
    _dtype = torch.complex64


class complex128_t(DTypeAlias):
    _dtype = torch.complex128


class bool_t(DTypeAlias):
    _dtype = torch.bool


class qint8_t(DTypeAlias):
    _dtype = torch.qint8


class qint32_t(DTypeAlias):
    _dtype = torch.qint32


class quint8_t(DTypeAlias):
    _dtype = torch.quint8


class quint4x2_t(DTypeAlias):
    _dtype = torch.quint4x2


class quint2x4_t(DTypeAlias):
    _dtype = torch.quint2x4


class error_t(DTypeAlias):
    """Error flags ``(samples, words)``: int64, or another of the four dtypes that hold flags."""

    _dtype = torch.int64


DTYPE_ALIASES = tuple(DTypeAlias.__subclasses__())
