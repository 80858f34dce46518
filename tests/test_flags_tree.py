"""Which paths share ids in a LocationTree, and which stay apart in a weighted one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opguard.flags.errors import LocationError
from opguard.flags.locations import ErrorLocation
from opguard.flags.tree import LocationTree, WeightedLocationTree


@pytest.fixture(autouse=True)
def _fresh():
    ErrorLocation.reset()
    yield
    ErrorLocation.reset()


def built(paths, most=1024, tree=None):
    tree = tree or LocationTree(most)
    for path in paths:
        tree.add_path(path)
    tree.build_ids()
    return tree


def test_ids_never_leave_ten_bits():
    tree = built([f"g{g}.m{i}" for g in range(4) for i in range(500)])
    assert sorted(set(tree.path_to_id.values())) == [1, 2, 3, 4]
    assert tree.get_location("g2.m17") == tree.get_location("g2.m400") == 3
    tree = built([f"m{i}" for i in range(1024)])
    assert max(tree.path_to_id.values()) == 1023
    assert tree.get_location("m1023") == 0
    tree = built([f"m{i}" for i in range(50)], 10)
    assert sorted(set(tree.path_to_id.values())) == list(range(1, 11))
    tree = LocationTree()
    for i in range(100):
        tree.add_path(f"m{i}")
    tree.build_ids(start_id=1000)
    assert sorted(tree.path_to_id.values()) == list(range(1000, 1024))


def test_inner_paths_that_were_added_have_ids():
    tree = built(["enc", "enc.l0", "dec.l0.q"])
    assert [tree.get_location(p) for p in ("enc", "enc.l0", "dec.l0.q")] == [1, 2, 3]
    assert tree.get_location("dec.l0") == 0  # was not added
    assert tree.get_location("enc.l0.anything") == 2
    assert tree.get_location("encoder") == 0


def test_an_empty_tree_has_nothing():
    tree = built([])
    assert tree.count_leaves() == 0
    assert tree.path_to_id == {}
    assert tree.to_dict() == {}
    tree = built([""])
    assert tree.path_to_id == {}


def test_the_documented_cut():
    paths = [f"encoder.layer.{i}.attn.{p}" for i in range(3) for p in "qkv"]
    tree = built(paths, 3)
    assert [tree.stands_for(p) for p in paths[:2]] == ["encoder.layer.0.attn"] * 2
    tree = built([*paths, *(f"encoder.layer.{i}.mlp" for i in range(3))], 4)
    assert tree.stands_for("encoder.layer.0.attn.q") == "encoder.layer.0"
    assert tree.get_location("encoder.layer.0.attn.q") == tree.get_location("encoder.layer.0") == 1


def test_weights_change_what_is_kept():
    paths = [
        f"{part}.b{b}.m{i}" for part in ("encoder", "head") for b in range(3) for i in range(4)
    ]

    def names(tree):
        return {tree.stands_for(p) for p in paths}

    plain = built(paths, 14)
    heavy = WeightedLocationTree(14)
    heavy.set_weight("head.*", 10.0)
    heavy.set_weight("encoder.b*", 1.0)
    built(paths, tree=heavy)
    assert names(plain) == {f"{part}.b{b}" for part in ("encoder", "head") for b in range(3)}
    assert names(heavy) == {"encoder", *paths[12:]}
    assert heavy.path_to_id["head.b0.m1"] != heavy.path_to_id["head.b0.m2"]
    light = WeightedLocationTree(14)
    light.set_default_weight(5.0)
    light.set_weight("encoder.*", 0)
    assert names(built(paths, tree=light)) == {"encoder", *paths[12:]}
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight of at least 0"):
            light.set_weight("x", bad)


def test_equal_weights_are_no_weights():
    paths = [f"a{a}.b{b}.c{c}" for a in range(3) for b in range(3) for c in range(3)]
    weighted = WeightedLocationTree(10)
    weighted.set_default_weight(3.0)
    assert built(paths, tree=weighted).path_to_id == built(paths, 10).path_to_id


def test_the_longest_pattern_counts():
    tree = WeightedLocationTree(4)
    tree.set_weight("a*", 10.0)
    tree.set_weight("a.slow*", 0)
    built(["a.slow.x", "a.slow.y", "a.fast.x", "a.fast.y", "b"], tree=tree)
    assert tree.stands_for("a.fast.x") == "a.fast.x"
    assert tree.stands_for("a.slow.x") == "a"


def test_order_of_calls():
    tree = LocationTree()
    with pytest.raises(RuntimeError, match="build_ids"):
        tree.get_location("a")
    tree.add_path("a")
    tree.build_ids()
    tree.build_ids()
    with pytest.raises(RuntimeError, match="add_path"):
        tree.add_path("b")
    with pytest.raises(LocationError, match="start_id"):
        LocationTree().build_ids(0)
    with pytest.raises(LocationError, match="max_locations"):
        LocationTree(0)


def test_what_it_shows(capsys):
    tree = LocationTree()
    tree.add_path("enc.l0")
    tree.add_path("enc.l1")
    assert tree.root == {"enc": {"l0": {}, "l1": {}}}
    assert tree.count_leaves() == tree.count_leaves(tree.root) == 2
    assert tree.count_leaves({"l0": {}}) == 1
    assert tree.to_dict() == {"enc": {"l0": {"__id__": -1}, "l1": {"__id__": -1}}}
    tree.build_ids()
    assert tree.to_dict() == {"enc": {"l0": {"__id__": 1}, "l1": {"__id__": 2}}}
    assert repr(tree) == "LocationTree(2 leaves, max 1024, 2 ids)"
    tree.print_tree()
    assert capsys.readouterr().out == f"{tree}\n"
    assert "l1 [2]" in str(tree)
    assert repr(WeightedLocationTree(5)).startswith("WeightedLocationTree(0 leaves, max 5")


def test_registering_a_tree():
    ErrorLocation.register("somebody")
    tree = built([f"g{g}.m{i}" for g in range(2) for i in range(3)], 4)
    ids = tree.register_all()
    assert ids["g0"] == ids["g0.m1"] == ErrorLocation.get("g0") == 2
    assert ids["g1.m2"] == 3
    assert ErrorLocation.count() == 3


names = st.lists(st.sampled_from("abcde"), min_size=1, max_size=5).map(".".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(names, max_size=60), st.integers(1, 40), st.dictionaries(names, st.floats(0, 20)))
def test_every_path_has_its_own_id_or_that_of_an_ancestor(paths, most, weights):
    tree = WeightedLocationTree(most)
    for path, weight in weights.items():
        tree.set_weight(path + "*", weight)
    built(paths, tree=tree)
    assert len(set(tree.path_to_id.values())) <= most
    for path in paths:
        owner = tree.stands_for(path)
        if owner is None:
            assert tree.get_location(path) == 0
            assert len({p.partition(".")[0] for p in paths}) > most
        else:
            assert path == owner or path.startswith(owner + ".")
            assert tree.get_location(path) == tree.path_to_id[owner] >= 1
    if len(set(paths)) <= most:
        assert all(tree.stands_for(path) == path for path in paths)
