"""first_failure: where a run broke first, out of the flags of a whole batch."""

from __future__ import annotations

import pytest
import torch

from opguard import flags
from opguard.flags import (
    ErrorCode,
    ErrorConfig,
    ErrorLocation,
    FlagsError,
    Severity,
    check_model,
    check_ops,
    first_failure,
    push,
)


def _pushed(f, samples, code, location):
    where = torch.zeros(f.shape[0], dtype=torch.bool)
    where[samples] = True
    return push(f, code, location, where=where)


def test_no_failure_is_none():
    assert first_failure(_none(3)) is None


def _none(samples: int) -> torch.Tensor:
    config = ErrorConfig()
    return torch.zeros((samples, config.num_words), dtype=config.flag_dtype)


def test_all_that_is_said_of_it():
    f = _pushed(_none(4), [1, 3], ErrorCode.NAN, "failures.encoder")
    failure = first_failure(f)
    assert failure is not None
    assert failure.samples == (1, 3)
    assert failure.sample == 1
    assert failure.total == 4
    assert (failure.code, failure.code_name) == (ErrorCode.NAN, "NAN")
    assert (failure.severity, failure.severity_name) == (Severity.CRITICAL, "CRITICAL")
    assert failure.location == ErrorLocation.get("failures.encoder")
    assert failure.location_name == "failures.encoder"
    assert str(failure) == "first failure: NAN at failures.encoder in samples 1, 3 of 4"
    assert flags.flags.first_failure(f) == failure


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([2], "sample 2 of 20"),
        (list(range(20)), "all 20 samples"),
        (list(range(12)), "samples 0, 1, 2, 3, 4, 5, 6, 7 and 4 more of 20"),
    ],
)
def test_who_it_is_said_of(samples, words):
    assert str(first_failure(_pushed(_none(20), samples, 2, "failures.x"))).endswith(f"in {words}")


def test_what_stands_behind_another_is_not_the_first():
    early, late = "failures.z_early", "failures.a_late"
    ErrorLocation.register(late)  # the lower id
    f = _pushed(_none(5), [1], ErrorCode.INF, early)
    f = _pushed(f, [0, 1, 2, 3], ErrorCode.NAN, late)
    failure = first_failure(f)
    assert failure is not None
    assert failure.location_name == early
    assert failure.samples == (1,)


def test_of_errors_that_nothing_tells_apart_the_one_of_more_samples():
    f = _pushed(_none(5), [0], ErrorCode.INF, "failures.one")
    f = _pushed(f, [2, 3], ErrorCode.INF, "failures.two")
    failure = first_failure(f)
    assert failure is not None
    assert failure.location_name == "failures.two"


def test_errors_in_a_circle_still_have_an_answer():
    f = _pushed(_none(3), [0, 1], ErrorCode.INF, "failures.one")
    f = _pushed(f, [0, 1, 2], ErrorCode.NAN, "failures.two")
    f = _pushed(f, [2], ErrorCode.INF, "failures.one")
    failure = first_failure(f)
    assert failure is not None
    assert failure.location_name == "failures.one"


def test_a_block_of_checks_knows_the_order():
    x = torch.tensor([[4.0], [-1.0], [0.0], [0.0]])
    ErrorLocation.reset()
    with check_ops(x) as again:  # gives the later line the lower id
        for order in ((torch.log,), (torch.sqrt, torch.log)):
            for op in order:
                op(x)
    with check_ops(x) as c:
        x.sqrt()
        (x + 0).log()
    assert first_failure(again).code_name == "NAN"
    failure = first_failure(c)
    assert failure is not None
    assert failure.location_name.startswith("aten::sqrt at test_flags_failures.py:")
    assert failure.samples == (1,)
    assert first_failure(c.flags) == failure


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float32])
def test_every_dtype_of_flags(dtype):
    config = ErrorConfig(flag_dtype=dtype, num_slots=8)
    f = torch.zeros((3, config.num_words), dtype=dtype)
    f = push(
        f, ErrorCode.NAN, "failures.x", where=torch.tensor([False, True, False]), config=config
    )
    failure = first_failure(f)
    assert failure is not None
    assert failure.samples == (1,)


def test_of_what_has_flags():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with check_model(model) as m:
        model(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
    failure = first_failure(m)
    assert failure is not None
    assert failure.samples == (1,)
    with pytest.raises(FlagsError, match="expected a flags tensor"):
        first_failure("flags")


def test_a_broken_graph_goes_on(recwarn):
    @torch.compile(backend="eager")
    def f(x):
        y = x + 1
        first_failure(_none(2))
        return y * 2

    assert torch.equal(f(torch.ones(2)), torch.full((2,), 4.0))
