"""csrc/core by C programs of its own, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from checkout import CSRC, TESTS
from compiling import (
    SANITIZERS,
    assert_instrumented,
    compile_c,
    need,
    sanitized_package,
    sanitizer_environment,
)

PROGRAMS = sorted((TESTS / "core").glob("test_*.c"))


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """All of csrc/core, instrumented; built once for the programs."""
    library = tmp_path_factory.mktemp("core") / "libcore.so"
    sources = sorted((CSRC / "core").glob("*.c"))
    return compile_c(library, sources, *SANITIZERS, "-fPIC", "-shared")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_core_under_sanitizers(program, core, tmp_path):
    path = f"-Wl,-rpath,{core.parent}"
    built = compile_c(tmp_path / program.stem, [program, core], *SANITIZERS, path)
    run = subprocess.run(
        [str(built)], env=sanitizer_environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]


def test_every_core_file_has_a_program():
    tested = {path.stem.removeprefix("test_") for path in PROGRAMS}
    stems = {path.stem for path in (CSRC / "core").glob("*.c")}
    # scan.c and its family, scan_avx2.c and so on, have one program; so has pool_<subject>.
    names = re.compile(r"pool_[a-z]+|[a-z]+")
    assert {names.match(stem)[0] for stem in stems} <= tested


def test_the_sanitizers_are_on(tmp_path):
    """A program that reads freed memory fails, so the others' silence means something."""
    bad = tmp_path / "bad.c"
    bad.write_text(
        "#include <stdlib.h>\nint main(void) { char *p = malloc(4); free(p); return *p; }\n"
    )
    built = compile_c(tmp_path / "bad", [bad], *SANITIZERS, "-Wno-use-after-free")
    run = subprocess.run(
        [str(built)], env=sanitizer_environment(), capture_output=True, check=False
    )
    assert run.returncode == 99
    assert b"heap-use-after-free" in run.stderr


# --- the ops library in a program without Python --------------------------------------------------


def torch_lib() -> Path:
    torch = pytest.importorskip("torch")
    return Path(torch.__file__).parent / "lib"


def build_program(folder: Path, *options: str) -> Path:
    lib = torch_lib()
    return compile_c(
        folder / "ops_program",
        [TESTS / "core" / "ops_program.c"],
        *options,
        flags=(f"-L{lib}", "-l:libtorch_cpu.so", "-l:libc10.so", f"-Wl,-rpath,{lib}", "-ldl"),
    )


def test_ops_load_without_python(tmp_path):
    """The library the package ships: registered and right from C; 20,000 calls leak nothing."""
    opguard = pytest.importorskip("opguard")
    need("gcc")
    library = Path(opguard.__file__).with_name("libopguard_ops.so")
    run = subprocess.run(
        [str(build_program(tmp_path)), str(library), "20000"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    before, after = map(int, run.stdout.split())
    assert after - before < 64, f"{after - before} pages more after 20000 rounds"


def test_ops_under_sanitizers(tmp_path, tmp_path_factory):
    """The same rounds with every file of the ops library instrumented."""
    torch_lib()
    library = sanitized_package(tmp_path_factory) / "libopguard_ops.so"
    assert_instrumented(library)
    program = build_program(tmp_path, *SANITIZERS)
    # libtorch's own start-up keeps what it allocates: a leak of ours shows above, by growth.
    environment = sanitizer_environment(
        ASAN_OPTIONS="exitcode=99:detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0"
    )
    run = subprocess.run(
        [str(program), str(library), "200"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
