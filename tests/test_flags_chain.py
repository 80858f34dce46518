"""Flag ops of compiled code with small tensors: one call, the results of many."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from opguard import _C
from opguard.flags import AccumulationConfig, ErrorConfig, Priority, _engine

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own

KEY = ErrorConfig().key
KEYS = (
    KEY,
    ErrorConfig(num_slots=4, flag_dtype=torch.int32).key,
    ErrorConfig(num_slots=3, flag_dtype=torch.float64).key,
    ErrorConfig(num_slots=2, accumulation=AccumulationConfig(priority=Priority.LOCATION)).key,
)
CHAIN = "torch.ops.opguard.core.flags_out_chain("


def data(rows: int = 6, columns: int = 5) -> torch.Tensor:
    x = torch.zeros(rows, columns)
    for row in range(rows):
        x[row, row % columns] = (0.0, float("nan"), float("inf"), -float("inf"))[row % 4]
    return x


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What the compiled function returns, which eager returns too, and its code."""
    torch.compiler.reset()
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        fast = torch.compile(function, fullgraph=True, dynamic=False)
        mine = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        found, (code,) = run_and_get_code(fast, *mine)
    expected = function(*args)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    return found, code


def test_one_call_makes_what_many_make():
    def step(x, where, f):
        outputs = []
        for key in KEYS:
            a = _engine.check(x * 2, 3, None, 7, key)
            a = _engine.check(x + 1, 4, a, 3, key)
            b = _engine.push(_engine.check(x, 5, None, 6, key), where, 9, 6, None, key)
            c = _engine.push(_engine.check(-x, 7, None, 2, key), None, 5, 8, 1, key)
            outputs.append(_engine.merge((a, _engine.merge((b, c), key), b, a), key))
        outputs.append(_engine.push(_engine.check(x, 9, f, 7, KEY), where, 5, 1, None, KEY))
        outputs.append(_engine.merge((f, _engine.check(x, 2, None, 7, KEY)), KEY))
        return outputs

    f = _engine.push(_engine.new(6, "cpu", KEY), None, 13, 77, None, KEY)
    _, code = compiled(step, data(), torch.arange(6) % 2 == 0, f)
    assert CHAIN in code


def test_a_chain_of_layers_is_one_call():
    def step(x, where):
        f = None
        for i in range(7):
            x = torch.relu(x) * 1.5
            f = _engine.check(x, i, f, 7, KEY)
        return x, _engine.merge((f, _engine.push(f.clone(), where, 9, 5, None, KEY)), KEY)

    _, code = compiled(step, data(), torch.ones(6, dtype=torch.bool))
    assert code.count(CHAIN) == 2  # f has two readers
    assert "flags_out_check(" not in code


def test_a_result_that_others_read_is_made():
    def step(x):
        f = _engine.check(x, 1, None, 7, KEY)
        g = _engine.check(x + 1, 2, f, 7, KEY)
        return f, g, _engine.is_ok(_engine.check(x, 3, g, 7, KEY))

    _, code = compiled(step, data())
    assert CHAIN not in code


def test_large_tensors_are_not_kept_for_the_end():
    def step(x):
        f = _engine.check(torch.relu(x), 1, None, 7, KEY)
        x = x @ x.t()
        return x, _engine.check(x, 2, f, 7, KEY)

    _, code = compiled(step, data(300, 300))
    assert CHAIN not in code
    _, code = compiled(step, data(30, 30))
    assert CHAIN in code


def test_ops_with_nothing_between_are_one_call_at_any_size():
    def step(x, where):
        return (_engine.push(_engine.check(x, 1, None, 7, KEY), where, 9, 2, None, KEY),)

    _, code = compiled(step, data(4096, 300), torch.rand(4096) > 0.5)
    assert CHAIN in code


def test_a_tensor_that_is_written_to_is_read_before():
    def step(x, y):
        f = _engine.check(y, 1, None, 7, KEY)
        y.copy_(x)
        torch.ops.opguard.flags_check_(f, x, 1, 7, KEY)
        return _engine.check(x, 2, f, 7, KEY), y

    compiled(step, torch.zeros(6, 5), data())


def test_more_flags_than_a_call_takes_do_not_wait_for_it():
    def step(x):
        return (_engine.merge([_engine.check(x + i, i, None, 7, KEY) for i in range(20)], KEY),)

    _, code = compiled(step, data())
    assert CHAIN not in code


def test_flags_of_another_carrier_keep_out_of_chains():
    def step(x, f):
        return (_engine.merge((_engine.check(x, 2, None, 7, KEY), f), KEY),)

    _, code = compiled(step, data(), _engine.check(data(), 77, None, 7, KEYS[1] + 12))
    assert CHAIN not in code


def test_chains_longer_than_a_call_takes():
    def step(x):
        f = _engine.check(x, 0, None, 7, KEY)
        for i in range(70):
            f = _engine.push(f, x[:, i % 5] > i % 3, 5 + i % 7, i, None, KEY)
        parts = [_engine.check(x, i, None, 7, KEY) for i in range(14)]
        return f, _engine.merge(parts, KEY), _engine.merge((f, *parts[:9]), KEY)

    _, code = compiled(step, data())
    assert 2 <= code.count(CHAIN) < 20


def step(kind: int, *rest: int) -> bytes:
    return struct.pack("=7q", kind, *rest)


@pytest.mark.parametrize(
    "steps",
    [
        b"short",
        step(4, 0, -1, 0, 0, 0, KEY),  # no such kind
        step(1, 16, -1, 0, 0, 7, KEY),  # no such register
        step(1, -1, -1, 0, 0, 7, KEY),
        step(1, 0, -1, 2, 0, 7, KEY),  # no such tensor
        step(1, 0, -1, -1, 0, 7, KEY),
        step(1, 0, -1, 0, 1024, 7, KEY),  # no such location
        step(1, 0, -1, 0, 0, 8, KEY),  # no such checks
        step(1, 0, -1, 0, 0, 7, 0),  # no such key
        step(1, 0, -1, 1, 0, 7, KEY),  # another batch
        step(0, 0, -1, 0, 0, 0, KEY),  # x is no flags
        step(2, 0, -1, 0, 5, 0, KEY),  # x is no mask
        step(2, 0, -1, -1, 1 << 16, 0, KEY),  # no such slot
        step(3, 0, 0, 0, 0, 0, KEY),  # merged with itself
        step(3, 0, 0, 99, 0, 0, KEY),
        step(1, 0, -1, 0, 0, 7, KEY) * 33,  # too many
    ],
)
def test_steps_that_are_none_are_refused(steps):
    out = torch.zeros(6, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="a flag op in compiled code failed"):
        _C.flags_out_chain(data(), data(4), steps, out=out)
    _C.flags_out_chain(data(), step(1, 0, -1, 0, 3, 7, KEY), out=out)
    assert torch.equal(out, _engine.check(data(), 3, None, 7, KEY))
