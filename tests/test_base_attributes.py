"""Class attributes and keywords of a wrong type, and names that are nearly known ones."""

import logging

import pytest
import torch

from opguard import OpGuardBase

CPU = {"device_override": "cpu"}


class Plain(OpGuardBase):
    NAME = "plain"
    MODEL_ID = "."
    DETECTOR_TYPE = torch.nn.Identity


def with_attributes(**attributes):
    return type("Changed", (Plain,), attributes)


@pytest.mark.parametrize("value", ["False", 1, None])
@pytest.mark.parametrize(
    "name",
    [
        "NEED_GRADS",
        "IS_CALLABLE",
        "USE_SAFETENSORS",
        "SKIP_TO_DEVICE",
        "SKIP_TO_DTYPE",
        "DEFAULT_QUANT_USE_DOUBLE",
    ],
)
def test_a_switch_that_is_no_bool_is_refused_when_the_class_is_made(name, value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"^Changed\.{name}: expected True or False, got {kind};"):
        with_attributes(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("NAME", 3, TypeError),
        ("NAME", "a\0b", ValueError),
        ("NAME", "n" * 201, ValueError),
        ("REVISION", 1, TypeError),
        ("DETECTOR_TYPE", "AutoModel", TypeError),
        ("DETECTOR_TYPE", torch.ones(1), TypeError),
    ],
)
def test_a_wrong_value_is_refused_when_the_class_is_made(name, value, error):
    with pytest.raises(error, match=rf"^Changed\.{name}: expected .*, got .*; "):
        with_attributes(**{name: value})
    with_attributes(NAME="n" * 200, REVISION=None)


def test_a_function_in_the_class_body_is_a_detector_type():
    class Function(Plain):
        DETECTOR_TYPE = lambda model_id: torch.nn.Linear(4, len(model_id))

    with Function(**CPU) as model:
        assert model.detector.out_features == 1


SWITCHES = [
    name
    for name, default in OpGuardBase.__init__.__kwdefaults__.items()
    if isinstance(default, bool)
]


@pytest.mark.parametrize("name", [*SWITCHES, "quant_use_double_override"])
def test_a_keyword_that_is_no_bool_is_one_sentence(name):
    with pytest.raises(TypeError, match=rf"^Plain\({name}=\.\.\.\): expected True or False, got s"):
        Plain(**{name: "no"}, **CPU)


def test_the_name_of_a_quantization_is_no_configuration():
    with pytest.raises(TypeError, match=r"got the str 'nf4'; .* quant_type_override='nf4'$"):
        Plain(quant_config_override="nf4", **CPU)


@pytest.mark.parametrize(
    ("name", "value"),
    [("DTYPE_PREFERENCE", None), ("DTYPE_PREFERENCE", "half16"), ("DEFAULT_DEVICE", "gpu")],
)
def test_an_attribute_that_means_nothing_is_named(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^Changed\.{name}: expected .*, got "):
        with_attributes(**{name: value})()


def test_an_override_that_means_nothing_is_no_attributes_fault():
    with pytest.raises(ValueError, match=r"^device: expected"):
        Plain(device_override="gpu")


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        ("NEED_GRAD", True, "NEED_GRADS"),
        ("NEEDS_GRADS", True, "NEED_GRADS"),
        ("USE_SAFETENSOR", False, "USE_SAFETENSORS"),
        ("MODELID", "org/name", "MODEL_ID"),
        ("DTYPE_PREFERENCES", "fp16", "DTYPE_PREFERENCE"),
    ],
)
def test_a_near_miss_is_logged_with_what_was_meant(caplog, name, value, near):
    with_attributes(**{name: value})
    (said,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert f"Changed.{name}" in said.getMessage()
    assert f"did you mean {near}?" in said.getMessage()


def test_constants_of_ones_own_are_left_alone(caplog):
    with_attributes(
        VAE_TYPE=Plain,
        MODEL_IDS=["a"],
        NAMES=("a",),
        T5_MODEL_ID="a",
        MODEL_ID_2="b",
        PROCESSOR_TYPE=Plain,
        DEFAULT_DTYPE="fp16",
        SCALE=1.0,
        NEED_GRID=3,
    )
    assert caplog.records == []
