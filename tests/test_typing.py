"""The types told are the types there are: _C.pyi against the module, mypy --strict over all."""

from __future__ import annotations

import subprocess
import sys

import pytest

from checkout import PYTHON, ROOT

pytestmark = pytest.mark.slow


def run(*command: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy")
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_stubs_agree_with_the_module():
    checked = run("mypy.stubtest", "opguard._C")
    assert checked.returncode == 0, checked.stdout[-4000:]


def test_the_package_under_mypy_strict(tmp_path):
    cache = f"--cache-dir={tmp_path}"
    files = [str(PYTHON / "opguard"), str(PYTHON / "pytest_opguard.py")]
    checked = run("mypy", "--strict", cache, *files)
    assert checked.returncode == 0, checked.stdout[-4000:]
