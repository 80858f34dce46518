"""The long tests begin first and on different workers, so that no worker is left alone with one.

xdist's worksteal gives each worker an equal stretch of the list to begin with; a worker that has
done its own takes from the end of another's. What stands at the head of a stretch is begun at once
and is never moved; all tests of a file named here stay on one worker, and so share its fixtures.
"""

from __future__ import annotations

import pytest

# A file, or the start of a test's name, and about how many seconds it takes. What uses several
# processes stands where its neighbour uses one.
LONG = {
    "test_build.py": 90,
    "test_typing.py": 60,
    "test_sanitizers.py::test_under_valgrind": 75,
    "test_sanitizers.py::test_under_asan_and_ubsan": 70,
    "test_notebooks.py": 70,
    "test_pools_soak.py": 62,
    "test_locality_tasks.py": 50,
    "test_cuda_host.py": 25,
    "test_core.py": 25,
    "test_sanitizers.py::test_on_another_python": 30,
    "test_sanitize.py": 20,
    "test_flags_compile_ops.py": 30,
    "test_quantizing_pipelines.py::test_importing_bitsandbytes": 20,
    "test_ops.py::test_no_leak": 12,
    "test_profiling.py::test_a_task_without_its_model": 12,
}


def long_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The same items; the order within each entry, and among all others, stays."""
    groups: dict[str, list[pytest.Item]] = {name: [] for name in LONG}
    others = []
    for item in items:
        name = f"{item.path.name}::{item.name}"
        entry = next((entry for entry in LONG if name.startswith(entry)), None)
        (others if entry is None else groups[entry]).append(item)
    heads: list[list[pytest.Item]] = [[] for _ in range(workers)]
    seconds = [0] * workers
    for entry, group in groups.items():
        if group:
            least = seconds.index(min(seconds))
            seconds[least] += LONG[entry]
            heads[least] += group
    ordered: list[pytest.Item] = []
    for left in range(workers, 0, -1):
        head = heads[-left]
        room = max((len(items) - len(ordered)) // left - len(head), 0)
        ordered += [*head, *others[:room]]
        others = others[room:]
    return ordered
