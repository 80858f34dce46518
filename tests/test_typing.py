"""The types told are the types there are: _C.pyi against the module, mypy --strict over all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from checkout import PYTHON, ROOT

pytestmark = pytest.mark.slow

# stubtest knows no --strict; with the same options it goes on from what mypy has read, and most of
# that is torch. Where they differ it reads again.
OPTIONS = f"""\
[mypy]
python_version = 3.11
mypy_path = {PYTHON}
incremental = True
cache_dir = {{cache}}
check_untyped_defs = True
disallow_any_generics = True
disallow_incomplete_defs = True
disallow_subclassing_any = True
disallow_untyped_calls = True
disallow_untyped_decorators = True
disallow_untyped_defs = True
extra_checks = True
implicit_reexport = False
strict_equality = True
warn_redundant_casts = True
warn_return_any = True
warn_unreachable = True
warn_unused_ignores = True
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy")
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def test_the_package_under_mypy_strict(cache):
    files = [str(PYTHON / "opguard"), str(PYTHON / "pytest_opguard.py")]
    checked = run("mypy", "--strict", f"--cache-dir={cache}", *files)
    assert checked.returncode == 0, checked.stdout[-4000:]


def test_stubs_agree_with_the_module(cache, tmp_path):
    options = tmp_path / "mypy.ini"
    options.write_text(OPTIONS.format(cache=cache))
    checked = run("mypy.stubtest", "--mypy-config-file", str(options), "opguard._C")
    assert checked.returncode == 0, checked.stdout[-4000:]
