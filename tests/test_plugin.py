"""The pytest plugin, run as a user's own suite runs it: in another process, on another folder."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

SUITE = """
import pytest
import torch

CACHE, KEPT = {}, []


class Box:
    pass


BOX = Box()


def test_clean(no_tensor_leak):
    x = torch.ones(3)
    assert (x * 2).sum() == 6


def test_cycle_is_no_leak(no_tensor_leak):
    x = [torch.ones(2)]
    x.append(x)


def test_in_a_global(no_tensor_leak):
    CACHE["a"] = [torch.ones(3, 4)]


def test_in_an_attribute(no_tensor_leak):
    BOX.layer = torch.nn.Linear(2, 2, bias=False)


def test_in_an_exception(no_tensor_leak):
    def fails():
        activation = torch.ones(7, dtype=torch.bfloat16)
        raise ValueError(len(activation))

    try:
        fails()
    except ValueError as error:
        KEPT.append(error)


def test_in_a_generator(no_tensor_leak):
    def steps():
        state = torch.ones(5)
        yield len(state)

    KEPT.append(steps())
    next(KEPT[-1])


def test_in_a_closure(no_tensor_leak):
    inside = torch.ones(9)
    KEPT.append(lambda: inside)


def test_allowed(no_tensor_leak):
    x = torch.ones(9)
    no_tensor_leak.allow(x)
    KEPT.append(x)


@pytest.fixture
def weights():
    return torch.ones(2)


def test_of_a_fixture_is_not_the_tests(weights, no_tensor_leak):
    assert weights.sum() == 2


def test_without_the_fixture():
    KEPT.append(torch.ones(4))


@pytest.mark.usefixtures("no_tensor_leak")
class TestInAClass:
    def test_method(self):
        self.kept = torch.ones(6)
        KEPT.append(self)


def test_that_fails_by_itself(no_tensor_leak):
    x = torch.ones(4)
    assert x.sum() == 5
"""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    import opguard

    paths = [str(Path(opguard.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def plugin_arguments() -> list[str]:
    """An installed opguard brings its plugin by itself; a checkout names it."""
    named = any(each.value == "pytest_opguard" for each in metadata.entry_points(group="pytest11"))
    return [] if named else ["-p", "pytest_opguard"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_suite.py").write_text(SUITE, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    done = run("-m", "pytest", "-q", "-rA", "-W", "error", *plugin_arguments(), cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "test_clean",
        "test_cycle_is_no_leak",
        "test_allowed",
        "test_of_a_fixture_is_not_the_tests",
        "test_without_the_fixture",
    ],
)
def test_passes(report, name):
    assert re.search(rf"PASSED \S*::{name}\b", report), report


@pytest.mark.parametrize(
    ("name", "tensor", "holder"),
    [
        (
            "test_in_a_global",
            "Tensor (3, 4) float32 on cpu",
            "list at [0] <- dict at 'a' <- global 'CACHE' of module test_suite",
        ),
        (
            "test_in_an_attribute",
            "Parameter (2, 2) float32 on cpu",
            "dict at 'weight' <- attribute '_parameters' of Linear <- attribute 'layer' of Box "
            "<- global 'BOX' of module test_suite",
        ),
        (
            "test_in_an_exception",
            "Tensor (7,) bfloat16 on cpu",
            "variable 'activation' of fails (",
        ),
        (
            "test_in_a_generator",
            "Tensor (5,) float32 on cpu",
            "<- global 'KEPT' of module test_suite",
        ),
        (
            "test_in_a_closure",
            "Tensor (9,) float32 on cpu",
            "test_in_a_closure.<locals>.<lambda>",
        ),
        ("test_method", "Tensor (6,) float32 on cpu", "attribute 'kept' of TestInAClass"),
    ],
)
def test_names_what_leaked_and_who_holds_it(report, name, tensor, holder):
    section = report.split(f"{name} _")[1].split("drop what holds them")[0]
    assert "1 tensor did" in section
    assert tensor in section
    assert holder in section


def test_a_failing_test_keeps_its_own_failure(report):
    section = report.split("test_that_fails_by_itself _")[1]
    assert "assert x.sum() == 5" in section
    assert "outlive" not in section.split("short test summary")[0]


def test_is_light_at_import(tmp_path):
    code = "import pytest_opguard, sys; print(sorted({'torch', 'opguard'} & set(sys.modules)))"
    done = run("-c", code, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
