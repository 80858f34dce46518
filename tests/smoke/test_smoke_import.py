"""Is this installation whole: the shared objects load, the public names are there."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.smoke


def test_import():
    import opguard

    assert opguard.__version__
    missing = [name for name in opguard.__all__ if not hasattr(opguard, name)]
    assert missing == []


def test_import_is_light():
    heavy = "{'transformers', 'diffusers', 'rich', 'pydantic'}"
    code = f"import opguard, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_ops_are_registered():
    import torch

    import opguard  # noqa: F401  (registers them)

    assert hasattr(torch.ops.opguard, "pack")


def test_info_names_torch():
    import torch

    from opguard import info

    assert torch.__version__ in info.as_text()
