"""What the README says of pools runs as written, and names tests that there are."""

import ast
import re

import torch

from checkout import ROOT, TESTS
from opguard import pools
from pools_kit import fresh_pools

README = (ROOT / "README.md").read_text()
SECTION = README.split("## Pools")[1].split("\n## ")[0]
OTHERS = {"call_guard", "OpGuardBase", "half", "load_state_dict", "share_memory"}  # not of pools
PEERS = README.split("Pools, against")[1].split("\n## ")[0]


def test_the_lines_run_as_written(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", SECTION, re.S)
    model, x = torch.nn.Linear(4, 2).requires_grad_(False), torch.ones(1, 4)
    expected = model(x)
    with fresh_pools(tmp_path) as management:
        names = {"model": model, "x": x}
        exec(program, names)
        assert torch.equal(names["y"], expected)
        assert management.pool("cpu").used > 0
        assert sum(user.leases for user in pools.report().snapshot.users) == 0


def test_every_line_of_the_table_names_tests_that_there_are():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PEERS)
    assert len(named) >= 17
    for file, test in named:
        tree = ast.parse((TESTS / file).read_text())
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert test in found, f"{file}::{test}"


def test_names_in_the_text_are_there():
    for name in set(re.findall(r"`(?:with )?(\w+)\(", SECTION)) - OTHERS:
        assert name in pools.__all__ or name == "manage", name
    assert {"seconds", "moves", "events"} <= pools.Snapshot.__dataclass_fields__.keys()
    keywords = pools.manage.__kwdefaults__.keys()
    (options,) = re.findall(r"`manage\(obj, ([\w=, ]+)\)`", SECTION)
    assert {each.strip(" =") for each in options.split(",")} == keywords
