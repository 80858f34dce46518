"""Random programs on GuardedTensor, against a model of rows and against the plain program.

Each sample starts with an error at a location of its own, so the flags of a row name the samples
it is made of. Three questions of every value of every program: is the data, bit for bit, what the
plain program makes; do the flags name what the model says (``helpers/rows_model.py``); and is
every row that changes when a sample's numbers change flagged with that sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from opguard.flags import (
    GuardedTensor,
    err,
    fix,
    flag_nan,
    flag_nan_and_inf,
    flags,
    push,
)
from rows_model import (
    ONE,
    TWO,
    Program,
    Step,
    closed,
    is_uniform,
    masked,
    of_rows,
    sort,
    topk,
    united,
)

SAMPLES = 3
HELPER = 31  # the first location of what helpers record
SETTINGS = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


def started(data: torch.Tensor, first: int) -> GuardedTensor:
    """Sample i has an error at location first + i."""
    f = err.new_t(data.shape[0])
    for i in range(data.shape[0]):
        one = torch.arange(data.shape[0]) == i
        f = push(f, err.INVALID_VALUE, first + i, where=one)
    return GuardedTensor(data, f)


def inputs() -> list[tuple[torch.Tensor, int]]:
    """Two batches of SAMPLES, and the location of the first sample of each."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(SAMPLES, 2, 4, generator=generator), 1),
        (torch.randn(SAMPLES, 4, generator=generator), 1 + SAMPLES),
    ]


def bits_of(f: torch.Tensor) -> np.ndarray:
    """The locations in each row of flags, as bits."""
    rows = [sum(1 << place for place in {e.location for e in row}) for row in flags.unpack_all(f)]
    return np.array(rows, dtype=np.int64)


def start_bits(data: torch.Tensor, first: int) -> np.ndarray:
    rows = np.array([1 << first + i for i in range(data.shape[0])], dtype=np.int64)
    return np.broadcast_to(rows.reshape(-1, *[1] * (data.dim() - 1)), data.shape).copy()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: NaN is NaN, and 0.0 is not -0.0."""
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    return a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


class Run:
    """A program while it is drawn: plain values, guarded ones and the model's."""

    def __init__(self, draw: Any, without: tuple[Any, ...] = ()) -> None:
        self.draw = draw
        self.one = [op for op in ONE if op not in without]
        self.program = Program()
        self.plain = [data for data, _ in inputs()]
        self.guarded = [started(data.clone(), first) for data, first in inputs()]
        self.bits = [start_bits(data, first) for data, first in inputs()]
        self.helpers = 0
        self.nans = 0  # the bits of locations where a helper records NaN

    def step(self) -> None:
        i = self.draw(st.integers(0, len(self.plain) - 1))
        kind = self.draw(st.integers(0, 9))
        if kind == 0:
            self.helper(i)
        elif kind <= 3:
            j = self.draw(st.integers(0, len(self.plain) - 1))
            made = self.draw(st.sampled_from(TWO))(self.draw, self.plain[i], self.plain[j])
            if made is not None:
                self.take(Step(made[0], (i, j), *made[1:]))
        elif self.plain[i].dim():
            made = self.draw(st.sampled_from(self.one))(self.draw, self.plain[i])
            self.take(Step(made[0], (i,), *made[1:]))

    def take(self, step: Step) -> None:
        """Runs one step three ways and compares."""
        plain = step.run(*(self.plain[i] for i in step.inputs))
        if plain.numel() > 2000:
            return
        guarded = step.run(*(self.guarded[i] for i in step.inputs))
        self.program.steps.append(step)
        inputs = [self.bits[i] for i in step.inputs]
        bits = np.asarray(step.model(*inputs), dtype=np.int64)
        upper = np.bitwise_or.reduce([united(each) for each in inputs])
        self.compare(step, plain, guarded, bits, upper)

    def compare(
        self,
        step: Step,
        plain: torch.Tensor,
        guarded: GuardedTensor,
        bits: np.ndarray,
        upper: np.ndarray,
    ) -> None:
        said = f"{step.name} of {self.program}"
        assert type(guarded) is GuardedTensor, said
        assert same(guarded.unwrap(), plain), said
        assert bits.shape == tuple(plain.shape), said
        dims = guarded.batch_dims
        found = bits_of(guarded.flags)
        if not plain.numel():
            return
        wanted = of_rows(bits, dims)
        assert found.shape == wanted.shape, (said, dims, guarded.flags.shape)
        if step.kind == "move":
            assert is_uniform(bits, dims), (said, dims)
        if step.kind == "mix":
            assert not (wanted & ~found).any(), (said, dims, wanted, found)
            assert not (found & ~upper).any(), (said, dims, upper, found)
            bits = bits | spread(found, plain, dims)
        else:
            assert (wanted == found).all(), (said, dims, wanted, found)
        self.plain.append(plain)
        self.guarded.append(guarded)
        self.bits.append(closed(bits, dims))

    def helper(self, i: int) -> None:
        """Plants a NaN, flags it and maybe mends it: the data of the next value."""
        plain, place = self.plain[i], HELPER + self.helpers
        if not plain.numel() or place > 60:
            return
        self.helpers += 1
        at = self.draw(st.integers(0, plain.numel() - 1))
        name = self.draw(st.sampled_from(["flag_nan", "flag_nan_and_inf", "fix", "push"]))
        spoilt = torch.zeros(plain.numel(), dtype=torch.bool)
        spoilt[at] = True
        spoilt = spoilt.reshape(plain.shape)

        def run(t: torch.Tensor) -> torch.Tensor:
            t = t.masked_fill(spoilt, float("nan"))
            if not isinstance(t, GuardedTensor):
                return t
            if name == "push":
                return push(t, err.UNSTABLE, place)
            flag = flag_nan if name == "flag_nan" else flag_nan_and_inf
            t = flag(t, place)
            return fix(t, 2.0, place, codes=[err.NAN]) if name == "fix" else t

        guarded = run(self.guarded[i])
        dims = guarded.batch_dims
        plain = plain.masked_fill(spoilt, float("nan"))
        bad = plain.isnan().numpy()
        rows = np.ones_like(bad) if name == "push" else closed(bad.astype(np.int64), dims) > 0
        bits = self.bits[i] | np.where(rows, 1 << place, 0)
        if name != "push":
            self.nans |= 1 << place
        if name == "fix":
            mended = rows | (bits & self.nans > 0)
            plain = plain.masked_fill(torch.tensor(mended), 2.0)
            bits = bits | np.where(mended, 1 << place, 0)
        self.program.steps.append(Step(name, (i,), run, lambda b: b, "move"))
        self.compare(Step(name, (i,), run, lambda b: b, "move"), plain, guarded, bits, united(bits))


def spread(rows: np.ndarray, plain: torch.Tensor, dims: tuple[int, ...]) -> np.ndarray:
    """One number a row, put on all elements of the row."""
    dims = tuple(dim % plain.dim() for dim in dims)
    rest = [dim for dim in range(plain.dim()) if dim not in dims]
    shape = [plain.shape[dim] for dim in dims] + [1] * len(rest)
    order = np.argsort([*dims, *rest])
    return np.broadcast_to(rows.reshape(shape).transpose(order), plain.shape)


def guarded_inputs(changed: int | None = None) -> list[GuardedTensor]:
    """The inputs, with other numbers in the sample of one location."""
    result = []
    for data, first in inputs():
        if changed is not None and first <= changed < first + len(data):
            data[changed - first] = data[changed - first] * 1.5 + 0.1
        result.append(started(data, first))
    return result


def drawn(draw: Any, most: int, without: tuple[Any, ...] = ()) -> Run:
    run = Run(draw, without)
    for _ in range(draw(st.integers(1, most))):
        run.step()
    return run


@settings(SETTINGS, max_examples=160)
@given(st.data())
def test_rows_are_followed_as_the_model_says(data):
    drawn(data.draw, 10)


@settings(SETTINGS, max_examples=60)
@given(st.data())
def test_what_a_sample_changes_is_flagged_with_it(data):
    """Where elements are ordered, numbers of others decide where they go, which no flag says."""
    program = drawn(data.draw, 8, (sort, topk)).program
    before = program(*guarded_inputs())
    for place in range(1, 1 + 2 * SAMPLES):
        for was, now in zip(before, program(*guarded_inputs(place)), strict=True):
            bits = was.unwrap().contiguous().view(torch.int32)
            changed = (bits != now.unwrap().contiguous().view(torch.int32)).numpy()
            rows = of_rows(changed.astype(np.int64), was.batch_dims) > 0
            flagged = bits_of(was.flags) >> place & 1
            assert not (rows & (flagged == 0)).any(), (program, place, was.batch_dims)


@settings(SETTINGS, max_examples=6, phases=[Phase.generate])
@given(st.data())
def test_compiled_programs_give_the_same(data):
    run = drawn(data.draw, 6, (masked,))
    if not run.program.steps:
        return
    torch._dynamo.reset()
    compiled = torch.compile(run.program.__call__, backend="aot_eager", fullgraph=True)
    wanted = run.program(*guarded_inputs())
    for one, other in zip(wanted, compiled(*guarded_inputs()), strict=True):
        assert type(other) is GuardedTensor, run.program
        assert same(one.unwrap(), other.unwrap()), run.program
        assert one.batch_dims == other.batch_dims, run.program
        assert (bits_of(one.flags) == bits_of(other.flags)).all(), run.program
