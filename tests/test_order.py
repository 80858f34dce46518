"""Long tests begin first, spread over the workers; nothing is lost or told twice."""

from collections import namedtuple
from pathlib import Path

import pytest

import order
from checkout import TESTS

Item = namedtuple("Item", "path name")


def collected():
    """Three tests of each long entry, each entry followed by many short ones."""
    found = []
    for entry in order.LONG:
        file, _, name = entry.partition("::")
        found += [Item(Path(file), f"{name}[{i}]") for i in range(3)]
        found += [Item(Path("test_short.py"), f"{entry} {i}") for i in range(40)]
    return found


def is_long(item):
    return f"{item.path.name}::{item.name}".startswith(tuple(order.LONG))


def stretches(items, workers):
    """As worksteal gives them out."""
    while workers:
        size = len(items) // workers
        yield items[:size]
        items, workers = items[size:], workers - 1


@pytest.mark.parametrize("workers", [1, 2, 3, 16, 40])
def test_each_worker_begins_with_its_long_tests(workers):
    items = collected()
    ordered = order.long_first(items, workers)
    assert sorted(ordered) == sorted(items)
    assert [item for item in ordered if not is_long(item)] == [i for i in items if not is_long(i)]
    entries = 0
    for stretch in stretches(ordered, workers):
        flags = [is_long(item) for item in stretch]
        assert flags == sorted(flags, reverse=True)  # all of them at the head
        assert sum(flags) % 3 == 0  # none is torn from its file
        entries += sum(flags) // 3
        if workers < len(order.LONG):
            assert any(flags)
    assert entries == len(order.LONG)


def test_few_tests_are_all_kept():
    few = [item for item in collected() if is_long(item)][:7]
    for workers in (1, 2, 8):
        assert sorted(order.long_first(few, workers)) == sorted(few)


@pytest.mark.parametrize("entry", order.LONG)
def test_every_name_is_of_a_test(entry):
    file, _, name = entry.partition("::")
    assert f"def {name}" in (TESTS / file).read_text()
