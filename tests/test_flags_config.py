"""The configuration: defaults, checked writes, the live view, keys, and what each field does."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import pytest
import torch
import torch._dynamo.testing

from checkout import CSRC
from opguard.flags import (
    CONFIG,
    AccumulationConfig,
    Dedupe,
    ErrorConfig,
    FlagsError,
    FlagsLayoutError,
    Order,
    Priority,
    Severity,
    SeverityError,
    err,
    flags,
    get_config,
    set_config,
)

DTYPES = [torch.int64, torch.int32, torch.float64, torch.float32]


@pytest.fixture(autouse=True)
def own_config():
    before = get_config()
    set_config(ErrorConfig())
    yield
    set_config(before)


def test_defaults():
    config = ErrorConfig()
    assert (config.num_slots, config.flag_dtype, config.default_severity) == (16, torch.int64, 2)
    assert config.accumulation == AccumulationConfig(
        priority=Priority.CHRONO, order=Order.FIRST, dedupe=Dedupe.UNIQUE
    )
    assert (config.strict_validation, config.use_transposed_layout) == (False, False)
    assert config.transpose_threshold == 10000
    assert [list(kind) for kind in (Priority, Order, Dedupe)] == [[0, 1, 2], [0, 1], [0, 1, 2, 3]]
    assert [f.name for f in dataclasses.fields(ErrorConfig) if f.init] == [
        "num_slots",
        "accumulation",
        "default_severity",
        "strict_validation",
        "flag_dtype",
        "use_transposed_layout",
        "transpose_threshold",
    ]


@pytest.mark.parametrize(
    ("dtype", "integers", "per_word"),
    [
        (torch.int64, torch.int64, 4),
        (torch.float64, torch.int64, 4),
        (torch.int32, torch.int32, 2),
        (torch.float32, torch.int32, 2),
    ],
    ids=str,
)
def test_words_of_each_carrier(dtype, integers, per_word):
    for num_slots in (1, 2, 3, 4, 5, 16, 17, 32768):
        config = ErrorConfig(num_slots=num_slots, flag_dtype=dtype)
        assert config.num_words == -(-num_slots // per_word)
        assert config.slots_per_word == per_word
        assert config.word_bits == 16 * per_word
        assert (config.torch_dtype, config.torch_int_dtype) == (dtype, integers)
        f = err.new_t(2, config=config)
        assert (f.dtype, f.shape) == (dtype, (2, config.num_words))


def test_transposing_is_only_answered():
    config = ErrorConfig(use_transposed_layout=True, transpose_threshold=10)
    assert [config.should_transpose(n) for n in (10, 11)] == [False, True]
    assert not ErrorConfig().should_transpose(10**9)
    assert err.new_t(11, config=config).shape == (11, 4)


BAD = [
    ("num_slots", 0, FlagsLayoutError),
    ("num_slots", 32769, FlagsLayoutError),
    ("num_slots", -1, FlagsLayoutError),
    ("num_slots", 2.5, FlagsError),
    ("num_slots", True, FlagsError),
    ("flag_dtype", torch.float16, FlagsLayoutError),
    ("flag_dtype", "int64", FlagsLayoutError),
    ("accumulation", Priority.CHRONO, FlagsError),
    ("default_severity", 0, SeverityError),
    ("default_severity", 4, SeverityError),
    ("transpose_threshold", "many", FlagsError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_writes_are_checked_as_construction_is(name, value, error):
    for target in (ErrorConfig(), CONFIG):
        before = getattr(target, name), target.key
        with pytest.raises(error, match=f"expected ErrorConfig.{name} to be"):
            setattr(target, name, value)
        assert (getattr(target, name), target.key) == before
    with pytest.raises(ValueError, match="expected"):
        ErrorConfig(**{name: value})
    with pytest.raises(AttributeError, match="one of ErrorConfig's fields"):
        CONFIG.num_slot = 4


@pytest.mark.parametrize("field", ["priority", "order", "dedupe"])
def test_accumulation_takes_members_and_their_numbers(field):
    assert getattr(AccumulationConfig(**{field: 1}), field) == 1
    assert AccumulationConfig(**{field: 1}) == AccumulationConfig(
        **{field: type(getattr(AccumulationConfig(), field))(1)}
    )
    with pytest.raises(FlagsError, match=f"expected AccumulationConfig's {field}"):
        AccumulationConfig(**{field: 9})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(AccumulationConfig(), field, 0)


def test_the_key_follows_the_attributes_and_is_the_headers():
    text = (CSRC / "core" / "slots.h").read_text()
    shifts = {
        name: int(shift) for name, shift in re.findall(r"#define OG_KEY_(\w+)_SHIFT (\d+)", text)
    }
    members = dict(re.findall(r"(OG_(?:INT|FLOAT)\d\d) = (\d)", text))
    config = ErrorConfig()
    seen = set()
    for num_slots in (1, 16, 32768):
        for priority in Priority:
            for order in Order:
                for dedupe in Dedupe:
                    for dtype in DTYPES:
                        config.num_slots = num_slots
                        config.accumulation = AccumulationConfig(priority, order, dedupe)
                        config.flag_dtype = dtype
                        carrier = int(members[f"OG_{str(dtype).removeprefix('torch.').upper()}"])
                        assert config.key == (
                            num_slots
                            | priority << shifts["PRIORITY"]
                            | order << shifts["ORDER"]
                            | dedupe << shifts["DEDUPE"]
                            | carrier << shifts["CARRIER"]
                        )
                        assert type(config.key) is int
                        assert config.key < 1 << shifts["END"]
                        seen.add(config.key)
    assert len(seen) == 3 * 3 * 2 * 4 * 4
    assert config.key == ErrorConfig(32768, config.accumulation, flag_dtype=dtype).key


def test_config_is_a_live_view():
    """A set_config is seen through CONFIG, and a write to CONFIG lands in the current one."""
    mine = ErrorConfig(num_slots=32)
    set_config(mine)
    assert get_config() is mine
    assert mine == CONFIG
    assert (CONFIG.num_slots, CONFIG.key, CONFIG.num_words) == (32, mine.key, 8)
    assert repr(CONFIG) == repr(mine)
    assert isinstance(CONFIG, ErrorConfig)
    CONFIG.num_slots = 4
    assert mine.num_slots == 4
    assert err.new_t(1).shape == (1, 1)
    assert err.new_t(1, config=CONFIG).shape == (1, 1)
    set_config(CONFIG)
    assert get_config() is mine
    for made in (copy.copy(CONFIG), copy.deepcopy(CONFIG), pickle.loads(pickle.dumps(CONFIG))):
        assert type(made) is ErrorConfig
        assert made == mine
        made.num_slots = 5
        assert mine.num_slots == 4
    assert dataclasses.replace(CONFIG, num_slots=7).num_slots == 7
    assert mine.num_slots == 4
    with pytest.raises(FlagsError, match="expected set_config to get an ErrorConfig"):
        set_config({"num_slots": 3})


def test_readmes_way_to_change_it_for_a_while():
    original = get_config()
    set_config(ErrorConfig(flag_dtype=torch.float32, num_slots=64))
    try:
        assert err.new(torch.zeros(4, 8)).shape == (4, 32)
    finally:
        set_config(original)
    CONFIG.flag_dtype = torch.float32
    CONFIG.num_slots = 32
    f = err.new(torch.zeros(4, 8))
    assert (f.dtype, f.shape) == (torch.float32, (4, 16))


def test_default_severity_is_of_codes_without_their_own():
    for default in (1, 2, 3):
        CONFIG.default_severity = default
        for code in range(1, 16):
            own = {1: 3, 2: 3, 3: 2, 5: 2, 6: 2, 7: 2, 9: 1, 10: 1, 11: 1, 13: 1, 14: 1}
            expected = own.get(code, default)
            pushed = [
                err.push(err.new_t(1), code, 3),
                err.push(err.new_t(1), torch.tensor([code]), 3),
                err.push_scalar(err.new_t(1), code, 3),
                err.from_code(code, 3, 1),
                err.ensure_mask(err.new_t(1), torch.tensor([False]), code, 3),
                err.guard(err.new_t(1), torch.zeros(1), lambda z: z > 0, code, 3),
            ]
            assert [int(err.max_severity(f)) for f in pushed] == [expected] * 6
            given = err.push(err.new_t(1), code, 3, Severity.WARN)
            assert int(err.max_severity(given)) == 1
    own_default = ErrorConfig(default_severity=1)
    assert int(err.max_severity(err.push(err.new_t(1), 15, 3, config=own_default))) == 1


def test_given_flags_keep_width_and_dtype_whatever_the_configuration():
    """The README's override for one call, and the same flags used without it afterwards."""
    for dtype in DTYPES:
        custom = ErrorConfig(flag_dtype=dtype, num_slots=8)
        f = err.new_t(5, config=custom)
        for other in (CONFIG, custom, ErrorConfig(num_slots=300, flag_dtype=torch.float32)):
            g = err.push(f, err.NAN, 1, config=other)
            g = err.merge(g, err.push(f, err.INF, 2), config=other)
            g = err.clear(g, err.NAN, config=other)
            assert (g.dtype, g.shape) == (f.dtype, f.shape)
            assert [(e.code_name, e.location) for e in flags.unpack(g)] == [("INF", 2)]


def test_compiled_code_follows_the_configuration():
    """A graph holds the key it was made with; another key makes another graph."""
    counter = torch._dynamo.testing.CompileCounter()

    def fn(x, bad):
        f = err.new(x)
        for location in range(1, 5):
            f = err.push(f, err.NAN, location, where=bad)
        return f

    torch._dynamo.reset()
    run = torch.compile(fn, backend=counter, fullgraph=True)
    x, bad = torch.zeros(2, 3), torch.tensor([True, False])
    graphs = []
    for change in (
        {},
        {"num_slots": 3},
        {"num_slots": 2},
        {"flag_dtype": torch.float32},
        {"accumulation": AccumulationConfig(order=Order.LAST)},
        {},
    ):
        set_config(ErrorConfig(**change))
        got, expected = run(x, bad), fn(x, bad)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert flags.unpack_all(got) == flags.unpack_all(expected)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 3, 4, 5, 5]
