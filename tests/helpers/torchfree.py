"""Running tests/torchfree in another process: another interpreter, or under an instrument."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from checkout import TESTS

FOLDER = TESTS / "torchfree"
# All of them pure Python, so that any interpreter can import this environment's copies.
PYTEST_PARTS = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py")
SETTINGS = """\
[pytest]
filterwarnings = error
markers =
    smoke: seconds, no GPU, no network
    slow: not under valgrind
"""


def borrow_pytest(folder: Path) -> Path:
    """A folder for PYTHONPATH that holds pytest and nothing else: no torch, no opguard."""
    folder.mkdir()
    for name in PYTEST_PARTS:
        spec = find_spec(name)
        assert spec is not None, name
        found = spec.submodule_search_locations
        source = Path(found[0]) if found else Path(str(spec.origin))
        (folder / source.name).symlink_to(source)
    return folder


def bare_interpreter() -> str:
    """The interpreter this virtual environment was made from: no torch on its path."""
    return str(getattr(sys, "_base_executable", sys.executable))


def run_torchfree(
    python: str,
    extension: Path,
    folder: Path,
    *options: str,
    prefix: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """pytest over tests/torchfree with the given ``_C``; ``folder`` is a fresh temporary one."""
    folder.mkdir(exist_ok=True)
    settings = folder / "pytest.ini"
    settings.write_text(SETTINGS)
    command = [*prefix, python, "-m", "pytest", "-q", "-x", "-c", str(settings)]
    command += ["--rootdir", str(folder), "--confcutdir", str(FOLDER), "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", "--tb=short", *options, str(FOLDER)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "COV"))}
    settled = {
        "PYTHONPATH": str(borrow_pytest(folder / "path")),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OPGUARD_C": str(extension),
    }
    return subprocess.run(
        command,
        env={**clean, **settled, **(env or {})},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def other_pythons() -> dict[tuple[int, int], str]:
    """One interpreter of each other CPython >= 3.11 with a GIL, from PATH and from pyenv."""
    candidates = [
        *sorted(Path.home().glob(".pyenv/versions/*/bin/python")),
        *(shutil.which(f"python3.{minor}") for minor in range(11, 20)),
    ]
    probe = (
        "import sys, sysconfig; print(sys.version_info[0], sys.version_info[1],"
        " sys.implementation.name, sysconfig.get_config_var('Py_GIL_DISABLED') or 0)"
    )
    found: dict[tuple[int, int], str] = {}
    for candidate in candidates:
        if candidate is None:
            continue
        try:
            told = subprocess.run(
                [str(candidate), "-c", probe],
                capture_output=True,
                text=True,
                check=False,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        words = told.stdout.split()
        if told.returncode or len(words) != 4 or words[2:] != ["cpython", "0"]:
            continue
        version = (int(words[0]), int(words[1]))
        if version >= (3, 11) and version != sys.version_info[:2]:
            found.setdefault(version, str(candidate))
    return found
