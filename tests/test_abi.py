"""Our C declarations of libtorch's stable ABI against torch's own headers and release lists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from checkout import CSRC, TESTS

GXX = shutil.which("g++")
INCLUDE = Path(torch.__file__).parent / "include"
SHIM_HEADERS = ("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h")
FLOOR = (2, 10, 0)

needs_headers = pytest.mark.skipif(
    GXX is None or not (INCLUDE / SHIM_HEADERS[0]).exists(),
    reason="there is no g++, or this torch came without its headers",
)


def listed() -> list[str]:
    text = (CSRC / "torch" / "shim_list.h").read_text()
    return re.findall(r"^X\([^,]+, (\w+),", text, re.MULTILINE)


def compile_check(csrc: Path) -> subprocess.CompletedProcess[str]:
    text = "".join((INCLUDE / header).read_text() for header in SHIM_HEADERS)
    newer = ["-DOG_CHECK_NEWER"] if "torch_exception_get_what_without_backtrace" in text else []
    command = [str(GXX), "-std=c++20", "-fsyntax-only", *newer, f"-I{csrc}", f"-I{INCLUDE}"]
    source = TESTS / "abi" / "shim_check.cpp"
    return subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)


@needs_headers
def test_declarations_agree_with_torch():
    checked = compile_check(CSRC)
    assert checked.returncode == 0, checked.stderr[-4000:]


@needs_headers
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("aoti_torch_get_dim, (AtenTensorHandle tensor, int64_t *ret)",
         "aoti_torch_get_dim, (AtenTensorHandle tensor, int32_t *ret)"),
        ("X(size_t, aoti_torch_dtype_element_size", "X(int64_t, aoti_torch_dtype_element_size"),
        ("uint64_t build_version)", "uint32_t build_version)"),
    ],
    ids=["argument", "result", "last argument"],
)  # fmt: skip
def test_a_wrong_declaration_does_not_compile(tmp_path, right, wrong):
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    header = csrc / "torch" / "shim_list.h"
    text = header.read_text()
    assert right in text
    header.write_text(text.replace(right, wrong))
    checked = compile_check(csrc)
    assert checked.returncode != 0
    assert "conflicting declaration" in checked.stderr or "ambiguat" in checked.stderr


@needs_headers
def test_torch_declares_each_name():
    text = "".join((INCLUDE / header).read_text() for header in SHIM_HEADERS)
    missing = [name for name in listed() if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_each_name_was_there_at_the_floor():
    """By the release list that torch-abi-audit carries."""
    versions = pytest.importorskip("torch_abi_audit.torch_versions").stable_shim_versions()
    names = listed()
    assert len(names) >= 20
    unknown = [name for name in names if name not in versions]
    assert not unknown, f"not in the stable ABI of any release: {unknown}"
    newer = {name: versions[name] for name in names if tuple(versions[name]) > FLOOR}
    assert not newer, f"newer than the floor, look them up at run time instead: {newer}"


def test_newer_names_are_looked_up_not_linked():
    """shim.c alone may name what torch 2.10 lacks, as a string for dlsym."""
    versions = pytest.importorskip("torch_abi_audit.torch_versions").stable_shim_versions()
    text = (CSRC / "torch" / "shim.c").read_text()
    for name in re.findall(r'find\("(\w+)"', text):
        assert name not in listed()
        assert name in versions, name
