"""Exports and their surroundings as somebody else may have left them: a load goes on."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tiny_exports
from opguard import cli, hub
from opguard.exports import identity, matching, store
from opguard.hub import LocalFileMissing

NESTED = "[" * 200_000


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    return tmp_path / "exports"


def of_list(found):
    return found | {"made_from": [1], "key": store.key_of([1])}


METADATA = {
    "nested deeply": lambda found: NESTED,
    "no object": lambda found: [found],
    "made from a list": of_list,
    "known is a list": lambda found: found | {"known": [1]},
    "known are numbers": lambda found: found | {"known": {"1-2": 3}},
    "known is missing": lambda found: {k: v for k, v in found.items() if k != "known"},
    "files is a list": lambda found: found | {"files": ["x"]},
    "a path outside": lambda found: (
        found | {"files": found["files"] | {"../../x": {"bytes": 1, "sha256": "a"}}}
    ),
    "huge number": lambda found: (
        found | {"files": {name: {"bytes": 10**400, "sha256": [[]]} for name in found["files"]}}
    ),
}


@pytest.mark.parametrize("kind", METADATA)
def test_hostile_metadata_costs_a_load_and_nothing_else(root, caplog, capsys, kind):
    folder = root / "models--x"
    tiny_exports.get(folder, 1)
    found = METADATA[kind](json.loads((folder / "metadata.json").read_text()))
    text = found if isinstance(found, str) else json.dumps(found)
    (folder / "metadata.json").write_text(text)
    for action, status in (("list", 0), ("verify", 1)):
        assert cli.main(["exports", action]) == status
    assert capsys.readouterr().err == ""
    with pytest.raises(LocalFileMissing, match="only_load_export: expected an export in"):
        tiny_exports.get(folder, 1, only_load_export=True)
    assert tiny_exports.generation_of(tiny_exports.get(folder, 1)) == 1
    assert "is made anew" in caplog.text
    assert tiny_exports.stands(folder) == 1


@pytest.mark.parametrize(
    "name", ["x" * 300, "a\0b", "a\ud800b"], ids=["too long", "a zero", "half a character"]
)
def test_a_name_that_no_folder_can_have_means_no_export(root, caplog, name):
    got = tiny_exports.get(store.export_folder(name), 1)
    assert tiny_exports.generation_of(got) == 1
    assert "no export in" in caplog.text


@pytest.mark.parametrize("name", ["..", "a/../../b", "~", "ü 漢", "-x", "."])
def test_odd_names_stay_in_the_folder_of_exports(root, name):
    folder = store.export_folder(name)
    for _ in range(2):
        tiny_exports.get(folder, 1)
    assert folder.parent == root
    assert sorted(path.name for path in root.parent.iterdir()) == ["exports"]
    assert tiny_exports.stands(folder) == 1


def test_a_relative_folder_is_of_one_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPGUARD_EXPORTS", "mine")
    folder = store.export_folder("x")

    def from_source():
        monkeypatch.chdir("/")
        return tiny_exports.model(1, 10)

    matching.load_or_refresh(
        folder=folder,
        describe=lambda network: {"generation": 1},
        from_source=from_source,
        from_export=tiny_exports.load,
        save=tiny_exports.save,
        settings=matching.Settings(),
    )
    assert tiny_exports.stands(tmp_path / "mine" / "models--x") == 1


def test_a_linked_export_is_pruned_and_what_it_names_is_not(root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    tiny_exports.get(elsewhere, 1)
    root.mkdir()
    (root / "models--x").symlink_to(elsewhere)
    assert tiny_exports.generation_of(tiny_exports.get(root / "models--x", 1)) == 1
    assert cli.main(["exports", "prune", "--name", "x"]) == 0
    assert sorted(path.name for path in root.iterdir()) == [".locks"]
    assert tiny_exports.stands(elsewhere) == 1


def test_a_linked_export_that_differs_is_replaced(root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    tiny_exports.get(elsewhere, 1)
    root.mkdir()
    (root / "models--x").symlink_to(elsewhere)
    tiny_exports.get(root / "models--x", 2)
    assert tiny_exports.stands(root / "models--x") == 2
    assert tiny_exports.stands(elsewhere) == 1


AS_NOBODY = """
import os, sys, pathlib
sys.path.insert(0, {helpers!r})
import tiny_exports
from opguard.exports import matching, store
from opguard import hub
tiny_exports.get(pathlib.Path({warm!r}), 1)
os.environ.pop("HOME", None)
os.setgid(54321)
os.setuid(54321)
got = tiny_exports.get(pathlib.Path({folder!r}), 1)
assert tiny_exports.generation_of(got) == 1
for name in ("OPGUARD_EXPORTS", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE"):
    os.environ.pop(name, None)
assert str(hub.hub_cache_dir()) == "~/.cache/huggingface/hub"
assert store.exports_root().is_absolute()
assert hub.local_folder("~/x", None) is None
"""


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="becoming nobody needs root")
def test_a_folder_of_somebody_else_and_no_home(tmp_path):
    """Exports in a folder that may not be entered, and a user that has no home folder."""
    private = tmp_path / "private"
    tiny_exports.get(private / "models--x", 1)
    private.chmod(0o700)
    text = AS_NOBODY.format(
        helpers=str(Path(tiny_exports.__file__).parent),
        warm=str(tmp_path / "warm" / "models--x"),
        folder=str(private / "models--x"),
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no export in" in done.stderr


def test_ids_that_are_no_paths():
    for name in ("~nobody-of-that-name/x", "x" * 5000, "a\0b"):
        assert hub.local_folder(name, "main") is None
        assert identity.describe_model(name)["files"] is None


@pytest.mark.parametrize("first", [True, False])
def test_a_source_with_a_file_nobody_may_read_is_loaded(root, caplog, first):
    """Also where it shows only as the load begins."""
    calls = []

    def describe(network):
        calls.append(network)
        if first or len(calls) > 1:
            raise PermissionError(13, "Permission denied", "secret.json")
        return {}

    def load(**settings):
        return matching.load_or_refresh(
            folder=root / "models--x",
            describe=describe,
            from_source=lambda: tiny_exports.model(1, 10),
            from_export=tiny_exports.load,
            save=tiny_exports.save,
            settings=matching.Settings(**settings),
        )

    with caplog.at_level(logging.WARNING, logger="opguard"):
        assert tiny_exports.generation_of(load()) == 1
    assert "secret.json" in caplog.text
    assert not (root / "models--x").exists()
    with pytest.raises(PermissionError):
        load(only_load_export=True)


def test_list_goes_on_while_a_writer_removes_files(root, monkeypatch, capsys):
    tiny_exports.get(root / "models--x", 1)
    real = os.lstat

    def gone(path, *args, **kwargs):
        if str(path).endswith("second.safetensors"):
            raise FileNotFoundError(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "lstat", gone)
    assert cli.main(["exports", "list"]) == 0
    assert "models--x" in capsys.readouterr().out


def test_a_long_wait_is_said_and_an_interrupt_ends_it(root, monkeypatch, caplog):
    """Nothing stays of a load that Ctrl-C ended while it waited for another one's lock."""
    monkeypatch.setattr(store, "LONG_WAIT_S", 0.05)
    folder = root / "models--x"
    has, done = threading.Event(), threading.Event()

    def hold():
        with store.lock(folder):
            has.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    has.wait(60)
    interrupt = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            tiny_exports.get(folder, 1)
    finally:
        done.set()
        interrupt.join()
        holder.join()
    assert "still waiting for another load" in caplog.text
    assert [path.name for path in root.iterdir()] == [".locks"]
    assert tiny_exports.generation_of(tiny_exports.get(folder, 1)) == 1
    assert tiny_exports.stands(folder) == 1
