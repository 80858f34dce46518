"""How opguard's three shared objects are built; used by pip, never shipped in the wheel.

- ``opguard._C``              csrc/py + csrc/core/pool_*.c: the Python extension, inside the Limited
  API; links no torch.
- ``opguard.libopguard_ops``  the rest of csrc/core + csrc/torch + csrc/cuda: torch ops, no Python.
- ``opguard.libopguard_cuda`` csrc/cuda/*.cu: built only where nvcc is on PATH.

No torch is needed: the ops library links against an import library, a generated file with
libtorch_cpu's soname and the names that csrc/torch/shim_list.h says we use.

Environment: OPGUARD_SANITIZE=1 adds ASan and UBSan; OPGUARD_CUDA=0 leaves the CUDA part out;
OPGUARD_CUDA_ARCHS="80 90" narrows its targets.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setuptools.command.build_ext import build_ext

if TYPE_CHECKING:
    from setuptools import Extension

CSRC = Path("csrc")
OPS = "opguard.libopguard_ops"
CUDA = "opguard.libopguard_cuda"
WANTED_ARCHS = ("80", "86", "89", "90", "100", "120")

WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wvla",
    "-Wstrict-prototypes",
    "-Wmissing-prototypes",
    "-Werror=implicit-function-declaration",
]
# -g1: functions and lines for a backtrace or memcheck; all that -g adds costs a sixth of the build.
C_FLAGS = ["-std=c11", "-O2", "-g1", "-fvisibility=hidden", "-fno-strict-aliasing", *WARNINGS]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-O1"]


def sources(*layers: str) -> list[str]:
    """Every C file of the named folders of csrc, in a stable order."""
    return [path.as_posix() for layer in layers for path in sorted((CSRC / layer).glob("*.c"))]


def pool_sources() -> list[str]:
    """The plain C of the pools, which ``_C`` holds: no torch op has a use for it."""
    return [path.as_posix() for path in sorted((CSRC / "core").glob("pool_*.c"))]


def cuda_sources() -> list[str]:
    """Every CUDA file, in a stable order."""
    return [path.as_posix() for path in sorted((CSRC / "cuda").glob("*.cu"))]


def find_nvcc() -> str | None:
    """The CUDA compiler on PATH, or None where the CUDA part is to be left out."""
    return None if os.environ.get("OPGUARD_CUDA") == "0" else shutil.which("nvcc")


class BuildExt(build_ext):
    """Builds each extension from whole folders of csrc, with its own compiler and linker."""

    extensions: list[Extension]

    def finalize_options(self) -> None:
        super().finalize_options()
        by_name = {ext.name: ext for ext in self.extensions or []}
        if find_nvcc() is None:
            by_name.pop(CUDA, None)
        sanitize = SANITIZE_FLAGS if os.environ.get("OPGUARD_SANITIZE") == "1" else []
        pools = pool_sources()
        files = {
            "opguard._C": [*sources("py"), *pools, "csrc/core/base.c"],
            OPS: [name for name in sources("core", "torch", "cuda") if name not in pools],
        }
        for name, names in files.items():
            ext = by_name[name]
            ext.sources = names
            ext.include_dirs = [str(CSRC)]
            ext.extra_compile_args = [*C_FLAGS, *sanitize]
            ext.extra_link_args = [*sanitize, "-Wl,--no-undefined" if name == OPS else "-Wl,-O1"]
        # Straight into the interpreter: a table to jump through is felt in the shortest calls.
        by_name["opguard._C"].extra_compile_args += ["-fno-plt"]
        # A failing op leaves through libtorch's C++ exception: our frames need unwind tables.
        by_name[OPS].extra_compile_args += ["-fexceptions"]
        self.extensions = list(by_name.values())

    def get_source_files(self) -> list[str]:
        """All of csrc and this file, so that the source distribution is complete."""
        files = [path.as_posix() for path in sorted(CSRC.rglob("*")) if path.is_file()]
        return [*files, "python/opguard_build.py"]

    def get_ext_filename(self, fullname: str) -> str:
        """``libopguard_*.so`` are plain shared objects: no Python version in their names."""
        if fullname.rpartition(".")[2].startswith("libopguard_"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return [] if "libopguard_" in ext.name else super().get_export_symbols(ext)

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA:
            self.build_cuda(ext)
            return
        if ext.name == OPS:
            ext.libraries = ["dl"]
            ext.extra_objects = [self.build_import_library()]
        one = self.compiler.compile

        def compile_all(names: list[str], **options: Any) -> list[str]:
            """setuptools compiles file by file; each is small, and there are many."""
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                objects = list(pool.map(lambda name: one([name], **options), names))
            return [name for group in objects for name in group]

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = one

    def build_import_library(self) -> str:
        """Writes and links an empty libtorch_cpu.so that has the names we call and nothing else."""
        listing = (CSRC / "torch" / "shim_list.h").read_text(encoding="utf-8")
        names = re.findall(r"^\s*X\((?:[^,]+),\s*(\w+),", listing, re.MULTILINE)
        folder = Path(self.build_temp) / "import_library"
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "libtorch_cpu.c"
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in names), encoding="utf-8")
        library = folder / "libtorch_cpu.so"
        compiler = [*self.compiler.linker_so[:1], "-shared", "-fPIC", "-nostdlib"]
        soname = "-Wl,-soname,libtorch_cpu.so"
        self.spawn([*compiler, soname, str(source), "-o", str(library)])
        return str(library)

    def build_cuda(self, ext: Extension) -> None:
        """One nvcc job a file, in parallel, then one link; nothing of it depends on Python."""
        nvcc = find_nvcc()
        assert nvcc is not None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        options = ["-O3", "-std=c++17", f"-I{CSRC}", "-cudart", "static"]
        options += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", *cuda_targets(nvcc)]

        def compile_one(source: str) -> str:
            output = folder / (Path(source).stem + ".o")
            self.spawn([nvcc, *options, "-c", source, "-o", str(output)])
            return str(output)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, cuda_sources()))
        self.spawn([nvcc, "-shared", "-cudart", "static", *objects, "-o", str(target)])


def cuda_targets(nvcc: str) -> list[str]:
    """Machine code for each wanted architecture this toolkit knows, and PTX of the newest."""
    listing = subprocess.run(
        [nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True
    ).stdout.split()
    wanted = os.environ.get("OPGUARD_CUDA_ARCHS", " ".join(WANTED_ARCHS)).split()
    known = [arch for arch in wanted if f"sm_{arch}" in listing]
    if not known:
        raise RuntimeError(f"expected nvcc to know one of sm_{wanted}, it lists {listing}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}", "--threads=0"]
