"""What an export is made from: functions, values, files, each told apart from every other."""

import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from opguard.exports import hashing, identity
from opguard.guards.loading import cache_guard

describe = identity.describe_function


def made(text, **names):
    """A function without source."""
    scope = dict(names)
    exec(text, scope)
    return scope["f"]


def same(first, second):
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


DIFFERENT = {
    "constant": ("def f(): return 1", "def f(): return 2"),
    "name": ("def f(): return a()", "def f(): return b()"),
    "operator": ("def f(x, y): return x + y", "def f(x, y): return x - y"),
    "default": ("def f(x=1): return x", "def f(x=2): return x"),
    "keyword default": ("def f(*, x=1): return x", "def f(*, x=2): return x"),
    "nested": ("def f(): return lambda: 1", "def f(): return lambda: 2"),
    "type": ("def f(): return 1", "def f(): return True"),
    "set": ("def f(x): return x in {'a', 'b'}", "def f(x): return x in {'a', 'c'}"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_functions_without_source_do_not_share_a_fingerprint(kind):
    """Fault D5."""
    first, second = (describe(made(text)) for text in DIFFERENT[kind])
    assert "text" not in first
    assert not same(first, second)
    assert same(first, describe(made(DIFFERENT[kind][0])))


def holding(value):
    return lambda: value


def test_what_a_function_holds_counts():
    assert same(describe(holding(1)), describe(holding(1)))
    assert not same(describe(holding(1)), describe(holding(2)))
    assert not same(describe(holding({"a": 1})), describe(holding({"a": 2})))
    weight = torch.ones(3)
    assert same(describe(holding(weight)), describe(holding(torch.ones(3))))
    assert not same(describe(holding(weight)), describe(holding(torch.zeros(3))))
    half = functools.partial(holding, 1)
    assert same(describe(half), describe(functools.partial(holding, 1)))
    assert not same(describe(half), describe(functools.partial(holding, 2)))


def test_functions_that_hold_each_other_end():
    def first(n):
        return second(n - 1)

    def second(n):
        return first(n - 1)

    assert describe(first)["name"].endswith("first")


def test_the_code_that_runs_counts_not_the_file_as_it_is_now(tmp_path):
    """A file edited after its import must not lend its new text to the old function."""
    path = tmp_path / "loader_mod.py"
    code = "def f():\n    return {}\n"
    path.write_text(code.format(1))
    sys.path.insert(0, str(tmp_path))
    try:
        import loader_mod

        old = loader_mod.f
        path.write_text(code.format(22))
        before = describe(old)
        del sys.modules["loader_mod"]
        import loader_mod as again
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("loader_mod", None)
    assert again.f() == 22
    assert not same(before, describe(again.f))


def test_methods_name_their_owner():
    class A:
        @classmethod
        def load(cls):
            return cls

    class B(A):
        pass

    assert describe(A.load)["of"].endswith("A")
    assert not same(describe(A.load), describe(B.load))
    assert same(describe(len), describe(len))
    assert not same(describe(len), describe(sum))


class Config:
    def __init__(self, size):
        self.size = size
        self.lock = threading.Lock()


class WithDict(Config):
    def to_dict(self):
        return {"size": self.size}


class Broken(Config):
    def to_dict(self):
        raise ValueError


@pytest.mark.parametrize("kind", [Config, WithDict, Broken])
def test_objects_are_what_they_hold_not_where_they_are(kind):
    assert same(identity.describe_value(kind(1)), identity.describe_value(kind(1)))
    assert not same(identity.describe_value(kind(1)), identity.describe_value(kind(2)))
    assert "0x" not in json.dumps(identity.describe_value(kind(1)))


def test_values_are_json_and_stay_different():
    inf = float("inf")
    values = [
        None,
        True,
        1,
        1.5,
        float("nan"),
        inf,
        "1",
        b"1",
        1j,
        torch.float16,
        torch.device("cpu"),
    ]
    values += [Path("a"), [1], {"a": 1}, {"a": 2}, {1: 2}, range(3), torch.ones(2), torch.ones(3)]
    values += [torch.ones(2, dtype=torch.bfloat16), {"x"}, Config, WithDict, os, len]
    texts = [json.dumps(identity.describe_value(value), sort_keys=True) for value in values]
    assert len(set(texts)) == len(texts)
    for value, text in zip(values, texts, strict=True):
        assert json.dumps(identity.describe_value(value), sort_keys=True) == text


def test_a_class_of_ones_own_has_its_code_a_librarys_its_version():
    first = made("class f:\n    def a(self): return 1")
    second = made("class f:\n    def a(self): return 2")
    assert not same(identity.describe_type(first), identity.describe_type(second))
    assert identity.describe_type(torch.nn.Linear) == {"class": "torch.nn.modules.linear.Linear"}


def test_descriptions_are_the_same_in_another_process():
    """Sets have another order in each process, objects another address."""
    code = (
        "import json, sys; sys.path.insert(0, 'tests/helpers')\n"
        "from opguard.exports.identity import describe_function as d, describe_value as v\n"
        "scope = {}\n"
        'exec(\'def f(x): return x in {"a", "b", "c", "d"}\', scope)\n'
        "print(json.dumps([d(scope['f']), v({'q', 'r', 's', 't'}), v(object())]))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_versions():
    plain = identity.describe_versions()
    assert plain["torch"] == str(torch.__version__)
    assert plain["opguard"]
    assert "bitsandbytes" not in plain
    quantized = identity.describe_versions(quantized=True)
    assert plain.items() <= quantized.items()


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "unet").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "unet/w.safetensors", "vocab.txt"):
        (folder / name).write_text(name)
    for name in ("README.md", "picture.png", "model.bin", ".hidden.json"):
        (folder / name).write_text(name)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("x")
    return folder


def test_files_of_a_folder(source):
    """No pickles where there are safetensors; else they are what is loaded."""
    found = identity.describe_model(source)
    names = {"config.json", "model.safetensors", "unet/w.safetensors", "vocab.txt"}
    assert found["files"].keys() == names
    assert found["commit"] is None
    (source / "model.safetensors").unlink()
    assert "model.bin" in identity.describe_model(source)["files"]
    assert identity.describe_model("/no/such/folder")["files"] is None


def test_a_change_of_the_same_size_and_time_is_noticed(source, monkeypatch):
    """Fault D3: the digests kept from before do not hide it, since the change time differs."""
    monkeypatch.setattr(hashing, "_known", {})
    monkeypatch.setattr(hashing, "_FRESH_NS", -(10**12))  # as if they were written long ago
    reads = []
    real = hashing._hash_chunk
    monkeypatch.setattr(hashing, "_hash_chunk", lambda *a: [reads.append(a), real(*a)][1])
    before = identity.describe_model(source)
    assert len(reads) == 4
    assert identity.describe_model(source) == before
    assert len(reads) == 4
    path = source / "model.safetensors"
    stat = path.stat()
    path.write_text(path.read_text()[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = identity.describe_model(source)
    assert path.stat().st_size == stat.st_size
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert after["files"]["model.safetensors"] != before["files"]["model.safetensors"]
    assert len(reads) == 5


def test_an_unchanged_folder_costs_the_next_process_no_reading(source, tmp_path, monkeypatch):
    """The digests are kept in the export's metadata, by stat."""
    monkeypatch.setattr(hashing, "_known", {})
    monkeypatch.setattr(hashing, "_FRESH_NS", -(10**12))
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))

    def loader(model_id):
        from safetensors.torch import save_file

        class Model:
            def save_pretrained(self, folder):
                save_file({"w": torch.ones(2)}, os.path.join(folder, "w.safetensors"))

        return Model()

    def load():
        with cache_guard(base_export_name="x") as guarded:
            guarded(loader, str(source))

    load()
    hashing._known.clear()
    reads = []
    real = hashing._hash_chunk
    monkeypatch.setattr(
        hashing, "_hash_chunk", lambda path, i: [reads.append(path), real(path, i)][1]
    )
    load()
    # Of the export alone, not of the source.
    assert {path.parent.name for path in reads} == {"models--x"}
    assert {path.name for path in reads} == {"opguard.json", "w.safetensors"}
    assert reads[0].is_relative_to(tmp_path / "exports")


def test_a_source_that_was_new_when_it_was_exported_is_read_once_more(
    source, tmp_path, monkeypatch
):
    """What was just written is not taken by its stat; the next load that can notes it."""
    monkeypatch.setattr(hashing, "_known", {})
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    reads = []
    real = hashing._hash_chunk
    monkeypatch.setattr(
        hashing, "_hash_chunk", lambda path, i: [reads.append(path), real(path, i)][1]
    )

    class Model:
        def save_pretrained(self, folder):
            from safetensors.torch import save_file

            save_file({"w": torch.ones(2)}, os.path.join(folder, "w.safetensors"))

    def load():
        with cache_guard(base_export_name="x") as guarded:
            guarded(lambda model_id: Model(), str(source))
        hashing._known.clear()
        count = len(reads)
        reads.clear()
        return count

    assert load()
    assert load()
    monkeypatch.setattr(hashing, "_FRESH_NS", -(10**12))  # as if two seconds went by
    assert load()
    assert not load()


# --- values that look alike -----------------------------------------------------------------------


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


def pair(name):
    import array

    np = pytest.importorskip("numpy")
    large = np.zeros(5000)
    other = large.copy()
    other[2500] = 1
    return {
        "large array": (large, other),
        "digits that are not printed": (np.array([0.1]), np.array([0.1 + 1e-12])),
        "array of objects": (np.array([{"a": 1}]), np.array([{"a": 2}])),
        "dtype": (np.zeros(2, "f4"), np.zeros(2, "i4")),
        "shape": (np.zeros((1, 2)), np.zeros((2, 1))),
        "memory": (memoryview(b"a"), memoryview(b"b")),
        "array": (array.array("b", [1]), array.array("B", [1])),
        "slots": (Slotted(1), Slotted(2)),
        "keys": ({1: 0}, {"1": 0}),
        "keys of a mapping": ({Slotted(1): 0}, {Slotted(2): 0}),
    }[name]


ALIKE = (
    "large array",
    "digits that are not printed",
    "array of objects",
    "dtype",
    "shape",
    "memory",
    "array",
    "slots",
    "keys",
    "keys of a mapping",
)


@pytest.mark.parametrize("name", ALIKE)
def test_values_that_look_alike_are_told_apart(name):
    first, second = pair(name)
    assert not same(identity.describe_value(first), identity.describe_value(second))
    assert same(identity.describe_value(first), identity.describe_value(pair(name)[0]))


def test_no_address_is_in_a_description():
    text = json.dumps(
        identity.describe_value([{Slotted(1): len}, {test_no_address_is_in_a_description}])
    )
    assert "0x" not in text


def test_defaults_of_a_type_count():
    def kind(value):
        class Model:
            def __init__(self, scale=value):
                self.scale = scale

        return Model

    assert same(identity.describe_type(kind(1)), identity.describe_type(kind(1)))
    assert not same(identity.describe_type(kind(1)), identity.describe_type(kind(2)))


# --- secrets --------------------------------------------------------------------------------------

SECRET = "hf_" + "abcdefgh" * 4


def test_secrets_are_not_written_and_change_nothing():
    def of(secret):
        value = {
            "token": secret,
            "headers": {"Authorization": secret},
            "url": f"https://u:{SECRET}@host",
            "nested": [{"api_key": secret.encode()}],
            "pad_token": "<pad>",
        }
        return [
            identity.describe_value(value),
            identity.describe_named("HF_TOKEN", secret),
            describe(functools.partial(print, password=secret)),
            describe(holding({"token": secret})),
        ]

    text = json.dumps(of("one of mine"))
    assert "one of mine" not in text
    assert SECRET not in text
    assert "<pad>" in text
    assert same(of("one of mine"), of("another"))


# --- files ----------------------------------------------------------------------------------------


def test_a_linked_part_of_a_folder_counts(tmp_path):
    """A pipeline whose unet is a link to another folder; a link in a circle ends."""
    folder, part = tmp_path / "model", tmp_path / "part"
    folder.mkdir()
    part.mkdir()
    (part / "w.safetensors").write_text("1")
    (folder / "unet").symlink_to(part)
    (part / "back").symlink_to(folder)
    before = identity.describe_model(folder)["files"]
    assert list(before) == ["unet/w.safetensors"]
    (part / "w.safetensors").write_text("2")
    assert identity.describe_model(folder)["files"] != before


def test_other_files_count_for_a_loader_of_ones_own(tmp_path):
    for name in ("a.npz", "b.gguf", "c.safetensors", "d.pt", "README.md", ".hidden"):
        (tmp_path / name).write_text("1")
    assert list(identity.describe_model(tmp_path)["files"]) == ["c.safetensors"]
    every = identity.describe_model(tmp_path, every_file=True)["files"]
    assert list(every) == ["a.npz", "b.gguf", "c.safetensors", "d.pt"]


def test_a_text_that_is_a_path_or_a_hub_id_is_what_it_names(tmp_path, monkeypatch):
    monkeypatch.setattr(identity.hub, "cache_in_use", lambda: str(tmp_path / "hub"))
    file, folder = tmp_path / "lora.safetensors", tmp_path / "adapter"
    (folder / "deep").mkdir(parents=True)
    refs = tmp_path / "hub" / "models--org--lora" / "refs"
    refs.mkdir(parents=True)

    def now(content):
        file.write_text(content)
        (folder / "adapter.safetensors").write_text(content)
        (folder / "deep" / "x.json").write_text(content)
        (refs / "main").write_text(content * 40)
        values = (str(file), file, str(folder), "org/lora", "org/absent", [str(file)])
        return [identity.describe_named("LORA", value) for value in values]

    first, second = now("a"), now("b")
    for index in (0, 1, 2, 3, 5):
        assert first[index] != second[index]
    assert first[4] == second[4] == "org/absent"
    assert list(first[2]["files"]) == ["adapter.safetensors"]
    assert first[3]["commit"] == "a" * 40


def test_the_cache_that_a_load_uses_is_the_one_described(tmp_path, monkeypatch):
    monkeypatch.setattr(identity.hub, "cache_in_use", lambda: str(tmp_path / "default"))
    for cache, commit in (("default", "a" * 40), ("other", "b" * 40)):
        repo = tmp_path / cache / "models--org--m"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text(cache)
    first = identity.describe_model("org/m")
    second = identity.describe_model("org/m", cache_dir=tmp_path / "other")
    assert (first["commit"], second["commit"]) == ("a" * 40, "b" * 40)
    assert first["files"] != second["files"]
