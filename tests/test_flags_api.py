"""The names, signatures, constants and bit layout that TorchGuard 1.0.4 documents."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest
import torch

import opguard
from checkout import CSRC
from opguard import flags as tg
from opguard.flags import constants, err


def words(text):
    return text.split()


# What `from torchguard import ...` takes, and `from torchguard.experimental import ...`.
NAMES = words("""
    err flags error_t tracked tensorcheck UnpackedError ErrorFlags ErrorCode ErrorDomain
    ErrorLocation Severity AccumulationConfig Priority Order Dedupe ErrorConfig CONFIG
    get_config set_config SLOT_BITS SLOTS_PER_WORD SEVERITY_SHIFT SEVERITY_BITS SEVERITY_MASK
    CODE_SHIFT CODE_BITS CODE_MASK LOCATION_SHIFT LOCATION_BITS LOCATION_MASK SLOT_MASK has_err
    find push fix flag_nan flag_inf flag_nan_and_inf flag_oob_indices IF HAS IS OR AND NOT
    as_result as_exception unwrap Ok Err Result ValidationError DimensionMismatchError
    DTypeMismatchError DeviceMismatchError InvalidParameterError TypeMismatchError
    InvalidReturnTypeError experimental typing __version__
""")
EXPERIMENTAL = words("""
    err IF IS HAS AND OR NOT
""")
TYPING = words("""
    Tensor Dim Broadcast error_t type_cast TensorAnnotation PYTHON_TYPE_TO_TORCH_DTYPE
    ValidationError DimensionMismatchError DTypeMismatchError DeviceMismatchError
    InvalidParameterError TypeMismatchError InvalidReturnTypeError float32_t int64_t bool_t
""")

# "=" marks a parameter with a default, None where nothing else is said; "*" what follows it is by
# keyword alone.
SIGNATURES = {
    "new": "reference",
    "new_t": "batch_size device= config=",
    "from_code": "code location batch_size device= severity= config=",
    "push": "flags code location severity= config= * where=",
    "push_scalar": "flags code location severity= config=",
    "merge": "*flag_tensors * config=",
    "clear": "flags code config=",
    "is_ok": "flags",
    "is_err": "flags",
    "has_any": "flags",
    "any_err": "flags",
    "all_ok": "flags",
    "has_code": "flags code config=",
    "has_nan": "flags config=",
    "has_inf": "flags config=",
    "has_fallback": "flags config=",
    "has_critical": "flags config=",
    "has_domain": "flags domain config=",
    "count_errors": "flags config=",
    "max_severity": "flags config=",
    "get_ok": "flags",
    "get_err": "flags",
    "take_ok": "flags tensor",
    "take_err": "flags tensor",
    "partition": "flags tensor",
    "partition_many": "flags *tensors",
    "take_ok_p": "flags tensor fill=0.0",
    "take_err_p": "flags tensor fill=0.0",
    "map_ok": "flags tensor fn",
    "map_err": "flags tensor fn",
    "map_err_flags": "flags fn",
    "and_then": "flags tensor fn",
    "bind": "flags tensor fn",
    "ensure_mask": "flags ok_mask code location severity= config=",
    "guard": "flags tensor predicate code location severity= config=",
    "recover_with_fallback": "flags tensor fallback location * config=",
    "get_first_code": "flags",
    "get_first_location": "flags",
    "get_first_severity": "flags",
    "replace": "t value=0.0 * targets",
}
INSPECTION = {
    "unpack": "flags sample_idx=0 config=",
    "unpack_all": "flags config=",
    "repr": "flags config=",
    "summary": "flags config=",
}
HELPERS = {
    "has_err": "flags",
    "find": "code flags config=",
    "push": "flags code module * where= severity= config= location=",
    "fix": "tensor flags module fallback=0.0 config=",
    "flag_nan": "tensor module flags= config=",
    "flag_inf": "tensor module flags= config=",
    "flag_nan_and_inf": "tensor module flags= config=",
    "flag_oob_indices": "indices num_embeddings module flags= config=",
    "IS": "code flags * config=",
    "HAS": "flags",
    "OR": "*conds",
    "AND": "*conds",
    "NOT": "cond",
    "IF": "cond then_fn",
    "unwrap": "result",
    "as_result": "func",
    "as_exception": "func",
    "set_config": "config",
    "get_config": "",
}


def parameters(text):
    found, by_keyword = [], False
    for word in text.split():
        if word == "*":
            by_keyword = True
            continue
        name, has_default, default = word.partition("=")
        kind = "keyword" if by_keyword else "plain"
        if name.startswith("*"):
            kind = "many"
        found.append((name.lstrip("*"), kind, has_default == "=", default))
    return found


def missing_parameters(function, text):
    """What a caller who goes by ``text`` would miss; more optional parameters are no loss."""
    actual = inspect.signature(function).parameters
    lost = []
    position = 0
    for name, kind, optional, default in parameters(text):
        found = actual.get(name)
        if found is None:
            lost.append(name)
            continue
        if kind == "plain" and list(actual).index(name) != position:
            lost.append(f"{name} in place {position}")
        if kind == "many" and found.kind is not inspect.Parameter.VAR_POSITIONAL:
            lost.append(f"*{name}")
        if kind == "plain" and found.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            lost.append(f"{name} by position")
        if optional and found.default is inspect.Parameter.empty:
            lost.append(f"{name}'s default")
        if (
            optional
            and found.default != (float(default) if "." in default else None)
            and (not default.isdigit() or found.default != int(default))
        ):
            lost.append(f"{name}={default or None}")
        position += 1
    known = {name for name, *_ in parameters(text)}
    lost += [
        f"without {name}"
        for name, found in actual.items()
        if name not in known
        and found.default is inspect.Parameter.empty
        and found.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    return lost


def test_the_comparison_of_signatures_can_fail():
    def function(flags, code, *, severity=2, extra): ...

    assert missing_parameters(function, "code flags where= severity=") == [
        "code in place 0",
        "flags in place 1",
        "where",
        "severity by position",
        "severity=None",
        "without extra",
    ]
    assert missing_parameters(lambda t, value=0.0, *, targets: None, SIGNATURES["replace"]) == []


def test_every_name_is_importable():
    assert len(NAMES) == len(set(NAMES)) == 61
    assert [name for name in NAMES if not hasattr(tg, name)] == []
    assert set(NAMES) - {"__version__"} <= set(tg.__all__)
    assert [name for name in EXPERIMENTAL if not hasattr(tg.experimental, name)] == []
    assert [name for name in TYPING if not hasattr(tg.typing, name)] == []
    namespace: dict[str, object] = {}
    exec("from opguard.flags import *", namespace)
    assert set(tg.__all__) <= namespace.keys()
    for name in tg.__all__:
        assert getattr(tg, name) is not None


def test_importing_says_one_version():
    assert tg.__version__ == opguard.__version__


@pytest.mark.parametrize("name", SIGNATURES)
def test_err_signatures(name):
    assert missing_parameters(getattr(err, name), SIGNATURES[name]) == []


@pytest.mark.parametrize("name", INSPECTION)
def test_flags_signatures(name):
    assert missing_parameters(getattr(tg.flags, name), INSPECTION[name]) == []
    assert missing_parameters(getattr(tg.ErrorFlags, name), INSPECTION[name]) == []


@pytest.mark.parametrize("name", HELPERS)
def test_helper_signatures(name):
    assert missing_parameters(getattr(tg, name), HELPERS[name]) == []


def test_helpers_have_a_module_of_their_own():
    from opguard.flags import helpers

    names = [name for name, text in HELPERS.items() if "module" in text]
    for name in [*names, "find", "has_err", "resolve_location"]:
        assert callable(getattr(helpers, name))
    assert helpers.clear_location_cache() is None
    assert helpers.clear_warn_cache() is None


def test_names_that_the_readme_has_and_the_release_had_not():
    assert err.OOB == err.OUT_OF_BOUNDS == tg.ErrorCode.OOB == 5
    f = err.push(err.new_t(3), err.INF, 7, where=torch.tensor([True, False, False]))
    z = torch.arange(3)
    assert err.Ok(f, z).tolist() == [1, 2]
    assert err.Err(f, z).tolist() == [0]
    assert err.find(err.INF, f).tolist() == [True, False, False]
    assert [len(errors) for errors in tg.flags.unpack_all(f)] == [1, 0, 0]
    by_name = tg.push(f, err.NAN, location=42, where=torch.tensor([False, True, False]))
    assert by_name.tolist() == tg.push(f, err.NAN, 42, where=torch.tensor([0, 1, 0]) > 0).tolist()
    (error,) = tg.ErrorFlags.to_errors(f)
    assert error == tg.flags.unpack(f, 0)[0]
    (told,) = tg.ErrorFlags.interpret(f, "decoder")
    assert told.location_name == f"decoder.{error.location_name}"


def test_err_holds_codes_and_severities_and_takes_none():
    plain = {name: value for name, value in vars(tg.ErrorCode).items() if name.isupper()}
    for name, value in {k: v for k, v in plain.items() if not k.startswith("_")}.items():
        assert getattr(err, name) == value
        assert type(value) is int
    assert (err.WARN, err.ERROR, err.CRITICAL, err.OK) == (1, 2, 3, 0)
    assert (err.ErrorCode, err.ErrorDomain, err.Severity) == (
        tg.ErrorCode,
        tg.ErrorDomain,
        tg.Severity,
    )
    with pytest.raises(AttributeError):
        err.NAN = 2


CODES = {
    "OK": (0, 0), "NAN": (1, 3), "INF": (2, 3), "OVERFLOW": (3, 2), "OUT_OF_BOUNDS": (5, 2),
    "NEGATIVE_IDX": (6, 2), "EMPTY_INPUT": (7, 2), "ZERO_OUTPUT": (9, 1),
    "CONSTANT_OUTPUT": (10, 1), "SATURATED": (11, 1), "FALLBACK_VALUE": (13, 1),
    "VALUE_CLAMPED": (14, 1), "UNKNOWN": (15, 2),
}  # fmt: skip


def test_codes_domains_and_severities():
    for name, (code, severity) in CODES.items():
        assert getattr(tg.ErrorCode, name) == code
        assert tg.ErrorCode.name(code) == name
        assert tg.ErrorCode.default_severity(code) == severity
        assert tg.ErrorCode.is_critical(code) == (name in {"NAN", "INF"})
        assert tg.ErrorCode.domain(code) == code >> 2
        assert tg.ErrorCode.subcode(code) == code & 3
    aliases = {"UNDERFLOW": 3, "INVALID_VALUE": 6, "UNSTABLE": 11, "CLAMPED": 14, "SPARSE": 9}
    assert {name: getattr(tg.ErrorCode, name) for name in aliases} == aliases
    assert tg.ErrorCode.name(4) == "CODE_4"
    assert tg.ErrorCode.default_severity(4) == 2
    names = [tg.Severity.name(i) for i in range(5)]
    assert names == ["OK", "WARN", "ERROR", "CRITICAL", "SEV_4"]
    assert [tg.Severity.is_error_or_worse(i) for i in range(4)] == [False, False, True, True]
    assert [tg.Severity.is_warn_or_worse(i) for i in range(4)] == [False, True, True, True]
    assert [tg.Severity.is_critical(i) for i in range(4)] == [False, False, False, True]


def test_a_domain_is_its_number_or_its_constant():
    domain = tg.ErrorDomain
    constants_ = (domain.NUMERIC, domain.INDEX, domain.QUALITY, domain.RUNTIME)
    assert constants_ == (0, 4, 8, 12)
    names = ["NUMERIC", "INDEX", "QUALITY", "RUNTIME"]
    assert [domain.name(value) for value in constants_] == names
    assert [domain.name(number) for number in range(4)] == names
    assert domain.name(5) == "DOMAIN_5"
    for number, constant in enumerate(constants_):
        for code in range(1, 16):
            inside = code >> 2 == number
            assert tg.ErrorCode.in_domain(code, constant) == inside
            assert tg.ErrorCode.in_domain(code, number) == inside
            assert (tg.ErrorCode.domain_name(code) == names[number]) == inside
            f = err.push(err.new_t(1), code, 1023)
            assert err.has_domain(f, constant).tolist() == [inside]
            assert err.has_domain(f, number).tolist() == [inside]
    for wrong in (5, -1, 16, "INDEX"):
        with pytest.raises(tg.CodeError, match="expected a domain"):
            err.has_domain(err.new_t(1), wrong)


def header():
    text = (CSRC / "core" / "slots.h").read_text()
    return {
        name: int(value, 0)
        for name, value in re.findall(r"#define OG_(\w+) (0x[0-9A-F]+|\d+)\b", text)
    }


def test_constants_are_the_headers():
    """One layout: Python's masks are of values, the header's lie in place."""
    there = header()
    for field in ("SEVERITY", "CODE", "LOCATION"):
        shift = getattr(constants, f"{field}_SHIFT")
        assert shift == there[f"{field}_SHIFT"]
        assert getattr(constants, f"{field}_BITS") == there[f"{field}_BITS"]
        assert getattr(constants, f"{field}_MASK") << shift == there[f"{field}_MASK"]
        assert getattr(constants, f"{field}_MASK") == 2 ** there[f"{field}_BITS"] - 1
    assert (there["SLOT_BITS"], there["SLOT_MASK"]) == (tg.SLOT_BITS, tg.SLOT_MASK)
    assert tg.SLOTS_PER_WORD == 4
    assert there["LOCATION_MAX"] == tg.LOCATION_MASK
    assert there["CODE_NAN"] == err.NAN
    assert there["CODE_INF"] == err.INF
    assert there["CODE_OUT_OF_BOUNDS"] == err.OUT_OF_BOUNDS
    assert there["SEVERITY_ERROR"] == err.ERROR
    assert there["SEVERITY_CRITICAL"] == err.CRITICAL


def test_readmes_unpack_slot_decodes():
    def unpack_slot(slot_value):
        severity = (slot_value >> tg.SEVERITY_SHIFT) & tg.SEVERITY_MASK
        code = (slot_value >> tg.CODE_SHIFT) & tg.CODE_MASK
        location = (slot_value >> tg.LOCATION_SHIFT) & tg.LOCATION_MASK
        return severity, code, location

    word = int(err.push(err.new_t(1), err.NAN, 42)[0, 0])
    assert word == 2695
    assert unpack_slot(word) == (3, 1, 42)
    for severity, code, location in ((1, 15, 1023), (3, 2, 0), (2, 5, 512)):
        f = err.push(err.new_t(1), code, location, severity)
        assert unpack_slot(int(f[0, 0]) & tg.SLOT_MASK) == (severity, code, location)


def test_slots_fill_words_from_the_low_bits():
    for dtype, per_word in ((torch.int64, 4), (torch.int32, 2)):
        config = tg.ErrorConfig(num_slots=5, flag_dtype=dtype)
        f = err.new_t(1, config=config)
        assert f.dtype is dtype
        assert f.shape == (1, -(-5 // per_word))
        for location in range(1, 6):
            f = err.push(f, err.INF, 1018 + location, config=config)
        words = [word & 0xFFFF_FFFF_FFFF_FFFF for word in f[0].tolist()]
        for slot in range(5):
            bits = words[slot // per_word] >> 16 * (slot % per_word) & 0xFFFF
            assert bits == 3 | 2 << 2 | (1019 + slot) << 6


def test_experimental_makes_floating_words_and_is_else_the_same():
    """float32 by default, as its README says; what is given keeps its dtype and its errors."""
    for name in EXPERIMENTAL[1:]:
        assert getattr(tg.experimental, name) is getattr(tg, name)
    x_err = tg.experimental.err
    for name, text in SIGNATURES.items():
        if name not in {"new", "new_t", "from_code"}:
            assert getattr(x_err, name) is getattr(err, name)
        assert missing_parameters(getattr(x_err, name), text) == []
    for dtype, made in (
        (torch.int64, torch.float32),
        (torch.int32, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        config = tg.ErrorConfig(flag_dtype=dtype, num_slots=6)
        for f in (
            x_err.new(torch.zeros(2, 3), config),
            x_err.new_t(2, config=config),
            x_err.from_code(err.NAN, 1023, 2, config=config),
        ):
            assert f.dtype is made
            assert f.shape == (2, tg.ErrorConfig(flag_dtype=made, num_slots=6).num_words)
        assert x_err.has_nan(f).all()
    assert x_err.new(torch.zeros(3)).dtype is torch.float32
    f = err.push(err.new_t(2), err.NAN, 1, where=torch.tensor([True, False]))
    g = x_err.push(f, err.INF, "layer", where=torch.tensor([False, True]))
    assert g.dtype is torch.int64
    found = [[(e.code_name, e.location_name) for e in s] for s in tg.flags.unpack_all(g)]
    assert found[0][0][0] == "NAN"
    assert found[1] == [("INF", "layer")]


def test_fake_tensors_leave_nothing_behind():
    """There is no cache of tensors that a trace could fill with its own."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def fn(x):
        f = err.push(err.new(x), err.NAN, 3, where=x.isnan().any(1))
        f = err.merge(f, err.from_code(err.INF, 4, 2))
        return err.clear(tg.flag_nan_and_inf(x, 5, f), err.INF), err.count_errors(f)

    x = torch.tensor([[float("nan")], [0.0]])
    expected = [t.tolist() for t in fn(x)]
    with FakeTensorMode():
        fn(torch.zeros(2, 1))
    assert [t.tolist() for t in fn(x)] == expected
    traced = make_fx(fn, tracing_mode="fake")(torch.zeros(2, 1))
    assert [t.tolist() for t in fn(x)] == expected
    assert [t.tolist() for t in traced(x)] == expected


def test_importing_flags_does_not_import_torchs_compiler():
    """It takes longer than all of opguard; who compiles imports it anyway."""
    source = (
        "import sys, opguard\n"
        "assert 'opguard.flags' not in sys.modules\n"
        "import opguard.flags\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'torch.distributed.fsdp')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
