"""``import opguard`` once torch is there, each time in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import Row

PROGRAM = """
import time, torch
begin = time.perf_counter()
import opguard
print(time.perf_counter() - begin)
"""


def rows() -> list[Row]:
    # Compiled files are kept as in any installation, whatever the environment says: without them
    # the compiler is measured. The first run makes them and does not count.
    folder = TemporaryDirectory()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(Path(folder.name))

    def seconds(folder: TemporaryDirectory[str] = folder) -> float:
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, check=True, capture_output=True, env=environment)
        return float(done.stdout)

    seconds()
    return [
        Row("import opguard after import torch", seconds, float, extra_us=10_000, self_timed=True)
    ]
