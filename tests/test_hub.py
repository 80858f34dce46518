"""What is known of the hub: its cache on this machine, and what it has now."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opguard import hub

SCRIPT = Path(__file__).parent / "isolated" / "exports_upstream.py"
COMMIT = "c" * 40


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"HF_HUB_CACHE": "/a/hub", "HF_HOME": "/b"}, "/a/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({}, "~/.cache/huggingface/hub"),
    ],
)
def test_hub_cache_dir(monkeypatch, settings, folder):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert hub.hub_cache_dir() == Path(folder).expanduser()


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache with one commit of org/m, which refs/main names."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--m"
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return repo


def test_local_commit_and_folder(cached, tmp_path):
    assert hub.cache_in_use() == str(tmp_path)
    for revision in (None, "main", COMMIT):
        assert hub.local_commit("org/m", revision) == COMMIT
        assert hub.local_folder("org/m", revision) == cached / "snapshots" / COMMIT
    assert hub.local_commit("org/m", "v2") is None
    assert hub.local_folder("org/m", "v2") is None
    assert hub.local_folder("org/m", "d" * 40) is None
    assert hub.local_folder(str(tmp_path), None) == tmp_path
    assert hub.is_commit(COMMIT)
    assert not any(map(hub.is_commit, (None, "main", COMMIT[1:], COMMIT.upper())))


def test_upstream_is_asked_once_a_while_and_may_fail(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def model_info(self, name, *, revision, timeout):
        asked.append((name, revision, timeout))
        if name == "org/bad":
            raise ConnectionError("down")
        return type("Info", (), {"sha": COMMIT})()

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "_upstream", {})
    for _ in range(2):
        assert hub.upstream_commit("org/m", "main") == COMMIT
        assert hub.upstream_commit("org/bad", None) is None
    assert asked == [("org/m", "main", 5.0), ("org/bad", None, 5.0)]
    monkeypatch.setattr(hub, "UPSTREAM_KEPT_S", 0)
    hub.upstream_commit("org/m", "main")
    assert len(asked) == 3
    assert hub.upstream_commit("/no/hub/id", None) is None
    assert len(asked) == 3


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    pytest.importorskip("huggingface_hub")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("upstream"))],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ASKS = ["GET /api/models/org/model/revision/main"]


@pytest.mark.parametrize(
    ("step", "value", "source", "asks"),
    [
        ("first", 1.0, "source", ASKS),
        ("again", 1.0, "export", ASKS),
        ("local", 1.0, "export", []),
        ("only", 1.0, "export", []),
        ("moved", 2.0, "source", ASKS),
        ("moved again", 2.0, "export", ASKS),
        ("pinned", 1.0, "source", []),
        ("pinned again", 1.0, "export", []),
        ("main again", 2.0, "source", ASKS),
        ("gone", 2.0, "export", []),
        ("gone, export", 2.0, "export", []),
    ],
)
def test_a_hub_that_moves_is_noticed(upstream, step, value, source, asks):
    """Fault D3: new weights under an old name are loaded; a commit never asks."""
    did = upstream["steps"][step]
    assert did["value"] == value
    assert did["from"] == [source]
    assert did["asked"] == asks


def test_a_hub_that_moved_is_said(upstream):
    said = upstream["steps"]["moved"]["said"]
    assert len(said) == 1
    assert said[0].startswith("WARNING")
    assert f"moved from commit {upstream['first']} to {upstream['second']}" in said[0]
    assert f"REVISION = '{upstream['first']}'" in said[0]
    assert upstream["steps"]["moved again"]["said"] == []
    assert "INFO org/model: the hub was not asked" in upstream["steps"]["gone"]["said"][0]


def test_an_export_is_not_served_for_a_source_nobody_can_see(upstream):
    did = upstream["steps"]["gone and forgotten"]
    assert did["from"] == ["source"]
    assert "only_load_export=True never asks for the source" in did["value"]
