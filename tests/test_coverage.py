"""tests/COVERAGE.md names tests that exist, and leaves out no fault and no item."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from checkout import ROOT, TESTS

TEXT = (TESTS / "COVERAGE.md").read_text()
NAMED = re.compile(r"\b(tests/[\w/]+\.py)::(\w+)")
# The rows of table B: each input that a detach once got wrong.
ROWS_B = (
    "ModelOutput", "BaseOutput", "namedtuple", "return_types", "PackedSequence", "torch.Size",
    "OrderedDict", "defaultdict", "list subclass", "dataclass", "SimpleNamespace", "set",
    "frozenset", "deque", "mappingproxy", "BatchEncoding", "DynamicCache", "numpy object array",
    "torch.distributions", "dict keys", "cyclic", "nesting", "meta", "Parameter",
    "tensor subclass", "identity", "aliases", "sparse", "inference tensor", "need_grads",
)  # fmt: skip
# What Sire was measured to get wrong, and what others do: words of the rows of table S.
ROWS_S = (
    "no LRU", "request was met", "cannot be met", "not loaded are evicted", "whole model goes",
    "locked for good", "input tensors", "not counted", "two threads", "21 us", "2 GiB",
    "tied weights counted twice", "non-persistent", "second manage", "malloc_trim",
    "patches accelerate", "does not load on entry", "setup_default_pools", "manage(pipe)",
    "manage(CommitObjectProxy",
    "no disk tier", "apply raising", "half-applied", "nested proxy", "proxies dead", "squash",
    "clone of an automatic proxy", "apply_commit_stack left", "`__exit__` was empty", "no LoRA",
    "pains 9", "pains 10", "pain 12", "pain 13", "pain 14", "pain 15", "pain 16",
    "version counter", "truncation", "view of an evicted", "silent no-op", "fault-around",
    "freezing", "power of two", "diffusers group offload", "without their module's forward",
    "vLLM", "subtracting", "between forward and backward", "deepcopy of a hooked module",
)  # fmt: skip


def rows() -> list[tuple[str, str]]:
    """(item or fault, tests) of every line of every table."""
    found = []
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) >= 2 and not set(cells[0]) <= {"-", ":"}:
            found.append((cells[0], cells[-1]))
    return [row for row in found if row[0] != "item or fault"]


@cache
def names_in(path: Path) -> set[str]:
    """Test functions, those that are methods of a test class, and hypothesis' state machines."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.value).endswith(".TestCase"):
            found |= {ast.unparse(target) for target in node.targets}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
            "test"
        ):
            found.add(node.name)
    return found


def test_every_named_test_exists():
    assert NAMED.search(TEXT), "expected COVERAGE.md to name tests"
    missing = []
    for name, test in set(NAMED.findall(TEXT)):
        path = ROOT / name
        if not path.is_file():
            missing.append(f"{name} does not exist")
        elif test not in names_in(path):
            missing.append(f"{name} has no {test}")
    assert not missing, "\n".join(sorted(missing))


def test_every_test_the_readme_names_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "README.md").read_text())
    assert len(named) > 10
    missing = [f"{name}::{test}" for name, test in named if test not in names_in(TESTS / name)]
    assert not missing, "\n".join(missing)


def test_every_row_names_a_test():
    empty = [what for what, tests in rows() if not NAMED.search(tests)]
    assert not empty, f"expected a test for {empty}"


@pytest.mark.parametrize(
    "wanted",
    [*(f"A{n}" for n in range(1, 13)), *(f"C{n}" for n in range(1, 12)),
     *(f"D{n}" for n in range(1, 9)), *(f"3.{n}" for n in range(1, 8)),
     *(f"4.{n}" for n in range(1, 8)), *(f"5.{n}" for n in range(1, 6)),
     *(f"6.{n}" for n in range(1, 4)), *(f"7.{n}" for n in range(1, 7)),
     *(f"T{n}" for n in range(1, 61)), *(f"R{n}" for n in range(1, 7))],
)  # fmt: skip
def test_every_fault_and_item_has_a_row(wanted):
    pattern = re.compile(rf"(?<![\w.]){re.escape(wanted)}(?![\w]|\.\d)")
    assert any(pattern.search(what) for what, _ in rows()), f"expected a row for {wanted}"


@pytest.mark.parametrize("wanted", ROWS_B)
def test_every_row_of_table_b_has_a_row(wanted):
    told = " ".join(what for what, _ in rows() if what.startswith("B"))
    assert wanted.lower() in told.lower(), f"expected a row 'B: {wanted}'"


@pytest.mark.parametrize("wanted", ROWS_S)
def test_every_fault_of_pools_has_a_row(wanted):
    told = " ".join(what for what, _ in rows() if what.startswith("S "))
    assert wanted.lower() in told.lower(), f"expected a row 'S ... {wanted}'"
