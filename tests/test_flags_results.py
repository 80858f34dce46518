"""Ok, Err, and the decorators between exceptions and them."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import pickle

import pytest

from opguard.flags import Err, Ok, Result, as_exception, as_result, unwrap


def test_ok():
    ok = Ok(3)
    assert ok.is_ok() is True
    assert ok.is_err() is False
    assert (ok.unwrap(), ok.unwrap_or(9), ok.ok_value, ok.err_value) == (3, 3, 3, None)
    assert ok.map(lambda v: v + 1) == Ok(4)
    assert ok.map_err(str) is ok
    assert ok.and_then(Err) == Err(3)
    with pytest.raises(ValueError, match="expected an Err"):
        ok.unwrap_err()


def test_err():
    error = KeyError("k")
    failed = Err(error)
    assert failed.is_ok() is False
    assert failed.is_err() is True
    assert failed.unwrap_err() is error
    assert (failed.unwrap_or(9), failed.ok_value, failed.err_value) == (9, None, error)
    assert failed.map(str) is failed
    assert failed.and_then(Ok) is failed
    assert failed.map_err(lambda e: e.args[0]) == Err("k")
    with pytest.raises(KeyError) as caught:
        failed.unwrap()
    assert caught.value is error
    with pytest.raises(ValueError, match="it broke"):
        Err("it broke").unwrap()


@pytest.mark.parametrize("result", [Ok([1]), Err("x"), Ok(None)])
def test_results_are_values(result):
    assert pickle.loads(pickle.dumps(result)) == result
    assert copy.deepcopy(result) == result
    assert eval(repr(result)) == result
    assert not hasattr(result, "__dict__")
    field = dataclasses.fields(result)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, field, 1)
    assert Ok(1) != Err(1)
    assert hash(Ok(1)) == hash(Ok(1))


def test_results_match_by_pattern():
    def told(result):
        match result:
            case Ok(value):
                return value
            case Err(error):
                return -error
        return None

    assert (told(Ok(1)), told(Err(2))) == (1, -2)
    assert Result[int, str].__args__ == (Ok[int], Err[str])


def test_as_result_catches_exceptions_and_nothing_else():
    @as_result
    def divide(a, b=1):
        """Divides."""
        return a / b

    assert divide(4, b=2) == Ok(2.0)
    assert isinstance(divide(1, 0).unwrap_err(), ZeroDivisionError)
    assert (divide.__name__, divide.__doc__) == ("divide", "Divides.")

    @as_result
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()


@pytest.mark.parametrize("decorator", [as_exception, unwrap])
def test_decorators_that_raise(decorator):
    @decorator
    def divide(a, b):
        """Divides."""
        return Ok(a / b) if b else Err(ZeroDivisionError("b is 0"))

    assert divide(4, 2) == 2.0
    assert (divide.__name__, divide.__doc__) == ("divide", "Divides.")
    with pytest.raises(ZeroDivisionError, match="b is 0"):
        divide(4, 0)
    neither = decorator(len)
    with pytest.raises(TypeError, match="expected len to return Ok or Err, got int"):
        neither("abc")


def test_unwrap_is_a_function_too():
    assert unwrap(Ok(3)) == 3
    with pytest.raises(KeyError):
        unwrap(Err(KeyError("k")))
    with pytest.raises(TypeError, match="expected unwrap to get Ok, Err, or a function"):
        unwrap(3)


def test_coroutine_functions():
    @as_result
    async def caught(x):
        await asyncio.sleep(0)
        return 1 / x

    @unwrap
    async def raised(x):
        await asyncio.sleep(0)
        return Ok(x) if x else Err(ValueError("zero"))

    assert asyncio.run(caught(2)) == Ok(0.5)
    assert isinstance(asyncio.run(caught(0)).unwrap_err(), ZeroDivisionError)
    assert asyncio.run(raised(3)) == 3
    with pytest.raises(ValueError, match="zero"):
        asyncio.run(raised(0))
