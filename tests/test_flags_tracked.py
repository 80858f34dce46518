"""What @tracked writes into a model's modules, and what it leaves out."""

from __future__ import annotations

import warnings
from types import MappingProxyType

import pytest
import torch
from torch import nn

from opguard.flags.extraction import LocationExtractor, extract_locations, location_from_stack
from opguard.flags.locations import ErrorLocation, resolve_location
from opguard.flags.tracked import assign_locations, tracked


@pytest.fixture(autouse=True)
def _fresh():
    ErrorLocation.reset()
    yield
    ErrorLocation.reset()


def name_of(location) -> str:
    return ErrorLocation.name(resolve_location(location))


def test_the_documented_block():
    @tracked
    class TransformerBlock(nn.Module):
        def __init__(self, dim, num_heads):
            super().__init__()
            self.attention = nn.MultiheadAttention(dim, num_heads)
            self.ffn = nn.Sequential(nn.Linear(dim, dim * 4), nn.GELU(), nn.Linear(dim * 4, dim))

    block = TransformerBlock(8, 2)
    assert block.attention._fx_path == "attention"
    assert block.ffn._fx_path == "ffn"
    assert [getattr(m, "_fx_path", None) for m in block.ffn] == ["ffn.0", None, "ffn.2"]
    assert not hasattr(block, "_fx_path")
    assert ErrorLocation.get_all_paths() == {
        "attention": 1,
        "attention.out_proj": 2,
        "ffn": 3,
        "ffn.0": 4,
        "ffn.2": 5,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert name_of(block.ffn[1]) == "ffn.1"  # only now has it an id
        assert name_of(block) == "TransformerBlock"
    assert ErrorLocation.count() == 7


def test_buffers_are_state_and_lazy_parameters_too():
    @tracked()
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2, affine=False)
            self.lazy = nn.LazyLinear(2)
            self.drop = nn.Dropout()

    Model()
    assert set(ErrorLocation.get_all_paths()) == {"norm", "lazy"}


@pytest.mark.parametrize("bad", [int, lambda: None, nn.Linear(1, 1)])
def test_other_things_are_refused(bad):
    with pytest.raises(TypeError, match=r"class derived from nn\.Module"):
        tracked(bad)
    with pytest.raises(TypeError, match=r"class derived from nn\.Module"):
        tracked()(bad)


def test_subclasses_are_tracked_whole():
    seen = []

    @tracked
    class Base(nn.Module):
        def __init_subclass__(cls, **kwargs):
            super().__init_subclass__(**kwargs)
            seen.append(cls.__name__)

        def __init__(self):
            super().__init__()
            self.first = nn.Linear(1, 1)

    class Sub(Base):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(1, 1)

    class Same(Base):
        pass

    model = Sub()
    assert [name_of(m) for m in (model.first, model.second, model)] == ["first", "second", "Sub"]
    assert ErrorLocation.count() == 3
    del model
    assert name_of(Same().first) == "first"
    assert seen == ["Sub", "Same"]


def test_a_failing_constructor_leaves_the_next_one_right():
    @tracked
    class Model(nn.Module):
        def __init__(self, fail):
            super().__init__()
            self.a = nn.Linear(1, 1)
            if fail:
                raise KeyError("no")

    with pytest.raises(KeyError):
        Model(True)
    assert Model(False).a._fx_path == "a"


def test_modules_that_refuse_attributes():
    class Stubborn(nn.Linear):
        def __setattr__(self, name, value):
            if name.startswith("_fx") or name.startswith("_opguard"):
                raise AttributeError(name)
            super().__setattr__(name, value)

    class Slotted(nn.Linear):
        __slots__ = ("extra",)

    class Frozen(nn.Linear):
        @property
        def __dict__(self):
            return MappingProxyType(vars(nn.Module)["__dict__"].__get__(self))

    @tracked
    class Model(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.a = kind(1, 1)

    for kind in (Stubborn, Slotted):
        model = Model(kind)
        assert (model.a._fx_path, name_of(model.a)) == ("a", "a")
        del model

    @tracked
    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.Linear(1, 1)
            layer.__class__ = Frozen
            self._modules["a"] = layer

    with pytest.warns(UserWarning, match="cannot be written to"):
        Closed()


def wide(groups: int, each: int) -> nn.Module:
    model = nn.Module()
    for g in range(groups):
        group = nn.Module()
        for i in range(each):
            group.add_module(f"m{i}", nn.Linear(1, 1, device="meta"))
        model.add_module(f"g{g}", group)
    return model


def test_too_many_modules_share_their_ancestors_ids():
    @tracked
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = wide(12, 100)
            self.head = nn.Linear(1, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Deep()
    inner = model.body.g3.m7
    assert inner._fx_path == "body.g3.m7"
    assert name_of(inner) == "body.g3"
    assert resolve_location("body.g3.m7") == resolve_location(inner)
    assert name_of(model.head) == "head"
    assert ErrorLocation.count() == 14
    assert max(ErrorLocation.get_all_ids()) == 14
    ErrorLocation.reset()
    assert name_of(inner) == "body.g3"


def test_weights_keep_what_matters_apart():
    @tracked(weights={"g3.*": 10.0})
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            for name, group in wide(12, 100).named_children():
                self.add_module(name, group)

    model = Deep()
    assert name_of(model.g3.m7) == "g3.m7"
    assert name_of(model.g4.m7) == "g4"


def test_exactly_as_many_modules_as_ids():
    model = wide(1, 1022)
    ids = assign_locations(model)
    assert sorted(ids.values()) == list(range(1, 1024))
    ErrorLocation.reset()
    flat = wide(0, 0)
    for i in range(1100):
        flat.add_module(f"m{i}", nn.Linear(1, 1, device="meta"))
    with pytest.warns(UserWarning, match="1100 modules"):
        ids = assign_locations(flat)
    assert ids["m1022"] == 1023
    assert ids["m1023"] == resolve_location(flat.m1023) == 0


def test_ids_are_the_same_in_every_run():
    first = assign_locations(wide(3, 4))
    ErrorLocation.reset()
    assert assign_locations(wide(3, 4)) == first
    assert list(first.values()) == list(range(1, 16))


def test_modules_of_anybody_can_be_assigned():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    assert assign_locations(model) == {"0": 1}
    assert assign_locations(model, every=True) == {"0": 1, "1": 2}
    model.append(nn.Linear(1, 1))
    assert assign_locations(model)["2"] == 3
    assert name_of(model[2]) == "2"


def test_forward_and_training_are_untouched():
    @tracked
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x):
            return self.a(x)

    model = Model()
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(torch.ones(1, 2)), model(torch.ones(1, 2)))
    assert name_of(graph.a) == "a"


def test_extracting_lists_every_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Dropout()))
    assert extract_locations(model) == {"0": 1, "1": 2, "2": 3, "2.0": 4}
    assert model[1]._fx_path == "1"
    assert name_of(model[2][0]) == "2.0"
    assert extract_locations(model, torch.ones(1, 2)) == {"0": 1, "1": 2, "2": 3, "2.0": 4}


def test_extracting_from_a_run():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    extractor = LocationExtractor(model)
    assert torch.equal(extractor.run(torch.ones(1, 2)), model(torch.ones(1, 2)))
    assert extractor.locations == {"0": 1, "1": 2}

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 1)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.warns(UserWarning, match=r"torch\.fx can trace"):
        assert extract_locations(Branching(), torch.ones(1, 1)) == {"a": 3}


def test_the_innermost_of_a_stack():
    stack = {"model": ("Model", nn.Module), "model.enc": ("Enc", nn.Module)}
    assert ErrorLocation.name(location_from_stack(stack)) == "model.enc"
    assert location_from_stack({}) == 0
