"""check_model: flags of a whole model that nobody changed, and no trace of them afterwards."""

import collections
import copy
import dataclasses
import gc
import io
import logging
import pickle
import re
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

from checkout import TESTS
from opguard.flags import (
    CONFIG,
    ErrorConfig,
    ErrorLocation,
    FlagsError,
    check_model,
    err,
    flags,
    tracked,
)

NAN, INF = float("nan"), float("inf")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.act = nn.ReLU()
        self.leave = nn.Linear(4, 4)

    def forward(self, x):
        return self.leave(self.act(self.enter(x)))


class Give(nn.Module):
    """A leaf that returns what it was made with, or what a function makes of its input."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, *args):
        return self.what(*args) if callable(self.what) else self.what


def bad(rows=3, row=1, value=NAN, width=4):
    x = torch.ones(rows, width)
    x[row] = value
    return x


def rows(f):
    """Where each sample's errors are: [[(location name, code name), ...], ...].

    Without what tells this model from those of other tests: "Net#2.enter" is "enter".
    """
    return [
        [(re.sub(r"^[A-Z]\w*(#\d+)?\.|#\d+$", "", e.location_name), e.code_name) for e in each]
        for each in flags.unpack_all(f)
    ]


def flagged(f):
    return err.is_err(f).tolist()


def hooks_of(model):
    return [
        each
        for module in model.modules()
        for each in (
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *module._forward_hooks_with_kwargs,
            *module._forward_hooks_always_called,
            *module._forward_pre_hooks_with_kwargs,
        )
    ]


# What is found


def test_the_readmes_lines_run():
    text = (TESTS.parent / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(from opguard.flags import check_model.*?)```", text, re.S)
    model = Net()
    names = {"model": model, "x": bad()}
    exec(lines, names)
    names["c"].remove()
    assert len(names["good"]) == 2


def test_flags_say_sample_module_and_code():
    model = Net()
    c = check_model(model)
    y = model(bad())
    assert y.shape == (3, 4)
    everywhere = [(name, "NAN") for name in ("enter", "act", "leave")]
    assert rows(c.flags) == [[], everywhere, []]
    assert c.flags.shape == (3, CONFIG.num_words)
    model(torch.ones(2, 4))
    assert flagged(c.flags) == [False, False]


def test_answers_and_gradients_are_the_models_own():
    model, x = Net(), bad(row=2, value=0.5)
    expected = model(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with check_model(model):
        y = model(x)
        y.sum().backward()
    assert torch.equal(y, expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize(
    ("inf", "codes"), [("both", [["INF"], ["INF"]]), ("pos", [["INF"], []]), ("none", [[], []])]
)
def test_which_infinities_count(inf, codes):
    model = nn.Sequential(nn.Identity())
    with check_model(model, inf=inf) as c:
        model(torch.tensor([[INF], [-INF]]))
    assert [[e.code_name for e in each] for each in flags.unpack_all(c.flags)] == codes


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    note: str = "none"


Named = collections.namedtuple("Named", "left right")


@pytest.mark.parametrize(
    "what",
    [
        lambda x: (torch.ones(3, 1), x),
        lambda x: [None, "text", 3, x],
        lambda x: {"one": torch.ones(3, 1), "deep": [{"two": (x,)}]},
        Answer,
        lambda x: Named(torch.ones(3), x),
        lambda x: (x.to(torch.complex64), x.long()),
    ],
    ids=["tuple", "list", "dict", "dataclass", "namedtuple", "complex"],
)
def test_every_floating_tensor_in_an_answer_is_looked_at(what):
    model = nn.Sequential(Give(what), Give(lambda _: torch.ones(3, 1)))
    with check_model(model) as c:
        model(bad(value=INF))
    assert rows(c.flags) == [[], [("0", "INF")], []]


def test_a_model_output_of_transformers():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    give = Give(lambda x: outputs.BaseModelOutput(x, hidden_states=(x, x * 2)))
    with check_model(nn.Sequential(give)) as c:
        give(bad())
    assert flagged(c.flags) == [False, True, False]


@pytest.mark.parametrize(
    "what",
    [None, "text", 3, torch.ones(3, dtype=torch.long), [], {}],
    ids=["None", "text", "number", "integers", "list", "dict"],
)
def test_answers_without_floating_tensors_record_nothing(what):
    model = nn.Sequential(Give(what))
    with check_model(model) as c:
        model(bad())
    assert flagged(c.flags) == [False] * 3


def test_an_answer_that_holds_itself_ends():
    ring = [bad()]
    ring.append(ring)
    model = nn.Sequential(Give(ring))
    with check_model(model) as c:
        model(bad())
    assert flagged(c.flags) == [False, True, False]


# Whose samples


@pytest.mark.parametrize(
    "shape",
    [(6, 4), (5, 3, 4), (4,), (), (1, 4)],
    ids=["two rows a sample", "time first", "a constant", "0-d", "one row"],
)
def test_what_is_not_batched_is_everybodys(shape):
    """Never a wrong sample: dim 0 is no batch when it has another size."""
    made = torch.zeros(shape)
    made.view(-1)[0] = NAN
    model = nn.Sequential(Give(made), Give(lambda _: torch.ones(3, 1)))
    with check_model(model) as c:
        model(torch.ones(3, 4))
        assert rows(c.flags) == [[("0", "NAN")]] * 3
        made.zero_()
        model(torch.ones(3, 4))
        assert flagged(c.flags) == [False] * 3


def test_after_what_is_everybodys_samples_stand_apart_again():
    model = nn.Sequential(Give(torch.tensor([INF])), Give(lambda _: bad()))
    with check_model(model) as c:
        model(torch.ones(3, 4))
    assert rows(c.flags) == [[("0", "INF")], [("0", "INF"), ("1", "NAN")], [("0", "INF")]]


@pytest.mark.parametrize(
    ("args", "kwargs", "samples"),
    [
        ((torch.ones(3, 4),), {}, 3),
        ((torch.tensor(7), torch.ones(5, 4)), {}, 5),
        ((), {"ids": torch.ones(2, dtype=torch.long)}, 2),
        (({"pixels": [torch.ones(4, 2)]},), {}, 4),
        (("text",), {}, 1),
        ((), {}, 1),
        ((torch.ones(0, 4),), {}, 0),
    ],
    ids=["first", "after 0-d", "keyword", "nested", "text", "nothing", "none"],
)
def test_the_first_tensor_says_how_many_samples_there_are(args, kwargs, samples):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = Give(lambda: torch.ones(samples or 1, 2) * NAN)

        def forward(self, *args, **kwargs):
            return self.leaf()

    model = Root()
    with check_model(model) as c:
        model(*args, **kwargs)
    assert flagged(c.flags) == [True] * samples


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules_know_their_batch(kind, batch_first):
    """Also with as many layers, and steps, as samples: then dim 0 alone would tell wrong rows."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(4, 4, num_layers=3, batch_first=batch_first)

        def forward(self, x):  # (samples, steps, width)
            return self.rnn(x if batch_first else x.transpose(0, 1))

    x = torch.ones(3, 3, 4)
    x[1] = NAN
    model = Root()
    with check_model(model) as c:
        model(x)
    assert rows(c.flags)[1] == [("rnn", "NAN")]
    assert flagged(c.flags) == [False, True, False]


def test_a_packed_sequence_is_everybodys():
    rnn = nn.LSTM(4, 4, batch_first=True)
    x = torch.ones(2, 3, 4)
    x[1, 0] = NAN
    packed = nn.utils.rnn.pack_padded_sequence(x, [1, 1], batch_first=True)
    model = nn.Sequential(rnn)
    with check_model(model) as c:
        model(packed)  # dim 0 of the data is 2 as well
    assert flagged(c.flags) == [True, True]


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_is_one_module_and_knows_its_batch(batch_first):
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    x = torch.ones(3, 3, 4)  # as many steps as samples
    x[1] = NAN

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            return self.attention(x, x, x)[0].mul(0).nan_to_num().sum()

    model = Root()
    with check_model(model) as c:
        model(x)
    assert list(c.locations) == ["attention"]
    assert flagged(c.flags) == [False, True, False]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_layouts_without_rows_are_everybodys():
    """Sparse and nested tensors are read by their values; quantized ones are never NaN."""
    values = torch.tensor([[1.0, NAN]])
    nested = torch.nested.nested_tensor([torch.ones(2), torch.tensor([NAN])], layout=torch.jagged)
    integers = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    for made, found in [(values.to_sparse(), True), (nested, True), (integers, False)]:
        model = nn.Sequential(Give(made))
        with check_model(model) as c:
            model(torch.ones(2, 1))
        assert flagged(c.flags) == [found] * 2


# Which modules


def test_what_comes_after_the_last_leaf_is_the_models_own():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = nn.Linear(4, 1)

        def forward(self, x):
            return self.leaf(x) * 0 / torch.tensor([[1.0], [1.0], [0.0]])

    model = Root()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), check_model(model) as c:
            model(bad())
        assert [[name for name, _ in each] for each in rows(c.flags)] == [[], ["leaf"], ["Root"]]


def test_a_change_in_place_after_the_last_leaf_is_seen():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = nn.Identity()

        def forward(self, x):
            return self.leaf(x.clone()).div_(0.0)

    model = Root()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), check_model(model) as c:
            model(torch.ones(2, 1))
        assert rows(c.flags) == [[("Root", "INF")]] * 2


def test_what_the_last_leaf_returned_is_told_once():
    for mode in (torch.no_grad, torch.inference_mode):
        model = Net()
        with mode(), check_model(model) as c:
            model(bad())
        assert len(rows(c.flags)[1]) == 3


def test_a_model_that_is_a_leaf():
    model = nn.Linear(4, 4)
    with check_model(model) as c:
        model(bad())
        assert rows(c.flags) == [[], [("Linear", "NAN")], []]


def test_shared_modules_modules_called_often_and_containers():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ModuleDict({"a": nn.Tanh()})])
            self.again = self.layers[0]
            self.empty = nn.ModuleList()
            self.made = nn.ParameterList([torch.ones(1)])

        def forward(self, x):
            for _ in range(3):
                x = self.again(self.layers[1]["a"](self.layers[0](x)))
            return x

    model = Root()
    with check_model(model) as c:
        model(bad())
    assert list(c.locations) == ["layers.0", "layers.1.a"]
    assert rows(c.flags) == [[], [("layers.0", "NAN"), ("layers.1.a", "NAN")], []]


def test_parametrizations_are_no_leaves():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with check_model(model) as c:
        model(bad())  # 3 rows of weights, and 3 samples
    assert list(c.locations) == ["0"]
    assert flagged(c.flags) == [False, True, False]


def test_include_and_exclude():
    model = Net()
    assert list(check_model(model, include="[ae]*").locations) == ["enter", "act"]
    assert list(check_model(model, exclude=["act", "l*"]).locations) == ["enter"]
    with pytest.raises(FlagsError, match=r"check_model\(include=\.\.\.\): .* got 'encoder', which"):
        check_model(model, include=["enter", "encoder"])


def test_lazy_modules():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with check_model(model) as c:
        model(bad())
        model(bad())
    assert rows(c.flags) == [[], [("0", "NAN"), ("1", "NAN")], []]
    assert hooks_of(model) == []


def test_a_scripted_module_is_seen_where_it_goes_in_next(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        scripted = torch.jit.script(nn.Linear(4, 4))
    model = nn.Sequential(scripted, nn.ReLU())
    with check_model(model) as c:
        model(bad())
    assert "check_model: 0 is a RecursiveScriptModule, which takes no hooks" in caplog.text
    assert rows(c.flags) == [[], [("1", "NAN")], []]
    model = nn.Sequential(scripted)
    with check_model(model) as c:
        model(bad())
    assert flagged(c.flags) == [False, True, False]


# Locations


def test_two_models_have_locations_of_their_own():
    one, other = Net(), Net()
    a, b = check_model(one), check_model(other)
    assert set(a.locations.values()).isdisjoint(b.locations.values())
    one(bad())
    other(bad())
    names = [{each.location_name for each in flags.unpack(c.flags, 1)} for c in (a, b)]
    assert names[0].isdisjoint(names[1])
    assert all(name.endswith(("enter", "act", "leave")) for name in names[0] | names[1])


def test_a_model_checked_again_has_the_same_locations():
    model = Net()
    with check_model(model) as c:
        pass
    with check_model(model) as d, check_model(model) as e:
        assert c.locations == d.locations == e.locations


def test_a_cell_run_many_times_does_not_run_out_of_locations():
    for _ in range(400):
        model = Net()
        c = check_model(model)
    assert all(place for place in c.locations.values())


def test_a_tracked_model_keeps_its_names():
    class Outer(Net):
        pass

    model = tracked(Outer)()
    with check_model(model) as c:
        model(bad())
    f = err.new_t(3)
    for each in (model.enter, model.act, model.leave):
        f = err.push(f, err.NAN, each, where=torch.tensor([False, True, False]))
    assert torch.equal(c.flags, f)


def test_more_modules_than_locations():
    ErrorLocation.reset()
    model = nn.Sequential(*[nn.Sequential(nn.Identity(), nn.Identity()) for _ in range(600)])
    with check_model(model) as c:
        model(bad())
    assert max(c.locations.values()) <= ErrorLocation.MAX_LOCATION_ID
    assert c.locations["3.0"] == c.locations["3.1"] != c.locations["4.0"]
    assert flagged(c.flags) == [False, True, False]
    ErrorLocation.reset()


# Reading, calls in calls, failures


def test_before_a_call_there_is_one_sentence():
    with pytest.raises(RuntimeError, match="expected a call of the model in this thread before"):
        _ = check_model(Net()).flags


def test_a_failed_call_leaves_what_was_found_up_to_there():
    def fail(x):
        raise ValueError("broken")

    fails = Give(fail)
    model = nn.Sequential(nn.Identity(), fails, nn.Identity())
    with check_model(model) as c:
        with pytest.raises(ValueError, match="broken"):
            model(bad())
        assert rows(c.flags) == [[], [("0", "NAN")], []]
        fails.what = lambda x: x
        model(torch.ones(2, 4))
        assert flagged(c.flags) == [False, False]


def test_ctrl_c_leaves_the_next_call_clean():
    """torch runs no hook after a KeyboardInterrupt."""

    def interrupt(x):
        raise KeyboardInterrupt

    stops = Give(interrupt)
    model = nn.Sequential(nn.Identity(), stops)
    with check_model(model) as c:
        with pytest.raises(KeyboardInterrupt):
            model(bad())
        assert flagged(c.flags) == [False, True, False]
        stops.what = lambda x: x
        model(torch.ones(2, 4))
        assert flagged(c.flags) == [False, False]
        model[0](bad(rows=4))  # nor is a call still open
        assert flagged(c.flags) == [False, True, False, False]


def test_a_model_that_calls_itself_is_one_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = nn.Identity()

        def forward(self, x, again=True):
            x = self.leaf(x)
            return self(x * bad(value=INF), again=False) if again else x

    model = Twice()
    with check_model(model) as c:
        model(bad(row=0))
    assert rows(c.flags) == [[("leaf", "NAN")], [("leaf", "INF")], []]


def test_a_model_in_a_model_and_a_check_in_a_check():
    inner = Net()
    model = nn.Sequential(nn.Identity(), inner)
    outside, inside = check_model(model), check_model(inner)
    model(bad())
    assert flagged(outside.flags) == flagged(inside.flags) == [False, True, False]
    assert len(rows(outside.flags)[1]) == 4
    assert len(rows(inside.flags)[1]) == 3
    outside.remove()
    inner(torch.ones(2, 4))
    assert flagged(inside.flags) == [False, False]
    assert flagged(outside.flags) == [False, True, False]
    inside.remove()
    assert hooks_of(model) == []


def test_a_leaf_called_by_itself_is_a_call():
    model = Net()
    with check_model(model) as c:
        model.enter(bad(rows=2))
        assert rows(c.flags) == [[], [("enter", "NAN")]]


def test_a_checkpointed_leaf_runs_again_in_the_backward_pass_and_is_no_call():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            once = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False)
            return self.second(once)

    model = Root()
    with check_model(model) as c:
        model(bad()).sum().backward()
    assert [name for name, _ in rows(c.flags)[1]] == ["first", "second"]


def test_collect_adds_calls_up():
    model = Net()
    with check_model(model) as c:
        with c.collect():
            model(bad(row=0))
            model(torch.ones(3, 4))
            model.act(bad(row=2, value=INF))
        assert flagged(c.flags) == [True, False, True]
        stops = Give(lambda x: (model(x), 1 / 0))
        with pytest.raises(ZeroDivisionError), c.collect():
            stops(bad())
        assert flagged(c.flags) == [False, True, False]
        model(torch.ones(3, 4))
        assert flagged(c.flags) == [False] * 3


def test_threads_have_flags_of_their_own():
    model = Net()
    meet = threading.Barrier(4)
    wrong = []
    with check_model(model) as c:

        def work(number):
            meet.wait()
            for turn in range(30):
                row = (number + turn) % 5
                model(bad(rows=5, row=row))
                if flagged(c.flags) != [each == row for each in range(5)]:
                    wrong.append((number, turn))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert wrong == []
        with pytest.raises(RuntimeError, match="in this thread"):
            _ = c.flags


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_flags_are_ordinary_tensors_in_any_mode(mode):
    model = Net()
    with check_model(model) as c:
        with mode():
            model(bad())
        assert not c.flags.is_inference()
        before = c.flags.clone()
        err.push(c.flags, err.INF, "later")
        assert torch.equal(before, c.flags)


def test_every_carrier_and_a_configuration_of_its_own():
    for dtype in (torch.int64, torch.int32, torch.float64, torch.float32):
        config = ErrorConfig(num_slots=2, flag_dtype=dtype)
        model = Net()
        with check_model(model, config=config) as c:
            model(bad())
        assert c.flags.dtype == dtype
        assert flags.unpack_all(c.flags, config)[1][1].location_name.endswith("act")
        assert err.count_errors(c.flags, config).tolist() == [0, 2, 0]


# on_flag


def test_on_flag_is_called_after_calls_with_errors():
    events = []
    model = Net()
    with check_model(model, on_flag=events.append) as c:
        model(torch.ones(2, 4))
        model(bad())
        assert [(each.call, each.model) for each in events] == [(2, model)]
        assert torch.equal(events[0].flags, c.flags)
        with c.collect():
            model(bad())
            model(bad())
        assert [each.call for each in events] == [2, 3]


def test_on_flag_that_raises_ends_the_call_and_nothing_else():
    def stop(event):
        raise ArithmeticError(flags.repr(event.flags))

    model = Net()
    with check_model(model, on_flag=stop) as c:
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="3 errors: 3xNAN @"):
                model(bad())
            assert flagged(c.flags) == [False, True, False]
        assert model(torch.ones(2, 4)).shape == (2, 4)
        assert flagged(c.flags) == [False, False]
    assert hooks_of(model) == []


def test_only_sampled_calls_are_looked_at():
    calls = []
    model = Net()
    with check_model(model, on_flag=lambda event: calls.append(event.call), every=3):
        for _ in range(7):
            model(bad())
    assert calls == [1, 4, 7]
    calls.clear()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with check_model(model, on_flag=lambda event: calls.append(event.call), sample_rate=0.3):
        for _ in range(300):
            model(bad())
    assert 40 < len(calls) < 140  # 90 expected, standard deviation 8
    assert torch.equal(state, torch.get_rng_state())


def test_flags_are_read_for_on_flag_alone(monkeypatch):
    """On an accelerator reading waits for it."""
    read = []
    for name in ("__bool__", "item", "tolist", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _real=real, **k: read.append(1) or _real(self)
        )
    model = Net()
    with check_model(model) as c:
        model(torch.ones(3, 4))
        assert (read, c.flags.shape[0]) == ([], 3)
    with check_model(model, on_flag=print):
        model(torch.ones(3, 4))
    assert read


def test_flags_of_a_transform_are_read_in_it():
    model = Net()

    def flagged(x):
        model(x)
        return c.flags

    x = torch.ones(2, 3, 4)
    with check_model(model) as c:
        assert torch.vmap(flagged)(x).shape == (2, 3, 4)
        with pytest.raises(RuntimeError, match=r"inside torch\.vmap .* return \.flags from"):
            _ = c.flags


def test_a_torch_that_cannot_forget_is_told(monkeypatch, caplog):
    import torch._dynamo.eval_frame

    monkeypatch.delattr(torch._dynamo.eval_frame, "remove_from_cache")
    with caplog.at_level(logging.WARNING, "opguard"), check_model(Net()):
        pass
    assert all("torch._dynamo.reset()" in said for said in caplog.messages)
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"model": print}, TypeError, "expected a torch.nn.Module, got builtin_function_or_method"),
        ({"inf": "neg"}, FlagsError, r"expected inf to be \"both\".*or \"none\", got 'neg'"),
        ({"on_flag": 3}, TypeError, r"on_flag=\.\.\.\): expected a function of one FlagEvent"),
        ({"every": 0}, FlagsError, r"every=\.\.\.\): expected a whole number from 1 on, got 0"),
        ({"sample_rate": 0}, FlagsError, r"sample_rate=\.\.\.\): expected a share above 0"),
    ],
)
def test_arguments_that_mean_nothing_are_one_sentence(given, kind, said):
    model = Net()
    with pytest.raises(kind, match=said):
        check_model(**{"model": model} | given)
    assert hooks_of(model) == []


# Off again, copies


def test_remove_leaves_nothing():
    model = Net()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    c = check_model(model)
    y = model(bad())
    c.remove()
    c.remove()
    assert hooks_of(model) == []
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before
    found, gone = c.flags, [weakref.ref(model), weakref.ref(y)]
    gc.disable()
    try:
        del model, y, before
        assert [each() for each in gone] == [None, None]  # nobody held them, not even in a cycle
    finally:
        gc.enable()
    assert torch.equal(c.flags, found)


def test_a_checked_model_and_its_activations_go_by_themselves():
    model, kept = Net(), []
    c = check_model(model, on_flag=lambda event: None)
    hook = model.act.register_forward_hook(lambda m, args, y: kept.append(weakref.ref(y)))
    model(bad())
    hook.remove()
    gone = [weakref.ref(model), weakref.ref(c), *kept]
    gc.disable()
    try:
        assert kept[0]() is None  # the call is over
        del model, c, hook
        assert [each() for each in gone] == [None] * 3
    finally:
        gc.enable()


def test_only_its_own_hooks_come_off():
    model = Net()
    own = model.act.register_forward_hook(lambda *args: None)
    check_model(model).remove()
    assert len(hooks_of(model)) == 1
    own.remove()


def test_a_copy_and_a_pickle_are_not_checked():
    model = Net()
    c = check_model(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    model(torch.ones(2, 4))
    for each in copies:
        assert torch.equal(each(bad(row=0))[1:], model(bad(row=0))[1:])
        assert hooks_of(each) == []
        assert flagged(c.flags) == [True, False, False]
        model(torch.ones(2, 4))
    with pytest.raises(TypeError, match="expected to stay with the model it checks"):
        copy.deepcopy(c)
    c.remove()


def test_state_dicts_are_the_models_own():
    model = Net()
    expected = list(model.state_dict())
    with check_model(model):
        assert list(model.state_dict()) == expected
        Net().load_state_dict(model.state_dict())


# torch.compile, export, parallel modules


class Pair(nn.Module):
    """Returns flags from its forward."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.check = check_model(self.net)

    def forward(self, x):
        return self.net(x), self.check.flags


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("order", ["before", "after", "after a call", "on the compiled one"])
def test_compiled_flags_are_those_of_eager(order):
    model = Net()
    with check_model(model) as c:
        model(bad())
        expected = c.flags
    if order == "before":
        c = check_model(model)
    fast = compiled(model)
    if order == "after a call":
        fast(bad())
    if order != "before":
        c = check_model(model if order == "after" else fast)
    for row in (1, 0):
        fast(bad(row=row))
        assert torch.equal(c.flags[row], expected[1])
        assert flagged(c.flags) == [each == row for each in range(3)]
    c.remove()
    fast(torch.ones(2, 4))
    assert len(c.flags) == 3


@pytest.mark.usefixtures("_fresh")
def test_a_function_that_calls_a_checked_model_is_one_graph_for_all_sizes():
    model = Net()
    c = check_model(model)
    sizes = []

    def backend(graph, inputs):
        sizes.append([each for each in inputs if isinstance(each, int | torch.SymInt)])
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def step(x):
        return model(x) * 2, c.flags

    for size in (3, 5, 7, 9):
        _, f = step(bad(rows=size))
        assert flagged(f) == [each == 1 for each in range(size)]
        assert torch.equal(f, c.flags)
    assert len(sizes) == 2  # the second time the size becomes a symbol
    sizes.clear()
    fast = torch.compile(model, fullgraph=True, backend=backend)
    for size in (3, 5, 7, 9):
        fast(bad(rows=size))
        assert flagged(c.flags) == [each == 1 for each in range(size)]
    assert len(sizes) == 2
    _, f = step(bad(rows=9))
    other = threading.Thread(target=lambda: step(torch.ones(3, 4)))
    other.start()
    other.join()
    assert torch.equal(f, c.flags)


@pytest.mark.usefixtures("_fresh")
def test_a_compiled_model_of_another_shape_of_answers():
    """Batch-wide findings, nested answers and what comes after the last leaf, in one graph."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = Give(lambda x: {"all": [x.flatten(0, 1)]})
            self.attend = nn.MultiheadAttention(4, 1)

        def forward(self, x):
            x = self.flat(x)["all"][0].view(x.shape).transpose(0, 1)
            return self.attend(x, x, x)[0].sum((0, 2)) / 0

    model, x = Root(), torch.ones(3, 2, 4)
    x[1] = NAN
    with check_model(model) as c:
        model(x)
        expected = c.flags
        compiled(model)(x)
    assert torch.equal(c.flags, expected)
    assert [len(each) for each in rows(expected)] == [1, 2, 1]  # everybody's NaN at flat


@pytest.mark.usefixtures("_fresh")
def test_on_flag_of_a_compiled_model_and_inside_a_graph():
    events = []
    model = Net()
    check_model(model, on_flag=events.append)
    compiled(model)(bad())
    assert len(events) == 1
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the checked model itself"):
        compiled(lambda x: model(x) * 2)(bad())
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x: model(x) * 2, backend="aot_eager")(bad())  # in two graphs
    assert len(events) == 2


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_returns_its_flags(strict):
    pair = Pair()
    _, expected = pair(bad())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # strict: that the check has state
        program = torch.export.export(pair, (torch.ones(3, 4),), strict=strict)
    assert any("flags_check" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(bad())[1], expected)
    assert torch.equal(pair(bad())[1], expected)


def test_parallel_modules():
    """On one device both call the model itself; the names are those of the model."""
    model = Net()
    with check_model(model) as c:
        names = list(c.locations)
    wrapped = nn.DataParallel(model)
    with check_model(wrapped) as c:
        wrapped(bad())
        assert (list(c.locations), flagged(c.flags)) == (names, [False, True, False])
    wrapped.device_ids = [0, 1]
    with pytest.raises(FlagsError, match="got a DataParallel on 2 devices; check the module insi"):
        check_model(wrapped)
    script = (
        "import torch, torch.distributed as dist\n"
        "from opguard.flags import check_model, err\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())\n"
        "model = torch.nn.parallel.DistributedDataParallel(model)\n"
        "c = check_model(model)\n"
        "x = torch.ones(3, 4); x[1] = float('nan')\n"
        "model(x).sum().backward()\n"
        "print(list(c.locations), err.is_err(c.flags).tolist())\n"
        "dist.destroy_process_group()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "['0', '1'] [False, True, False]\n", ran.stderr[-2000:]


def test_replicas_return_their_own_flags():
    """What DataParallel does on several devices: a copy of the module in a thread for each."""
    pair = Pair()
    replicas = [pair._replicate_for_data_parallel() for _ in range(2)]
    for each in replicas:
        each.net = pair.net._replicate_for_data_parallel()
        for name, leaf in pair.net.named_children():
            setattr(each.net, name, leaf)
    found = [None, None]

    def work(number):
        found[number] = replicas[number](bad(row=number))[1]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert flagged(torch.cat(found)) == [True, False, False, False, True, False]


def test_checking_imports_no_dynamo():
    script = (
        "import sys, torch; from opguard.flags import check_model\n"
        "model = torch.nn.Linear(4, 4); c = check_model(model); model(torch.ones(1, 4)); c.flags\n"
        "c.remove(); print('torch._dynamo' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
