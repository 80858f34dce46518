"""Repro bundles: what a failed call was given, written to one file, and the call once more."""

from __future__ import annotations

import collections
import enum
import json
import logging
import resource
import shlex
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import opguard
from opguard import _bundle, cli, repro
from opguard._bundle_values import ValueReader, ValueWriter

Point = collections.namedtuple("Point", "x y")


class Color(enum.Enum):
    RED = 1


class Broken(Exception):
    pass


class Tiny(torch.nn.Linear):
    def __init__(self, model_id):
        super().__init__(4, 4)


class Failing(opguard.OpGuardBase):
    NAME = "failing"
    MODEL_ID = "none"
    DETECTOR_TYPE = Tiny

    def _predict(self, *, input_proc, scale=1.0, extra=None):
        if isinstance(input_proc, dict) and input_proc.get("inplace") is not None:
            input_proc["inplace"].add_(1)
        if extra == "random":
            raise Broken(f"drew {torch.rand(1).item()}")
        if extra == "interrupt":
            raise KeyboardInterrupt
        raise Broken(f"scale {scale}")


def repr_short(value):
    return (
        f"{type(value).__name__} {value!r}"[:40] if not isinstance(value, int) else hex(value)[:40]
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_REPRO_DIR", str(tmp_path / "bundles"))
    return tmp_path / "bundles"


def fail(cls=Failing, settings=None, **kwargs):
    kwargs.setdefault("input_raw", torch.zeros(1, 4))
    with pytest.raises(Broken) as caught:
        cls(**(settings or {}))(**kwargs)
    return caught.value


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def text_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()["opguard.repro"]


def there_and_back(value, tmp_path):
    """`value` through a real file; returns it and what could not be carried."""
    writer = ValueWriter()
    node = writer.write(value, "v")
    save_file(writer.tensors.saved(), tmp_path / "v.safetensors")
    node = json.loads(json.dumps(node, allow_nan=False))
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        reader = ValueReader({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return reader.read(node, "v"), reader.missing


# The file


def test_a_failed_call_leaves_one_file_that_says_it_all(folder):
    error = fail(
        settings={"device_override": "cpu", "detach_outputs": False},
        input_raw=torch.arange(4.0),
        scale=2.5,
    )
    path = only_file(folder)
    assert path.name.startswith("Failing-")
    assert f"opguard replay {path}" in error.__notes__[-1]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    whole = json.loads(text_of(path))
    assert whole["class"]["name"] == f"{__name__}:Failing"
    assert whole["class"]["file"] == __file__
    assert whole["settings"] == {"device_override": "cpu", "detach_outputs": False}
    assert whole["call"]["scale"] == 2.5
    assert whole["versions"]["torch"] == torch.__version__
    assert whole["versions"]["opguard"] == opguard.__version__
    assert whole["error"]["type"] == f"{__name__}:Broken"
    assert whole["error"]["message"] == "scale 2.5"
    assert any("in _predict" in line for line in whole["error"]["traceback"])
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("call/input_raw"), torch.arange(4.0))
    bundle = repro.read(path)
    assert bundle.settings == whole["settings"]
    assert torch.equal(bundle.kwargs["input_raw"], torch.arange(4.0))


def test_without_the_variable_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("OPGUARD_REPRO_DIR", raising=False)
        else:
            monkeypatch.setenv("OPGUARD_REPRO_DIR", value)
        assert not any("opguard replay" in note for note in fail().__notes__)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_and_a_success_write_nothing(folder):
    class Fine(Failing):
        def _predict(self, *, input_proc):
            return input_proc

    Fine()(input_raw=torch.zeros(1))
    with pytest.raises(KeyboardInterrupt):
        Failing()(input_raw=torch.zeros(1), extra="interrupt")
    assert not folder.exists()


def test_the_written_exception_is_the_sanitized_one(folder):
    class Carrying(Failing):
        def _predict(self, *, input_proc):
            activation = input_proc * 1234567.0
            raise Broken("with payload", activation)

    error = fail(Carrying, input_raw=torch.ones(1))
    text = text_of(only_file(folder))
    assert "1234567." not in json.dumps(json.loads(text)["error"]["message"])
    assert "float32" in str(error.args[1])


def test_a_failing_load_inside_a_call_is_written_too(folder):
    class NoModel(Failing):
        def _load_detector(self):
            raise Broken("no model")

    fail(NoModel)
    assert repro.read(only_file(folder)).error["message"] == "no model"


def test_values_of_unknown_objects_and_secrets_are_not_written(folder, monkeypatch):
    monkeypatch.setenv("SECRET_OF_ENVIRONMENT", "hidden-env-value")

    class Client:
        def __init__(self):
            self.password = "hidden-attribute"

        def __repr__(self):
            return "hidden-repr"

    token = "hf_" + "a" * 30
    fail(
        input_raw={
            "client": Client(),
            "api_key": "hidden-key",
            "Token": "hidden-token",
            "credentials": ["user", {"is": b"hidden-nested"}],
            "token": torch.tensor([7]),
            "pad_token": "[PAD]",
            "max_new_tokens": 5,
            "text": f"see {token}",
        }
    )
    path = only_file(folder)
    raw = path.read_bytes()
    assert b"hidden" not in raw
    assert token.encode() not in raw
    bundle = repro.read(path)
    assert bundle.kwargs["input_raw"]["max_new_tokens"] == 5
    assert bundle.kwargs["input_raw"]["pad_token"] == "[PAD]"
    lost = {each.path.rpartition("/")[2] for each in bundle.missing}
    assert lost == {"client", "api_key", "Token", "credentials", "text"}
    assert bundle.kwargs["input_raw"]["token"].item() == 7


def test_an_access_token_in_the_message_is_masked(folder):
    token = "hf_" + "b" * 34

    class Telling(Failing):
        def _predict(self, *, input_proc):
            raise Broken(f"401 for {token}")

    fail(Telling)
    raw = only_file(folder).read_bytes()
    assert token.encode() not in raw
    assert b"401 for ***" in raw


# What is carried


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(10**30),
        1 << 20_000,
        1.5,
        -0.0,
        float("inf"),
        "",
        "\ud800 \u00e4",
        b"\0\xff",
        bytearray(b"x"),
        1 + 2j,
        [],
        [1, [2]],
        (),
        (1, "a"),
        {},
        {"a": {"b": [None]}},
        {1: "int key", "1": "str key", (1, 2): None},
        {"$tensor": "no tensor"},
        {1, 2},
        frozenset("a"),
        range(2, 9, 3),
        slice(1, None, -1),
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.device("cpu"),
        ...,
        Path("a/b"),
        Point(1, [2]),
        Color.RED,
        collections.OrderedDict(b=1, a=2),
        {"a/b": 1, "a~b": [2]},
    ],
    ids=repr_short,
)
def test_plain_values_come_back_exactly(value, tmp_path):
    back, missing = there_and_back(value, tmp_path)
    assert not missing
    assert type(back) is type(value)
    assert back == value
    assert repr_short(back) == repr_short(value)


def test_a_nan_keeps_its_bits(tmp_path):
    odd = struct.unpack(">d", bytes.fromhex("7ff8dead0000beef"))[0]
    (back, value), _ = there_and_back([odd, float("-inf")], tmp_path)
    assert struct.pack(">d", back).hex() == "7ff8dead0000beef"
    assert value == float("-inf")


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (2, 3)], ids=str)
def test_tensors_of_every_dtype_come_back_bit_for_bit(dtype, shape, tmp_path):
    size = torch.empty(0, dtype=dtype).element_size()
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count * size,)).byte()
    value = torch.empty(shape, dtype=dtype)
    if count:
        bits(value).copy_(raw)
    back, missing = there_and_back(value, tmp_path)
    assert not missing
    assert (back.dtype, back.shape, back.stride()) == (dtype, torch.Size(shape), value.stride())
    assert torch.equal(bits(back), bits(value)) or not count


def test_views_come_back_with_their_strides_and_their_sharing(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    value = {"t": base.t(), "row": base[1], "again": base, "bits": base.view(torch.int32)}
    back, _ = there_and_back(value, tmp_path)
    for name, tensor in value.items():
        assert back[name].stride() == tensor.stride()
        assert torch.equal(back[name], tensor)
    back["row"][0] = -1
    assert back["t"][0, 1] == back["again"][1, 0] == -1
    assert back["bits"][1, 0] == torch.tensor(-1.0).view(torch.int32)
    assert base[1, 0] == 6


def test_a_small_view_does_not_bring_its_huge_memory_along(tmp_path):
    huge = torch.zeros(4_000_000)
    ends = [huge[:2], huge[-2:]]
    back, _ = there_and_back([huge[5:6], torch.zeros(1).expand(10**12), ends], tmp_path)
    assert (tmp_path / "v.safetensors").stat().st_size < 20_000
    assert back[1].shape == (10**12,)
    assert back[1].stride() == (0,)


def test_more_bytes_than_a_bundle_may_have_are_named_as_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("opguard._bundle_tensors.MOST_BYTES", 100)
    back, (lost,) = there_and_back([torch.zeros(20), torch.zeros(50)], tmp_path)
    assert torch.equal(back[0], torch.zeros(20))
    assert lost.path == "v/1"
    assert "more than 100 bytes" in lost.why


def test_lazy_signs_gradients_and_kinds_come_back(tmp_path):
    z = torch.tensor([1 + 2j, 3 - 4j])
    with torch.inference_mode():
        inference = torch.ones(2)
    value = [
        z.conj(),
        z.conj().imag,
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True),
        inference,
        torch.empty(2, 3, device="meta"),
    ]
    back, missing = there_and_back(value, tmp_path)
    assert not missing
    assert back[0].is_conj()
    assert back[1].is_neg()
    assert torch.equal(back[0], value[0])
    assert torch.equal(back[1], value[1])
    assert type(back[2]) is torch.nn.Parameter
    assert back[3].requires_grad
    assert [tensor.is_inference() for tensor in back] == [False] * 4 + [True, False]
    assert back[5].is_meta
    assert back[5].shape == (2, 3)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning")
def test_sparse_and_quantized_tensors_come_back(tmp_path):
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    coo = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2), check_invariants=True)
    value = [coo, dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()]
    value += [dense.to_sparse_bsr((1, 1))]
    quantized = [
        torch.quantize_per_tensor(dense, 0.5, 3, torch.qint8),
        torch.quantize_per_channel(
            dense, torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.quint8
        ),
    ]
    back, missing = there_and_back(value + quantized, tmp_path)
    assert not missing
    for old, new in zip(value, back, strict=False):
        assert new.layout is old.layout
        assert torch.equal(new.to_dense(), old.to_dense())
    assert [back[0].is_coalesced(), back[1].is_coalesced()] == [False, True]
    for old, new in zip(quantized, back[5:], strict=True):
        assert new.qscheme() == old.qscheme()
        assert torch.equal(new.int_repr(), old.int_repr())
        assert torch.equal(new.dequantize(), old.dequantize())


def test_cycles_and_aliases_come_back(tmp_path):
    ring = [1]
    ring.append({"back": ring, 5: [ring]})
    shared = torch.ones(2)
    back, missing = there_and_back({"ring": ring, "a": shared, "b": shared}, tmp_path)
    assert not missing
    assert back["ring"][1]["back"] is back["ring"]
    assert back["ring"][1][5][0] is back["ring"]
    assert back["a"] is back["b"]
    knot = ([],)
    knot[0].append(knot)
    _, missing = there_and_back(knot, tmp_path)
    assert "contains itself" in missing[0].why


def test_deep_nesting_ends_in_a_description(tmp_path):
    value = []
    for _ in range(100_000):
        value = [value]
    _, (lost,) = there_and_back(value, tmp_path)
    assert "nested deeper" in lost.why
    while value:
        value = value.pop()


def test_hostile_objects_are_described_by_their_type(tmp_path):
    class Hostile:
        def __repr__(self):
            raise RuntimeError("repr")

        __str__ = __len__ = __iter__ = __eq__ = __hash__ = __repr__

        def __getattribute__(self, name):
            raise RuntimeError(f"asked for {name}")

    class Lying(dict):
        def items(self):
            raise RuntimeError("items")

    class Subclass(torch.Tensor):
        pass

    value = [Hostile(), Lying(a=1), Subclass(), lambda: 0, threading.Lock(), torch.nn.Linear(1, 1)]
    back, missing = there_and_back(value, tmp_path)
    assert [lost.path for lost in missing] == [f"v/{index}" for index in range(len(value))]
    assert missing[0].kind.endswith(
        "test_hostile_objects_are_described_by_their_type.<locals>.Hostile"
    )
    assert "Subclass" in missing[2].why
    assert "v/0" in repr(back[0])


def test_arrays_and_images_come_back_exactly(tmp_path):
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image")
    arrays = [
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.asfortranarray(np.ones((2, 3))),
        np.zeros((0, 2)),
        np.array(["a", "bc"]),
        np.array([1, "x", None], dtype=object),
        np.float32(2.5),
        np.array("2024-01-02", dtype="M8[D]"),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.arange(10)[::-2],
    ]
    back, missing = there_and_back(arrays, tmp_path)
    assert not missing
    for old, new in zip(arrays, back, strict=True):
        assert type(new) is type(old)
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert new.tolist() == old.tolist()
    assert back[1].flags.f_contiguous
    images = [image.new(mode, (3, 2), 1) for mode in ("1", "L", "RGB", "RGBA", "CMYK", "I", "F")]
    images += [image.new("RGB", (4, 4), (9, 8, 7)).convert("P"), image.new("I;16", (2, 2), 300)]
    back, missing = there_and_back(images, tmp_path)
    assert not missing
    for old, new in zip(images, back, strict=True):
        assert (new.mode, new.size, new.tobytes()) == (old.mode, old.size, old.tobytes())
        assert new.getpalette() == old.getpalette()


def test_an_encoding_and_a_quantization_config_come_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    batch = transformers.BatchEncoding({"input_ids": torch.tensor([[1, 2]])})
    (encoding, other), missing = there_and_back([batch, config], tmp_path)
    assert not missing
    assert type(encoding) is transformers.BatchEncoding
    assert torch.equal(encoding.input_ids, batch.input_ids)
    assert type(other) is transformers.BitsAndBytesConfig
    assert other.to_dict() == config.to_dict()


# Where it cannot be written


@pytest.mark.parametrize(
    "place", ["a file", "below a file", "not writable", "not a name", "of nobody"]
)
def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path, monkeypatch, caplog, place):
    (tmp_path / "file").write_text("x")
    where = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "x",
        "not writable": "/proc/1/nothing",
        "not a name": "\x01" * 5000,
        "of nobody": "~no-user-of-this-name/x",
    }[place]
    monkeypatch.setenv("OPGUARD_REPRO_DIR", str(where))
    with caplog.at_level(logging.WARNING, "opguard"):
        error = fail()
    assert not any("opguard replay" in note for note in error.__notes__)
    (record,) = [each for each in caplog.records if "OPGUARD_REPRO_DIR" in each.message]
    assert "the call's own error goes on" in record.message
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_leaves_no_half_a_file(folder, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        fail(input_raw=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "expected to write a repro bundle" in caplog.text
    assert list(folder.iterdir()) == []


def test_a_loop_of_failures_does_not_fill_the_disk(folder, monkeypatch):
    monkeypatch.setattr(_bundle, "_numbers", iter(range(1, 1000)))
    monkeypatch.setattr(_bundle, "MOST_FILES", 3)
    for _ in range(5):
        fail()
    assert len(list(folder.iterdir())) == 3


def test_an_exception_that_cannot_be_printed_is_written_and_goes_on(folder):
    class Mute(Broken):
        def __str__(self):
            raise RuntimeError("no words")

    class Failing2(Failing):
        def _predict(self, *, input_proc):
            raise Mute

    assert type(fail(Failing2)) is Mute
    assert "its __str__ raised builtins:RuntimeError" in text_of(only_file(folder))


# Again


def test_replay_reproduces(folder):
    fail(settings={"device_override": "cpu"}, scale=3.0)
    done = repro.replay(only_file(folder), cls=Failing)
    assert done.outcome == "reproduced"
    assert done.notes == []
    assert isinstance(done.error, Broken)
    assert len(list(folder.iterdir())) == 1  # a replay leaves no bundle of its own


def test_replay_draws_the_same_random_numbers_and_gives_them_back(folder):
    fail(extra="random")
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert repro.replay(only_file(folder), cls=Failing).outcome == "reproduced"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_comes_back_as_it_was_before_the_call(folder):
    class Drawing(Failing):
        def _predict(self, *, input_proc, generator):
            raise Broken(f"drew {torch.rand(1, generator=generator).item()}")

    fail(Drawing, generator=torch.Generator().manual_seed(7))
    assert repro.replay(only_file(folder), cls=Drawing).outcome == "reproduced"


class Shaped(Failing):
    """Hides what it gives the base, and has arguments of its own."""

    def __init__(self, width, *, shift=0.0, token="", part=None, **kwargs):
        super().__init__(dtype_override="fp64", **kwargs)
        self.said = f"width {width} shift {shift} dtype {self.dtype}"

    def _predict(self, *, input_proc):
        raise Broken(self.said)


class Positional(Failing):
    def __init__(self, first, /, *rest):
        super().__init__(device_override="cpu")
        self.said = f"{first} {rest}"

    def _predict(self, *, input_proc):
        raise Broken(self.said)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shaped(3, shift=0.5, device_override="cpu"),
        lambda: Shaped(shift=0.5, width=torch.ones(2)),
        lambda: Shaped(3, instance_to_match=Failing(device_override="cpu")),
        lambda: Positional(1, 2, [3]),
    ],
)
def test_a_class_is_made_again_with_arguments_of_its_own(folder, make):
    """M4: the keywords of the base alone are not enough, or too many."""
    with pytest.raises(Broken):
        make()(input_raw=1)
    assert repro.replay(only_file(folder)).outcome == "reproduced"


def test_what_the_constructor_was_given_and_a_bundle_cannot_carry_is_named(folder, capsys):
    with pytest.raises(Broken):
        Shaped(3, token="hush-hush", part=Failing())(input_raw=1)
    path = only_file(folder)
    assert "hush-hush" not in text_of(path)
    bundle = repro.read(path)
    assert [each.path for each in bundle.missing] == ["settings/token", "settings/part"]
    assert cli.main(["replay", str(path)]) == 2
    said = capsys.readouterr().err
    assert "settings/part" in said
    assert ".settings of" in said
    bundle.settings.update(token="", part=None)
    assert repro.replay(bundle).outcome == "reproduced"


def grow(held):
    held["list"].append(1)
    held["dict"]["new"] = 1
    held["set"].clear()
    held["replaced"][0] = 3.0
    held["same"].reverse()


def test_holders_changed_in_place_are_told(folder):
    class Growing(Failing):
        def _predict(self, *, input_proc):
            grow(input_proc)
            raise Broken("grown")

    given = {"list": [], "dict": {}, "set": {1}, "replaced": [2.0], "same": [5], "kept": [1]}
    fail(Growing, input_raw=given)
    (told,) = [json.loads(text_of(only_file(folder)))["changed_by_the_call"]]
    assert told == [f"input_raw/{name}" for name in ("list", "dict", "set", "replaced")]


def test_an_input_changed_in_place_is_told(folder):
    fail(input_raw={"inplace": torch.zeros(2), "other": torch.zeros(2)})
    notes = repro.read(only_file(folder)).notes
    assert [note for note in notes if "changed in place" in note] == [
        "input_raw/inplace was changed in place by the call that failed: "
        "it is carried as it was then"
    ]


def test_another_failure_and_none_are_told_apart(folder):
    fail()
    (path,) = folder.iterdir()

    class Other(Failing):
        def _predict(self, *, input_proc):
            raise ValueError("else")

    class Fine(Failing):
        def _predict(self, *, input_proc):
            return input_proc

    another = repro.replay(path, cls=Other)
    assert (another.outcome, another.got) == ("another", "builtins:ValueError: else")
    assert repro.replay(path, cls=Fine).outcome == "none"


def test_a_missing_value_is_asked_for_and_can_be_given(folder):
    fail(extra=object())
    bundle = repro.read(only_file(folder))
    with pytest.raises(ValueError, match=r"could not carry <call/extra: builtins:object") as caught:
        repro.replay(bundle, cls=Failing)
    assert "\n" not in str(caught.value)
    bundle.kwargs["extra"] = None
    assert repro.replay(bundle, cls=Failing).outcome == "reproduced"


# The command


SCRIPT = """
    import sys, torch, opguard

    class Tiny(torch.nn.Linear):
        def __init__(self, model_id):
            super().__init__(4, 4)

    class Model(opguard.OpGuardBase):
        NAME, MODEL_ID, DETECTOR_TYPE = "model", "none", Tiny

    if __name__ == "__main__":
        Model()(input_raw=torch.zeros(1, 5))
"""


@pytest.fixture
def script(tmp_path, folder):
    """The bundle of a script's failure, and the script."""
    path = tmp_path / "script_that_fails.py"
    path.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert "mat1 and mat2" in done.stderr
    assert "opguard replay" in done.stderr
    return only_file(folder), path


def test_command_replays_a_script_by_its_file(script, capsys, monkeypatch):
    bundle, path = script
    assert cli.main(["replay", str(bundle)]) == 2
    said = capsys.readouterr().err
    assert "--class" in said
    assert said.count("\n") == 1
    assert cli.main(["replay", str(bundle), "--class", f"{path}:Model"]) == 0
    assert "reproduced" in capsys.readouterr().out
    monkeypatch.chdir(path.parent)
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    assert cli.main(["replay", str(bundle), "--class", f"{path.stem}:Model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "reproduced"
    path.write_text(path.read_text().replace("4, 4", "5, 4"))
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    assert cli.main(["replay", str(bundle), "--class", f"{path}:Model"]) == 1
    assert "no failure" in capsys.readouterr().out


def test_the_command_on_the_exception_replays_a_script(script, tmp_path, monkeypatch, capsys):
    """As it is printed, from another folder, with what lies beside the script."""
    bundle, path = script
    (path.parent / "beside_the_script.py").write_text("SIZE = 4")
    path.write_text(path.read_text().replace("import torch", "import torch, beside_the_script"))
    bundle.unlink()
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    (line,) = (each for each in done.stderr.splitlines() if "opguard replay" in each)
    words = shlex.split(line.partition("again with: ")[2])
    assert words[:2] == ["opguard", "replay"]
    assert words[-2:] == ["--class", f"{path}:Model"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = [*sys.path]
    assert cli.main(words[1:]) == 0
    assert "reproduced" in capsys.readouterr().out
    assert sys.path == before


LAZY = """
    import opguard, torch

    class Tiny(torch.nn.Module):
        def __init__(self, model_id):
            super().__init__()
            import beside_the_class
            self.size = beside_the_class.SIZE

    class Model(opguard.OpGuardBase):
        NAME, MODEL_ID, DETECTOR_TYPE = "model", "none", Tiny
        def _predict(self, *, input_proc):
            raise ValueError(f"size {self._detector.size}")
"""


def test_a_class_may_import_what_lies_beside_its_file_when_it_loads(folder, tmp_path, capsys):
    path = tmp_path / "class_of_a_file.py"
    path.write_text(textwrap.dedent(LAZY))
    (tmp_path / "beside_the_class.py").write_text("SIZE = 3")
    with repro.importable(f"{path}:Model"), pytest.raises(ValueError, match="size 3"):
        repro.load_class(f"{path}:Model")()(input_raw=torch.zeros(1))
    sys.modules.pop("beside_the_class")
    assert cli.main(["replay", str(only_file(folder)), "--class", f"{path}:Model"]) == 0
    assert "reproduced" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import no_such_thing", ["No module named 'no_such_thing'", "install no_such_thing, or"]),
        ("from os import nothing", ["cannot import name 'nothing'", "see that python imports it"]),
        ("raise SystemExit(3)", ["SystemExit: 3"]),
        ("1 +", ["SyntaxError"]),
    ],
)
@pytest.mark.parametrize("kind", ["file", "module"])
def test_a_file_that_cannot_be_imported_is_one_sentence(
    kind, line, words, *, folder, tmp_path, capsys, monkeypatch
):
    fail()
    path = tmp_path / f"broken_{abs(hash(line))}.py"
    path.write_text(line)
    monkeypatch.chdir(tmp_path)
    name = str(path) if kind == "file" else path.stem
    assert cli.main(["replay", str(only_file(folder)), "--class", f"{name}:Model"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for each in [f"expected to import {name} for Model, got ", *words]:
        assert each in said
    assert path.stem not in sys.modules


def picture(whole):
    """One that says to have 40000 x 40000 pixels, and has the bytes of a small tensor."""
    some = next(node for node in whole["call"].values() if "$tensor" in node)
    return {"mode": "RGB", "size": [40_000, 40_000], "bytes": some}


def damaged(path, tmp_path, how):
    raw = path.read_bytes()
    out = tmp_path / "damaged.safetensors"
    if how == "absent":
        return out
    if how == "folder":
        out.mkdir()
        return out
    whole = json.loads(text_of(path))
    texts = {
        "no json": "{",
        "no object": "[]",
        "other format": json.dumps(whole | {"format": 99}),
        "no call": json.dumps({k: v for k, v in whole.items() if k != "call"}),
        "no error type": json.dumps(whole | {"error": {}}),
        "unknown word": json.dumps(whole | {"call": {"input_raw": {"$pickle": "x"}}}),
        "no such tensor": json.dumps(
            whole | {"call": {"a": {"$tensor": "b", "dtype": "bool", "shape": [], "device": "cpu"}}}
        ),
        "huge picture": json.dumps(whole | {"call": {"a": {"$image": picture(whole)}}}),
        "random state": json.dumps(whole | {"random": [1]}),
        "keywords": json.dumps(whole | {"call": {"$dict": [[1, 2]]}}),
        "model": json.dumps(whole | {"model": [1]}),
        "changed": json.dumps(whole | {"changed_by_the_call": 5}),
        "class in a file": json.dumps(whole | {"class": {"name": f"{tmp_path}/evil.py:X"}}),
        "deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    }
    if how in texts:
        tensors = {"x": torch.zeros(1)}
        if how in ("huge picture", "random state"):  # all else is as it was written
            tensors |= load_file(path)
        save_file(tensors, out, metadata={"opguard.repro": texts[how]})
    elif how == "other":
        save_file({"x": torch.zeros(1)}, out)
    else:
        out.write_bytes(
            {"empty": b"", "truncated": raw[: len(raw) // 2], "garbage": b"\xff" * 99}[how]
        )
    return out


DAMAGES = [
    "absent",
    "folder",
    "empty",
    "truncated",
    "garbage",
    "other",
    "no json",
    "no object",
    "deep",
    "other format",
    "no call",
    "no error type",
    "unknown word",
    "no such tensor",
    "huge picture",
    "random state",
    "keywords",
    "model",
    "changed",
    "class in a file",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_one_sentence(how, folder, tmp_path, capsys):
    fail()
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    out = damaged(only_file(folder), tmp_path, how)
    begin = time.perf_counter()
    assert cli.main(["replay", str(out)]) == 2
    assert time.perf_counter() - begin < 5
    assert not (tmp_path / "ran").exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(out) in said
    assert said.startswith("opguard replay: ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nocolon", "expected module:Class"),
        ("os:system", "expected a subclass of OpGuardBase"),
        ("no_such_module_here:X", "expected a module"),
        ("opguard:Nothing", "there is none"),
        ("/no/such/file.py:X", "expected a file"),
    ],
)
def test_a_wrong_class_is_one_sentence(name, words, folder, capsys):
    fail()
    assert cli.main(["replay", str(only_file(folder)), "--class", name]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_bundle_of_other_versions_says_so(folder, tmp_path):
    fail()
    path = only_file(folder)
    whole = json.loads(text_of(path))
    whole["versions"]["torch"] = "1.0"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    out = tmp_path / "other.safetensors"
    save_file(tensors, out, metadata={"opguard.repro": json.dumps(whole)})
    assert f"torch was 1.0, here it is {torch.__version__}" in repro.read(out).notes


def test_nothing_is_imported_for_bundles_before_a_failure():
    code = (
        "import sys, opguard; print([m for m in sys.modules if 'bundle' in m or 'repro' in m[-6:]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_many_threads_write_files_of_their_own(folder):
    threads = [threading.Thread(target=fail) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = list(folder.iterdir())
    assert len(files) == 8
    assert all(repro.read(path).error["message"] == "scale 1.0" for path in files)
    assert not [path for path in files if path.name.startswith(".")]
