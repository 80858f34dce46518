"""OpGuardBase(flags=True): a call returns its answer and which samples met a NaN or Inf."""

import copy
import logging
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from opguard.base import OpGuardBase
from opguard.flags import CONFIG, err, flags
from opguard.repro import read

CPU = {"device_override": "cpu"}
NAN = float("nan")


class Layer(nn.Module):
    def __init__(self, model_id):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.linear(x))


class Plain(OpGuardBase):
    NAME = "plain"
    MODEL_ID = "."
    DETECTOR_TYPE = Layer


def bad(rows=3, row=1):
    x = torch.ones(rows, 4)
    x[row] = NAN
    return x


def flagged(f):
    return err.is_err(f).tolist()


def test_a_call_returns_its_answer_and_flags_on_the_cpu():
    with Plain(**CPU, flags=True) as model, Plain(**CPU) as bare:
        bare.detector.load_state_dict(model.detector.state_dict())
        y, f = model(input_raw=bad())
        assert torch.equal(y[0], bare(input_raw=bad())[0])
    assert (f.dtype, f.shape, f.device.type) == (torch.int64, (3, CONFIG.num_words), "cpu")
    assert flagged(f) == [False, True, False]
    names = [each.location_name.rpartition(".")[2] for each in flags.unpack(f, 1)]
    assert names == ["linear", "act"]
    assert not f.is_inference()
    assert not y.is_inference()


def test_without_flags_a_call_is_as_before():
    with Plain(**CPU) as model:
        assert isinstance(model(input_raw=bad()), torch.Tensor)
        assert not model.detector.linear._forward_hooks
        assert not model.detector._forward_pre_hooks


def test_a_class_asks_for_flags_and_a_keyword_has_the_last_word():
    class Flagged(Plain):
        DEFAULT_FLAGS = True

    assert len(Flagged(**CPU)(input_raw=bad())) == 2
    assert isinstance(Flagged(**CPU, flags=False)(input_raw=bad()), torch.Tensor)
    assert len(Flagged(**CPU, flags=None)(input_raw=bad())) == 2
    with pytest.raises(TypeError, match=r"^Plain\(flags=\.\.\.\): expected True or False, got str"):
        Plain(**CPU, flags="yes")
    with pytest.raises(TypeError, match=r"Wrong\.DEFAULT_FLAGS: expected True or False, got int"):
        type("Wrong", (Plain,), {"DEFAULT_FLAGS": 1})


def test_steps_of_the_classs_own():
    """The answer is what _postprocess made; calls of the model in one call add up."""

    class Steps(Plain):
        def _preprocess(self, *, input_raw, times=1):
            return [torch.tensor(input_raw)] * times

        def _predict(self, *, input_proc):
            return [self.detector(each / turn) for turn, each in enumerate(input_proc)]

        def _postprocess(self, *, output_raw):
            return {"last": output_raw[-1], "count": len(output_raw)}

    with Steps(**CPU, flags=True) as model:
        answer, f = model(input_raw=[[1.0] * 4, [0.0] * 4], times=2)
    assert answer["count"] == 2
    assert answer["last"].isfinite().all()
    assert flagged(f) == [True, True]  # of the first turn, which divides by 0


def test_methods_that_are_no_call_of_the_model():
    class Parts(Plain):
        def _predict(self, *, input_proc):
            return self.detector.act(self.detector.linear(input_proc))

    with Parts(**CPU, flags=True) as model:
        assert flagged(model(input_raw=bad(row=2))[1]) == [False, False, True]


def test_a_call_that_never_runs_the_model_has_no_samples():
    class Nothing(Plain):
        def _predict(self, *, input_proc):
            return "nothing"

    with Nothing(**CPU, flags=True) as model:
        model(input_raw=torch.ones(2, 4))
        answer, f = model(input_raw=torch.ones(2, 4))
    assert (answer, tuple(f.shape)) == ("nothing", (0, CONFIG.num_words))


class Pipeline:
    """Models beside each other, as diffusers has them, and no module itself."""

    def __init__(self, model_id):
        self.components = {"encode": nn.Linear(4, 4), "scale": 2.0, "decode": nn.Linear(4, 2)}

    def __call__(self, x):
        return self.components["decode"](self.components["encode"](x) * self.components["scale"])


def test_all_models_of_a_pipeline_are_checked():
    class Piped(Plain):
        DETECTOR_TYPE = Pipeline

    with Piped(**CPU, flags=True) as model:
        answer, f = model(input_raw=bad())
    assert answer.shape == (3, 2)
    names = [each.location_name for each in flags.unpack(f, 1)]
    assert [name.rpartition(".")[2] for name in names] == ["encode", "decode"]
    assert flagged(f) == [False, True, False]


def test_what_has_no_modules_is_one_sentence():
    class Function(Plain):
        DETECTOR_TYPE = staticmethod(lambda model_id: str.upper)

    with pytest.raises(TypeError, match=r"Function\(flags=True\): expected a detector that is a "):
        Function(**CPU, flags=True)(input_raw="text")
    assert Function(**CPU)(input_raw="text") == "TEXT"


def test_gradients_and_answers_that_are_not_detached():
    class Grads(Plain):
        NEED_GRADS = True

    with Grads(**CPU, flags=True) as model:
        y, f = model(input_raw=torch.ones(3, 4))
        y.sum().backward()
        assert model.detector.linear.weight.grad is not None
    assert (y.requires_grad, f.requires_grad, flagged(f)) == (True, False, [False] * 3)
    with Plain(**CPU, flags=True, detach_outputs=False) as model:
        assert flagged(model(input_raw=bad())[1]) == [False, True, False]


def test_autocast():
    with Plain(**CPU, flags=True, dtype_override="bf16") as model:
        y, f = model(input_raw=bad().bfloat16())
    assert (y.dtype, flagged(f)) == (torch.bfloat16, [False, True, False])


def test_a_failure_goes_on_and_the_next_call_is_clean():
    with Plain(**CPU, flags=True) as model:
        model(input_raw=bad())
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(input_raw=torch.ones(2, 3))
        assert flagged(model(input_raw=torch.ones(2, 4))[1]) == [False, False]


def test_an_unfinished_answer_is_refused_as_ever():
    class Lazy(Plain):
        def _postprocess(self, *, output_raw):
            return (each for each in output_raw)

    with (
        Lazy(**CPU, flags=True) as model,
        pytest.raises(TypeError, match="to return a finished answer, got a generator"),
    ):
        model(input_raw=torch.ones(2, 4))


def test_threads():
    found = {}
    with Plain(**CPU, flags=True) as model:

        def work(row):
            found[row] = [flagged(model(input_raw=bad(row=row))[1]) for _ in range(20)]

        threads = [threading.Thread(target=work, args=(row,)) for row in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert found == {row: [[each == row for each in range(3)]] * 20 for row in range(3)}


def test_a_freed_model_has_no_hooks_and_is_not_held():
    model = Plain(**CPU, flags=True, keep_warm=True)
    model(input_raw=bad())
    detector = model.detector
    model.free()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in detector.modules())
    gone = weakref.ref(detector)
    del detector
    assert gone() is None
    assert len(model(input_raw=bad())) == 2  # loaded and checked again


def test_a_copy_and_a_pickle_have_flags_too():
    model = Plain(**CPU, flags=True)
    assert len(copy.deepcopy(model)(input_raw=bad())) == 2
    assert len(pickle.loads(pickle.dumps(model))(input_raw=bad())) == 2


def test_flags_do_not_change_the_export(monkeypatch, tmp_path, caplog):
    """The same weights: with flags an export is neither made anew nor different."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")

    class Bert(OpGuardBase):
        NAME = "bert"
        MODEL_ID = tmp_path / "bert"
        DETECTOR_TYPE = transformers.BertModel

        def _postprocess(self, *, output_raw):
            return output_raw.last_hidden_state

    class Flagged(Bert):
        DEFAULT_FLAGS = True

    Flagged.__qualname__, Flagged.__name__ = Bert.__qualname__, Bert.__name__
    ids = torch.ones(2, 3, dtype=torch.long)
    with caplog.at_level(logging.INFO, "opguard"), Bert(**CPU) as model:
        expected = model(input_raw=ids)
    made = caplog.text.count("made")
    assert list((tmp_path / "exports").rglob("metadata.json"))
    for kind, given in ((Bert, {"flags": True}), (Flagged, {})):
        caplog.clear()
        with caplog.at_level(logging.INFO, "opguard"), kind(**CPU, **given) as model:
            y, f = model(input_raw=ids)
        assert caplog.text.count("made anew") == 0, caplog.text
        assert torch.equal(y, expected)
        assert flagged(f) == [False, False]
    assert made == 1


def test_a_failed_calls_bundle_knows_about_flags(monkeypatch, tmp_path):
    monkeypatch.setenv("OPGUARD_REPRO_DIR", str(tmp_path))
    with Plain(**CPU, flags=True) as model, pytest.raises(RuntimeError):
        model(input_raw=torch.ones(2, 3))
    (bundle,) = tmp_path.glob("*.safetensors")
    assert read(bundle).settings["flags"] is True
