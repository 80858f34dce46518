"""``python tests/bench [NAME ...]``: every row of every bench_*.py, ratios from one run.

In one thread, or in as many as OPGUARD_BENCH_THREADS says.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def main(names: list[str]) -> int:
    sys.path.insert(0, str(FOLDER))
    harness = importlib.import_module("harness")
    torch.set_num_threads(int(os.environ.get("OPGUARD_BENCH_THREADS", "1")))
    missed = 0
    for path in sorted(FOLDER.glob("bench_*.py")):
        if names and path.stem.removeprefix("bench_") not in names:
            continue
        for row in importlib.import_module(path.stem).rows():
            figure = harness.measure(row)
            missed += not figure.reached
            print(harness.show(figure), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
