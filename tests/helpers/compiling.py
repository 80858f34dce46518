"""Compiling C test programs against the checkout's csrc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import CSRC, TESTS, copy_clean
from once import once_a_run

SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]


def need(tool: str) -> str:
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"there is no {tool} on PATH")
    return found


def compile_c(
    target: Path, sources: list[Path], *options: str, flags: tuple[str, ...] = ()
) -> Path:
    """One program or library; a warning is an error. ``flags`` come last, as libraries must."""
    command = [need("gcc"), "-std=c11", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    command += [f"-I{TESTS / 'core'}", *options, *map(str, sources), "-o", str(target), *flags]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    return target


def sanitized_package(factory: pytest.TempPathFactory) -> Path:
    """The package's folder, its libraries built the documented way with OPGUARD_SANITIZE=1."""
    need("gcc")
    pytest.importorskip("setuptools")

    def build(folder: Path) -> None:
        code = "from setuptools import setup; setup()"
        built = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, "-q", "build_ext", "--inplace"],
            cwd=copy_clean(folder / "source"),
            env={**os.environ, "OPGUARD_SANITIZE": "1", "OPGUARD_CUDA": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert built.returncode == 0, built.stderr[-4000:]

    return once_a_run(factory, "sanitized", build) / "source" / "python" / "opguard"


def assert_instrumented(library: Path) -> Path:
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True)
    assert "__asan_" in symbols.stdout
    assert "__ubsan_" in symbols.stdout
    return library


def sanitizer_environment(**more: str) -> dict[str, str]:
    """Any report ends the process with a status of its own."""
    return {
        **os.environ,
        "ASAN_OPTIONS": "exitcode=99:abort_on_error=0:detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
        **more,
    }
