"""Where the checkout is, what is tracked in it, and how C files read without their comments."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PYTHON = ROOT / "python"
TESTS = ROOT / "tests"

# What building and testing leave behind; never part of a clean copy.
LEFTOVERS = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "*.o", "__pycache__", ".*_cache",
    ".hypothesis", ".ipynb_checkpoints",
)  # fmt: skip


def tracked() -> list[Path]:
    """Every file under version control, or every file of a clean copy where there is no git."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        found = [ROOT / name for name in listing.split("\0") if name]
        return [path for path in found if path.is_file()]
    skipped = ("build/", "dist/", ".")
    return [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.is_file()
        and not path.relative_to(ROOT).as_posix().startswith(skipped)
        and not LEFTOVERS("", path.relative_to(ROOT).parts)
    ]


def copy_clean(target: Path) -> Path:
    """The checkout without anything a build or a test run left in it."""
    target.mkdir(parents=True)
    for path in tracked():
        copied = target / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copied)
    return target


def code_only(text: str) -> str:
    """C text with comments and string bodies blanked; every line keeps its number."""
    pattern = re.compile(
        r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL
    )

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        if found[0] in "\"'":
            return found[0] * 2
        return "\n" * found.count("\n")

    return pattern.sub(blank, text)
