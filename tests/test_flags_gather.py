"""torch.ops.opguard.flags_gather: rows by number, copied or merged, against the slow model."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import flags_model as model
import opguard  # noqa: F401  (registers the ops)
from flags_model import CRITICAL, INF, NAN, Policy, slot_of
from opguard.flags import _engine

OPS = torch.ops.opguard
KEY = Policy().key

few = hypothesis.settings(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)

policies = st.builds(
    Policy,
    num_slots=st.one_of(st.integers(1, 9), st.integers(1, 80)),
    priority=st.integers(0, 2),
    order=st.integers(0, 1),
    dedupe=st.integers(0, 3),
    carrier=st.integers(0, 3),
)
slots = st.builds(slot_of, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))


def folded(rows: list[model.Row], picks: list[int], policy: Policy) -> model.Row:
    """The rows with errors in the order named, each once, the first as it is."""
    whole = Policy(policy.capacity, policy.priority, policy.order, policy.dedupe, policy.carrier)
    some = [rows[i] for i in dict.fromkeys(picks) if i >= 0 and any(rows[i])]
    made = some[0] if some else [0] * policy.capacity
    for row in some[1:]:
        made = model.merge(made, row, whole)
    return made


@few
@hypothesis.given(
    data=st.data(),
    policy=policies,
    shape=st.tuples(st.integers(0, 9), st.integers(0, 9),
                    st.one_of(st.none(), st.integers(0, 5), st.just(40))),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)  # fmt: skip
def test_gather_equals_the_model(data, policy, shape, dtype):
    n, m, k = shape
    rows = []
    for _ in range(n):
        used = data.draw(st.lists(slots, max_size=min(policy.capacity, 6)))
        rows.append(used + [0] * (policy.capacity - len(used)))
    pick = st.integers(-1, n - 1)
    size = 1 if k is None else k
    picks = [data.draw(st.lists(pick, min_size=size, max_size=size)) for _ in range(m)]
    f = model.to_flags(rows, policy)
    before = f.clone()
    index = torch.tensor(picks, dtype=dtype).reshape(m, size)
    expected = model.to_flags([folded(rows, one, policy) for one in picks], policy)
    wide = torch.zeros(m, 2 * size + 1, dtype=dtype)
    wide[:, 1::2] = index
    for layout in (index, index.t().contiguous().t(), wide[:, 1::2]):
        given = layout[:, 0] if k is None else layout
        out = OPS.flags_gather(f, given, policy.key)
        assert (out.shape, out.dtype) == (expected.shape, policy.dtype)
        assert out.is_contiguous()
        assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(_engine.gather(f, given, policy.key).view(torch.uint8),
                           expected.view(torch.uint8))  # fmt: skip
    assert torch.equal(f.view(torch.uint8), before.view(torch.uint8))


def test_a_row_named_twice_counts_once():
    """With errors that are never the same one, naming a row twice would show."""
    key = Policy(dedupe=model.NONE).key
    f = OPS.flags_push_all(torch.zeros(3, 4, dtype=torch.int64), slot_of(1, NAN, CRITICAL), key)
    picks = torch.tensor([[0, 0, 0], [0, 1, 0], [2, 1, 2], [0, 1, 2]])
    assert OPS.flags_count(OPS.flags_gather(f, picks, key)).tolist() == [1, 2, 2, 3]
    many = torch.tensor([[2, 1, 0] * 300])
    assert OPS.flags_count(OPS.flags_gather(f, many, key)).tolist() == [3]


def test_all_slots_are_used_whatever_the_key_says():
    f = torch.zeros(6, 4, dtype=torch.int64)
    for row in range(6):
        OPS.flags_push_all_(f[row : row + 1], slot_of(row, NAN, CRITICAL), KEY)
    whole = OPS.flags_gather(f, torch.arange(6).reshape(1, 6), Policy(2).key)
    assert OPS.flags_count(whole).tolist() == [6]


def test_flags_and_index_of_any_layout():
    wide = torch.zeros(5, 8, dtype=torch.int64)
    slot = slot_of(1, NAN, CRITICAL)
    for f in (wide[:, :4], wide[:, ::2], wide[:, 1:5], torch.zeros(4, 5, dtype=torch.int64).t()):
        OPS.flags_push_(f, torch.tensor([0, 1, 0, 0, 1]).bool(), slot, KEY)
        out = OPS.flags_gather(f, torch.tensor([4, 0, -1, 1]), KEY)
        assert OPS.flags_err(out).tolist() == [True, False, False, True]
        every = torch.tensor([1]).expand(7)
        assert OPS.flags_err(OPS.flags_gather(f, every, KEY)).all()
        f.zero_()
    assert not wide.any()
    one = OPS.flags_push_all(wide[:1, :4], slot, KEY).expand(5, 4)
    assert torch.equal(OPS.flags_gather(one, torch.arange(5).flip(0), KEY), one)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows_on_several_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        n = 60_000
        bad = torch.arange(n) % 777 == 0
        f = torch.zeros(n, 4, dtype=torch.int64)
        OPS.flags_push_(f, bad, slot_of(1, INF, CRITICAL), KEY)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        assert torch.equal(OPS.flags_gather(f, order, KEY), f[order])
        groups = order.reshape(-1, 60)
        assert torch.equal(OPS.flags_err(OPS.flags_gather(f, groups, KEY)), bad[groups].any(1))
        assert OPS.flags_count(OPS.flags_gather(f, order[None], KEY)).tolist() == [1]
        order[59_999] = n
        with pytest.raises(RuntimeError, match="row 59999 has another number"):
            OPS.flags_gather(f, order, KEY)
    finally:
        torch.set_num_threads(before)


def test_numbers_beyond_two_to_the_31():
    """Rows of an expanded tensor, which take no memory."""
    f = torch.tensor([[slot_of(1, NAN, CRITICAL)]], dtype=torch.int32).expand(2**31 + 9, 1)
    picks = torch.tensor([2**31 + 8, -1, 2**31])
    assert OPS.flags_err(OPS.flags_gather(f, picks, KEY)).tolist() == [True, False, True]
    with pytest.raises(RuntimeError, match="2147483657 rows"):
        OPS.flags_gather(f, picks + 1, KEY)


F = torch.zeros(3, 4, dtype=torch.int64)


@pytest.mark.parametrize(("args", "words"), [
    ((F, torch.tensor([3]), KEY), ["3 rows", "row 0"]),
    ((F, torch.tensor([0, -2]), KEY), ["row 1"]),
    ((F, torch.tensor([[0, 1], [1, 2**40]]), KEY), ["row 1"]),
    ((F, torch.tensor([[0, 1], [1, 7]], dtype=torch.int32), KEY), ["row 1"]),
    ((F[:0], torch.tensor([0]), KEY), ["0 rows"]),
    ((F, torch.zeros(2), KEY), ["int64 or int32", "float32"]),
    ((F, torch.zeros(2).bool(), KEY), ["int64 or int32", "bool"]),
    ((F, torch.zeros(1, 1, 1).long(), KEY), ["(M,) or (M, K)", "3 dimensions"]),
    ((F, torch.tensor(1), KEY), ["(M,) or (M, K)", "0 dimensions"]),
    ((F[0], torch.tensor([1]), KEY), ["(N, W)"]),
    ((F.half(), torch.tensor([1]), KEY), ["int64, int32", "float16"]),
    ((F, torch.tensor([1]), 0), ["key"]),
])  # fmt: skip
def test_bad_arguments_are_one_clear_sentence(args, words):
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        OPS.flags_gather(*args)
    said = str(caught.value).splitlines()[0]
    assert all(word in said for word in words), said
    assert len(said) < 200


def test_under_vmap_each_batch_has_its_own_rows():
    f = torch.zeros(4, 3, 4, dtype=torch.int64)
    for i in range(4):
        OPS.flags_push_all_(f[i, i % 3 : i % 3 + 1], slot_of(i, NAN, CRITICAL), KEY)
    index = torch.tensor([[0, 1], [2, -1]])
    many = torch.stack([index, index.flip(0), index.flip(1), index]).int()
    run = torch.vmap(lambda a, b: OPS.flags_gather(a, b, KEY), in_dims=(1, -1))
    out = run(f.movedim(0, 1), many.movedim(0, -1))
    alone = [OPS.flags_gather(a, b, KEY) for a, b in zip(f, many, strict=True)]
    assert torch.equal(out, torch.stack(alone))
    with pytest.raises(RuntimeError, match="has another number"):  # and not a neighbour's row
        torch.vmap(lambda a: OPS.flags_gather(a, torch.tensor([3]), KEY))(f)
