"""The CUDA kernels on a machine without a GPU: csrc/cuda as it is, over an emulation of CUDA.

tests/core/cuda_emulation runs a launch's threads one after another on the host, and
tests/core/cuda_program.c holds every call of csrc/torch/flags_cuda.c against loops over single
elements and slots, on random shapes, layouts, dtypes and policies, between forbidden pages.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkout import CSRC, TESTS
from compiling import compile_c

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("g++") is None,
    reason="there is no gcc and g++ to build with",
)

NOT_CALLED = ("pool_", "lowrank")  # of csrc/core, by the host's part of the flags
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-fno-strict-aliasing"]
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
# Few blocks a launch, so that the kernels' blocks have to step on to further rows.
EMULATED = ["-x", "c++", "-std=c++17", "-O1", "-g1", "-fPIC", "-DOG_CUDA_MAX_BLOCKS=5"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"]


def build_kernels(target: Path, sources: list[Path], ready: Sequence[Path] = ()) -> None:
    def compile_one(source: Path) -> str:
        output = target.with_name(source.stem + ".o")
        command = [
            "g++",
            *EMULATED,
            *WARNINGS,
            *UNDEFINED,
            f"-I{source.parent.parent}",
            f"-I{CSRC}",
        ]
        command += ["-isystem", str(TESTS / "core" / "cuda_emulation"), "-c", str(source)]
        made = subprocess.run(
            [*command, "-o", str(output)], capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, made.stderr[-4000:]
        return str(output)

    with ThreadPoolExecutor(2) as pool:
        objects = [*pool.map(compile_one, sources), *map(str, ready)]
    subprocess.run(["g++", "-shared", *UNDEFINED, *objects, "-o", str(target)], check=True)


def build_program(folder: Path) -> Path:
    """The library goes beside the program, where load.c looks for it."""
    sources = [TESTS / "core" / "cuda_program.c", CSRC / "torch" / "flags_cuda.c"]
    core = sorted((CSRC / "core").glob("*.c"))
    sources += [path for path in core if not path.name.startswith(NOT_CALLED)]
    sources.append(CSRC / "cuda" / "load.c")
    return compile_c(folder / "cuda_program", sources, *UNDEFINED, flags=("-lm", "-ldl"))


def run(program: Path, seed: int, rounds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), str(seed), str(rounds)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    build_kernels(folder / "libopguard_cuda.so", KERNELS)
    return build_program(folder)


def test_kernels_equal_loops_over_elements(program):
    made = run(program, 1, 120)
    assert made.returncode == 0, made.stderr[-4000:]


MISTAKES = [
    ("check.cu", "tail + i - head", "tail + i"),  # the last bytes of a row
    ("check.cu", "const int64_t at = i + k * lanes;", "const int64_t at = i + k;"),
    ("device.h", "word < rows.capacity / 2", "word <= rows.capacity / 2"),  # one word too many
    # Somebody's value is overwritten before everybody has read it.
    ("device.h", "    __syncthreads(); /* parts of the row before have been read */\n", ""),
    ("gather.cu", "pick >= g.rows", "pick > g.rows"),
    ("gather.cu", "                __syncthreads(); /* found has been read */\n", ""),
    ("gather.cu", "begin + w * kWarp + i", "begin + i"),  # the first warp's picks again
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m[0] + m[1].strip()[:12])
def test_the_emulation_sees_mistakes(program, tmp_path, mistake):
    """A changed index or a lost wait fails, so the silence above means something."""
    name, right, wrong = mistake
    shutil.copytree(CSRC / "cuda", tmp_path / "cuda")
    broken = tmp_path / "cuda" / name
    text = broken.read_text()
    assert right in text
    broken.write_text(text.replace(right, wrong, 1))
    shutil.copy(program, tmp_path / "cuda_program")
    source = "check.cu" if name == "device.h" else name
    whole = [path.with_suffix(".o").name for path in KERNELS if path.name != source]
    build_kernels(
        tmp_path / "libopguard_cuda.so",
        [tmp_path / "cuda" / source],
        [program.with_name(one) for one in whole],
    )
    assert run(tmp_path / "cuda_program", 1, 60).returncode != 0
