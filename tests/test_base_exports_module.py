"""A class and its export go through a program's life: a script, imported, moved into a package."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

SCRIPT = """
import enum, json, logging, os, sys
import torch
from safetensors.torch import load_file, save_file
from opguard import OpGuardBase

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
OFFSET = 1.0

class Mode(enum.Enum):
    FAST = 1

class Config:
    def __init__(self):
        self.size = 2

class Weights(torch.nn.Module):
    START = 0.0

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((2,), self.START))

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        model = cls()
        model.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
        return model

    def save_pretrained(self, folder):
        save_file(self.state_dict(), os.path.join(folder, "model.safetensors"))

def shifted(model, folder):
    if os.path.exists(os.path.join(folder, "raw")):
        model.w.data += OFFSET
    return model

class Model(OpGuardBase):
    NAME = "moved"
    MODEL_ID = os.environ["SOURCE"]
    DETECTOR_TYPE = Weights
    MODE = Mode.FAST
    CONFIG = Config()
    CALLED = staticmethod(shifted)

    def _load_detector(self, **kwargs):
        return shifted(super()._load_detector(**kwargs), self.model_id)

def show(**kwargs):
    with Model(device_override="cpu", **kwargs) as model:
        print("weights", model.detector.w[0].item())

if __name__ == "__main__":
    show()
"""
ONLY = "from {module} import show; show(only_load_export=True)"


@pytest.fixture
def run(tmp_path):
    """Runs Python in a folder with the script; returns what it said."""
    (tmp_path / "source").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "raw").write_text("")
    (tmp_path / "scr.py").write_text(SCRIPT)
    env = os.environ | {"SOURCE": str(tmp_path / "source"), "OMP_NUM_THREADS": "1"}
    env |= {"OPGUARD_EXPORTS": str(tmp_path / "exports"), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_a_script_imported_and_moved_into_a_package_has_one_export(run, tmp_path):
    first = run("scr.py")
    assert "weights 2.0" in first.stdout, first.stderr
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "inner.py").write_text(SCRIPT)
    ways = [
        ("-c", ONLY.format(module="scr")),
        ("-c", ONLY.format(module="package.inner")),
        ("-m", "package.inner"),
        ("scr.py",),
    ]
    for way in ways:
        again = run(*way)
        assert "weights 2.0" in again.stdout, again.stderr
        assert "made anew" not in again.stdout
        assert "WARNING" not in again.stdout


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("OFFSET = 1.0", "OFFSET = 2.0", "OFFSET"),
        ("START = 0.0", "START = 3.0", "Weights.START"),
        ("FAST = 1", "FAST = 2", "MODE"),
        ("self.size = 2", "self.size = 3", "CONFIG"),
        ("+= OFFSET", "-= OFFSET", "shifted"),
        (" Model(", " Other(", "two classes share this NAME"),
    ],
)
def test_what_differs_in_another_module_still_costs_a_load(run, tmp_path, old, new, named):
    run("scr.py")
    (tmp_path / "other.py").write_text(SCRIPT.replace(old, new))
    said = run("-c", "import other; other.show()").stdout
    assert "is made anew" in said
    assert named in said
    assert ("share this NAME" in said) is (old == " Model(")
