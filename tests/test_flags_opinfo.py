"""Every op of torch's OpInfo database that runs on CPU floats follows rows rightly, or refuses.

Follows: the data is the plain run's bit for bit, and when a row of an input is poisoned, every
output row that changes has that row's flag. The lists below may only shrink: an op that is in one
of them for nothing fails, and so does one that would have to be in one and is not.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch

from opguard.flags import GuardedTensor
from opinfo_oracle import Sample, all_ops, check, locations, name_of, repeats, samples

# Memory that nobody wrote: what it holds is of no sample.
UNWRITTEN = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
OPS = {name_of(op): op for op in all_ops() if op.name not in UNWRITTEN}
MOST = 3  # calls of each op


def names(text: str) -> set[str]:
    return set(text.split())


# What refuses at least one of its calls. No more than these, and fewer whenever a rule is added.
REFUSING = names(
    """
    _chunk_cat _unsafe_masked_index _unsafe_masked_index_put_accumulate
    as_strided_copy
    nn.functional.linear_cross_entropy.chunked nn.functional.linear_cross_entropy.chunked_none
    nonzero_static resize_ resize_as_ to_sparse
    """
)
# Where some output row carries a flag that it did not depend on in some call: scans, of which each
# element sees those before it; outputs that tell of no numbers (info, permutations, indices);
# windows and groups along the batch; choices of which few depend on every number. All other ops
# are exact.
LOOSE = names(
    """
    bucketize cross cummax cummin cumprod cumsum cumulative_trapezoid histogram histogramdd
    igamma igammac kthvalue linalg.cholesky_ex linalg.cross linalg.inv_ex linalg.ldl_factor
    linalg.ldl_factor_ex linalg.lstsq linalg.lstsq.grad_oriented linalg.lu linalg.lu_factor
    linalg.lu_factor_ex linalg.slogdet linalg.solve_ex logcumsumexp lu lu_unpack masked.cumprod
    masked.cumsum median nanmedian nn.functional.adaptive_max_pool2d
    nn.functional.adaptive_max_pool3d nn.functional.conv1d nn.functional.conv2d
    nn.functional.conv3d nn.functional.conv_transpose1d nn.functional.conv_transpose2d
    nn.functional.conv_transpose3d nn.functional.embedding_bag nn.functional.local_response_norm
    pca_lowrank searchsorted special.zeta triangular_solve unique_consecutive
    """
)
# For a tensor subclass torch itself chooses vectors as well as values, or it starts from memory
# that nobody wrote: the same numbers but for rounding.
OTHER_ROUTE = names(
    """
    linalg.cond linalg.eigvalsh linalg.lstsq linalg.lstsq.grad_oriented linalg.matrix_norm
    linalg.svdvals norm.nuc
    """
)
# Made of no tensor, or of tensors too small to be batches.
UNGUARDED = names(
    """
    arange broadcast_shapes cartesian_prod eye full item linspace linspace.tensor_overload
    logspace logspace.tensor_overload nn.functional.unfold normal.number_mean ones randint randn
    scalar_tensor signal.windows.bartlett signal.windows.blackman signal.windows.cosine
    signal.windows.exponential signal.windows.gaussian signal.windows.general_cosine
    signal.windows.general_hamming signal.windows.hamming signal.windows.hann
    signal.windows.kaiser signal.windows.nuttall sparse.mm.reduce sparse.sampled_addmm zeros
    """
)
# What one element draws depends on how many were drawn before it: no dependence of the data.
DRAWS = {"nn.functional.rrelu"}
# A value that was picked keeps its row; that others were not picked is not followed.
PICKS = {"argsort", "kthvalue", "msort", "sort", "topk"}
IN_PLACE = sorted(name for name, op in OPS.items() if op.inplace_variant is not None)
SMOKE = ("add", "mm", "softmax", "cat", "nn.functional.conv2d", "sort")


class Outcome(NamedTuple):
    """What the sample calls of one op came to."""

    follows: int
    refuses: list[str]
    faults: list[str]
    loose: bool


def calls(function: Any, op: Any, most: int) -> list[tuple[Sample, Any]]:
    """Calls of an op that torch itself takes and repeats, with their plain results."""
    found = []
    for sample in samples(op, function, most):
        try:
            reference = sample.plain()
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            continue
        if repeats(reference, sample.plain()):  # not: memory that nobody wrote
            found.append((sample, reference))
    return found


def outcome(function: Any, op: Any, most: int, lost: str = "error") -> Outcome:
    exact = name_of(op) not in OTHER_ROUTE
    follows, refuses, faults, loose = 0, [], [], False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (sample, reference) in enumerate(calls(function, op, most)):
            try:
                outputs = sample.flagged(lost)
            except NotImplementedError as refusal:
                refuses.append(f"call {number}: {refusal}")
                continue
            verdict = check(sample, outputs, reference, exact)
            follows += 1
            faults += [f"call {number}: {fault}" for fault in verdict.faults]
            loose = loose or verdict.loose
    return Outcome(follows, refuses, faults, loose)


def of_data(name: str, got: Outcome) -> list[str]:
    return [each for each in got.faults if name not in DRAWS | PICKS or "depends on" not in each]


def params() -> list[Any]:
    return [
        pytest.param(name, marks=[pytest.mark.smoke] if name in SMOKE else [])
        for name in sorted(OPS)
    ]


@pytest.mark.parametrize("name", params())
def test_op_follows_rows_or_refuses(name: str):
    op = OPS[name]
    got = outcome(op.op, op, MOST)
    assert not of_data(name, got)
    assert bool(got.refuses) == (name in REFUSING), got.refuses or "it refuses no more"
    assert (not got.follows and not got.refuses) == (name in UNGUARDED)
    assert got.loose <= (name in LOOSE)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_form_follows_rows_or_refuses(name: str):
    op = OPS[name]
    got = outcome(op.inplace_variant, op, 2)
    assert not of_data(name, got)
    assert bool(got.refuses) <= (name in REFUSING), got.refuses


@pytest.mark.parametrize("name", sorted(PICKS - {"argsort"}))
def test_picked_values_keep_their_rows(name: str):
    """Each value of a result is one of those rows whose flags its row has."""
    op = OPS[name]
    for sample, _ in calls(op.op, op, MOST):
        outputs = sample.flagged()
        values = outputs if isinstance(outputs, GuardedTensor) else outputs[0]
        ((at, (base, dim)),) = [each for each in sample.guarded.items() if each[0] == 0]
        rows = sample.leaves[at].movedim(dim, 0)
        found = values.unwrap().movedim(values.batch_dims, tuple(range(len(values.batch_dims))))
        count = values.flags.shape[0]
        for row, named in zip(found.reshape(count, -1), locations(values.flags), strict=True):
            allowed = {value for each in named for value in rows[each - base].flatten().tolist()}
            assert set(row.tolist()) <= allowed


@pytest.mark.parametrize("name", sorted(REFUSING - {"to_sparse"}))  # a sparse result has no data
def test_refused_op_merges_by_choice(name: str):
    op = OPS[name]
    got = outcome(op.op, op, MOST, lost="merge")
    assert got.follows
    assert not got.refuses
    assert not got.faults


def test_lists_only_shrink():
    """Raise none of these: a rule is missing instead."""
    assert len(REFUSING) <= 11
    assert len(LOOSE) <= 46
    assert len(OTHER_ROUTE) <= 7
    assert not (REFUSING | LOOSE | OTHER_ROUTE | UNGUARDED) - set(OPS)


def test_oracle_sees_wrong_rows_and_wrong_data():
    """Of each kind of fault that it is there for, one is planted and found."""
    op = OPS["nn.functional.relu"]
    sample, reference = calls(op.op, op, 1)[0]
    right = sample.flagged()
    assert not check(sample, right, reference).faults
    assert not check(sample, right, reference).loose
    rolled = right.with_flags(right.flags.roll(1, 0))
    assert any("has not its flag" in fault for fault in check(sample, rolled, reference).faults)
    everywhere = right.with_flags(right.flags | right.flags.roll(1, 0).roll(1, 1))
    assert check(sample, everywhere, reference).loose
    assert check(sample, right.unwrap(), reference).faults
    other = GuardedTensor(right.unwrap() + 1, right.flags)
    assert "output 0: other data" in check(sample, other, reference).faults
    signed = GuardedTensor(torch.where(reference == 0, -0.0, reference), right.flags)
    assert check(sample, signed, reference).faults or not (reference == 0).any()
