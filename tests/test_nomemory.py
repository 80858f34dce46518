"""Allocation failing at the n-th call: every C entry point ends well or in MemoryError."""

from __future__ import annotations

import ast
import os
import re
import subprocess

import pytest

from checkout import CSRC, TESTS
from torchfree import bare_interpreter, borrow_pytest

SCRIPT = TESTS / "isolated" / "nomemory.py"


def test_every_entry_point_without_memory(tmp_path):
    import opguard._C

    python = bare_interpreter()
    probe = subprocess.run([python, "-c", "import _testcapi"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this Python has no _testcapi, whose set_nomemory makes allocations fail")
    run = subprocess.run(
        [python, str(SCRIPT)],
        env={
            **os.environ,
            "OPGUARD_C": opguard._C.__file__,
            "PYTHONPATH": str(borrow_pytest(tmp_path / "path")),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]


def test_every_entry_point_has_a_scenario():
    """Each name in a PyMethodDef table of a module function is called by the script."""
    tables = "".join(path.read_text() for path in sorted((CSRC / "py").glob("*.c")))
    pattern = r'^    \{"([a-z]\w*)", (?:\([\w ()*]+\))*\w+,?\s*METH_'
    offered = set(re.findall(pattern, tables, re.MULTILINE))
    assert "bind_types" in offered
    called = {
        node.attr
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert offered <= called, f"no scenario for {sorted(offered - called)}"
