"""The smoke tests of an installed opguard: ``opguard selftest`` or ``smoke()`` in a notebook.

The tests themselves travel in the wheel as data (``opguard/_smoke``); pytest comes with the extra
``test``. They run in a process of their own, so that a notebook's state cannot colour them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main", "smoke"]

MARKERS = """markers =
    smoke: seconds, no GPU, no network
    slow: needs 4 GB of device memory or more than ten seconds
    large: needs 8 GB of device memory
    trivial: a pass-through model, for profiling the guard itself
    full: everything
"""
NO_PYTEST = (
    "expected pytest to run opguard's smoke tests, it is not installed; "
    "run: python -m pip install 'opguard[test]'"
)


def _folder() -> Path:
    """Where the smoke files are: inside the wheel, or beside the sources in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_smoke"
    return installed if installed.is_dir() else package.parents[1] / "tests" / "smoke"


def _environment() -> dict[str, str]:
    """This process's environment, in which the tests find this very opguard from any folder."""
    given = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    own = str(Path(__file__).resolve().parents[1])
    paths = [*given, own] if os.environ.get("PYTHONPATH") else [own]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def main(arguments: Sequence[str] = ()) -> int:
    """Runs the smoke tests, printing as pytest does; returns pytest's exit status (0 passed).

    Args:
        arguments: more arguments for pytest, for example ``["-m", "trivial", "-v"]``.
    """
    if importlib.util.find_spec("pytest") is None:
        print(NO_PYTEST, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        # A configuration of our own: the one of the folder the user stands in says nothing here.
        settings = Path(scratch) / "pytest.ini"
        settings.write_text(f"[pytest]\nfilterwarnings = error\n{MARKERS}", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", str(_folder()), "-m", "smoke", "-q"]
        command += ["-c", str(settings), "--rootdir", scratch, "--strict-markers"]
        command += ["--import-mode=importlib", "-p", "no:cacheprovider", *arguments]
        with subprocess.Popen(
            command,
            cwd=scratch,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:  # through print: a notebook shows it under its cell
                print(line, end="", flush=True)
    return process.returncode


def smoke() -> None:
    """Runs the smoke tests of this installation and prints their result.

    Raises:
        RuntimeError: a test failed, or pytest is missing.
    """
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError(NO_PYTEST)
    status = main()
    if status:
        raise RuntimeError(
            f"expected opguard's smoke tests to pass, pytest ended with status {status}; "
            "its output above names the test that failed"
        )
