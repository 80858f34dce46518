"""What the sources may not do: arrows that point back, heavy imports, long functions, stray files.

Each check first proves on a sample that it can fail.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from checkout import CSRC, PYTHON, ROOT, code_only, tracked

C_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".c", ".h", ".cu"})
PACKAGE = PYTHON / "opguard"
PY_FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_check():
    assert len(C_FILES) > 20
    assert len(PY_FILES) > 3


# --- C: which layer may see which -----------------------------------------------------------------

MAY_INCLUDE = {
    "core": ("core/",),
    "cuda": ("cuda/", "core/"),
    "torch": ("torch/", "cuda/opguard_cuda.h", "core/"),
    "py": ("py/", "torch/opguard_ops.h", "core/"),
    "runner": ("runner/", "torch/opguard_ops.h", "core/"),
}
PYTHON_HEADERS = {"Python.h": {"py/python.h"}, "structmember.h": {"py/"}}
INCLUDE = re.compile(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)


def bad_includes(name: str, text: str) -> list[str]:
    """name is relative to csrc, as "torch/shim.c"."""
    allowed = MAY_INCLUDE[name.split("/", maxsplit=1)[0]]
    found = []
    for ours, system in INCLUDE.findall(text):
        if ours and not ours.startswith(allowed):
            found.append(f'csrc/{name} includes "{ours}", its layer may see only {allowed}')
        if system in PYTHON_HEADERS and not name.startswith(tuple(PYTHON_HEADERS[system])):
            found.append(
                f"csrc/{name} includes <{system}>, which belongs to csrc/py/python.h alone"
            )
        if system.startswith(("torch/", "ATen/", "c10/")):
            found.append(f"csrc/{name} includes <{system}>, torch's headers are not C")
        if system.startswith("cuda") and not name.endswith(".cu"):
            found.append(f"csrc/{name} includes <{system}>, CUDA belongs to .cu files")
    return found


def test_includes_point_one_way():
    assert bad_includes("core/x.c", '#include "torch/shim.h"')
    assert bad_includes("py/x.c", '#include "torch/shim.h"')
    assert bad_includes("py/x.c", "#include <Python.h>")
    assert bad_includes("torch/x.c", "#include <torch/csrc/stable/c/shim.h>")
    assert not bad_includes("py/x.c", '#include "torch/opguard_ops.h"\n#include <stdlib.h>')
    found = []
    for path in C_FILES:
        found += bad_includes(path.relative_to(CSRC).as_posix(), path.read_text())
    assert not found, "\n".join(found)


# --- C: functions, files, data at file scope ------------------------------------------------------

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 700


@dataclass(frozen=True)
class Function:
    name: str
    first_line: int
    lines: int
    body: str


def functions(text: str) -> Iterator[Function]:
    """Definitions as PEP 7 lays them out: the name at column 0, the braces at column 0."""
    lines = code_only(text).splitlines()
    head, begin = "", -1
    for number, line in enumerate(lines):
        found = re.match(r"(\w+)\(", line)
        if found and begin < 0:
            head = found.group(1)
        elif line.startswith("{") and head:
            begin = number
        elif line.startswith("}") and begin >= 0:
            yield Function(
                head, begin + 1, number - begin + 1, "\n".join(lines[begin : number + 1])
            )
            head, begin = "", -1


def test_functions_and_files_are_short():
    sample = "int\nlong_one(void)\n{\n" + "    x++;\n" * 80 + "}\n"
    assert [f.lines for f in functions(sample)] == [82]
    long = [
        f"{name_of(path)}:{f.first_line} {f.name} has {f.lines} lines"
        for path in C_FILES
        for f in functions(path.read_text())
        if f.lines > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)
    big = [
        f"{name_of(path)} has {lines} lines"
        for path in [*C_FILES, *PY_FILES]
        if (lines := path.read_text().count("\n")) > MAX_FILE_LINES
    ]
    assert not big, "\n".join(big)


# Written once before anybody can read them, or published by an atomic: each says so beside it.
ALLOWED_DATA = {
    "csrc/core/cpu.c": {"chosen"},
    "csrc/core/pool_pages_guard.c": {"published"},
    "csrc/cuda/load.c": {"published"},
    "csrc/torch/library.c": {"registration"},
}
# Tables CPython takes by non-const pointers and never writes.
CPYTHON_TABLES = ("PyMethodDef", "PyModuleDef", "PyModuleDef_Slot", "PyType_Slot", "PyType_Spec",
                  "PyMemberDef", "PyGetSetDef")  # fmt: skip


def file_scope_data(text: str) -> list[str]:
    """Names of mutable variables outside functions (and mutable statics inside them)."""
    code = re.sub(r"^\s*#(?:[^\n]*\\\n)*[^\n]*", "", code_only(text), flags=re.MULTILINE)
    found = []
    for line in re.findall(r"^[ ]+static\s[^;({=]*[;=]", code, re.MULTILINE):
        # PyArg_ParseTupleAndKeywords takes its names by a non-const pointer and never writes them.
        if not re.search(r"\bconst\b|\bchar \*(?:keywords|names)\[", line):
            found.append(re.findall(r"(\w+)\s*(?:\[[^\]]*\]\s*)*[;=]", line)[-1])
    for declared in re.findall(r"^(?!typedef|extern|struct \w+ \{|\}|return|case|goto)"
                               r"([A-Za-z_][\w \*\n()]*?\b\w+\s*(?:\[[^\]]*\]\s*)*)(?:=|;)",
                               code, re.MULTILINE):  # fmt: skip
        words = declared.split()
        if len(words) < 2 or words[0] in {
            "typedef",
            "extern",
            "return",
            "goto",
            "enum",
            "PyDoc_STRVAR",
        }:
            continue
        atomic = "_Atomic" in declared
        if ("(" in declared and not atomic) or re.match(
            r"(?:struct|union|enum)\s+\w+\s*$", declared
        ):
            continue
        is_const = re.search(r"\bconst\b", declared) and not re.search(
            r"const[^*]*\*(?!\s*const)", declared
        )
        if (is_const and not atomic) or any(table in words for table in CPYTHON_TABLES):
            continue
        found.append(re.findall(r"\w+", re.sub(r"\[[^\]]*\]", "", declared))[-1])
    return found


def test_no_mutable_data_at_file_scope():
    assert file_scope_data("static int counter;\n") == ["counter"]
    assert file_scope_data("PyObject *cache = NULL;\n") == ["cache"]
    assert file_scope_data("static const char *name;\n") == ["name"]
    assert file_scope_data("int\nf(void)\n{\n    static int calls = 0;\n}\n") == ["calls"]
    assert file_scope_data("static const char *const names[] = {0};\n") == []
    assert file_scope_data("int\nf(void);\nstatic int\ng(int a)\n{\n    int b = a;\n}\n") == []
    found = []
    for path in C_FILES:
        if path.suffix == ".cu":
            continue
        data = set(file_scope_data(path.read_text())) - ALLOWED_DATA.get(name_of(path), set())
        found += [f"{name_of(path)}: {name} is mutable data at file scope" for name in sorted(data)]
    assert not found, "\n".join(found)


# --- C: calls -------------------------------------------------------------------------------------

# Opened and closed in one function; leaving on several roads may close more often than it opens.
PAIRED_IN_FUNCTION = {
    "Py_EnterRecursiveCall": "Py_LeaveRecursiveCall",
    "PyGILState_Ensure": "PyGILState_Release",
    "Py_BEGIN_ALLOW_THREADS": "Py_END_ALLOW_THREADS",
}
PAIRED_IN_FAMILY = {
    "PyErr_Fetch": "PyErr_Restore",
    "PyObject_GetBuffer": "PyBuffer_Release",
    "PyMem_Malloc": "PyMem_Free",
    "PyMem_Calloc": "PyMem_Free",
    "PyMem_Realloc": "PyMem_Free",
    "PyThread_allocate_lock": "PyThread_free_lock",
    "PyThread_acquire_lock": "PyThread_release_lock",
    "PyObject_GC_Track": "PyObject_GC_UnTrack",
}


def unpaired_in_functions(text: str) -> list[str]:
    found = []
    for function in functions(text):
        for opens, closes in PAIRED_IN_FUNCTION.items():
            opened = len(re.findall(rf"\b{opens}\b", function.body))
            closed = len(re.findall(rf"\b{closes}\b", function.body))
            if opened > closed or (closed and not opened):
                found.append(f"{function.name}: {opened} {opens}, {closed} {closes}")
    return found


def unpaired_in_family(text: str) -> list[str]:
    code = code_only(text)
    return [
        f"{opens} without any {closes}"
        for opens, closes in PAIRED_IN_FAMILY.items()
        if re.search(rf"\b{opens}\b", code) and not re.search(rf"\b{closes}\b", code)
    ]


def test_calls_come_in_pairs():
    assert unpaired_in_functions("int\nf(void)\n{\n    Py_EnterRecursiveCall();\n}\n")
    assert unpaired_in_family("int\nf(void)\n{\n    PyMem_Malloc(3);\n}\n")
    families: dict[str, str] = {}
    found = []
    for path in C_FILES:
        text = path.read_text()
        found += [f"{name_of(path)}: {what}" for what in unpaired_in_functions(text)]
        family = f"{path.parent.name}/{re.split('[_.]', path.name)[0]}"
        families[family] = families.get(family, "") + text
    # The call-time guards are one family in several files.
    for part in ("stepper", "leases", "modes", "walk"):
        families["py/guards"] = families.get("py/guards", "") + families.pop(f"py/{part}", "")
    for family, text in families.items():
        found += [f"{family}: {what}" for what in unpaired_in_family(text)]
    assert not found, "\n".join(found)


# Outside the Limited API of 3.11, or a macro that hides a struct field.
BANNED = re.compile(
    r"\b(Py(?:List|Tuple|Set|Unicode|Bytes)_(?:GET_ITEM|SET_ITEM|GET_SIZE|AS_STRING)|Py_X?SETREF"
    r"|PyUnicode_AsUTF8(?=\()|PyErr_[GS]etRaisedException|PyException_[GS]etArgs"
    r"|PyErr_FormatUnraisable|PyFrame_Get(?:Back|Locals|Globals|Builtins|Lasti)"
    r"|PyObject_(?:Vectorcall\w*|CallOneArg|CallMethodNoArgs|CallMethodOneArg|GetOptionalAttr)"
    r"|PyMutex\w*|PyMem_Raw\w+|PyContextVar_\w+|PyType_GetModuleByDef|PyObject_GetTypeData"
    r"|Py_(?:BEGIN|END)_CRITICAL_SECTION|PyDict_(?:Pop|GetItemRef)|PyList_GetItemRef|_Py\w+)\b"
)
# These layers speak by og_status alone.
SILENT = re.compile(r"\b(exit|_exit|abort|printf|fprintf|puts|perror|assert)\s*\(")


def test_only_allowed_calls():
    assert BANNED.search("Py_SETREF(a, b)")
    assert BANNED.search("_PyObject_New(a)")
    assert not BANNED.search("PyUnicode_AsUTF8AndSize(a, &n)")
    found = []
    for path in C_FILES:
        code = code_only(path.read_text())
        found += [f"{name_of(path)}: {m.group(1)}" for m in BANNED.finditer(code)]
        if path.relative_to(CSRC).parts[0] in {"core", "torch", "cuda"}:
            found += [f"{name_of(path)}: {m.group(1)}" for m in SILENT.finditer(code)]
    assert not found, "\n".join(found)


def test_errors_are_not_cleared_blindly():
    """PyErr_Clear stands where the exception was looked at, or a comment says why any may go.

    Sanitizing is the exception: its contract is that it never raises, whatever happens in it.
    """
    found = []
    for path in C_FILES:
        if path.name.startswith("sanitize"):
            continue
        text = path.read_text()
        lines = text.splitlines()
        for function in functions(text):
            if "ExceptionMatches" in function.body:
                continue
            for offset, line in enumerate(function.body.splitlines()):
                here = function.first_line - 1 + offset
                around = "\n".join(lines[max(0, function.first_line - 12) : here + 1])
                if "PyErr_Clear" in line and "/*" not in around:
                    found.append(f"{name_of(path)}:{here + 1} {function.name} clears any exception")
    assert not found, "\n".join(found)


def test_c_files_say_what_they_are():
    """Each C file opens with a comment that says what it owns."""
    found = [name_of(p) for p in C_FILES if "/*" not in p.read_text()[:120]]
    assert not found, f"expected an opening comment in {found}"


# --- Python: which module may see which -----------------------------------------------------------

# Low to high: a module imports from its own row or a lower one.
LAYERS = (
    {"_C"},
    {"_runtime"},
    {
        "_ops",
        "devices",
        "sanitizing",
        "detaching",
        "holders",
        "_attributes",
        "_instances",
        "_ipython",
        "_loaded",
        "_numbers",
        "_routing",
        "_secrets",
        "_sizes",
        "_tables",
        "_types",
        "hub",
        "_bundle_tensors",
        "_flag_ops",
        "_flag_chain",
        "_flag_lowering",
        "_flag_vmap",
    },
    {"_bundle_values", "_pictures"},
    {"_bundle"},
    {"exports"},
    {"flags"},
    {"pools"},
    {"guards"},
    {"_pooled"},
    {"_contract", "_exporting", "_lifecycle"},
    {"base"},
    {"tasks"},
    {"repro", "profiling"},
    {"info", "demo", "tests", "_smoke"},
    {"cli"},
    {"__main__"},
)
# What the top of a module may import beside the standard library; the rest goes inside functions.
LIGHT = {"torch", "opguard", "__future__"}
HEAVY_TORCH = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed",
    "torch.export",
    "torch.onnx",
)


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    if parts == ["opguard"] or parts[0] != "opguard":
        return None
    for rank, names in enumerate(LAYERS):
        if parts[1] in names:
            return rank
    raise AssertionError(f"expected {module} to have a place in LAYERS of tests/test_lint.py")


def imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[str, bool]]:
    """(imported module, whether at the top) of every import that runs."""

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node = ast.Module(body=node.orelse, type_ignores=[])
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, top
        if isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source, top
            if source == "opguard":
                for alias in node.names:
                    if any(alias.name in names for names in LAYERS):
                        yield f"opguard.{alias.name}", top
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, top and not inner)

    yield from visit(tree, True)


def bad_imports(module: str, text: str, *, is_package: bool = False) -> list[str]:
    own = layer_of(module)
    found = []
    for name, top in imports(ast.parse(text), module, is_package=is_package):
        root = name.split(".")[0]
        rank = layer_of(name)
        if own is not None and rank is not None and rank > own:
            found.append(f"{module} imports {name}, which is above it")
        if top and root not in sys.stdlib_module_names and root not in LIGHT:
            found.append(f"{module} imports {name} at its top; do it inside the function")
        if top and name.startswith(HEAVY_TORCH):
            found.append(f"{module} imports {name} at its top; do it inside the function")
    return found


def test_python_imports_point_one_way():
    assert bad_imports("opguard.devices", "from opguard.guards import calling")
    assert bad_imports("opguard.devices", "def f():\n    from opguard import base\n")
    assert bad_imports("opguard.guards.calling", "from ..base import OpGuardBase")
    assert bad_imports("opguard.base", "import transformers")
    assert bad_imports("opguard.base", "import torch._dynamo")
    assert not bad_imports("opguard.base", "def f():\n    import transformers\n")
    assert not bad_imports("opguard.base", "if TYPE_CHECKING:\n    import transformers\n")
    assert not bad_imports("opguard.guards.calling", "from ._base import Guard")
    found = []
    for path in PY_FILES:
        parts = path.relative_to(PYTHON).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found += bad_imports(module, path.read_text(), is_package=is_package)
    assert not found, "\n".join(found)


def test_the_plugin_is_light():
    """pytest loads it in every run of every user: pytest and the standard library, no torch."""
    tree = ast.parse((PYTHON / "pytest_opguard.py").read_text())
    top = {
        name.split(".")[0] for name, top in imports(tree, "pytest_opguard", is_package=False) if top
    }
    assert top <= {*sys.stdlib_module_names, "pytest"}, top


def test_public_modules_say_what_they_offer():
    missing = [
        name_of(path)
        for path in PY_FILES
        if not path.name.startswith("_") and "__all__" not in path.read_text()
    ]
    assert not missing, f"expected __all__ in {missing}"


# --- words and files ------------------------------------------------------------------------------

UNFINISHED = re.compile(
    r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK|place" r"holder|st" r"ub)s?\b", re.I
)


def test_nothing_is_left_unfinished():
    found = []
    for path in [*C_FILES, *PY_FILES, *PYTHON.glob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if UNFINISHED.search(line):
                found.append(f"{name_of(path)}:{number} {line.strip()}")
    assert not found, "\n".join(found)


TOP_LEVEL = {
    "csrc", "python", "tests", "notebooks", "pyproject.toml", "setup.cfg", "README.md",
    "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
    ".ci", ".clang-format", ".gitignore", ".pre-commit-config.yaml",
}  # fmt: skip


def test_top_level_is_as_designed():
    found = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert found <= TOP_LEVEL | {"PKG-INFO"}, f"unexpected at the top: {sorted(found - TOP_LEVEL)}"
    assert not (ROOT / "setup.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_large_files():
    big = [
        f"{name_of(p)}: {p.stat().st_size} bytes" for p in tracked() if p.stat().st_size > 1 << 20
    ]
    assert not big, "\n".join(big)


# --- the tools ------------------------------------------------------------------------------------


def tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None or find_spec(name.replace("-", "_")) is None:
        pytest.skip(f"{name} is not installed beside this Python; it comes with the extra test")
    return found


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff(command):
    run = subprocess.run(
        [tool("ruff"), *command, "--no-cache", "--quiet", "python", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_clang_format():
    run = subprocess.run(
        [tool("clang-format"), "--dry-run", "-Werror", *map(str, C_FILES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]


def test_full_is_everything(request: pytest.FixtureRequest) -> None:
    assert all(item.get_closest_marker("full") for item in request.session.items)
