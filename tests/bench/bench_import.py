"""``import opguard`` once torch is there, each time in a process of its own."""

from __future__ import annotations

import subprocess
import sys

from harness import Row

PROGRAM = """
import time, torch
begin = time.perf_counter()
import opguard
print(time.perf_counter() - begin)
"""


def seconds() -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True)
    return float(done.stdout)


def rows() -> list[Row]:
    return [
        Row("import opguard after import torch", seconds, float, extra_us=10_000, self_timed=True)
    ]
