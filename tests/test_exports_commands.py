"""opguard exports list, verify, prune."""

import json
import os
import time

import pytest

import tiny_exports
from opguard import cli
from opguard.exports import matching, store


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Two exports: one described as OpGuardBase does it, one in two parts of nothing else."""
    root = tmp_path / "exports"
    monkeypatch.setenv("OPGUARD_EXPORTS", str(root))
    source = {"model": "org/m", "revision": "main", "commit": "a" * 40, "files": None}
    matching.load_or_refresh(
        folder=store.export_folder("blip-detector", precision="bf16", quant_type="nf4"),
        describe=lambda network: {"source": source, "dtype": "torch.bfloat16"},
        from_source=lambda: tiny_exports.model(1, 1000),
        from_export=tiny_exports.load,
        save=tiny_exports.save,
        settings=matching.Settings(),
    )
    tiny_exports.get(root / "models--vae", 1)
    return root


def opguard(*arguments):
    return cli.main(["exports", *arguments])


def test_list_says_what_is_there(root, capsys):
    assert opguard("list") == 0
    said = capsys.readouterr().out
    for words in ("models--blip-detector-bf16-nf4", "org/m at " + "a" * 40, "bfloat16 nf4", "KB"):
        assert words in said
    assert "2 exports, " in said
    assert opguard("list", "--json") == 0
    blip, vae = json.loads(capsys.readouterr().out)
    assert blip["model"] == "org/m"
    assert blip["commit"] == "a" * 40
    assert (blip["dtype"], blip["quant"]) == ("bfloat16", "nf4")
    assert blip["made_at"] <= blip["used_at"]
    assert blip["bytes"] == sum(p.stat().st_size for p in root.glob("*bf16*/**/*") if p.is_file())
    assert vae["model"] is None
    assert vae["problem"] is None


def test_a_use_is_noted(root, capsys):
    os.utime(root / "models--vae" / "metadata.json", (0, 0))
    opguard("list", "--json")
    assert json.loads(capsys.readouterr().out)[1]["used_at"].startswith("1970")
    tiny_exports.get(root / "models--vae", 1)
    assert time.time() - (root / "models--vae" / "metadata.json").stat().st_mtime < 60


def test_no_exports_at_all(tmp_path, monkeypatch, capsys):
    for value in (str(tmp_path / "none"), "0"):
        monkeypatch.setenv("OPGUARD_EXPORTS", value)
        for action in ("list", "verify", "prune"):
            assert opguard(action) == 0
    assert "exports are off" in capsys.readouterr().out


def test_verify_finds_the_bad_one(root, capsys):
    assert opguard("verify") == 0
    assert capsys.readouterr().out.count("whole") == 2
    path = root / "models--vae" / tiny_exports.PARTS[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert opguard("verify") == 1
    said = capsys.readouterr().out
    assert f"models--vae: {tiny_exports.PARTS[0]} has not the content" in said
    assert opguard("verify", "blip*") == 0
    assert opguard("verify", "vae", "--json") == 1
    said = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert [row["name"] for row in said] == ["models--vae"]
    assert opguard("verify", "nobody") == 1
    assert "is named nobody" in capsys.readouterr().err


def names(root):
    return sorted(path.name for path in root.iterdir() if path.name != ".locks")


BLIP, VAE = "models--blip-detector-bf16-nf4", "models--vae"


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ([], [BLIP, VAE]),
        (["--name", "vae"], [BLIP]),
        (["--name", "blip*", "--name", "vae"], []),
        (["--broken"], [BLIP]),
        (["--broken", "--name", "blip*"], [BLIP, VAE]),
        (["--older-than", "30"], [VAE]),
        (["--older-than", "30", "--name", "vae"], [BLIP, VAE]),
        (["--older-than", "0"], []),
    ],
)
def test_prune_removes_what_meets_every_condition(root, capsys, arguments, left):
    old = time.time() - 40 * 86400
    os.utime(root / BLIP / "metadata.json", (old, old))
    (root / VAE / "metadata.json").write_text("{broken")
    assert opguard("prune", "--dry-run", *arguments) == 0
    said = capsys.readouterr().out
    assert names(root) == [BLIP, VAE]
    assert opguard("prune", *arguments) == 0
    assert names(root) == left
    assert capsys.readouterr().out == said.replace("would be removed", "removed")
    assert said.count("would be removed") == 2 - len(left)


def test_prune_removes_what_killed_writers_left(root):
    for name in (f".{VAE}.tmp-12-0123abcd", f".{VAE}.old-12-0123abcd", ".models--x.tmp-1-00000000"):
        (root / name).mkdir()
    (root / f".{VAE}.tmp-mine").mkdir()
    assert opguard("prune") == 0
    assert names(root) == [f".{VAE}.tmp-mine", BLIP, VAE]


def test_prune_puts_back_before_it_removes(root):
    (root / VAE).rename(root / f".{VAE}.old-12-0123abcd")
    assert opguard("prune") == 0
    assert names(root) == [BLIP, VAE]
    assert tiny_exports.stands(root / VAE) == 1


def test_prune_leaves_what_is_being_written(root, capsys):
    from filelock import FileLock

    with FileLock(root / ".locks" / f"{VAE}.lock"):
        assert opguard("prune", "--older-than", "0") == 1
    assert names(root) == [VAE]
    assert f"{VAE} is being written" in capsys.readouterr().out


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "-inf", "soon"])
def test_days_that_are_none_remove_nothing(root, capsys, days):
    with pytest.raises(SystemExit) as left:
        opguard("prune", f"--older-than={days}")
    assert left.value.code == 2
    assert "expected a number of days, 0 or more, got" in capsys.readouterr().err
    assert names(root) == [BLIP, VAE]


def called(name, **folder):
    """An export of a class of that NAME; returns its folder's name."""
    where = store.export_folder(f"{name}-detector", **folder)
    matching.load_or_refresh(
        folder=where,
        describe=lambda network: {"name": name},
        from_source=lambda: tiny_exports.model(1, 1000),
        from_export=tiny_exports.load,
        save=tiny_exports.save,
        settings=matching.Settings(),
    )
    return where.name


def test_a_name_is_the_classs_as_well(root, capsys):
    plain = called("me/m")
    half = called("me/m", precision="fp16", quant_type="nf4", quant_use_double=True)
    longer = called("me/m-detector-2")
    assert opguard("verify", "me/m", "--json") == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == [plain, half]
    (root / half / "metadata.json").write_text("{broken")  # its folder's name has to do
    assert opguard("prune", "--name", "me/m") == 0
    assert names(root) == sorted([BLIP, VAE, longer])


@pytest.mark.parametrize("action", [("verify",), ("prune", "--name")])
def test_a_name_of_nothing_is_said(root, capsys, action):
    assert opguard(*action, "nobody") == 1
    said = capsys.readouterr().err
    assert f"no export in {root} is named nobody" in said
    assert said.count("\n") == 1
    assert names(root) == [BLIP, VAE]


@pytest.mark.parametrize("action", ["list", "verify", "prune"])
def test_a_file_is_no_folder_of_exports(tmp_path, monkeypatch, capsys, action):
    (tmp_path / "exports").write_text("")
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    assert opguard(action) == 2
    said = capsys.readouterr()
    assert f"expected a folder of exports in {tmp_path / 'exports'}, it is a file" in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
