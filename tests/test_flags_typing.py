"""Tensor annotations: their forms, what fits them, and what their errors are."""

import pickle
from typing import Optional, get_args

import pytest
import torch

from opguard.flags import typing as ft
from opguard.flags.typing import (
    Broadcast,
    DeviceMismatchError,
    Dim,
    DimensionMismatchError,
    DTypeMismatchError,
    InvalidParameterError,
    InvalidReturnTypeError,
    Tensor,
    TensorAnnotation,
    TypeMismatchError,
    ValidationError,
    error_t,
    float32_t,
    int64_t,
    type_cast,
)

ERRORS = [
    ValidationError,
    DimensionMismatchError,
    DTypeMismatchError,
    DeviceMismatchError,
    InvalidParameterError,
    TypeMismatchError,
    InvalidReturnTypeError,
]


def test_the_forms():
    full = Tensor[float32_t, ("N", 4), "cpu", True]
    assert isinstance(full, TensorAnnotation)
    assert (full.dtype, full.shape, full.device, full.requires_grad) == (
        torch.float32,
        ("N", 4),
        "cpu",
        True,
    )
    assert Tensor[torch.int8].dtype is torch.int8
    assert Tensor[[3, "N"]].shape == (3, "N")
    assert Tensor[[3, "N"]].dtype is None
    assert Tensor[None, None, "cuda"].device == "cuda"
    for python, dtype in (
        (float, torch.float32),
        (int, torch.int64),
        (bool, torch.bool),
        (complex, torch.complex128),
    ):
        assert Tensor[python].dtype is dtype
        assert ft.PYTHON_TYPE_TO_TORCH_DTYPE[python] is dtype
    with pytest.raises(ValueError, match="got 5 parameters"):
        Tensor[float32_t, (1,), "cpu", True, 1]
    for bad in ("batch", 3.5, str):
        with pytest.raises(TypeError, match=r"expected a torch\.dtype"):
            Tensor[bad]
    with pytest.raises(TypeError, match="dimensions of a shape"):
        Tensor[float32_t, (1.5,)]
    with pytest.raises(ValueError, match=r"at most one \.\.\."):
        Tensor[float32_t, (..., 3, ...)]
    assert isinstance(torch.ones(1), Tensor)
    assert repr(full) == "Tensor[torch.float32, (N, 4), 'cpu', True]"


def test_a_name_alone_is_one_dimension():
    annotation = Tensor[float32_t, "batch"]
    assert annotation.shape == ("batch",)
    sizes: dict[str, int] = {}
    annotation.validate("x", torch.ones(7), sizes)
    assert sizes == {"batch": 7}
    assert Tensor[float32_t, 3].shape == (3,)


def test_annotations_can_be_compared_and_joined():
    annotation = Tensor[float32_t, [..., "N"]]
    assert annotation == Tensor[torch.float32, (..., "N")]
    assert hash(annotation) == hash(Tensor[torch.float32, (..., "N")])
    assert annotation != Tensor[float32_t]
    for either in (Optional[annotation], annotation | None, None | annotation):  # noqa: UP045
        assert set(get_args(either)) == {annotation, type(None)}
    assert (
        pickle.loads(pickle.dumps(Tensor[float32_t, ("N", Dim.a.b, Broadcast)]))
        == Tensor[float32_t, ("N", Dim.a.b, Broadcast)]
    )


NAMES = """
float8_e5m2 float8_e4m3fn float8_e5m2fnuz float8_e4m3fnuz float16 bfloat16 float32 float64 int8
int16 int32 int64 uint8 uint16 uint32 uint64 complex32 complex64 complex128 bool qint8 qint32 quint8
quint4x2 quint2x4
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_every_alias_is_its_dtype(name):
    alias, dtype = getattr(ft, f"{name}_t"), getattr(torch, name)
    assert alias == dtype
    assert alias._dtype is dtype
    assert Tensor[alias].dtype is dtype
    assert hash(alias) == hash(dtype)
    assert alias != torch.float32 or dtype is torch.float32
    with pytest.raises(TypeError, match="inside Tensor"):
        alias[3]


def test_error_t_is_int64_and_any_carrier_of_flags():
    assert error_t == torch.int64
    annotation = Tensor[error_t, ("N", "words")]
    for dtype in (torch.int64, torch.int32, torch.float32, torch.float64):
        assert annotation.validate("f", torch.zeros(2, 4, dtype=dtype))
    with pytest.raises(DTypeMismatchError):
        annotation.validate("f", torch.zeros(2, 4, dtype=torch.float16))
    with pytest.raises(DTypeMismatchError):
        Tensor[int64_t].validate("f", torch.zeros(2, 4))


class Config:
    hidden = 4
    wrong = "four"

    class inner:
        size = 2


@pytest.mark.parametrize(
    ("shape", "size", "fits"),
    [
        ((2, 3), (2, 3), True),
        ((2, 3), (2, 4), False),
        ((2,), (2, 1), False),
        ((), (), True),
        ((), (1,), False),
        (("a", "a"), (3, 3), True),
        (("a", "a"), (3, 4), False),
        ((Broadcast, 3), (9, 3), True),
        ((..., "s", 3), (3,), False),
        ((..., "s", 3), (5, 3), True),
        ((..., "s", 3), (7, 8, 5, 3), True),
        ((2, ...), (2,), True),
        ((2, ...), (3, 2), False),
        ((2, ..., 4), (2, 4), True),
        ((2, ..., 4), (2, 9, 9, 4), True),
        ((2, ..., 4), (2, 9, 9, 5), False),
        ((2, ..., 4), (4,), False),
        ((...,), (1, 2, 3), True),
        (("n", Dim.hidden), (9, 4), True),
        (("n", Dim.hidden), (9, 5), False),
        ((Dim.inner.size,), (2,), True),
    ],
)
def test_shapes(shape, size, fits):
    annotation = Tensor[float32_t, shape]
    if fits:
        assert annotation.validate("x", torch.zeros(size), {}, Config()) is True
    else:
        with pytest.raises(DimensionMismatchError) as caught:
            annotation.validate("x", torch.zeros(size), {}, Config(), "forward")
        assert (caught.value.parameter, caught.value.function) == ("x", "forward")


def test_names_hold_over_tensors():
    sizes: dict[str, int] = {}
    Tensor[float32_t, ("batch", 3)].validate("x", torch.zeros(5, 3), sizes)
    with pytest.raises(DimensionMismatchError, match=r"0 \(batch\) of y to be 5") as caught:
        Tensor[float32_t, ("batch",)].validate("y", torch.zeros(6), sizes)
    assert (caught.value.expected, caught.value.actual, caught.value.dim_name) == (5, 6, "batch")


@pytest.mark.parametrize("dim", [Dim.missing, Dim.inner.missing, Dim.wrong])
def test_dims_that_cannot_be_read_are_validation_errors(dim):
    annotation = Tensor[float32_t, ("N", dim)]
    for instance in (Config(), None):
        with pytest.raises(ValidationError, match="in the shape of x"):
            annotation.validate("x", torch.ones(2, 4), {}, instance)
        result = annotation.validate_result("x", torch.ones(2, 4), {}, instance)
        assert isinstance(result.unwrap_err(), ValidationError)


def test_dim_itself_says_what_is_wrong():
    assert Dim.hidden.resolve(Config()) == 4
    for dim, kind in ((Dim.missing, AttributeError), (Dim.wrong, TypeError)):
        with pytest.raises(kind):
            dim.resolve(Config())
    with pytest.raises(ValueError, match="an instance"):
        Dim.hidden.resolve(None)
    assert repr(Dim.a.b) == "self.a.b"


def test_devices():
    anywhere = torch.ones(1, device="meta")
    assert Tensor[float32_t, None, "cpu"].validate("x", torch.ones(1))
    assert Tensor[float32_t, None, "cpu:0"].validate("x", torch.ones(1))
    with pytest.raises(DeviceMismatchError, match="on cuda, got it on cpu"):
        Tensor[float32_t, None, "cuda"].validate("x", torch.ones(1))
    assert Tensor[float32_t, None, torch.device("meta")].validate("x", anywhere)

    class OnCuda(torch.Tensor):
        device = torch.device("cuda", 1)

    far = torch.ones(1).as_subclass(OnCuda)
    assert Tensor[float32_t, None, "cuda"].validate("x", far)
    assert Tensor[float32_t, None, "cuda:1"].validate("x", far)
    with pytest.raises(DeviceMismatchError):
        Tensor[float32_t, None, "cuda:0"].validate("x", far)


def test_requires_grad_and_other_things():
    annotation = Tensor[float32_t, None, None, True]
    with pytest.raises(ValidationError, match="requires_grad=True"):
        annotation.validate("x", torch.ones(1))
    assert annotation.validate("x", torch.ones(1, requires_grad=True))
    with pytest.raises(TypeMismatchError, match="to be a tensor, got list"):
        annotation.validate("x", [1.0])
    assert annotation.validate_result("x", torch.ones(1, requires_grad=True)).unwrap() is True


def test_type_cast():
    result = type_cast[float32_t](torch.tensor([1, 2]))
    assert result.is_ok()
    assert torch.equal(result.unwrap(), torch.tensor([1.0, 2.0]))
    assert type_cast[torch.int8](torch.ones(2)).unwrap().dtype is torch.int8
    assert isinstance(type_cast[float32_t]("x").unwrap_err(), ValidationError)
    with pytest.raises(TypeError, match=r"expected a torch\.dtype"):
        type_cast["float32"]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_can_be_hashed_compared_and_pickled(kind):
    fields = dict.fromkeys(kind.FIELDS, 1)
    error = kind(message="m", context={"k": 2}, **fields)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again, hash(again)) == (kind, error, hash(error))
    assert again != kind("m")
    assert str(again) == "m (k=2)"
    assert repr(kind("m")) == f"{kind.__name__}('m', context={{}})"
    assert isinstance(error, ValidationError)
    assert isinstance(error, ValueError)
    assert hash(kind("m")) == hash(kind("m"))
    with pytest.raises(TypeError):
        kind("m", nothing=1)


def test_fields_by_position_as_documented():
    error = DTypeMismatchError("m", {}, torch.float32, torch.int64, "x", "forward")
    assert (error.expected, error.actual, error.parameter, error.function) == (
        torch.float32,
        torch.int64,
        "x",
        "forward",
    )
    assert InvalidParameterError("m", num_errors=3).num_errors == 3
