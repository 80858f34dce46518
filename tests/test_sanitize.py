"""Sanitizing with torch: real tensors, the formatters people use, IPython, leaks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from opguard import _C
from opguard.sanitizing import ObjectSummary, TensorSummary, sanitize_exception

ENV = {
    **os.environ,
    "COLUMNS": "100",
    "NO_COLOR": "1",
    "PYTHONPATH": str(Path(_C.__file__).parents[1]),
}
ISOLATED = Path(__file__).parent / "isolated"


def run_isolated(name: str, *args: str, timeout: int = 120) -> str:
    done = subprocess.run(
        [sys.executable, str(ISOLATED / name), *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=ENV,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activation = self.layer(x)
        raise RuntimeError("in forward", activation)


def caught(function, *args) -> BaseException:
    try:
        function(*args)
    except BaseException as error:
        return error
    raise AssertionError("expected a failure")


@pytest.mark.smoke
def test_model_and_tensors_are_freed(collected):
    refs = []

    def run() -> None:
        model, x = Model(), torch.ones(2, 4)
        refs.extend(weakref.ref(one) for one in (model, model.layer.weight, x))
        try:
            model(x)
        except RuntimeError as error:
            error.model = model
            error.batch = {"x": [x]}
            raise

    error = caught(run)
    assert sanitize_exception(error) is error
    assert [ref() for ref in refs] == [None] * 3
    message, activation = error.args
    assert message == "in forward"
    assert activation == TensorSummary(((2, 4), torch.float32, torch.device("cpu")))
    assert error.batch["x"][0].shape == (2, 4)
    assert isinstance(error.model, ObjectSummary)
    assert error.model.type.endswith("Model")
    (note,) = error.__notes__
    assert "    activation: [2, 4] float32 cpu, 32 bytes" in note
    assert "    x: [2, 4] float32 cpu, 32 bytes" in note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_kinds_of_tensors_in_the_note(dtype, device):
    def run() -> None:
        value = torch.zeros(3, dtype=dtype, device=device)
        raise ValueError(value)

    error = sanitize_exception(caught(run))
    assert error.args[0] == TensorSummary(((3,), dtype, torch.device(device)))
    assert f"value: [3] {str(dtype)[6:]} {device}, " in error.__notes__[0]


def test_odd_tensors_are_described():
    def run() -> None:
        sparse = torch.eye(3).to_sparse()
        scalar = torch.tensor(3.0)
        parameter = torch.nn.Parameter(torch.ones(2))
        raise ValueError(sparse, scalar, parameter)

    error = sanitize_exception(caught(run))
    assert [one.shape for one in error.args] == [(3, 3), (), (2,)]
    assert all(name in error.__notes__[0] for name in ("sparse: [3, 3]", "scalar: []"))


def test_attribute_error_of_a_tensor(collected):
    """Fault A7."""
    tensor = torch.ones(2)
    gone = weakref.ref(tensor)
    error = caught(lambda held: held.nope, tensor)
    sanitize_exception(error)
    del tensor
    assert isinstance(error.obj, TensorSummary)
    assert gone() is None


def test_keep_and_deep():
    tensor = torch.ones(1)
    inner, outer = KeyError(tensor), ValueError(tensor)
    outer.__cause__ = inner
    sanitize_exception(outer, deep=False)
    assert inner.args[0] is tensor
    sanitize_exception(outer, keep=(KeyError,))
    assert inner.args[0] is tensor
    sanitize_exception(outer)
    assert isinstance(inner.args[0], TensorSummary)


def test_what_is_handled_is_found_by_itself():
    tensor = torch.ones(1)
    stored = ValueError(tensor)
    stored.__context__ = handled = KeyError(tensor)
    try:
        raise handled
    except KeyError:
        sanitize_exception(stored)
    assert handled.args[0] is tensor
    assert isinstance(stored.args[0], TensorSummary)


def test_a_part_of_what_is_handled_can_be_sanitized():
    inner = ValueError(torch.ones(1))
    try:
        raise KeyError from inner
    except KeyError as error:
        sanitize_exception(error.__cause__)
    assert isinstance(inner.args[0], TensorSummary)


def test_summaries_pickle_and_compare():
    import copy
    import pickle

    one = TensorSummary(((1,), torch.float32, torch.device("cpu")))
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    assert repr(one).startswith("opguard.sanitizing.TensorSummary(shape=(1,), dtype=torch.float32")


def test_formatters_write_the_same_text():
    """traceback, IPython in every mode and rich; a wrong tb_lasti would never end."""
    pytest.importorskip("IPython")
    pytest.importorskip("rich")
    raw = run_isolated("format_sanitized.py", "raw")
    assert "ZeroDivisionError" in raw
    assert raw.count("\n--- ") == 7
    assert run_isolated("format_sanitized.py", "sanitized") == raw


FAILING_TEST = """
from opguard import _C

def hidden(value):
    __tracebackhide__ = True
    deeper(value)

def deeper(value):
    raise ValueError(
        "wrong", value)

def test_fails():
    try:
        hidden(1)
    except ValueError as error:
        {sanitize}
        raise
"""


SANITIZE = ("pass", "_C.sanitize_exception(error)")
STYLES = ("long", "short", "native")
RUN_EACH = """
import contextlib, io, json, os, sys
import pytest

shown = {}
for style in sys.argv[1].split(","):
    for folder in sorted(os.listdir()):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = pytest.main(
                ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--tb={style}",
                 "--import-mode=importlib", "--rootdir", ".", f"{folder}/test_sample.py"]
            )
        shown[style + folder] = [int(status), out.getvalue()]
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def shown_by_pytest(tmp_path_factory):
    """Style and folder -> status and text; the folders differ in the one call. One import of torch
    for all of them."""
    root = tmp_path_factory.mktemp("shown")
    for number, sanitize in enumerate(SANITIZE):
        path = root / f"version_{number}" / "test_sample.py"
        path.parent.mkdir()
        path.write_text(FAILING_TEST.format(sanitize=sanitize))
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, ",".join(STYLES)],
        capture_output=True, text=True, check=False, timeout=120, cwd=root, env=ENV,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("style", STYLES)
def test_pytest_shows_the_same_failure(shown_by_pytest, style):
    shown = []
    for number, sanitize in enumerate(SANITIZE):
        status, text = shown_by_pytest[f"{style}version_{number}"]
        assert status == 1, text
        text = text.replace(f"version_{number}", "version_N")
        lines = text.replace(sanitize, "SANITIZE").splitlines()
        # Long style starts each function with its arguments, which are values.
        shown.append([line for line in lines if not line.startswith("value = ")
                      and "1 failed in" not in line])  # fmt: skip
    assert any("deeper" in line for line in shown[0])
    passing = any(line.strip(" >") == "deeper(value)" for line in shown[0])
    assert passing == (style == "native"), "the hidden frame"
    assert [x for x in shown[1] if x.strip()] == [x for x in shown[0] if x.strip()]


@pytest.fixture(scope="module")
def cells():
    pytest.importorskip("IPython")
    return json.loads(run_isolated("ipython_cells.py").splitlines()[-1])


@pytest.mark.parametrize("cell", ["error", "interrupt", "attribute", "chained", "async"])
def test_nothing_stays_alive_after_a_failing_cell(cells, cell):
    """Faults A2, A3, A5 in a notebook: model, weight, input and activation are freed."""
    assert cells["bare"] == [True] * 5
    assert cells[cell] == [False] * 5


@pytest.mark.parametrize("cell", ["error", "interrupt", "attribute", "chained", "async"])
def test_a_failing_cell_still_tells_where(cells, cell):
    for name in (":shown", ":tb"):
        text = re.sub(r"\x1b\[[\d;]*m", "", cells[cell + name])
        assert "outer(" in text
        assert "helper" in text
        assert "forward" in text
    assert "activation: [2, 4] float32 cpu, 32 bytes" in cells[cell + ":tb"]


def test_load_ext_looks_after_every_cell(cells):
    assert cells["every"] == [False] * 5
    assert cells["unloaded"] == [True] * 5
    assert cells["registered_once"]


def test_keep_frames_keeps_everything(monkeypatch):
    """Fault A11: a debugger can have all of it."""
    monkeypatch.setenv("OPGUARD_KEEP_FRAMES", "1")
    error = caught(Model(), torch.ones(2, 4))
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    _C.sanitize_exit(error)
    assert last.tb_frame.f_locals["activation"] is error.args[1]


def test_loguru_like_logging_does_not_pin(collected):
    """Fault A1 with a real formatter that reads f_locals before the guard cleans up."""
    import traceback

    refs = []

    def run() -> None:
        model, x = Model(), torch.ones(2, 4)
        refs.extend([weakref.ref(model), weakref.ref(x)])
        try:
            model(x)
        except RuntimeError as error:
            traceback.TracebackException.from_exception(error, capture_locals=True)
            raise

    sanitize_exception(caught(run))
    assert [ref() for ref in refs] == [None, None]


def test_nothing_leaks():
    run_isolated("leak_sanitize.py")
