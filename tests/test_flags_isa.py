"""The flag ops on each instruction set this machine has, forced in turn by OPGUARD_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import opguard  # noqa: F401  (loads the ops library)
from opguard import _C

SCRIPT = Path(__file__).parent / "isolated" / "flags_isa.py"
TIERS = ("scalar", "neon", "avx2", "avx512")


def run(tier: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), tier],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )


@pytest.mark.parametrize("tier", TIERS)
def test_flags_on_every_instruction_set(tier):
    best = _C.ops_info()["isa"]
    if TIERS.index(tier) > TIERS.index(best) or (tier == "neon" != best):
        pytest.skip(f"{best} is the best this machine has")
    done = run(tier)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [tier]
