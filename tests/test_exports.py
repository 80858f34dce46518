"""An export is matched or made anew: what makes it differ, what breaks it, who may write it."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tiny_exports
from opguard.exports import hashing, matching, store
from opguard.hub import LocalFileMissing

ISOLATED = Path(__file__).parent / "isolated"
WEIGHTS = "part/second.safetensors"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "exports" / "models--tiny"


@pytest.fixture
def made(folder):
    tiny_exports.get(folder, 1)
    return folder


@pytest.fixture
def loads(monkeypatch):
    """From where each load of the test came."""
    seen = []
    for name, kind in (("model", "source"), ("load", "export")):
        real = getattr(tiny_exports, name)

        def noting(*args, real=real, kind=kind):
            seen.append(kind)
            return real(*args)

        monkeypatch.setattr(tiny_exports, name, noting)
    return seen


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(ISOLATED / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# --- matching -------------------------------------------------------------------------------------


def test_made_at_the_first_load_and_matched_afterwards(folder, loads, caplog):
    with caplog.at_level("INFO", logger="opguard"):
        tiny_exports.get(folder, 1)
    assert [each.message for each in caplog.records] == [f"exports: {folder} is made"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    for _ in range(2):
        assert tiny_exports.generation_of(tiny_exports.get(folder, 1)) == 1
    assert loads == ["source", "export", "export"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [".locks", "models--tiny"]


def test_metadata_is_for_a_person_and_exact(made):
    found = json.loads((made / "metadata.json").read_text())
    assert found["made_from"] == {"generation": 1}
    assert found["key"] == store.key_of({"generation": 1})
    assert found["made_at"].endswith("+00:00")
    assert found["files"].keys() == set(tiny_exports.PARTS)
    for name, entry in found["files"].items():
        printed = subprocess.run(
            ["sha256sum", str(made / name)], capture_output=True, text=True, check=True
        ).stdout
        assert printed.split()[0] == entry["sha256"]
        assert entry["bytes"] == (made / name).stat().st_size


def test_what_differs_is_said_and_the_source_is_loaded(made, loads, caplog):
    assert tiny_exports.generation_of(tiny_exports.get(made, 2)) == 2
    assert loads == ["source"]
    assert "generation was 1 and is 2" in caplog.text
    assert tiny_exports.stands(made) == 2


def test_forced_refresh_makes_it_anew(made, loads):
    before = store.stamp(made)
    tiny_exports.get(made, 1, force_refresh=True)
    assert loads == ["source"]
    assert store.stamp(made)[0] != before[0]
    with pytest.raises(ValueError, match="only_load_export: expected without"):
        tiny_exports.get(made, 1, force_refresh=True, only_load_export=True)


@pytest.mark.parametrize("missing", [True, False])
def test_only_load_export_never_loads_the_source(folder, loads, missing):
    if not missing:
        tiny_exports.get(folder, 1)
        loads.clear()
    with pytest.raises(LocalFileMissing) as caught:
        tiny_exports.get(folder, 2, only_load_export=True)
    said = "there is none" if missing else "generation was 1 and is 2"
    assert said in str(caught.value)
    assert "load once without only_load_export" in str(caught.value)
    assert loads == []
    if not missing:
        tiny_exports.get(folder, 1, only_load_export=True)
        assert loads == ["export"]


def load_described(folder, description, seen, **settings):
    """A load with a description of its own; `seen` gets where it came from."""

    def from_source():
        seen.append("source")
        return tiny_exports.model(1, 10)

    def from_export(where):
        seen.append("export")
        return tiny_exports.load(where)

    return matching.load_or_refresh(
        folder=folder,
        describe=description if callable(description) else lambda network: description,
        from_source=from_source,
        from_export=from_export,
        save=tiny_exports.save,
        settings=matching.Settings(**settings),
    )


def source(**changes):
    plain = {
        "model": "org/m",
        "revision": "main",
        "commit": "a" * 40,
        "files": {"w": "1", "c": "2"},
    }
    return {"class": "a.B", "versions": {"torch": "2.13"}, "source": plain | changes}


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (source(commit="b" * 40), f"org/m at 'main' moved from commit {'a' * 40} to {'b' * 40}"),
        (source(commit="b" * 40, files=None), f"REVISION = '{'a' * 40}'"),
        (source(files={"w": "9", "c": "2"}), "w changed of org/m"),
        (source(revision="v1"), "source.revision was \"main\" and is \"v1\""),
        (source(model="org/n"), "source.model was"),
        (source(commit=None, files=None), "org/m is not on this machine to compare with"),
        (source(commit=None, files={"w": "1", "c": "2", "x": "3"}), "x is new of org/m"),
        (source(commit=None, files={"w": "1"}), "c is gone of org/m"),
        (source() | {"class": "a.C"}, "two classes share this NAME"),
        (source() | {"versions": {"torch": "2.14"}}, 'versions.torch was "2.13" and is "2.14"'),
        (source() | {"dtype": "fp16"}, "dtype is new"),
    ],
)  # fmt: skip
def test_each_difference_costs_a_load_and_is_named(folder, caplog, new, words):
    """Faults D3 and D4: revision, commit, files, attributes; two classes of one name are told."""
    seen = []
    load_described(folder, source(), seen)
    load_described(folder, new, seen)
    assert seen == ["source", "source"]
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert words in warned[0]


@pytest.mark.parametrize(
    "same",
    [source(), source(files=None), source(files={"w": "1"}), source(files={"w": "1", "y": "7"})],
    ids=["all", "source-gone", "part-here", "more-here"],
)
def test_a_commit_pins_what_is_not_here(folder, same):
    """Other files of the same commit may come and go with what other classes load."""
    seen = []
    load_described(folder, source(), seen)
    load_described(folder, same, seen)
    assert seen == ["source", "export"]


def test_only_load_export_works_when_the_source_is_gone(folder, caplog):
    seen = []
    load_described(folder, source(commit=None), seen)
    gone = source(commit=None, files=None)
    load_described(folder, gone, seen, only_load_export=True)
    assert caplog.text == ""
    load_described(folder, gone | {"versions": {"torch": "3"}}, seen, only_load_export=True)
    assert 'although versions.torch was "2.13" and is "3"' in caplog.text
    assert seen == ["source", "export", "export"]
    with pytest.raises(LocalFileMissing, match="revision"):
        load_described(folder, source(files=None, revision="v2"), seen, only_load_export=True)
    with pytest.raises(LocalFileMissing, match="class was"):
        load_described(folder, gone | {"class": "x.Y"}, seen, only_load_export=True)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"network": True}, True),
        ({"network": False}, False),
        ({"network": True, "only_load_export": True}, False),
        ({"network": True, "local_on_refresh": True}, False),
    ],
)
def test_who_may_ask_the_hub(folder, settings, asked):
    seen, networks = [], []

    def describe(network):
        networks.append(network)
        return source()

    load_described(folder, source(), seen)
    load_described(folder, describe, seen, **settings)
    assert any(networks) is asked


def test_a_failing_source_tells_of_the_export_that_stands(made):
    def describe(network):
        return {"generation": 2}

    def from_source():
        raise OSError("no connection")

    with pytest.raises(OSError, match="no connection") as caught:
        matching.load_or_refresh(
            folder=made,
            describe=describe,
            from_source=from_source,
            from_export=tiny_exports.load,
            save=tiny_exports.save,
            settings=matching.Settings(),
        )
    assert "only_load_export=True never asks for the source" in caught.value.__notes__[0]
    assert tiny_exports.stands(made) == 1


# --- broken exports -------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def rewrite(change):
    def damage(folder):
        path = folder / "metadata.json"
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return damage


DAMAGES = {
    "flipped": (lambda f: flip(f / WEIGHTS), f"{WEIGHTS} has not the content"),
    "cut": (lambda f: cut(f / WEIGHTS), f"{WEIGHTS} has "),
    "gone": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "added": (lambda f: (f / "adapter.json").write_text("{}"), "adapter.json was not exported"),
    "pickle": (lambda f: (f / "model.bin").write_bytes(b"x"), "model.bin is no safetensors file"),
    "nested": (lambda f: (f / "part" / "a.pt").write_bytes(b"x"), "a.pt is no safetensors file"),
    "link": (lambda f: (f / "config.json").symlink_to("/none"), "config.json was not exported"),
    "no-metadata": (lambda f: (f / "metadata.json").unlink(), "metadata.json is not valid"),
    "no-json": (lambda f: (f / "metadata.json").write_text("{broken"), "metadata.json is not"),
    "list": (lambda f: (f / "metadata.json").write_text("[]"), "metadata.json is not valid"),
    "binary": (lambda f: (f / "metadata.json").write_bytes(b"\xff\0"), "metadata.json is not"),
    "made-from": (rewrite(lambda m: m["made_from"].update(x=1)), "its key is not that of"),
    "no-digest": (rewrite(lambda m: m["files"].update({WEIGHTS: {}})), "metadata.json is not"),
    "format": (rewrite(lambda m: m.update(format=2)), "metadata.json is not valid"),
    "empty": (lambda f: [shutil.rmtree(f), f.mkdir()], "metadata.json is not valid"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_export_costs_a_load_and_is_made_anew(made, loads, caplog, damage):
    """Fault D5: the source is fine, so the load is; what is wrong is named."""
    act, words = DAMAGES[damage]
    act(made)
    with pytest.raises(LocalFileMissing, match="only_load_export") as caught:
        tiny_exports.get(made, 1, only_load_export=True)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert loads == []
    assert tiny_exports.generation_of(tiny_exports.get(made, 1)) == 1
    assert loads == ["source"]
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert words in warned[0]
    assert tiny_exports.stands(made) == 1


def test_pickles_are_never_exported_nor_listed(folder, caplog):
    def save(parts, where):
        (where / "weights.pt").write_bytes(b"x")
        return tiny_exports.save(parts, where)

    matching.load_or_refresh(
        folder=folder,
        describe=lambda network: {},
        from_source=lambda: tiny_exports.model(1, 10),
        from_export=tiny_exports.load,
        save=save,
        settings=matching.Settings(),
    )
    assert "not saved as safetensors, but as weights.pt" in caplog.text
    assert not folder.exists()
    tiny_exports.get(folder, 1)
    (folder / "w.bin").write_bytes(b"x")
    rewrite(lambda m: m["files"].update({"w.bin": {"bytes": 1, "sha256": "0"}}))(folder)
    with pytest.raises(store.BrokenExport, match=r"w\.bin is no safetensors file"):
        store.verify(folder, store.read(folder))


def test_an_export_that_does_not_load_is_made_anew(made, caplog):
    def broken(where):
        raise RuntimeError("shape mismatch")

    seen = []
    real, tiny_exports.load = tiny_exports.load, broken
    try:
        load_described(made, {"generation": 1}, seen)
        with pytest.raises(RuntimeError, match="shape mismatch"):
            load_described(made, {"generation": 1}, seen, only_load_export=True)
    finally:
        tiny_exports.load = real
    assert seen == ["export", "source", "export"]
    assert "it does not load (RuntimeError: shape mismatch)" in caplog.text


def test_an_unfit_export_is_not_tried_again(made, caplog):
    seen = []

    def unfit(where):
        seen.append("export")
        raise matching.ExportUnfit("weight w differs")

    def get(generation=1, **settings):
        def from_source():
            seen.append("source")
            return tiny_exports.model(generation, 10)

        return matching.load_or_refresh(
            folder=made,
            describe=lambda network: {"generation": generation},
            from_source=from_source,
            from_export=unfit,
            save=tiny_exports.save,
            settings=matching.Settings(**settings),
        )

    get()
    get()
    assert seen == ["export", "source", "source"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "weight w differs" in caplog.text
    assert "_export_identity" in caplog.text  # the way to say what else the loader reads
    with pytest.raises(LocalFileMissing, match=r"weight w differs.*leave only_load_export out"):
        get(only_load_export=True)
    get(2)  # made anew, so there is a new chance
    get(2)
    assert seen[3:] == ["source", "export", "source"]


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fallback", [False, True])
def test_a_writer_killed_at_any_instant_leaves_a_whole_export(tmp_path, fallback):
    """At twenty named points, and by SIGKILL at random times while others read."""
    run("exports_killed.py", tmp_path, "--seconds", 3, *(["--fallback"] if fallback else []))


def test_processes_that_refresh_at_once_leave_one_good_export(folder):
    did = json.loads(run("exports_together.py", folder, 1, 1, 1, 1).stdout)
    assert [each["got"] for each in did] == [1] * 4
    assert sum(each["source"] for each in did) == 1
    assert sum(each["export"] for each in did) == 3
    assert tiny_exports.stands(folder) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == [".locks", "models--tiny"]


@pytest.mark.parametrize("generations", [(1, 2, 1, 2), (3, 3, 3)])
def test_processes_that_disagree_get_what_they_asked_for(made, generations):
    force = len(set(generations)) == 1
    did = json.loads(run("exports_together.py", made, *generations, *["--force"][:force]).stdout)
    assert [each["got"] for each in did] == list(generations)
    assert tiny_exports.stands(made) in generations
    assert sorted(path.name for path in made.parent.iterdir()) == [".locks", "models--tiny"]


def test_threads_wait_for_each_other_and_not_for_themselves(folder, loads):
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(tiny_exports.get(folder, 1))) for _ in range(4)
    ]
    with store.lock(folder):
        [thread.start() for thread in threads]
        tiny_exports.get(folder, 1)  # this thread has the lock
        assert not got
    [thread.join(30) for thread in threads]
    assert len(got) == 4
    assert loads.count("source") == 1


def test_an_export_exchanged_while_it_is_read_is_read_again(made):
    seen = []

    def from_export(where):
        parts = tiny_exports.load(where)
        seen.append(tiny_exports.generation_of(parts))
        if len(seen) == 1:  # somebody with another opinion, between two files
            tiny_exports.get(made, 2)
            tiny_exports.get(made, 1, size=7)
        return parts

    model = matching.load_or_refresh(
        folder=made,
        describe=lambda network: {"generation": 1},
        from_source=lambda: pytest.fail("the export matches"),
        from_export=from_export,
        save=tiny_exports.save,
        settings=matching.Settings(),
    )
    assert seen == [1, 1]
    assert len(model[WEIGHTS]) == 7


class _Limit:
    """No file may be longer, as on a disk that is full."""

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_leaves_the_load_and_the_old_export(made, caplog):
    """Fault D5: saving fails for want of room, and that is a warning."""
    before = tree(made)
    with _Limit():
        got = tiny_exports.get(made, 2, size=100_000)
    assert tiny_exports.generation_of(got) == 2
    assert f"no export in {made}" in caplog.text
    assert tree(made) == before
    assert sorted(path.name for path in made.parent.iterdir()) == [".locks", "models--tiny"]


@pytest.mark.parametrize("step", ["_measured", "_sync_tree", "_write_json", "_exchange"])
@pytest.mark.parametrize("error", [OSError(28, "no space"), KeyboardInterrupt()])
def test_a_failing_step_leaves_the_old_export(made, monkeypatch, caplog, step, error):
    before = tree(made)

    def fails(*args):
        raise error

    monkeypatch.setattr(store, step, fails)
    if isinstance(error, OSError):
        assert tiny_exports.generation_of(tiny_exports.get(made, 2)) == 2
        assert "no space" in caplog.text
    else:
        with pytest.raises(KeyboardInterrupt):
            tiny_exports.get(made, 2)
    assert tree(made) == before
    assert sorted(path.name for path in made.parent.iterdir()) == [".locks", "models--tiny"]


def test_no_place_for_exports_is_a_warning(tmp_path, caplog):
    (tmp_path / "exports").write_text("a file")
    got = tiny_exports.get(tmp_path / "exports" / "models--x", 1)
    assert tiny_exports.generation_of(got) == 1
    assert "no export in" in caplog.text
    assert "made anew" not in caplog.text


def test_instances_that_take_turns_are_told_to_take_names(made, caplog):
    for told in ("a", "b"):
        matching.load_or_refresh(
            folder=made,
            describe=lambda network, told=told: {"class": "C", "identity": {"vae": told}},
            from_source=lambda: tiny_exports.model(1, 10),
            from_export=tiny_exports.load,
            save=tiny_exports.save,
            settings=matching.Settings(),
        )
    said = caplog.records[-1].message
    assert "identity.vae was" in said
    assert said.endswith("to keep an export of each, give one a NAME of its own in a subclass")


def test_a_source_that_changes_while_it_is_loaded_is_not_exported(folder, caplog):
    files = {"w": "1"}

    def describe(network):
        return source(commit=None, files=dict(files))

    def from_source():
        files["w"] = "2"
        return tiny_exports.model(1, 10)

    matching.load_or_refresh(
        folder=folder,
        describe=describe,
        from_source=from_source,
        from_export=tiny_exports.load,
        save=tiny_exports.save,
        settings=matching.Settings(),
    )
    assert "w changed while it was loaded" in caplog.text
    assert not folder.exists()


@pytest.mark.parametrize(
    ("network", "upstream", "exported"),
    [(False, None, False), (True, "b", True), (True, "c", False)],
    ids=["off the network", "to what the hub had said", "to something else"],
)
def test_a_reference_that_moves_while_its_model_loads(folder, caplog, network, upstream, exported):
    """Who moved it, this load or another process, decides which weights these are."""
    here = {"commit": "a" * 40}

    def describe(ask):
        commit = upstream * 40 if ask else here["commit"]
        return {"model": "org/m", "revision": "main", "commit": commit, "files": None}

    def from_source():
        here["commit"] = "b" * 40
        return tiny_exports.model(1, 10)

    matching.load_or_refresh(
        folder=folder,
        describe=lambda ask: {"source": describe(ask)},
        from_source=from_source,
        from_export=tiny_exports.load,
        save=tiny_exports.save,
        settings=matching.Settings(network=network),
    )
    assert folder.exists() is exported
    assert ("moved from commit" in caplog.text and "while it was loaded" in caplog.text) is (
        not exported
    )


def test_what_cannot_be_saved_is_loaded_each_time(folder, caplog):
    with caplog.at_level("INFO", logger="opguard"):
        got = matching.load_or_refresh(
            folder=folder,
            describe=lambda network: {},
            from_source=lambda: 3,
            from_export=tiny_exports.load,
            save=lambda model, where: False,
            settings=matching.Settings(),
        )
    assert got == 3
    assert caplog.records == []  # save has said why
    assert [path.name for path in folder.parent.iterdir()] == [".locks"]


# --- where, and off -------------------------------------------------------------------------------


def test_folder_of_an_export(tmp_path, monkeypatch):
    monkeypatch.delenv("OPGUARD_EXPORTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "exports"
    assert store.export_folder("tiny-vae-detector") == root / "models--tiny-vae-detector"
    named = store.export_folder("a/b", precision="fp16", quant_type="nf4", quant_use_double=True)
    assert named == root / "models--a--b-fp16-nf4-dq"
    assert store.export_folder("x", quant_type="i8") == root / "models--x-i8"
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "mine"))
    assert store.export_folder("x") == tmp_path / "mine" / "models--x"


def test_exports_can_be_turned_off(monkeypatch, tmp_path):
    monkeypatch.setenv("OPGUARD_EXPORTS", "0")
    assert store.export_folder("x") is None
    assert tiny_exports.generation_of(tiny_exports.get(None, 4)) == 4
    with pytest.raises(LocalFileMissing, match="OPGUARD_EXPORTS=0"):
        tiny_exports.get(None, 4, only_load_export=True)


# --- hashing --------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Which files were read to be hashed; the process has forgotten what it knew."""
    seen = []
    real = hashing._hash_chunk

    def noting(path, index):
        seen.append((path.name, index))
        return real(path, index)

    monkeypatch.setattr(hashing, "_hash_chunk", noting)
    monkeypatch.setattr(hashing, "_known", {})
    return seen


def test_nothing_is_hashed_twice_in_a_process(made, reads, monkeypatch):
    monkeypatch.setattr(hashing, "_FRESH_NS", -(10**12))  # as if they were written long ago
    for _ in range(3):
        tiny_exports.get(made, 1)
    assert len(reads) == 2
    flip(made / WEIGHTS)
    with pytest.raises(LocalFileMissing, match="has not the content"):
        tiny_exports.get(made, 1, only_load_export=True)


def test_a_file_just_written_is_read_again(made, reads):
    for _ in range(2):
        tiny_exports.get(made, 1)
    assert len(reads) == 4


def test_a_whole_export_costs_the_next_process_no_reading(made, reads, monkeypatch):
    monkeypatch.setattr(hashing, "_FRESH_NS", -(10**12))
    for expected in (2, 2, 2):
        tiny_exports.get(made, 1)
        assert len(reads) == expected
        hashing._known.clear()  # as if another process began
    for damage in ("{", "[]", '{"a": 1}', "[" * 100_000):
        (made / store.VERIFIED).write_text(damage)
        tiny_exports.get(made, 1, only_load_export=True)
        hashing._known.clear()
    assert len(reads) == 10
    flip(made / WEIGHTS)
    with pytest.raises(LocalFileMissing, match="has not the content"):
        tiny_exports.get(made, 1, only_load_export=True)


def test_damage_below_the_file_system_is_seen_afresh(made, reads, monkeypatch):
    """A bit that changed while the stat did not: `opguard exports verify` reads everything."""
    monkeypatch.setattr(hashing, "_FRESH_NS", -(10**12))
    metadata = store.read(made)
    flip(made / WEIGHTS)
    known = {
        hashing._signature((made / name).stat()): entry["sha256"]
        for name, entry in metadata["files"].items()
    }
    (made / store.VERIFIED).write_text(json.dumps(known))
    store.verify(made, metadata)
    assert not reads
    with pytest.raises(store.BrokenExport, match="has not the content"):
        store.verify(made, metadata, afresh=True)
    # And what was read has the last word.
    with pytest.raises(store.BrokenExport, match="has not the content"):
        store.verify(made, metadata)


def test_large_files_are_hashed_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "CHUNK", 1000)
    monkeypatch.setattr(hashing, "_BUFFER", 300)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2500))
    (tmp_path / "none").write_bytes(b"")
    found = hashing.hash_files([path, tmp_path / "none"])
    data = path.read_bytes()
    chunks = [data[:1000], data[1000:2000], data[2000:]]
    assert found[path] == [hashlib.sha256(chunk).hexdigest() for chunk in chunks]
    assert found[tmp_path / "none"] == hashlib.sha256(b"").hexdigest()
