"""The torch-free tests again: under ASan and UBSan, under valgrind, on every other Python found."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from checkout import TESTS
from compiling import assert_instrumented, need, sanitized_package
from torchfree import bare_interpreter, other_pythons, run_torchfree

# What takes longer than this natively runs under the other instruments only: memcheck is 40 times
# slower. A tenth of the tests.
SECONDS_NATIVE = 0.05
SUPPRESSIONS = TESTS / "valgrind.supp"
# What is not found of these is audited by abi3audit (test_build.py) and not run; the skip says so.
KNOWN_MINORS = (11, 12, 13, 14, 15)


def installed_extension() -> Path:
    import opguard._C

    return Path(opguard._C.__file__)


def assert_passed(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert " passed" in run.stdout


# --- ASan and UBSan -------------------------------------------------------------------------------


@pytest.fixture
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (extension,) = sanitized_package(tmp_path_factory).glob("_C*.so")
    return assert_instrumented(extension)


def runtime(name: str) -> str:
    found = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"gcc has no {name}")
    return found


@pytest.mark.slow
def test_under_asan_and_ubsan(sanitized, tmp_path):
    environment = {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
        "PYTHONMALLOC": "malloc",
    }
    run = run_torchfree(bare_interpreter(), sanitized, tmp_path / "run", env=environment)
    assert_passed(run)
    assert "AddressSanitizer" not in run.stderr
    assert "runtime error:" not in run.stderr


# --- valgrind -------------------------------------------------------------------------------------


def reports_of_ours(xml: str, extension: Path) -> list[str]:
    """Every memcheck report that has a frame in ``extension``, in words.

    What a forked child has lost is no subject here: leaks are told by slope.
    """
    found = []
    for error in ET.fromstring(xml).iter("error"):
        if error.findtext("kind", "").startswith("Leak_"):
            continue
        frames = list(error.iter("frame"))
        if any(Path(frame.findtext("obj", "")).name == extension.name for frame in frames):
            what = error.findtext("what") or error.findtext("xwhat/text") or "?"
            where = [frame.findtext("fn", "?") for frame in frames[:8]]
            found.append(f"{error.findtext('kind')}: {what} at {' < '.join(where)}")
    return found


SAMPLE = """<valgrindoutput><error><kind>InvalidRead</kind><what>Invalid read of size 8</what>
<stack><frame><obj>{}</obj><fn>f</fn></frame><frame><obj>/python</obj><fn>g</fn></frame></stack>
</error></valgrindoutput>"""


def test_a_report_of_ours_is_seen():
    ours = Path("/site/opguard/_C.abi3.so")
    assert reports_of_ours(SAMPLE.format("/elsewhere/_C.abi3.so"), ours)
    assert not reports_of_ours(SAMPLE.format("/lib/libc.so.6"), ours)


def too_long(folder: Path, extension: Path, seconds: float) -> list[str]:
    """Tests that take longer natively: their subject is depth or length, not a kind of access."""
    report = folder / "native.xml"
    folder.mkdir()
    run = run_torchfree(bare_interpreter(), extension, folder / "run", f"--junitxml={report}")
    assert_passed(run)
    cases = list(ET.parse(report).iter("testcase"))
    return [case.get("name", "") for case in cases if float(case.get("time", "0")) > seconds]


def told_of_ours(path: Path, extension: Path) -> list[str]:
    """`reports_of_ours` in one file; a process that was killed has not ended its own."""
    text = path.read_text()
    if not text.rstrip().endswith("</valgrindoutput>"):
        text = text[: text.rfind("</error>") + len("</error>")] + "</valgrindoutput>"
    return reports_of_ours(text, extension) if "<error>" in text else []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_valgrind(tmp_path):
    """No invalid access and no use of what was never set with a frame of ours in it."""
    valgrind = need("valgrind")
    reports = tmp_path / "reports"  # one a process: tests fork
    reports.mkdir()
    extension = installed_extension()
    leave_out = tmp_path / "leave_out"
    leave_out.write_text("\n".join(too_long(tmp_path / "native", extension, SECONDS_NATIVE)))
    run = run_torchfree(
        bare_interpreter(),
        extension,
        tmp_path / "run",
        prefix=(
            valgrind,
            "--tool=memcheck",
            "--xml=yes",
            f"--xml-file={reports}/%p.xml",
            "--num-callers=30",
            "--leak-check=no",
            f"--suppressions={SUPPRESSIONS}",
        ),
        env={"PYTHONMALLOC": "malloc", "OPGUARD_LEAVE_OUT": str(leave_out)},
        timeout=800,
    )
    assert_passed(run)
    found = list(reports.glob("*.xml"))
    assert found
    ours = [text for path in found for text in told_of_ours(path, extension)]
    assert not ours, "\n".join(ours)


# --- other Pythons --------------------------------------------------------------------------------

OTHERS = other_pythons()
MINORS = sorted({*KNOWN_MINORS, *(minor for _, minor in OTHERS)} - {sys.version_info[1]})


@pytest.mark.parametrize("minor", MINORS)
def test_on_another_python(minor, tmp_path):
    """The very file this Python uses, on another."""
    python = OTHERS.get((3, minor))
    if python is None:
        pytest.skip(f"no Python 3.{minor} is found: audited by abi3audit, not run")
    run = run_torchfree(python, installed_extension(), tmp_path / "run")
    assert_passed(run)
