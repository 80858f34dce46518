"""The ``opguard`` command."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import opguard
from opguard import cli, info, tests


def python(code: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=tests._environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("command", ["demo", "info", "selftest", "exports", "replay", "profile"])
def test_help_names_every_command(capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    assert command in capsys.readouterr().out


def test_help_of_the_module_alone_imports_no_torch(tmp_path):
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('cli', {cli.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "try:\n    module.main(['info', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)\n"
    )
    assert python(code, cwd=tmp_path).stdout.splitlines()[-1] == "False"


def test_a_device_torch_does_not_know_is_wrong_usage(capsys):
    assert cli.main(["demo", "--device", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("opguard demo: --device: expected a device torch knows")
    assert said.count("\n") == 1


def test_no_command_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_info_says_versions_devices_isa_and_floors(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for wanted in (
        opguard.__version__,
        torch.__version__,
        platform.python_version(),
        "cpu",
        info.collect()["isa"],
        "Python 3.11, torch 2.10",
        "audited, not run",
    ):
        assert wanted in out


def test_a_reader_that_has_read_enough_is_no_failure_to_trace():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "opguard.cli", "info"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert facts["floors"] == {"python": "3.11", "torch": "2.10"}
    assert facts["devices"][0]["device"] == "cpu"


def test_info_sees_an_accelerator(monkeypatch):
    class Module:
        @staticmethod
        def get_device_properties(index):
            return type("P", (), {"name": "Fast", "total_memory": 8 * 2**30})

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Module)
    assert "cuda:1: Fast, 8.0 GiB" in info.as_text()


def test_selftest_runs_the_smoke_set_and_nothing_else(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a folder with no settings of ours
    assert cli.main(["selftest", "--", "--collect-only"]) == 0
    out = capsys.readouterr().out
    files = {line.split("::")[0].rpartition("/")[2] for line in out.splitlines() if "::" in line}
    assert {name.startswith("test_smoke_") for name in files} == {True}


def test_selftest_passes(capsys):
    assert cli.main(["selftest"]) == 0
    assert "passed" in capsys.readouterr().out


def test_smoke_raises_when_a_test_fails(monkeypatch, tmp_path):
    (tmp_path / "test_smoke_bad.py").write_text(
        "import pytest\n@pytest.mark.smoke\ndef test_bad():\n    assert 0\n", encoding="utf-8"
    )
    monkeypatch.setattr(tests, "_folder", lambda: tmp_path)
    with pytest.raises(RuntimeError, match="pytest ended with status 1; its output above names"):
        tests.smoke()


def test_without_pytest_one_sentence_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tests.main() == 1
    assert "'opguard[test]'" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="expected pytest"):
        tests.smoke()
