"""The C module on its own: no torch, no opguard package, any Python from 3.11 on.

The same files run in the main test run, under ASan and UBSan, under valgrind, and on every other
Python that is found. They may use pytest, the fixture ``C`` and ``fakes.py``, and nothing else.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent
# `import fakes` in a test: importlib mode puts no test folder on sys.path.
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """OPGUARD_LEAVE_OUT=FILE: leaves out the tests named in it, which are too long for valgrind."""
    listed = os.environ.get("OPGUARD_LEAVE_OUT")
    if listed:
        names = set(Path(listed).read_text().split("\n"))
        left_out = [item for item in items if item.name in names]
        items[:] = [item for item in items if item.name not in names]
        config.hook.pytest_deselected(items=left_out)


def extension_path() -> Path:
    """OPGUARD_C, else the installed package's file, else the one built in place."""
    named = os.environ.get("OPGUARD_C")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("opguard")  # looks the package up, does not import it
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    folders.append(str(FOLDER.parents[1] / "python" / "opguard"))
    for folder in folders:
        for found in sorted(Path(folder).glob("_C*.so")):
            return found
    pytest.fail("expected opguard._C to be built, no _C*.so found; run: python -m pip install .")


def load_extension() -> ModuleType:
    """A fresh module object with a state of its own; two of them do not see each other."""
    path = str(extension_path())
    loader = ExtensionFileLoader("opguard._C", path)
    spec = importlib.util.spec_from_file_location("opguard._C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def C() -> ModuleType:
    """The bare ``_C`` of this test module, with no tensor classes bound yet."""
    return load_extension()


@pytest.fixture
def new_module() -> Callable[[], ModuleType]:
    """Makes further module objects, to drop or to compare."""
    return load_extension
