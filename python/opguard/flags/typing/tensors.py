"""``Tensor[dtype, shape, device, requires_grad]``: what a tensor has to be, and the check of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Union, get_args

import torch

from opguard.flags.results import Err, Ok, Result
from opguard.flags.typing.dims import Broadcast, DimRef
from opguard.flags.typing.dtypes import (
    FLAG_DTYPES,
    PYTHON_TYPE_TO_TORCH_DTYPE,
    DTypeAlias,
    error_t,
)
from opguard.flags.typing.errors import (
    DeviceMismatchError,
    DimensionMismatchError,
    DTypeMismatchError,
    TypeMismatchError,
    ValidationError,
)

__all__ = ["Tensor", "TensorAnnotation", "dtype_of", "type_cast"]


def dtype_of(spec: Any) -> torch.dtype:
    """The torch dtype of a dtype, an alias or one of float, int, bool and complex; TypeError."""
    if isinstance(spec, torch.dtype):
        return spec
    if isinstance(spec, type):
        if issubclass(spec, DTypeAlias):
            return spec._dtype
        if spec in PYTHON_TYPE_TO_TORCH_DTYPE:
            return PYTHON_TYPE_TO_TORCH_DTYPE[spec]
    raise TypeError(
        "expected a torch.dtype, one of opguard.flags.typing's aliases or float, int, bool,"
        f" complex, got {spec!r}"
    )


def _shape_of(spec: Any) -> tuple[Any, ...] | None:
    if spec is None:
        return None
    # A name alone is one dimension of that name, as an int alone is one of that size.
    dims = tuple(spec) if isinstance(spec, tuple | list) else (spec,)
    for dim in dims:
        known = isinstance(dim, int | str | DimRef) or dim is Broadcast or dim is ...
        if not known or isinstance(dim, bool):
            raise TypeError(
                "expected the dimensions of a shape to be ints, names, Dim.<attribute>, Broadcast"
                f" or ..., got {dim!r}"
            )
    if dims.count(...) > 1:
        raise ValueError(f"expected at most one ... in a shape, got {dims}")
    return dims


class TensorAnnotation:
    """What ``Tensor[...]`` makes. None stands for "any".

    Attributes:
        dtype: torch dtype.
        shape: sizes, names (bound where they are first met in a call), ``Dim.<attribute>``,
            ``Broadcast`` (any size) and one ``...`` (any number of dimensions).
        device: string or torch.device; without an index any device of that type.
        requires_grad: bool.
        is_flags: annotated as ``error_t``: error flags, in any of their four dtypes.
    """

    def __init__(
        self,
        dtype: Any = None,
        shape: Any = None,
        device: str | torch.device | None = None,
        requires_grad: bool | None = None,
    ) -> None:
        self.is_flags = isinstance(dtype, type) and dtype is error_t
        self.dtype = None if dtype is None else dtype_of(dtype)
        self.shape = _shape_of(shape)
        self.device = device
        self.requires_grad = requires_grad
        self._device = None if device is None else torch.device(device)

    def validate(
        self,
        name: str,
        tensor: torch.Tensor,
        dim_registry: dict[str, int] | None = None,
        instance: Any = None,
        function_name: str | None = None,
    ) -> bool:
        """True, or the error of what does not fit: dtype, device, requires_grad, shape.

        ``dim_registry`` holds the sizes of names and gets the new ones; ``instance`` is where
        ``Dim`` looks.

        Raises:
            ValidationError: DTypeMismatchError, DeviceMismatchError, DimensionMismatchError,
                TypeMismatchError for what is no tensor, itself for the rest.
        """
        where = {"parameter": name, "function": function_name}
        if not isinstance(tensor, torch.Tensor):
            raise TypeMismatchError(
                f"expected {name} to be a tensor, got {type(tensor).__qualname__}",
                expected="tensor",
                actual=type(tensor).__qualname__,
                function=function_name,
            )
        self._check_dtype(name, tensor, where)
        self._check_device(name, tensor, where)
        if self.requires_grad is not None and tensor.requires_grad != self.requires_grad:
            raise ValidationError(
                f"expected {name} to have requires_grad={self.requires_grad}, got"
                f" {tensor.requires_grad}"
            )
        if self.shape is not None:
            names = {} if dim_registry is None else dim_registry
            self._check_shape(name, tensor, names, instance, where)
        return True

    def validate_result(
        self,
        name: str,
        tensor: torch.Tensor,
        dim_registry: dict[str, int] | None = None,
        instance: Any = None,
        function_name: str | None = None,
    ) -> Result[bool, ValidationError]:
        """:meth:`validate` as ``Ok(True)`` or ``Err(error)``."""
        try:
            return Ok(self.validate(name, tensor, dim_registry, instance, function_name))
        except ValidationError as error:
            return Err(error)

    def _check_dtype(self, name: str, tensor: torch.Tensor, where: dict[str, Any]) -> None:
        if self.dtype is None or tensor.dtype == self.dtype:
            return
        if self.is_flags and tensor.dtype in FLAG_DTYPES:
            return
        raise DTypeMismatchError(
            f"expected {name} in {self.dtype}, got {tensor.dtype}",
            expected=self.dtype,
            actual=tensor.dtype,
            **where,
        )

    def _check_device(self, name: str, tensor: torch.Tensor, where: dict[str, Any]) -> None:
        want, got = self._device, tensor.device
        if want is None:
            return
        if want.type == got.type and want.index in (None, got.index or 0):
            return
        raise DeviceMismatchError(
            f"expected {name} on {want}, got it on {got}",
            expected=str(want),
            actual=str(got),
            **where,
        )

    def _check_shape(
        self,
        name: str,
        tensor: torch.Tensor,
        names: dict[str, int],
        instance: Any,
        where: dict[str, Any],
    ) -> None:
        shape = self.shape or ()
        sizes = tuple(tensor.shape)
        gap = shape.index(...) if ... in shape else len(shape)
        rest = len(shape) - gap - 1
        fits = len(sizes) >= len(shape) - 1 if ... in shape else len(sizes) == len(shape)
        if not fits:
            least = f"at least {len(shape) - 1}" if ... in shape else f"{len(shape)}"
            raise DimensionMismatchError(
                f"expected {name} of shape {self._shown()}, {least} dimensions, got {sizes}",
                expected=self._shown(),
                actual=sizes,
                **where,
            )
        for at in range(gap):
            self._check_dim(name, at, shape[at], sizes, names, instance, where)
        for at in range(max(rest, 0)):
            spec, place = shape[gap + 1 + at], len(sizes) - rest + at
            self._check_dim(name, place, spec, sizes, names, instance, where)

    def _check_dim(  # noqa: PLR0917
        self,
        name: str,
        at: int,
        spec: Any,
        sizes: tuple[int, ...],
        names: dict[str, int],
        instance: Any,
        where: dict[str, Any],
    ) -> None:
        if spec is Broadcast:
            return
        if isinstance(spec, str):
            want = names.setdefault(spec, sizes[at])
        elif isinstance(spec, DimRef):
            try:
                want = spec.resolve(instance)
            except (ValueError, AttributeError, TypeError) as error:
                raise ValidationError(f"in the shape of {name}: {error}", where) from error
        else:
            want = spec
        if want != sizes[at]:
            label = "" if isinstance(spec, int) else f" ({spec})"
            raise DimensionMismatchError(
                f"expected dimension {at}{label} of {name} to be {want}, got {sizes[at]} in shape"
                f" {sizes}",
                expected=want,
                actual=sizes[at],
                dim_name=None if isinstance(spec, int) else str(spec),
                **where,
            )

    def _shown(self) -> str:
        shape = self.shape or ()
        inner = ", ".join("..." if dim is ... else str(dim) for dim in shape)
        return f"({inner},)" if len(shape) == 1 else f"({inner})"

    def _key(self) -> tuple[Any, ...]:
        return (self.dtype, self.is_flags, self.shape, self._device, self.requires_grad)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorAnnotation) and other._key() == self._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        parts = [
            "error_t" if self.is_flags else str(self.dtype),
            None if self.shape is None else self._shown(),
            None if self.device is None else repr(str(self.device)),
            None if self.requires_grad is None else str(self.requires_grad),
        ]
        while parts and parts[-1] is None:
            parts.pop()
        return f"Tensor[{', '.join(str(part) for part in parts)}]"

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 - `|` is what is defined here

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007


if TYPE_CHECKING:
    from typing import Annotated

    # What a checker sees: an annotated tensor is a tensor.
    Tensor = Annotated
else:

    class _TensorType(type):
        def __getitem__(cls, params: Any) -> TensorAnnotation:
            if isinstance(params, list):
                return TensorAnnotation(shape=params)
            if not isinstance(params, tuple):
                return TensorAnnotation(params)
            if not 1 <= len(params) <= 4:
                raise ValueError(
                    "expected Tensor[dtype, shape, device, requires_grad] or the first of these,"
                    f" got {len(params)} parameters"
                )
            return TensorAnnotation(*params)

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, torch.Tensor)

    class Tensor(metaclass=_TensorType):
        """``Tensor[dtype, shape, device, requires_grad]``, or the first of these.

        ``Tensor[[...]]`` is a shape alone. A name or a number alone in the place of the shape is
        one dimension.
        """


class type_cast:
    """``type_cast[dtype](tensor)``: ``Ok(tensor in dtype)`` or ``Err(ValidationError)``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __class_getitem__(cls, dtype: Any) -> type_cast:
        return cls(dtype_of(dtype))

    def __call__(self, tensor: Any) -> Result[torch.Tensor, ValidationError]:
        if not isinstance(tensor, torch.Tensor):
            return Err(
                ValidationError(
                    f"expected a tensor to cast to {self.dtype}, got {type(tensor).__qualname__}"
                )
            )
        try:
            return Ok(tensor.to(self.dtype))
        except (RuntimeError, TypeError, NotImplementedError) as error:
            return Err(
                ValidationError(f"expected a tensor that can be cast to {self.dtype}: {error}")
            )


def tensors_in(annotation: Any) -> bool:
    """Whether an annotation says anything about a tensor."""
    if isinstance(annotation, TensorAnnotation):
        return True
    if isinstance(annotation, type) and issubclass(annotation, DTypeAlias):
        return True
    return any(tensors_in(part) for part in get_args(annotation))
