"""Instances of OpGuardBase: copied, pickled, sent to another process; made without super()."""

import copy
import dataclasses
import inspect
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

from opguard import OpGuardBase

CPU = {"device_override": "cpu"}
X = torch.ones(1, 4)
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda model, protocol=protocol: pickle.loads(
            pickle.dumps(model, protocol)
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


class Net(torch.nn.Linear):
    def __init__(self, model_id):
        super().__init__(4, 4)
        self.model_id = model_id

    def __reduce_ex__(self, protocol):
        raise AssertionError("expected the model not to travel")


class Plain(OpGuardBase):
    NAME = "plain"
    MODEL_ID = "."
    DETECTOR_TYPE = Net


class Own(Plain):
    """Has arguments of its own, positional ones too, and hides keywords of the base."""

    def __init__(self, scale, *, shift=0.0, **kwargs):
        super().__init__(dtype_override="fp64", **kwargs)
        self.scale, self.shift = scale, shift


# --- made again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_made_with_the_same_arguments_and_is_not_loaded(way):
    one = Own(2.0, shift=1.0, keep_warm=True, **CPU)
    one(input_raw=X.double())
    two = COPIES[way](one)
    assert type(two) is Own
    assert (two.scale, two.shift, two.dtype) == (2.0, 1.0, torch.float64)
    assert two.device == torch.device("cpu")
    assert (one.is_loaded, two.is_loaded) == (True, False)
    assert two(input_raw=X.double()).shape == (1, 4)
    assert two.is_loaded  # it keeps warm as the other does
    assert two.detector is not one.detector


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_the_model_id_of_its_instance(way, tmp_path):
    one = Plain(**CPU)
    one.model_id = tmp_path
    one.use_safetensors = True
    two = COPIES[way](COPIES[way](one))
    assert two.model_id == str(tmp_path)
    assert two.detector.model_id == str(tmp_path)


def test_a_copy_matches_what_its_instance_matched():
    """The instance that was matched is not there any more, and chose nothing for some."""

    class Mapped(Plain):
        DEFAULT_DEVICE_MAP = {"": "meta"}  # noqa: RUF012

    one = Mapped(instance_to_match=Plain(dtype_override="fp64", **CPU))
    two = copy.deepcopy(one)
    assert (two.dtype, two.device, two.device_map) == (torch.float64, torch.device("cpu"), None)


def test_a_copy_shares_no_lock_and_no_user():
    with Plain(**CPU) as one:
        two = copy.copy(one)
        two(input_raw=X)
        assert not two.is_loaded
        assert one.is_loaded


def test_an_instance_goes_to_a_spawned_process(tmp_path):
    (tmp_path / "models.py").write_text(
        textwrap.dedent("""
        import torch
        from opguard import OpGuardBase

        class Net(torch.nn.Linear):
            def __init__(self, model_id):
                super().__init__(4, 4)
                torch.nn.init.constant_(self.weight, 1.0)
                torch.nn.init.zeros_(self.bias)

        class Scaled(OpGuardBase):
            NAME, MODEL_ID, DETECTOR_TYPE = "scaled", ".", Net

            def __init__(self, scale, **kwargs):
                super().__init__(**kwargs)
                self.scale = scale

            def _postprocess(self, *, output_raw):
                return output_raw * self.scale

        def work(model, x):
            return model.is_loaded, model(input_raw=x).tolist()
        """)
    )
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
        import multiprocessing, torch, models

        if __name__ == "__main__":
            model = models.Scaled(3.0, device_override="cpu", keep_warm=True)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(models.work, (model, torch.ones(1, 4))))
        """)
    )
    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "(False, [[12.0, 12.0, 12.0, 12.0]])\n", done.stderr


def test_the_signature_is_that_of_the_constructor():
    assert list(inspect.signature(Own).parameters) == ["scale", "shift", "kwargs"]
    assert "keep_warm" in inspect.signature(Plain).parameters
    assert list(inspect.signature(Plain(**CPU)).parameters) == ["args", "kwargs"]


# --- made without super().__init__() --------------------------------------------------------------


class Forgot(Plain):
    def __init__(self):
        self.scale = 2.0


@dataclasses.dataclass
class Data(Plain):
    scale: float = 2.0


USES = {
    "call": lambda model: model(input_raw=X),
    "with": lambda model: model.__enter__(),
    "lazy_loader_context": lambda model: model.lazy_loader_context().__enter__(),
    "detector": lambda model: model.detector,
    "processor": lambda model: model.processor,
    "extra_info": lambda model: model.extra_info,
    "free": lambda model: model.free(),
    "model_id": lambda model: model.model_id,
    "model_id =": lambda model: setattr(model, "model_id", "."),
    "use_safetensors =": lambda model: setattr(model, "use_safetensors", True),
    "copy": copy.copy,
    **{
        name: lambda model, name=name: getattr(model, name)
        for name in ("device", "device_list", "device_map", "dtype", "variant", "quant_config")
    },
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [Forgot, Data])
def test_without_the_bases_constructor_one_sentence_says_so(kind, use):
    sentence = (
        rf"^{kind.__name__}: expected OpGuardBase's constructor to have run, it has not; call "
        r"super\(\)\.__init__\(\.\.\.\) first"
    )
    with pytest.raises(RuntimeError, match=sentence) as caught:
        USES[use](kind())
    assert caught.value.__context__ is None


def test_too_early_in_the_own_constructor_is_the_same_sentence():
    class Early(Plain):
        def __init__(self):
            self.scale = 2.0 if self.device.type == "cpu" else 1.0
            super().__init__(**CPU)

    with pytest.raises(RuntimeError, match="Early: expected OpGuardBase's constructor to have run"):
        Early()


def test_a_dataclass_that_calls_it_is_fine():
    @dataclasses.dataclass
    class Whole(Plain):
        scale: float = 2.0

        def __post_init__(self):
            super().__init__(**CPU)

    assert Whole(scale=3.0).scale == 3.0
    assert Whole()(input_raw=X).shape == (1, 4)
    assert copy.copy(Whole(3.0)).scale == 3.0


@pytest.mark.parametrize("block", [Plain(**CPU), Plain(**CPU).lazy_loader_context()])
def test_exit_without_enter_is_one_sentence(block):
    with pytest.raises(RuntimeError, match=r"__exit__: expected a .*block that was entered"):
        block.__exit__(None, None, None)
    with block as model:  # and it is as good as before
        assert model.is_loaded
