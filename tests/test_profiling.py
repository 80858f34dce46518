"""opguard profile: times, operators and what the guard adds, of a class or of a failed call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

import opguard
from opguard import cli, profiling
from opguard.guards import locality


class Tiny(torch.nn.Linear):
    def __init__(self, model_id):
        super().__init__(16, 16)


class Model(opguard.OpGuardBase):
    NAME = "profiled"
    MODEL_ID = "none"
    DETECTOR_TYPE = Tiny
    calls = 0

    def _predict(self, *, input_proc, wait=0.0):
        type(self).calls += 1
        time.sleep(wait)
        return super()._predict(input_proc=input_proc)

    def example_inputs(self):
        return {"input_raw": torch.zeros(2, 16), "wait": 0.01}


class Bare(opguard.OpGuardBase):
    NAME = "no-example"
    MODEL_ID = "none"
    DETECTOR_TYPE = Tiny


HERE = f"{__file__}:Model"


def test_figures_are_those_of_the_calls():
    model = Model(device_override="cpu")
    found = profiling.profile(model, 3)
    assert 0.01 <= found.call < 1
    assert 0.01 <= found.bare < 1
    assert found.overhead == found.call - found.bare
    assert found.weights == (16 * 16 + 16) * 4
    assert found.peak is None
    assert (found.name, found.device, found.dtype) == ("Model", "cpu", "float32")
    assert not model.is_loaded
    named = {row["operator"]: row["calls"] for row in found.operators}
    assert named["aten::linear"] == 3
    assert found.operators == sorted(found.operators, key=lambda row: -row["seconds"])


def test_keywords_replace_the_example():
    found = profiling.profile(Model(device_override="cpu"), 2, input_raw=torch.zeros(1, 16))
    assert found.call < 0.01


def test_the_text_has_the_table():
    text = profiling.profile(Model(device_override="cpu"), 2).as_text()
    for wanted in ("Model on cpu as float32", "median of 2", "the guard adds", "aten::linear", "%"):
        assert wanted in text


def test_steps_that_fail_without_the_guard_have_no_bare_time():
    class Guarded(Model):
        def _predict(self, *, input_proc, wait=0.0):
            assert not self._detector.training
            if torch.is_inference_mode_enabled() and self.outside:
                raise RuntimeError("bare")
            return input_proc

        @property
        def outside(self):
            import sys

            return any(
                frame.f_code.co_name == "call" and "profiling" in frame.f_code.co_filename
                for frame in (sys._getframe(depth) for depth in range(2, 6))
            )

    found = profiling.profile(Guarded(device_override="cpu"), 1)
    assert found.bare is None
    assert found.overhead is None
    assert "bare" not in found.as_text()


def test_wrong_use_is_one_sentence():
    with pytest.raises(ValueError, match="at least 1 call, got 0"):
        profiling.profile(Model(), 0)
    with pytest.raises(NotImplementedError, match="example_inputs"):
        profiling.profile(Bare(device_override="cpu"))


def test_without_inputs_no_model_is_loaded():
    class Loading(Bare):
        def _load_detector(self, **kwargs):
            raise AssertionError("loaded")

    with pytest.raises(NotImplementedError, match="example_inputs"):
        profiling.profile(Loading(device_override="cpu"))


class Absent(Model):
    """A model that says, as libraries do, that no connection was had."""

    MODEL_ID = "nobody/absent-model"

    def _load_detector(self, **kwargs):
        if not locality.is_local():
            raise OSError("We couldn't connect")
        raise opguard.LocalFileMissing("expected it here; fetch it first with: hf download X")


@pytest.mark.parametrize("offline", [True, False])
def test_a_model_that_cannot_be_had_is_one_sentence_with_its_command(offline, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert cli.main(["profile", f"{__file__}:Absent", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "fetch it first with: hf download X" in said
    assert said.count("\n") == 1


def test_a_task_without_its_model_ends_in_the_sentence_with_its_command(tmp_path):
    """In a process of its own, in which diffusers says much else."""
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OPGUARD_EXPORTS": str(tmp_path / "e")}
    done = subprocess.run(
        [sys.executable, "-m", "opguard.cli", "profile", "opguard.tasks.vae:VaeTinyForSd"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | own,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("opguard profile: ")
    assert "fetch it first with: hf download madebyollin/taesd config.json" in last


def test_command_prints_writes_a_trace_and_json(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    arguments = ["profile", HERE, "--calls", "2", "--device", "cpu"]
    assert cli.main([*arguments, "--trace", str(trace)]) == 0
    assert "aten::linear" in capsys.readouterr().out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::linear" in names
    assert cli.main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["calls"] == 2
    assert shown["overhead"] == shown["call"] - shown["bare"]


def test_command_takes_the_call_from_a_repro_bundle(tmp_path, capsys, monkeypatch):
    path = tmp_path / "profiled_class.py"
    path.write_text(
        textwrap.dedent("""
        import torch, opguard
        class Tiny(torch.nn.Linear):
            def __init__(self, model_id): super().__init__(16, 16)
        class Model(opguard.OpGuardBase):
            NAME, MODEL_ID, DETECTOR_TYPE = "model", "none", Tiny
            broken = True
            def _predict(self, *, input_proc):
                if self.broken: raise ValueError("broken")
                return self._detector(input_proc)
        """)
    )
    from opguard import repro

    monkeypatch.setenv("OPGUARD_REPRO_DIR", str(tmp_path / "bundles"))
    with pytest.raises(ValueError, match="broken"):
        repro.load_class(f"{path}:Model")(device_override="cpu")(input_raw=torch.zeros(5, 16))
    (bundle,) = (tmp_path / "bundles").iterdir()
    path.write_text(path.read_text().replace("broken = True", "broken = False"))
    assert cli.main(["profile", f"{path}:Model", "--input", str(bundle), "--calls", "1"]) == 0
    assert "Model on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([HERE, "--calls", "0"], 2, "--calls: expected at least 1"),
        ([HERE, "--trace", "/no/such/folder/t.json"], 2, "--trace: expected a file"),
        ([HERE, "--input", "/no/such/file"], 2, "No such file"),
        ([f"{__file__}:Nope"], 2, "there is none; name where it is, as module:Class"),
        (["nocolon"], 2, "expected module:Class"),
        ([HERE, "--device", "nowhere"], 1, "nowhere"),
        ([f"{__file__}:Bare", "--device", "cpu"], 1, "example_inputs"),
    ],
)
def test_command_says_what_was_wrong(arguments, status, words, capsys):
    assert cli.main(["profile", *arguments]) == status
    said = capsys.readouterr().err
    assert words in said
    assert "--class" not in said  # that is replay's
    assert said.count("\n") == 1
