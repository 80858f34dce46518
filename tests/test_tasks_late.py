"""Classes of libraries imported when they are first read, and what is said where they are not."""

import importlib

import pytest

from opguard import OpGuardBase
from opguard.tasks._late import Late


def test_an_absent_library_is_one_sentence_with_its_extra():
    class Task(OpGuardBase):
        DETECTOR_TYPE = Late("no_such_library", "Model", extra="hf")

    with pytest.raises(ImportError) as caught:
        Task.DETECTOR_TYPE
    assert str(caught.value) == (
        "Task: expected the library no_such_library, it is not installed; install opguard[hf]"
    )


def test_what_an_installed_library_lacks_is_its_own_to_say(monkeypatch, tmp_path):
    """To install the library again would not help."""
    (tmp_path / "a_library.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()

    class Task(OpGuardBase):
        DETECTOR_TYPE = Late("a_library", "Model", extra="hf")

    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_dependency'$"):
        Task.DETECTOR_TYPE
