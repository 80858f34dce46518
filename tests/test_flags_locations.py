"""Names, their ids, and what id a module has: eager, compiled, exported, copied, collected."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from opguard import flags
from opguard.flags.config import ErrorConfig, get_config, set_config
from opguard.flags.errors import LocationError
from opguard.flags.locations import (
    ErrorLocation,
    clear_location_cache,
    clear_warn_cache,
    resolve_location,
)
from opguard.flags.tracked import assign_locations, tracked


@pytest.fixture(autouse=True, scope="module")
def _small_heap():
    """Each test collects, but not through what other files' tests have left."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fresh():
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # compiled code holds models
    gc.collect()
    ErrorLocation.reset()
    before = get_config()
    yield
    set_config(before)
    ErrorLocation.reset()


@tracked
class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(2, 2)
        self.act = nn.GELU()
        self.layer2 = nn.Linear(2, 2)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


def name_of(location) -> str:
    return ErrorLocation.name(resolve_location(location))


# --- the registry ---------------------------------------------------------------------------------


def test_ids_are_given_in_order_and_once():
    assert [ErrorLocation.register(n) for n in ("a", "b", "a", "c")] == [1, 2, 1, 3]
    assert ErrorLocation.get("b") == 2
    assert ErrorLocation.get("never") == 0 == ErrorLocation.UNKNOWN
    assert ErrorLocation.is_registered("a")
    assert not ErrorLocation.is_registered("never")
    assert ErrorLocation.get_all_paths() == {"a": 1, "b": 2, "c": 3}
    assert ErrorLocation.get_all_ids() == {0: "Unknown", 1: "a", 2: "b", 3: "c"}


def test_names_of_ids_that_are_free():
    assert [ErrorLocation.name(n) for n in (0, 7, 1023)] == [
        "Unknown",
        "Location_7",
        "Location_1023",
    ]
    assert ErrorLocation.path(7) == ""


def test_count_of_an_empty_registry_is_0_and_reset_forgets_modules():
    assert ErrorLocation.count() == 0
    first, second = Model(), Plain()
    ErrorLocation.register("x")
    assert ErrorLocation.count() == 3
    assert resolve_location(first.layer2) == 2
    with pytest.warns(UserWarning, match="Linear of none"):
        resolve_location(second.inner)
    ErrorLocation.reset()
    assert ErrorLocation.count() == 0
    ErrorLocation.register("other")
    ErrorLocation.register("another")
    assert name_of(first.layer2) == "layer2"  # not "another", which has the id it had
    assert resolve_location(first.layer2) == 3


def test_a_full_registry_gives_0_with_one_warning():
    for i in range(1023):
        assert ErrorLocation.register(f"n{i}") == i + 1
    with pytest.warns(UserWarning, match="all are taken"):
        assert ErrorLocation.register("late") == 0
    assert ErrorLocation.register("later") == 0
    assert ErrorLocation.count() == 1023
    assert ErrorLocation.register("n5") == 6
    set_config(ErrorConfig(strict_validation=True))
    with pytest.raises(LocationError, match="all are taken"):
        ErrorLocation.register("last")


def test_threads_get_one_id_a_name():
    out: list[list[int]] = [[] for _ in range(8)]
    start = threading.Barrier(8)

    def work(mine: list[int]) -> None:
        start.wait()
        mine += [ErrorLocation.register(f"t{i}") for i in range(200)]

    threads = [threading.Thread(target=work, args=(mine,)) for mine in out]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == out[0] for mine in out)
    assert sorted(out[0]) == list(range(1, 201))


# --- resolve_location -----------------------------------------------------------------------------


def test_what_a_location_may_be():
    assert resolve_location(None) == 0
    assert resolve_location(1023) == 1023
    assert resolve_location("enc") == resolve_location("enc") == 1
    for bad in (-1, 1024, 1 << 40):
        with pytest.raises(LocationError, match="0 to 1023"):
            resolve_location(bad)
    with pytest.raises(TypeError, match="an id, a string, a module or None, got list"):
        resolve_location([1])


def test_an_untracked_module_has_its_class_and_warns_once():
    model = Plain()
    with pytest.warns(UserWarning, match="@tracked"):
        assert name_of(model.inner) == "Linear"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert name_of(nn.Linear(1, 1)) == "Linear"
    clear_warn_cache()
    with pytest.warns(UserWarning, match="@tracked"):
        resolve_location(model.inner)
    set_config(ErrorConfig(strict_validation=True))
    with pytest.raises(LocationError, match="@tracked"):
        resolve_location(model.inner)


def test_clearing_the_cache_keeps_names_and_ids():
    model = Model()
    before = resolve_location(model.layer2)
    clear_location_cache()
    assert resolve_location(model.layer2) == before


def test_the_path_alone_is_enough():
    layer = nn.Linear(1, 1)
    layer._fx_path = "enc.q"
    assert name_of(layer) == "enc.q"


class Everything(nn.Module):
    """A tracked layer, a stateless one, the root, an untracked one, a string."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.outside = [Plain()]

    def forward(self, x):
        m = self.model
        places = (m.layer2, m.act, m, self.outside[0], "by hand", self.outside[0].inner)
        return [x + resolve_location(place) for place in places]


def places_of(results) -> list[str]:
    return [ErrorLocation.name(int(result.flatten()[0])) for result in results]


NAMES = ["layer2", "act", "Model", "Plain", "by hand", "Linear"]


@pytest.mark.parametrize("way", ["compiled", "strict", "nonstrict"])
@pytest.mark.filterwarnings("ignore:expected a module of a @tracked")
def test_what_is_first_seen_while_compiling_has_its_name(way):
    model, x = Everything(), torch.zeros(1, 1)
    if way == "compiled":
        run = torch.compile(model, backend="eager", fullgraph=True)
    else:
        run = torch.export.export(model, (x,), strict=way == "strict").module()
    first = run(x)
    assert places_of(first) == NAMES
    assert all(torch.equal(a, b) for a, b in zip(first, model(x), strict=True))


def test_a_graph_made_before_a_reset_is_not_used_after():
    model = Model()
    run = torch.compile(
        lambda x: x + resolve_location(model.layer2), backend="eager", fullgraph=True
    )
    assert int(run(torch.zeros(1))) == 2
    ErrorLocation.reset()
    ErrorLocation.register("first")
    ErrorLocation.register("second")
    assert int(run(torch.zeros(1))) == 3 == resolve_location(model.layer2)


@pytest.mark.filterwarnings("ignore:expected a module of a @tracked model")
@pytest.mark.parametrize("location", ["encoder", nn.Identity()], ids=["name", "class"])
def test_names_in_a_graph_are_looked_up_anew_after_a_reset(location):
    run = torch.compile(lambda x: x + resolve_location(location), backend="eager", fullgraph=True)
    assert int(run(torch.zeros(1))) == 1
    ErrorLocation.reset()
    ErrorLocation.register("first")
    assert int(run(torch.zeros(1))) == 2 == resolve_location(location)


@pytest.mark.filterwarnings("ignore:all 1023 locations", "ignore:expected room for")
def test_an_id_in_a_graph_is_never_another_modules():
    @tracked
    class WithoutState(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.act = nn.GELU()

    def fn(model, x):
        return x + resolve_location(model.act)

    run = torch.compile(fn, backend="eager", fullgraph=True)
    assert places_of([run(WithoutState(), torch.zeros(1))]) == ["act"]
    gc.collect()  # the model is gone, and its ids are given to others
    room = ErrorLocation.MAX_LOCATION_ID - ErrorLocation.count()
    for i in range(room + 1):
        assert ErrorLocation.register(f"other{i}")
    assert places_of([run(WithoutState(), torch.zeros(1))]) == ["act"]


def test_instances_of_one_class_are_told_apart_in_one_compiled_function():
    first, second = Model(), Model()

    def fn(model, x):
        return x + resolve_location(model.layer2)

    run = torch.compile(fn, backend="eager", fullgraph=True)
    assert places_of([run(first, torch.zeros(1)), run(second, torch.zeros(1))]) == [
        "layer2",
        "Model#2.layer2",
    ]


# --- several models -------------------------------------------------------------------------------


def test_two_models_with_equal_paths_have_ids_of_their_own():
    first, second, third = Model(), Model(), Model()

    @tracked
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Linear(1, 1)

    other = Other()
    assert [name_of(m.layer1) for m in (first, second, third, other)] == [
        "layer1",
        "Model#2.layer1",
        "Model#3.layer1",
        "Other.layer1",
    ]
    assert [name_of(m) for m in (first, second, third, other)] == [
        "Model",
        "Model#2",
        "Model#3",
        "Other",
    ]
    assert len({resolve_location(m.layer1) for m in (first, second, third, other)}) == 4
    assert second.layer1._fx_path == "layer1"


def test_ids_of_collected_models_are_used_again():
    for _ in range(1500):
        model = Model()
        assert name_of(model.layer2) == "layer2"
        del model
        gc.collect(0)
    assert ErrorLocation.count() == 2


def test_models_of_ever_new_paths_do_not_run_out():
    ErrorLocation.register("mine")
    stays = Model()
    kept = resolve_location(stays.layer2)

    def build(n):
        model = tracked(type("M", (nn.Sequential,), {}))()
        for i in range(200):
            model.add_module(f"m{n}_{i}", nn.PReLU(device="meta"))
        return assign_locations(model)

    for n in range(5):
        assert 0 not in build(n).values()
        gc.collect()
    with pytest.warns(UserWarning, match="models that are gone"):
        assert 0 not in build(5).values()
    assert ErrorLocation.get("mine") == 1
    assert (ErrorLocation.name(kept), resolve_location(stays.layer2)) == ("layer2", kept)
    assert max(ErrorLocation.get_all_ids()) <= 1023


def test_an_inner_model_takes_the_outer_path():
    @tracked
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(1, 1)

    @tracked
    class Outer(nn.Module):
        def __init__(self, enc) -> None:
            super().__init__()
            self.enc = enc
            self.dec = Inner()

    inner = Inner()
    assert name_of(inner.q) == "q"
    outer = Outer(inner)
    assert [name_of(m) for m in (outer.enc.q, outer.enc, outer.dec.q)] == ["enc.q", "enc", "dec.q"]
    assert inner.q._fx_path == "enc.q"
    assert name_of(Inner().q) == "q"  # free again


# --- copies ---------------------------------------------------------------------------------------


def test_copies_are_models_of_their_own():
    model = Model()
    twin = copy.deepcopy(model)
    assert name_of(twin.layer2) == "Model#2.layer2"
    assert name_of(model.layer2) == "layer2"
    loaded = pickle.loads(pickle.dumps(twin))
    assert name_of(loaded.layer2) == "Model#3.layer2"
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    del twin, loaded
    gc.collect()
    assert name_of(torch.load(buffer, weights_only=False).layer2) == "Model#2.layer2"


def test_ids_pickled_in_another_process_are_not_believed():
    layer = Model().layer2
    state = dict(layer.__dict__, _opguard_location=(12345, 999), _opguard_name="Model#9.layer2")
    layer.__dict__.update(state)
    assert name_of(layer) == "layer2"


def test_replicas_have_the_ids_of_their_model():
    model = Model()
    replica = model.layer2._replicate_for_data_parallel()
    assert resolve_location(replica) == resolve_location(model.layer2) != 0


def test_state_dicts_and_buffers_show_nothing():
    tracked_keys = set(Model().state_dict())
    assert tracked_keys == {"layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias"}
    model = Model()
    assert not list(model.buffers())
    assert [path for path, _ in model.named_modules()] == ["", "layer1", "act", "layer2"]


def test_the_package_hands_these_out():
    assert flags.ErrorLocation is ErrorLocation
    assert flags.tracked is tracked
