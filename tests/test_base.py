"""OpGuardBase: loading, calling, freeing, and what a failure in any of its parts leaves behind."""

import gc
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch

import opguard
from opguard.base import OpGuardBase

CPU = {"device_override": "cpu"}


class Layer(torch.nn.Module):
    """A plain module: no dtype attribute, no from_pretrained."""

    def __init__(self, model_id):
        super().__init__()
        self.model_id = model_id
        self.linear = torch.nn.Linear(4, 4)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x))


class Plain(OpGuardBase):
    NAME = "plain"
    MODEL_ID = "."
    DETECTOR_TYPE = Layer


def alive(*references):
    return [reference() is not None for reference in references]


@pytest.fixture(autouse=True)
def _no_collector(collected):
    """What must be free is free without the cyclic collector."""


# The class's contract


@pytest.mark.parametrize("name", ["NAME", "MODEL_ID", "DETECTOR_TYPE"])
def test_a_missing_attribute_is_one_sentence(name):
    attributes = {"NAME": "n", "MODEL_ID": ".", "DETECTOR_TYPE": Layer}
    del attributes[name]
    incomplete = type("Incomplete", (OpGuardBase,), attributes)
    with pytest.raises(ValueError, match=rf"Incomplete\.{name}: expected .*; set it in the class"):
        incomplete()


class Pretrained(Layer):
    """Takes what from_pretrained takes, and remembers it."""

    @classmethod
    def from_pretrained(cls, model_id, **kwargs):
        model = cls(model_id)
        model.given = kwargs
        return model


def test_a_hub_id_needs_a_revision():
    attributes = {"NAME": "n", "MODEL_ID": "a/b", "DETECTOR_TYPE": Pretrained}
    hub = type("Hub", (OpGuardBase,), attributes)
    with pytest.raises(ValueError, match=r"Hub\.REVISION: expected .* hub id 'a/b'"):
        hub(**CPU)


def test_a_folder_that_is_not_there_is_one_sentence():
    class Missing(Plain):
        MODEL_ID = "/nowhere/at/all"
        DETECTOR_TYPE = Pretrained

    with pytest.raises(FileNotFoundError, match="MODEL_ID: expected a folder, '/nowhere/at/all'"):
        Missing(**CPU)


def test_empty_attributes_are_refused_when_the_class_is_made():
    with pytest.raises(ValueError, match=r"Empty\.NAME: expected a value"):
        type("Empty", (OpGuardBase,), {"NAME": ""})
    with pytest.raises(TypeError, match="expected a tuple of names, got str"):
        type("Skips", (OpGuardBase,), {"FROM_PRETRAINED_SKIP_KWARGS": "variant"})
    with pytest.raises(TypeError, match="expected a mapping, got list"):
        type("Adds", (OpGuardBase,), {"FROM_PRETRAINED_ADDITIONAL_KWARGS": []})


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_unknown_constructor_keyword_names_the_near_miss():
    """D7: and nothing is printed by __del__ of the instance that never was."""
    with pytest.raises(TypeError, match=r"got 'dtyp_override' \(did you mean 'dtype_override'\?\)"):
        Plain(dtyp_override="fp32")


def test_not_callable_is_enforced():
    class Part(Plain):
        IS_CALLABLE = False

    with pytest.raises(TypeError, match=r"Part\.IS_CALLABLE is False; hand its \.detector"):
        Part(**CPU)(input_raw=1)


def test_positional_input_is_one_sentence():
    with pytest.raises(TypeError, match=r"expected keywords only, got 1 positional; write input_"):
        Plain(**CPU)(torch.ones(1, 4))


# Lazy loading


def test_first_call_without_with_loads():
    """D1: a fresh object is called, outside any with and not kept warm."""
    model = Plain(**CPU)
    assert not model.is_loaded
    assert model(input_raw=torch.ones(1, 4)).shape == (1, 4)
    assert not model.is_loaded
    for _ in range(4):
        assert model(input_raw=torch.ones(1, 4)).shape == (1, 4)


def test_detector_of_a_fresh_object_is_loaded():
    """D1."""
    model = Plain(**CPU)
    assert isinstance(model.detector, Layer)
    assert model.is_loaded
    assert model.free()
    assert not model.is_loaded


def test_keep_warm_loads_once():
    model = Plain(keep_warm=True, **CPU)
    first = model.detector
    model(input_raw=torch.ones(1, 4))
    assert model.detector is first
    reference = weakref.ref(first)
    del first
    assert model.free()
    assert alive(reference) == [False]


def test_a_plain_module_is_a_detector():
    """D6: no dtype attribute is needed; it is placed and put in eval mode."""
    with Plain(dtype_override="fp64", **CPU) as model:
        assert model.detector.linear.weight.dtype == torch.float64
        assert not model.detector.training
        x = torch.ones(1, 4, dtype=torch.float64)
        assert torch.equal(model(input_raw=x), model(input_raw=x))


def test_a_falsy_detector_counts_as_loaded():
    """D6: an empty container is a model too."""
    loads = []

    class Empty(torch.nn.ModuleList):
        def forward(self, x):
            return x + 1

    class Falsy(OpGuardBase):
        NAME = "falsy"
        MODEL_ID = "."
        DETECTOR_TYPE = Empty

        def _load_detector(self):
            loads.append(1)
            return Empty()

        def _load_processor(self):
            return []

    with Falsy(**CPU) as model:
        assert not model.detector
        assert model(input_raw=torch.zeros(2)).tolist() == [1, 1]
        assert model.processor == []
    assert loads == [1]


def test_a_detector_type_may_be_any_callable():
    class Function(OpGuardBase):
        NAME = "function"
        MODEL_ID = "."

        @staticmethod
        def DETECTOR_TYPE(model_id):
            return lambda x: x * 3

    assert Function(**CPU)(input_raw=torch.ones(2)).tolist() == [3, 3]


def test_using_the_model_while_it_loads_is_one_sentence():
    class Loop(Plain):
        def _load_processor(self):
            return self.detector

    with pytest.raises(RuntimeError, match="expected the loading steps not to use the model"):
        Loop(**CPU)(input_raw=1)


def test_the_detector_step_may_use_the_processor():
    class Two(Plain):
        def _load_processor(self):
            return {"width": 4}

        def _load_detector(self):
            return torch.nn.Linear(self.processor["width"], 2)

    assert Two(**CPU)(input_raw=torch.ones(1, 4)).shape == (1, 2)


# Keywords to steps


class Routed(Plain):
    def _preprocess(self, *, input_raw, scale=1.0):
        return input_raw * scale

    def _predict(self, *, input_proc, steps=1):
        return input_proc + steps

    def _postprocess(self, *, output_raw, scale=1.0, as_list=False):
        result = output_raw / scale
        return result.tolist() if as_list else result


def test_keywords_reach_the_steps_that_name_them():
    model = Routed(keep_warm=True, **CPU)
    assert model(input_raw=torch.ones(2), scale=2.0, steps=2, as_list=True) == [2.0, 2.0]
    assert model(input_raw=torch.ones(2)).tolist() == [2.0, 2.0]


def test_an_unknown_call_keyword_names_the_near_miss():
    """D7: not dropped without a word; and the model is not loaded for it."""
    model = Routed(**CPU)
    with pytest.raises(TypeError, match=r"got 'step' \(did you mean 'steps'\?\)"):
        model(input_raw=torch.ones(2), step=3)
    assert not model.is_loaded


def test_signatures_are_read_once_a_class(monkeypatch):
    import inspect

    class Once(Routed):
        pass

    model = Once(keep_warm=True, **CPU)
    monkeypatch.setattr(inspect, "signature", lambda *a: pytest.fail("read again"))
    model(input_raw=torch.ones(2), scale=2.0)
    Once(**CPU)(input_raw=torch.ones(2), steps=1)


def test_a_step_with_open_keywords_takes_all():
    class Open(Plain):
        def _predict(self, *, input_proc, **options):
            return options

    assert Open(**CPU)(input_raw=1, anything=2) == {"anything": 2}


def test_an_overridden_caller_is_used():
    class Own(Plain):
        def _caller(self, *, input_raw, mode):
            return mode, self._predict(input_proc=input_raw).shape

    assert Own(**CPU)(input_raw=torch.ones(1, 4), mode="m") == ("m", (1, 4))
    with pytest.raises(TypeError, match=r"'mod' \(did you mean 'mode'\?\)"):
        Own(**CPU)(input_raw=1, mod="m")


def test_an_overridden_caller_that_passes_on_what_no_step_takes():
    class Passing(Routed):
        def _caller(self, *, input_raw, **kwargs):
            return super()._caller(input_raw=input_raw, **kwargs)

    assert Passing(**CPU)(input_raw=torch.ones(1), steps=4, as_list=True) == [5.0]
    with pytest.raises(TypeError, match=r"got 'step' \(did you mean 'steps'\?\)"):
        Passing(**CPU)(input_raw=torch.ones(1), step=4)


# Modes and outputs


def test_a_call_is_eval_without_gradients_and_detached():
    class Seen(Plain):
        def _predict(self, *, input_proc):
            seen.append((torch.is_grad_enabled(), self.detector.training))
            return self.detector.linear.weight

    seen = []
    with Seen(**CPU) as model:
        out = model(input_raw=0)
        assert out.data_ptr() != model.detector.linear.weight.data_ptr()
    assert seen == [(False, False)]
    assert not out.requires_grad
    assert not out.is_inference()


def test_need_grads_keeps_the_graph():
    class Grads(Plain):
        NEED_GRADS = True

    with Grads(**CPU) as model:
        out = model(input_raw=torch.ones(1, 4))
        out.sum().backward()
        assert model.detector.linear.weight.grad is not None


class Later:
    """Steps that would run after the call."""

    def yielded(self, *, input_proc):
        yield self.detector(input_proc)

    async def awaited(self, *, input_proc):
        return self.detector(input_proc)

    async def yielded_and_awaited(self, *, input_proc):
        yield self.detector(input_proc)

    def expressed(self, *, input_proc):
        return (self.detector(each) for each in input_proc)

    def mapped(self, *, input_proc):
        return map(self.detector, input_proc)


@pytest.mark.parametrize("need_grads", [False, True])
@pytest.mark.parametrize(
    ("step", "got", "way"),
    [
        ("yielded", "generator", "return list"),
        ("awaited", "coroutine", "write the steps with def"),
        ("yielded_and_awaited", "async_generator", "write the steps with def"),
        ("expressed", "generator", "return list"),
        ("mapped", "map", "return list"),
    ],
)
def test_an_answer_that_is_yet_to_be_worked_out_is_refused(step, got, way, need_grads):
    """H3: it would run without the guard, and load the model again."""
    attributes = {"_predict": getattr(Later, step), "NEED_GRADS": need_grads}
    model = type("Late", (Plain,), attributes)(**CPU)
    sentence = rf"^Late\(\): expected the steps to return a finished answer, got a {got}, .*; {way}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: coroutine was never awaited
        with pytest.raises(TypeError, match=sentence):
            model(input_raw=torch.ones(1, 4))
        gc.collect()
    assert not model.is_loaded


def test_a_generator_that_a_step_uses_up_is_fine():
    class Summed(Plain):
        _predict = Later.yielded

        def _postprocess(self, *, output_raw):
            return [each.shape for each in output_raw]

    assert Summed(**CPU)(input_raw=torch.ones(1, 4)) == [
        Plain(**CPU)(input_raw=torch.ones(1, 4)).shape
    ]


def test_detach_outputs_false_is_respected():
    """D7."""
    with Plain(detach_outputs=False, **CPU) as model:
        assert model(input_raw=torch.ones(1, 4)).is_inference()


def test_default_steps_use_the_processor():
    """D7: the default _postprocess calls the processor's postprocess."""

    class Processor:
        def preprocess(self, x):
            return {"x": x + 1}

        def postprocess(self, x):
            return ("done", x)

    class Processed(Plain):
        def _load_processor(self):
            return Processor()

    done, out = Processed(**CPU)(input_raw=torch.ones(1, 4))
    assert done == "done"
    assert out.shape == (1, 4)


# Contexts and threads


def test_nested_with_frees_at_the_outermost_end():
    """D8."""
    model = Plain(**CPU)
    with model:
        first = model.detector
        with model:
            model(input_raw=torch.ones(1, 4))
        assert model.detector is first
        assert model(input_raw=torch.ones(1, 4)).shape == (1, 4)
        first = weakref.ref(first)
    assert alive(first) == [False]


def test_entered_again_and_again():
    """D2: the same object is used for many blocks."""
    model = Plain(**CPU)
    for _ in range(3):
        with model:
            assert model(input_raw=torch.ones(1, 4)).shape == (1, 4)
        assert not model.is_loaded


def test_free_inside_with_waits_for_its_end():
    with Plain(**CPU) as model:
        assert not model.free()
        assert model(input_raw=torch.ones(1, 4)).shape == (1, 4)
    assert not model.is_loaded


def test_no_thread_frees_under_another():
    """D8: one call is held inside the model while another begins and ends."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Plain):
        def _predict(self, *, input_proc, wait=False):
            if wait:
                inside.set()
                assert go_on.wait(30)
            return self._detector(input_proc)

    model, results = Slow(**CPU), []

    def held():
        results.append(model(input_raw=torch.ones(1, 4), wait=True))

    thread = threading.Thread(target=held)
    thread.start()
    assert inside.wait(30)
    assert model(input_raw=torch.ones(2, 4)).shape == (2, 4)
    assert model.is_loaded
    assert not model.free()
    go_on.set()
    thread.join(30)
    assert results[0].shape == (1, 4)
    assert not model.is_loaded


def test_first_call_of_many_threads_loads_once():
    loads, start = [], threading.Barrier(8)

    class Counted(Plain):
        def _load_processor(self):
            loads.append(threading.get_ident())

    model, results = Counted(keep_warm=False, **CPU), []

    def call():
        start.wait(30)
        with model:
            start.wait(30)
            results.append(model(input_raw=torch.ones(1, 4)).shape)
            start.wait(30)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [(1, 4)] * 8
    assert len(loads) == 1
    assert not model.is_loaded


def test_threads_that_wait_for_the_first_load_share_it():
    loads = []

    class Slow(Plain):
        def _load_detector(self, **kwargs):
            loads.append(threading.get_ident())
            end = time.monotonic() + 30
            while len(loads) == 1 and self._coming < 4 and time.monotonic() < end:
                time.sleep(0.001)
            return super()._load_detector(**kwargs)

    instance, answers = Slow(**CPU), []
    threads = [
        threading.Thread(target=lambda: answers.append(instance(input_raw=torch.ones(1, 4))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 4
    assert len(loads) == 1
    assert not instance.is_loaded


def test_lazy_calls_of_many_threads():
    """D8: 4 threads load, use and free one lazily managed instance."""
    model, errors = Plain(**CPU), []

    def call():
        try:
            for _ in range(25):
                assert model(input_raw=torch.ones(1, 4)).shape == (1, 4)
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert not model.is_loaded


# Failures: nothing is alive because of them, while the exception is held


class Failing(Plain):
    """Fails in one chosen part; each part's frame holds a tensor that must not survive."""

    where = ""
    error: type[BaseException] = RuntimeError

    def _fail(self, part, *held):
        local = torch.ones(64)
        self.seen.append(weakref.ref(local))
        if part == self.where:
            raise self.error(f"in {part}")

    def __init__(self, seen, **kwargs):
        self.seen = seen
        super().__init__(**CPU, **kwargs)

    def _load_processor(self):
        big = Layer(".")
        self.seen.append(weakref.ref(big))
        self._fail("processor", big)

    def _load_detector(self):
        model = Layer(".")
        self.seen.append(weakref.ref(model))
        self._fail("detector", model)
        return model

    def _preprocess(self, *, input_raw):
        made = input_raw + 1
        self.seen.append(weakref.ref(made))
        self._fail("preprocess")
        return made

    def _predict(self, *, input_proc):
        activation = self._detector(input_proc)
        self.seen.append(weakref.ref(activation))
        self._fail("predict")
        return activation

    def _postprocess(self, *, output_raw):
        made = output_raw + 1
        self.seen.append(weakref.ref(made))
        self._fail("postprocess")
        return made


PARTS = ["processor", "detector", "preprocess", "predict", "postprocess"]


def caught(function):
    """The exception that ``function`` ends in, held; its caller's frame holds nothing else."""
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("expected a failure")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("way", ["call", "with", "warm"])
@pytest.mark.parametrize("part", PARTS)
def test_a_failure_in_any_part_leaves_nothing_alive(part, way, error):
    """A3, A4, A5."""
    seen = []
    kind = type("Kind", (Failing,), {"where": part, "error": error})

    def call():
        kind(seen)(input_raw=torch.ones(3, 4))

    def block():
        with kind(seen) as model:
            model(input_raw=torch.ones(3, 4))

    def warm():
        kind(seen, keep_warm=True)(input_raw=torch.ones(3, 4))

    held = caught({"call": call, "with": block, "warm": warm}[way])
    assert isinstance(held, error)
    assert str(held) == f"in {part}"
    assert len(seen) >= 2
    assert not any(alive(*seen))
    frames = []
    traceback = held.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert "_fail" in frames


def test_the_calls_own_frames_keep_neither_input_nor_model():
    """A2: the input is the caller's; after it lets go, the held exception has no hold of it."""
    seen = []
    kind = type("Kind", (Failing,), {"where": "predict"})
    model, x = kind(seen), torch.ones(3, 4)
    references = [weakref.ref(x), weakref.ref(model)]
    held = None
    try:
        model(input_raw=x)
    except RuntimeError as error:
        held = error
    del model, x
    assert held is not None
    assert alive(*references) == [False, False]


def test_user_code_inside_with_leaves_nothing_alive():
    """A3: a helper's variable refers to the detector and fails outside any guarded call."""
    seen = []

    def helper(model):
        detector = model.detector
        activation = detector(torch.ones(3, 4))
        seen.extend([weakref.ref(detector), weakref.ref(activation)])
        raise ValueError("mine")

    def block():
        with Plain(**CPU) as model:
            helper(model)

    held = caught(block)
    assert isinstance(held, ValueError)
    assert alive(*seen) == [False, False]


def test_a_processor_that_fails_leaves_nothing_alive():
    """A4: what the processor's loader made is gone, and the detector was not loaded."""
    seen = []
    kind = type("Kind", (Failing,), {"where": "processor"})
    held = caught(lambda: kind(seen).__enter__())
    assert str(held) == "in processor"
    assert alive(*seen) == [False, False]


def test_after_a_failed_load_the_next_call_loads():
    class Once(Plain):
        failed = False

        def _load_processor(self):
            if not self.failed:
                self.failed = True
                raise OSError("disk")

    model = Once(**CPU)
    with pytest.raises(OSError, match="disk"):
        model(input_raw=torch.ones(1, 4))
    assert not model.is_loaded
    assert model(input_raw=torch.ones(1, 4)).shape == (1, 4)


def test_what_the_caller_handles_is_left_alone():
    """A10: an exception handled around a guarded failure keeps its frames and their variables."""
    kind = type("Kind", (Failing,), {"where": "predict"})
    try:
        marker = torch.ones(2)
        raise KeyError(1)
    except KeyError as outer:
        with pytest.raises(RuntimeError) as info:
            kind([])(input_raw=torch.ones(3, 4))
        assert info.value.__context__ is outer
        assert outer.__traceback__ is not None
        assert outer.__traceback__.tb_frame is sys._getframe()
        assert marker.sum() == 2


def test_a_failure_to_clean_up_hides_no_failure_of_the_model(monkeypatch):
    """A12: the user's error is the one that arrives."""

    class Broken:
        def __init__(self, *args):
            raise OSError("device lost")

    kind = type("Kind", (Failing,), {"where": "predict"})
    monkeypatch.setattr("opguard._lifecycle._Free", Broken)
    assert str(caught(lambda: kind([])(input_raw=torch.ones(3, 4)))) == "in predict"

    def block():
        with kind([]):
            raise KeyError("mine")

    assert isinstance(caught(block), KeyError)


def test_sanitize_all_exceptions_false_is_respected():
    """D7: a debugger finds the variables."""
    kind = type("Kind", (Failing,), {"where": "predict"})
    with pytest.raises(RuntimeError) as info:
        kind([], sanitize_all_exceptions=False)(input_raw=torch.ones(3, 4))
    traceback = info.value.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    assert "local" in traceback.tb_frame.f_locals
    info.value.__traceback__ = None


def test_the_exception_tells_what_was_alive():
    kind = type("Kind", (Failing,), {"where": "predict"})
    held = caught(lambda: kind([])(input_raw=torch.ones(3, 4)))
    (note,) = held.__notes__
    assert "activation" in note
    assert "[3, 4]" in note


def test_del_never_raises(monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    model = Plain(keep_warm=True, **CPU)
    monkeypatch.setattr("opguard._lifecycle._Free", None)
    del model
    gc.collect()
    assert unraisable == []


def test_an_instance_that_goes_frees_its_model():
    model = Plain(keep_warm=True, **CPU)
    reference = weakref.ref(model.detector)
    del model
    assert alive(reference) == [False]


def test_nothing_leaks_by_slope():
    script = Path(__file__).parent / "isolated" / "leak_base.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(opguard.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Choices


def test_instance_to_match_that_is_none_is_one_sentence():
    with pytest.raises(TypeError, match=r"^instance_to_match: expected an instance .*; leave it"):
        Plain(instance_to_match=3, **CPU)


def test_instance_to_match_copies_the_choices():
    one = Plain(dtype_override="fp64", **CPU)
    two = Plain(instance_to_match=one)
    assert (
        (two.device, two.dtype) == (one.device, one.dtype) == (torch.device("cpu"), torch.float64)
    )


def test_properties():
    model = Plain(**CPU)
    assert model.classname == "Plain"
    assert model.use_safetensors is True
    assert model.device_list == [torch.device("cpu")]
    assert model.variant is None
    assert model.quant_config is None
    assert model.extra_info == {}
    model.model_id = "/tmp"
    assert str(model.model_id) == "/tmp"
    assert Plain.MODEL_ID == "."
    with pytest.raises(ValueError, match="use_safetensors: expected True"):
        model.use_safetensors = False


def test_half_precision_is_a_choice_on_the_cpu():
    assert Plain(**CPU).dtype in (torch.float32, torch.bfloat16)
    with Plain(dtype_override="bf16", **CPU) as model:
        assert model.detector.linear.weight.dtype == torch.bfloat16
